"""LearningRateAnnealing: the losses of a PINN, their gradients as large as the residual's (Wang et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastconfig.gradients.parameters import trained
from fastconfig.validation import check_number
from fastconfig.weightings.base import Weighting
from fastconfig.weightings.gradients import gradient_sizes


class LearningRateAnnealing(Weighting):
    """Weights ``λ_i ← (1 - α) λ_i + α max|∇L_r| / mean|∇L_i|``, that of the reference loss L_r staying 1.

    All weights are 1 until ``update(losses, parameters)`` is called, every few steps as in the paper:

        weighting.update(losses, model.parameters())
        weighting(losses).backward()

    Source: Wang, Teng & Perdikaris 2021, SIAM J. Sci. Comput. 43(5), arXiv 2001.04536, algorithm 1.

    Args:
        num_losses: m, or the m losses' names.
        reference: r, index or name of the loss that the others are to match, the residual of the equation.
        alpha: α, how much of a new ratio enters, 0 to 1. 0.1 is what the authors' code does.

    Raises:
        TypeError, ValueError, IndexError: see ``Weighting``; reference is no loss; alpha not in [0, 1].

    A weight whose new value is not finite stays as it is: a loss with a zero gradient, or one that is not finite.
    """

    def __init__(self, num_losses: int | Sequence[str], reference: int | str = 0, alpha: float = 0.1) -> None:
        super().__init__(num_losses)
        check_number("alpha", alpha, 0.0, 1.0)
        self.reference = self._losses.index(reference)
        self.alpha = alpha

    def update(self, losses: Tensor | Sequence[Tensor], parameters: Iterable[Tensor]) -> None:
        """Form the weights anew, by one backward pass a loss; the graph is retained.

        Args:
            losses: as in a call, with their graph.
            parameters: those that the losses share.

        Raises:
            TypeError, ValueError: see ``Weighting``; a loss without a graph; no parameter that needs a gradient.
        """
        shared = trained(parameters)
        sums, largest = gradient_sizes(self._each(losses), self.names, shared, (1, math.inf))
        n = sum(parameter.numel() for parameter in shared)
        weights = torch.lerp(self.weights, largest[self.reference] / (sums / n), self.alpha)
        others = torch.arange(self.num_losses, device=weights.device) != self.reference
        self._keep(others & weights.isfinite(), weights=weights)
