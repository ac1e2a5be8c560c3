"""GradNorm: weights that bring the losses' gradients to one norm, more for slow losses (Chen et al., ICML 2018)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastconfig.gradients.parameters import trained
from fastconfig.validation import check_number
from fastconfig.weightings.adam import Moments, adam
from fastconfig.weightings.base import Weighting, all_finite, ratio
from fastconfig.weightings.gradients import gradient_sizes


class GradNorm(Weighting):
    """Weights that descend ``Σ |G_i - Ḡ r_i^α|``, G_i = w_i |∇L_i|, by Adam. They sum to m.

    Ḡ is the mean of the G_i, and r_i the loss's inverse training rate: L_i(t)/L_i(0) over the mean of these. As G_i is
    linear in w_i, the gradient is ±|∇L_i| and takes no second backward pass. All weights are 1 until
    ``update(losses, parameters)`` is called, each step or every few; its first call sets L(0):

        weighting.update(losses, model.last_shared_layer.parameters())
        weighting(losses).backward()

    Source: Chen et al. 2018, arXiv 1711.02257, eq. 1 and 2, algorithm 1.

    Args:
        num_losses: m, or the m losses' names.
        alpha: α, how strongly slow losses are favoured, 0 or more.
        lr: Adam's learning rate of the weights.

    Raises:
        TypeError, ValueError: see ``Weighting``; an argument that cannot be.

    Weights are kept from falling below 0, where the paper's formula would maximise a loss. An update with a loss or a
    gradient that is not finite, or with a negative ratio r_i, is left out. Where L_i(0) was 0 its rate counts as 1.
    """

    initial: Tensor
    first: Tensor
    second: Tensor
    updates: Tensor

    def __init__(self, num_losses: int | Sequence[str], alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__(num_losses)
        check_number("alpha", alpha, 0.0)
        check_number("lr", lr, 0.0)
        self.alpha = alpha
        self.lr = lr
        self.register_buffer("initial", torch.zeros(self.num_losses, dtype=torch.float64))
        for name, value in Moments.zeros(self.num_losses)._asdict().items():
            self.register_buffer(name, value)

    def update(self, losses: Tensor | Sequence[Tensor], parameters: Iterable[Tensor]) -> None:
        """Improve the weights by one step, for one backward pass a loss; the graph is retained.

        Args:
            losses: as in a call, with their graph.
            parameters: those that the losses share; the paper takes the last shared layer, for speed.

        Raises:
            TypeError, ValueError: see ``Weighting``; a loss without a graph; no parameter that needs a gradient.
        """
        each = self._each(losses)
        norms = gradient_sizes(each, self.names, trained(parameters), (2,))[0]
        values = torch.stack(each).detach().double()
        initial = torch.where(self.updates == 0, values, self.initial)
        rates = ratio(values, initial)
        sizes = self.weights * norms
        target = sizes.mean() * ratio(rates, rates.mean()) ** self.alpha
        step, moments = adam((sizes - target).sign() * norms, Moments(self.first, self.second, self.updates), self.lr)
        weights = (self.weights + step).clamp(min=0.0)
        weights = weights * (self.num_losses / weights.sum())
        self._keep(
            all_finite(values, target, moments.second, weights),
            weights=weights,
            initial=initial,
            **moments._asdict(),
        )
