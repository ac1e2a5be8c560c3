"""GeometricMean: the losses' geometric mean, which no loss's scale can change (Chennupati et al., CVPRW 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastconfig.weightings.base import Weighting


class GeometricMean(Weighting):
    """Total ``(Π L_i)^(1/m)``. The weights are total/(m L_i).

    Source: Chennupati et al. 2019, arXiv 1904.08492 (geometric loss strategy). It has no state but ``weights``.

    Args:
        num_losses: m, or the m losses' names.

    Raises:
        TypeError, ValueError: see ``Weighting``.

    A loss of 0 makes the total 0 with weights 0: the derivative by that loss is infinite, but a loss that cannot fall
    further has no gradient to multiply. A negative loss makes the total NaN, as to raise would wait for the device.
    """

    def _total(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        zero = losses == 0
        mean = torch.where(zero, 1.0, losses).log().mean().exp()
        total = torch.where(zero.any(), 0.0 * mean, mean)
        return total, total.detach() / (self.num_losses * torch.where(zero, 1.0, losses.detach()))
