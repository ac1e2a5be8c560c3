"""The methods' parameters as backends read them: validated, immutable, hashable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

LengthName = Literal["projection", "minimum", "maximum", "harmonic", "arithmetic", "geometric"]
LengthModel = Callable[[Tensor, Tensor], "Tensor | float"]
NonFinite = Literal["propagate", "drop", "raise"]

LENGTH_NAMES: tuple[str, ...] = get_args(LengthName)
NONFINITE_NAMES: tuple[str, ...] = get_args(NonFinite)


@dataclass(frozen=True)
class ConFIGRule:
    """ConFIG's parameters, validated: what a backend needs besides the Gramian."""

    direction: tuple[float, ...] | None
    length: str | int | LengthModel
    rtol: float
    nonfinite: str

    def __hash__(self) -> int:
        """Computed once: every combination looks something up by its rule."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.direction, self.length, self.rtol, self.nonfinite))

    def __getstate__(self) -> dict[str, object]:
        """The parameters alone: what is kept beside them holds in this process."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def direction_tensor(self, gramian: Tensor) -> Tensor:
        """ŵ as an (m,) float64 tensor beside the Gramian."""
        if self.direction is None:
            return gramian.new_ones(len(gramian))
        return gramian.new_tensor(self.direction)

    def check_losses(self, m: int) -> None:
        """Raise ValueError unless the rule fits m losses."""
        if self.direction is not None and len(self.direction) != m:
            raise ValueError(f"weights has {len(self.direction)} entries for {m} losses; pass one weight a loss")
        if isinstance(self.length, int) and not -m <= self.length < m:
            raise ValueError(f"length={self.length} tracks a loss that does not exist; pass 0 to {m - 1}")

    def length_of(self, norms: Tensor, cosines: Tensor) -> Tensor:
        """L from the rows' norms (m,) and their cosines with the direction (m,); rows of norm 0 take no part."""
        if callable(self.length):
            return _one_number(self.length(norms, cosines), norms)
        if self.length == "projection":
            return norms @ cosines
        return self._tracked_norm(norms) * cosines.sum()

    def _tracked_norm(self, norms: Tensor) -> Tensor:
        """The norm that every gradient is rescaled to before its projection is taken (ConFIG paper, appendix A.3)."""
        active = norms > 0
        count = active.sum()
        if isinstance(self.length, int):
            return norms[self.length]
        if self.length == "minimum":
            return torch.where(active, norms, torch.inf).min().nan_to_num(posinf=0.0)
        if self.length == "maximum":
            return norms.max()
        if self.length == "arithmetic":
            return norms.sum() / count.clamp(min=1)
        if self.length == "harmonic":
            return count / torch.where(active, 1.0 / norms, 0.0).sum().clamp(min=torch.finfo(norms.dtype).tiny)
        # The logarithm keeps the product of many norms from leaving float64's range.
        return torch.where(active, norms, 1.0).log().sum().div(count.clamp(min=1)).exp() * (count > 0)


@dataclass(frozen=True)
class GramianRule:
    """A method but ConFIG, validated: what a backend needs besides the Gramian.

    Attributes:
        kind: the method, by the name of its file in ``fastconfig.methods``.
        parameters: its numbers, in the order that the file lists.
        preferences: one finite number a loss; None for equal ones.
        nonfinite: as ``ConFIGRule``.
    """

    kind: str
    parameters: tuple[float, ...]
    preferences: tuple[float, ...] | None
    nonfinite: str

    def __hash__(self) -> int:
        """Computed once, as ConFIGRule's."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.parameters, self.preferences, self.nonfinite))

    def __getstate__(self) -> dict[str, object]:
        """As ConFIGRule's."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def check_losses(self, m: int) -> None:
        """Raise ValueError unless the rule fits m losses."""
        if self.preferences is not None and len(self.preferences) != m:
            raise ValueError(f"weights has {len(self.preferences)} entries for {m} losses; pass one weight a loss")
        if self.kind == "priority" and len(self.parameters) not in (0, m):
            raise ValueError(f"order has {len(self.parameters)} entries for {m} losses; name every loss once")

    def operand_shape(self, m: int) -> tuple[int, ...]:
        """Of what the method takes besides the Gramian of m losses, where it takes something."""
        return {"gradvac": (2, m, m), "pcgrad": (m, m)}.get(self.kind, (m,))


Rule = ConFIGRule | GramianRule


def _one_number(length: object, norms: Tensor) -> Tensor:
    """What a callable length model returned, as a 0-d tensor beside the norms."""
    if not isinstance(length, (Tensor, int, float)):
        raise TypeError(f"length must return a number or a tensor of one element, got {length!r}")
    value = torch.as_tensor(length, dtype=norms.dtype, device=norms.device)
    if value.numel() != 1:
        raise ValueError(f"length must return one number, got shape {tuple(value.shape)}; reduce it, e.g. .mean()")
    return value.reshape(())


class NonFiniteError(FloatingPointError):
    """A gradient is not finite, and the method raises on it.

    Attributes:
        row: the first such gradient's. Who knows the losses' names says so by ``losses.Losses.with_name``.
    """

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row

    def __str__(self) -> str:
        return nonfinite_message(f"loss {self.row}")


def nonfinite_message(loss: str) -> str:
    """What is said of the first loss whose gradient is not finite."""
    return (
        f"the squared norm of the gradient of {loss} is inf or NaN; "
        "skip this step, or use nonfinite='drop' or 'propagate'"
    )
