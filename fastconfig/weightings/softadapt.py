"""SoftAdapt: weights by how fast the losses rise or fall (Heydari, Thompson & Mehmood, 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastconfig.validation import check_number
from fastconfig.weightings.base import Weighting, all_finite


class SoftAdapt(Weighting):
    """Weights ``softmax(β s)``, s_i the rate of change of the loss from call to call. They sum to 1.

    Source: Heydari, Thompson & Mehmood 2019, arXiv 1912.12355, section 3.1, with its variants.

    Args:
        num_losses: m, or the m losses' names.
        beta: β; above 0 the losses that fall slowest get most weight, below 0 those that fall fastest.
        normalized: divide the rates by Σ |s_i|, so that the losses' scale does not matter.
        loss_weighted: multiply each weight by the loss's average over the calls that the rate is taken from, and
            divide by their sum.
        accuracy: order of the finite difference that gives the rate, from this call and as many before it, 1 to 8.

    Raises:
        TypeError, ValueError: see ``Weighting``; an argument that cannot be.

    Until there were ``accuracy + 1`` calls all weights are 1/m. A call with a loss that is not finite is left out.
    Without ``loss_weighted`` losses may be of any sign; with it they should not be negative, as weights then are.
    """

    history: Tensor
    calls: Tensor
    coefficients: Tensor

    def __init__(
        self,
        num_losses: int | Sequence[str],
        beta: float = 0.1,
        *,
        normalized: bool = False,
        loss_weighted: bool = False,
        accuracy: int = 1,
    ) -> None:
        super().__init__(num_losses)
        check_number("beta", beta, -math.inf)
        if isinstance(accuracy, bool) or not isinstance(accuracy, int):
            raise TypeError(f"accuracy must be an int, got {accuracy!r}")
        check_number("accuracy", accuracy, 1, 8)
        self.beta = beta
        self.normalized = normalized
        self.loss_weighted = loss_weighted
        self.weights.fill_(1.0 / self.num_losses)
        coefficients = torch.tensor(_backward_difference(accuracy), dtype=torch.float64)
        self.register_buffer("coefficients", coefficients, persistent=False)
        self.register_buffer("history", torch.zeros(accuracy + 1, self.num_losses, dtype=torch.float64))  # newest first
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def _observe(self, losses: Tensor) -> None:
        history = torch.cat([losses.unsqueeze(0), self.history[:-1]])
        rates = self.coefficients @ history
        if self.normalized:
            size = rates.abs().sum()
            rates = torch.where(size > 0, rates / size, 0.0)
        weights = torch.softmax(self.beta * rates, 0)
        if self.loss_weighted:
            weights = weights * history.mean(0)
            weights = weights / weights.sum()
        usable, calls = all_finite(losses), self.calls + 1
        known = calls >= len(self.coefficients)
        self._keep(usable & known & all_finite(weights), weights=weights)
        self._keep(usable, history=history, calls=calls)


def _backward_difference(order: int) -> list[float]:
    """Coefficients of f(0), f(-1) ... f(-order) in the difference that is f'(0) up to that order."""
    return [
        sum(1.0 / j for j in range(1, order + 1)),
        *((-1.0) ** j * math.comb(order, j) / j for j in range(1, order + 1)),
    ]
