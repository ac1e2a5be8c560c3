"""GradDrop: of every column only the gradients of one sign, drawn by its share (arXiv 2010.06808, NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastconfig.backends import Backend
from fastconfig.backends.rows import Rows
from fastconfig.ops import is_recorded

_SEEDS = 2**63


class GradDrop:
    """Gradient Sign Dropout: the one method that is no rule on the Gramian, as it treats every parameter by itself.

    Where the losses' gradients of a parameter have both signs, the losses of one sign are masked. The positive sign is
    kept with the probability P = ½(1 + Σ g_i / Σ |g_i|), its share of the magnitude; then every gradient of that sign
    passes whole, of the others ``leak``: Σ (leak_i + (1 - leak_i)·kept_i) g_i (Chen et al. 2020, algorithm 1, lines 10
    to 15, with the identity for f). It is a sum of gradients, not a mean. One pass over the rows, and no memory beside
    them.

    Args:
        leak: what passes of a gradient of the masked sign: None for nothing, a number in [0, 1] for every loss, or m of
            them. Loss i with leak 1 is never masked, and with 1 for all losses the answer is their sum.
        generator: what the first seed is drawn from, once, here: a generator on the CPU; None for PyTorch's global
            one, so that ``torch.manual_seed`` before makes runs repeat. Each combination then takes the next seed.

    Raises:
        TypeError: leak is no number, or no vector of numbers.
        ValueError: a leak outside [0, 1]; a generator of another device than the CPU.

    The seed, one int64, lies on the gradients' device, where kernels read it and it is counted on: so nothing waits,
    and every replay of a captured CUDA graph, and every run of a compiled one, draws anew. The first use on a device
    copies it there, which waits; after capturing, use the method on that device alone. What is drawn depends on the
    seed and the parameter's place among all of the buffer's alone: it is the same on every backend, with any number of
    threads.

    A zero gradient has no influence. A gradient that holds inf or NaN makes the same element of the answer NaN, and
    nothing else. A single loss passes whole. Of complex gradients real and imaginary part are parameters of their own.
    A GradientBuffer's record has the Gramian, for one pass more, and NaN for weights: each parameter has its own.
    """

    source = "Chen et al., NeurIPS 2020, arXiv 2010.06808"

    def __init__(
        self, leak: float | Sequence[float] | Tensor | None = None, generator: torch.Generator | None = None
    ) -> None:
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator must be on the CPU, got one on {generator.device}; use torch.Generator()")
        values = _check_leak(leak)
        self._is_number = isinstance(values, float)
        numbers = [values] if isinstance(values, float) else values
        self._leak = None if numbers is None else torch.tensor(numbers, dtype=torch.float64)
        self._seed = torch.randint(_SEEDS - 1, (1,), generator=generator)

    def combine_rows(self, parts: Sequence[tuple[Backend, Rows, Tensor]], columns: Sequence[int] | None = None) -> None:
        """Combine the columns of all parts, and go on to the next seed.

        Args:
            parts: as of every ``StreamingMethod``.
            columns: the number of each part's first column in the whole model, on which its draws depend; None where
                the parts are the whole model, in order.

        Raises:
            ValueError: leaks for another number of losses.
            RuntimeError: a tracer other than torch.compile's would keep the seed in its graph as a constant.
        """
        if not is_dynamo_compiling() and is_recorded():
            raise RuntimeError(
                "GradDrop cannot be recorded by make_fx or a torch.export that is not strict: its seed would be a "
                "constant of the graph, and every run would mask the same gradients; use torch.compile"
            )
        if parts:  # a rank may have no column
            rows = parts[0][1]
            self._bring_to(rows.device, rows.m)
        if columns is None:
            columns, column = [], 0  # PyTorch 2.7 cannot compile itertools.accumulate from a number on
            for _, rows, _ in parts:
                columns.append(column)
                column += rows.n
        for (backend, rows, out), column in zip(parts, columns, strict=True):
            leak = None if self._leak is None else self._leak.to(rows.device)
            backend.graddrop(rows, leak, self._seed.to(rows.device), column, out)
        self._seed += 1

    def seed_on(self, device: torch.device) -> Tensor:
        """(1,) int64: the seed of the next combination, kept on a device, for ranks to have one."""
        self._seed = self._seed.to(device)
        return self._seed

    def state_dict(self) -> dict[str, int]:
        """The seed of the next combination. Reading it waits for the device."""
        return {"seed": int(self._seed)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a ``state_dict``, as does whatever graph was captured with this method.

        Raises:
            ValueError: the state holds no seed.
        """
        seed = state.get("seed")
        if isinstance(seed, bool) or not isinstance(seed, int) or not -_SEEDS <= seed < _SEEDS:
            raise ValueError(f"state must hold a seed, an integer of 64 bits, got {dict(state)}")
        self._seed.fill_(seed)

    def __repr__(self) -> str:
        if self._leak is None:
            return "GradDrop()"
        return f"GradDrop(leak={self._leak[0].item() if self._is_number else self._leak.tolist()})"

    def _bring_to(self, device: torch.device, m: int) -> None:
        """Keep seed and leaks where they are read."""
        if self._leak is not None and len(self._leak) != m:
            if not self._is_number:
                raise ValueError(f"leak has {len(self._leak)} entries for {m} losses; give a number, or one a loss")
            self._leak = self._leak[:1].expand(m).contiguous()
        if self._seed.device != device:
            self._seed = self._seed.to(device)
            self._leak = None if self._leak is None else self._leak.to(device)


def _check_leak(leak: float | Sequence[float] | Tensor | None) -> float | list[float] | None:
    if leak is None:
        return None
    values = leak.tolist() if isinstance(leak, Tensor) else leak
    numbers = list(values) if isinstance(values, Sequence) else [values]
    if not numbers or any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in numbers):
        raise TypeError(f"leak must be None, a number or a vector of numbers, one a loss, got {leak!r}")
    if not all(0 <= value <= 1 for value in numbers):
        raise ValueError(f"leak must lie in [0, 1], got {leak!r}; 0 masks, 1 lets everything pass")
    floats = [float(value) for value in numbers]
    return floats if isinstance(values, Sequence) else floats[0]
