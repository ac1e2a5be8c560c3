"""ReLoBRaLo: relative loss balancing with random lookback (Bischof & Kraus, 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastconfig.validation import check_number
from fastconfig.weightings.base import Weighting, all_finite, ratio


class ReLoBRaLo(Weighting):
    """Weights by how much each loss fell since the last call and, now and then, since the first. They sum to m.

    With ``b(t, s)_i = m · softmax_i(L_i(t) / (T L_i(s)))`` and ρ, drawn anew at each call, 1 with probability E[ρ]
    and else 0: ``w(t) = α (ρ w(t-1) + (1 - ρ) b(t, 0)) + (1 - α) b(t, t-1)``. As in the authors' code w(0) = 1 and
    w(1) = b(1, 0).

    Source: Bischof & Kraus 2021, arXiv 2110.09813.

    Args:
        num_losses: m, or the m losses' names.
        alpha: α, how much of the past is kept, 0 to 1.
        temperature: T above 0; the larger, the more alike are the weights.
        expected_rho: E[ρ], 0 to 1: ρ = 0 looks back to the first call.
        generator: what ρ is drawn from; by default one on the CPU, seeded from torch's. Its state is in ``state_dict``.
            To capture calls in a CUDA graph, give one on the device that is registered with the graph.

    Raises:
        TypeError, ValueError: see ``Weighting``; an argument that cannot be.

    A call with a loss that is not finite is left out, but draws ρ. Where an earlier loss was 0 its ratio counts as 1.
    Losses should keep their sign.
    """

    initial: Tensor
    previous: Tensor
    calls: Tensor

    def __init__(
        self,
        num_losses: int | Sequence[str],
        alpha: float = 0.999,
        temperature: float = 0.1,
        expected_rho: float = 0.99,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_losses)
        check_number("alpha", alpha, 0.0, 1.0)
        check_number("temperature", temperature, 0.0, ends=False)
        check_number("expected_rho", expected_rho, 0.0, 1.0)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
        self.alpha = alpha
        self.temperature = temperature
        self.expected_rho = expected_rho
        self.generator = generator or _seeded_generator()
        self.register_buffer("initial", torch.zeros(self.num_losses, dtype=torch.float64))
        self.register_buffer("previous", torch.zeros(self.num_losses, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def get_extra_state(self) -> Tensor:
        """For ``state_dict``: where the generator stands."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """From ``load_state_dict``."""
        self.generator.set_state(state.cpu())

    def _observe(self, losses: Tensor) -> None:
        source = self.generator.device
        drawn = torch.rand((), generator=self.generator, dtype=torch.float64, device=source) < self.expected_rho
        rho = drawn.to(losses.device, non_blocking=True)
        since_first, since_last = self._balance(losses, self.initial), self._balance(losses, self.previous)
        kept = torch.where(rho, self.weights, since_first)
        later = self.alpha * kept + (1.0 - self.alpha) * since_last
        weights = torch.where(self.calls == 0, 1.0, torch.where(self.calls == 1, since_first, later))
        usable, initial = all_finite(losses), torch.where(self.calls == 0, losses, self.initial)
        self._keep(usable & all_finite(weights), weights=weights)
        self._keep(usable, initial=initial, previous=losses, calls=self.calls + 1)

    def _balance(self, losses: Tensor, earlier: Tensor) -> Tensor:
        return self.num_losses * torch.softmax(ratio(losses, earlier) / self.temperature, 0)


def _seeded_generator() -> torch.Generator:
    """A generator that follows from torch.manual_seed, and that no other drawing disturbs afterwards."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), dtype=torch.int64, device="cpu")))
