"""UncertaintyWeighting: each loss by the uncertainty learned for its task (Kendall, Gal & Cipolla, CVPR 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastconfig.weightings.base import Weighting


class UncertaintyWeighting(Weighting):
    """Total ``Σ ½ exp(-s_i) L_i + ½ s_i`` with s_i = log σ_i² learned beside the model.

    Give ``weighting.parameters()`` to the optimizer, too. The weights are ½ exp(-s_i); a loss that stays at L_i has its
    best s_i at log L_i, where its weight is 1/(2 L_i).

    The total falls while the s_i are learned, also where no loss does: watch the losses themselves.

    Source: Kendall, Gal & Cipolla 2018, arXiv 1705.07115, eq. 7; for a cross-entropy pass 2·L, which makes it eq. 10.

    Args:
        num_losses: m, or the m losses' names.

    Attributes:
        log_variances: (m,) parameter s, of torch's default dtype, zeros at first.

    Raises:
        TypeError, ValueError: see ``Weighting``.

    A loss that is not finite gives its s_i a zero gradient, the total being non-finite all the same. A loss that is
    negative for good has no best s_i: it falls without end.
    """

    def __init__(self, num_losses: int | Sequence[str]) -> None:
        super().__init__(num_losses)
        self.log_variances = nn.Parameter(torch.zeros(self.num_losses))
        self.weights.fill_(0.5)

    def _total(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        learned = torch.where(losses.isfinite(), self.log_variances, self.log_variances.detach()).double()
        weights = 0.5 * (-learned).exp()
        return (weights * losses + 0.5 * learned).sum(), weights
