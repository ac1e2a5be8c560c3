"""DynamicWeightAverage: more weight for the losses that fall slowly (Liu, Johns & Davison, CVPR 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastconfig.validation import check_number
from fastconfig.weightings.base import Weighting, all_finite, ratio


class DynamicWeightAverage(Weighting):
    """Weights ``m · softmax(r / T)``, r_i the ratio of the loss's averages over the last two epochs. They sum to m.

    Call ``step()`` at the end of every epoch, however long you define it. During the first two all weights are 1.

    Source: Liu, Johns & Davison 2019, arXiv 1803.10704, eq. 7.

    Args:
        num_losses: m, or the m losses' names.
        temperature: T above 0; the larger, the more alike are the weights. The paper's is 2.

    Raises:
        TypeError, ValueError: see ``Weighting``; temperature not a number above 0.

    A batch with a loss that is not finite is left out of the averages. Where a loss was 0 for an epoch its ratio counts
    as 1. Ratios of averages of different sign mean little; losses should keep theirs.
    """

    sums: Tensor
    batches: Tensor
    averages: Tensor
    epochs: Tensor

    def __init__(self, num_losses: int | Sequence[str], temperature: float = 2.0) -> None:
        super().__init__(num_losses)
        check_number("temperature", temperature, 0.0, ends=False)
        self.temperature = temperature
        m = self.num_losses
        self.register_buffer("sums", torch.zeros(m, dtype=torch.float64))  # of this epoch
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("averages", torch.zeros(2, m, dtype=torch.float64))  # of the last two epochs
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def step(self) -> None:
        """End an epoch: form the weights anew. An epoch without a finite batch does not count."""
        averages = torch.stack([self.averages[1], self.sums / self.batches])
        epochs = self.epochs + 1
        rates = ratio(averages[1], averages[0])
        weights = torch.where(epochs >= 2, self.num_losses * torch.softmax(rates / self.temperature, 0), 1.0)
        self._keep((self.batches > 0) & all_finite(weights), averages=averages, epochs=epochs, weights=weights)
        self.sums.zero_()
        self.batches.zero_()

    def _observe(self, losses: Tensor) -> None:
        self._keep(all_finite(losses), sums=self.sums + losses, batches=self.batches + 1)
