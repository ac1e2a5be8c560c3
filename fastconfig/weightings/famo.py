"""FAMO: fast adaptive multitask optimization, all losses falling at one rate (Liu, Feng, Stone & Liu, NeurIPS 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastconfig.validation import check_number
from fastconfig.weightings.adam import Moments, adam
from fastconfig.weightings.base import Weighting, all_finite

EPSILON = 1e-8
"""Added to a loss before its logarithm, as in the authors' code."""


class FAMO(Weighting):
    """Total ``c Σ z_i log(L_i - b_i + ε)``, z = softmax of logits that follow from how the losses changed in a step.

    c, a constant to autograd, makes the weights ``c z_i / (L_i - b_i + ε)`` sum to 1. After the optimizer's step call
    ``update`` with the losses of the same batch, which need no graph:

        weighting(losses).backward()
        optimizer.step()
        with torch.no_grad():
            weighting.update(losses_of(batch))

    **The total is to be backpropagated, not watched**: c grows as the losses fall, so c Σ z_i log L_i rises once they
    are below 1, and ``ReduceLROnPlateau`` on it would stop the training. Give it the losses' mean, or that of their
    logarithms.

    Source: Liu, Feng, Stone & Liu 2023, arXiv 2306.03792, algorithm 1.

    Args:
        num_losses: m, or the m losses' names.
        lower_bounds: b, m finite numbers that the losses stay above; zeros by default.
        lr: Adam's learning rate of the logits.
        weight_decay: pulls the logits to 0; the paper's γ.

    Attributes:
        logits: (m,) float64. No parameter: the model's optimizer must not touch them.

    Raises:
        TypeError, ValueError: see ``Weighting``; an argument that cannot be.

    A loss under its bound makes the total NaN, as to raise would wait for the device; an update with such a loss, or
    with one that is not finite, is left out.
    """

    logits: Tensor
    lower_bounds: Tensor
    before: Tensor
    first: Tensor
    second: Tensor
    updates: Tensor

    def __init__(
        self,
        num_losses: int | Sequence[str],
        lower_bounds: Sequence[float] | None = None,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
    ) -> None:
        super().__init__(num_losses)
        check_number("lr", lr, 0.0)
        check_number("weight_decay", weight_decay, 0.0)
        m = self.num_losses
        bounds = [0.0] * m if lower_bounds is None else list(lower_bounds)
        if len(bounds) != m:
            raise ValueError(f"lower_bounds must hold {m} numbers, one a loss, got {len(bounds)}")
        for i, bound in enumerate(bounds):
            check_number(f"lower_bounds[{i}]", bound, -math.inf)
        self.lr = lr
        self.weight_decay = weight_decay
        self.weights.fill_(1.0 / m)
        self.register_buffer("logits", torch.zeros(m, dtype=torch.float64))
        self.register_buffer("lower_bounds", torch.tensor(bounds, dtype=torch.float64))
        self.register_buffer("before", torch.full((m,), math.nan, dtype=torch.float64))  # of the last call, as logs
        for name, value in Moments.zeros(m)._asdict().items():
            self.register_buffer(name, value)

    @torch.no_grad()
    def update(self, losses: Tensor | Sequence[Tensor]) -> None:
        """Improve the logits by one step of Adam, from what became of the losses since the last call.

        Where there was no call yet, nothing changes.

        Args:
            losses: as in a call, of the same batch, after the model's step.

        Raises:
            TypeError, ValueError: see ``Weighting``.
        """
        fallen = self.before - self._shifted(self._stacked(losses).double()).log()
        z = torch.softmax(self.logits, 0)
        gradient = z * (fallen - (z * fallen).sum()) + self.weight_decay * self.logits
        step, moments = adam(gradient, Moments(self.first, self.second, self.updates), self.lr)
        self._keep(all_finite(moments.second, step), logits=self.logits + step, **moments._asdict())

    def _total(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        shifted = self._shifted(losses)
        logs = shifted.log()
        if self.training:
            self.before.copy_(logs.detach())
        z = torch.softmax(self.logits, 0)
        scale = 1.0 / (z / shifted).sum().detach()
        return scale * (z * logs).sum(), scale * z / shifted

    def _shifted(self, losses: Tensor) -> Tensor:
        return losses - self.lower_bounds + EPSILON
