"""GradVac: pairs of gradients are brought up to a cosine that was usual for them, not only out of conflict.

    g_i' ← g_i;  for j ≠ i in a drawn order:  φ = cos(g_i', g_j)
        if φ < φ̂_ij:  g_i' ← g_i' + |g_i'| (φ̂√(1 - φ²) - φ√(1 - φ̂²)) / (|g_j| √(1 - φ̂²)) · g_j
        φ̂_ij ← (1 - β) φ̂_ij + β φ
    g = Σ w_i g_i';  the targets φ̂ begin at 0, where the first step is PCGrad's

Source: Wang et al., Gradient Vaccine, ICLR 2021 (arXiv 2010.05874), eq. 4, 5 and algorithm 1.

Degenerate cases: a target of cosine 1 (duplicates for long) asks for no correction; of a gradient that has vanished, to
1e-6 of what it is made of, the cosine counts as 0; zero gradients leave the targets of their pairs alone, and so does a
step of which a gradient is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastconfig.backends.problem import NOTHING, Problem, Vector, reference_of
from fastconfig.backends.rules import GramianRule, NonFinite
from fastconfig.methods.base import (
    StatefulMethod,
    check_generator,
    check_nonfinite,
    check_preferences,
    draw,
)
from fastconfig.methods.pcgrad import order_of
from fastconfig.validation import check_number


@reference_of("gradvac")
def _gradvac(problem: Problem, parameters: Sequence[float], operand: Vector | None) -> Vector:
    """parameters: β. operand: (2, m, m), the targets, which are updated, and the keys of the orders."""
    assert operand is not None
    beta, (targets, keys) = parameters[0], operand
    gramian, norms = problem.gramian, problem.norms
    total = np.zeros(problem.k)
    for i in range(problem.k):
        coefficients = np.zeros(problem.k)
        coefficients[i] = 1.0
        for j in order_of(problem, keys, i):
            place = problem.index[i], problem.index[j]
            target = targets[place]
            square, terms = coefficients @ gramian @ coefficients, np.abs(coefficients) @ norms
            length = np.sqrt(square) if square > NOTHING * terms**2 else 0.0
            product = coefficients @ gramian[:, j]
            cosine = np.clip(product / (length * norms[j]), -1.0, 1.0) if length > 0 else 0.0
            open_ = 1.0 - target**2
            if cosine < target and open_ > NOTHING:
                turn = target * np.sqrt(1.0 - cosine**2) - cosine * np.sqrt(open_)
                coefficients[j] += length * turn / (norms[j] * np.sqrt(open_))
            targets[place] = (1.0 - beta) * target + beta * cosine
        total += problem.preferences[i] * coefficients
    return total


class GradVac(StatefulMethod):
    """Gradient vaccine: pairs of gradients are brought up to a moving average of their cosines.

    Args:
        beta: how much of a new cosine enters the target, in [0, 1]; the paper uses 0.01.
        generator: what the orders come from; None for torch's own on the gradients' device. One of another device
            works, and costs a copy of m² numbers.
        weights: of the changed gradients in the sum, m finite numbers from 0 on; None for 1 each.
        nonfinite: what becomes of a gradient that holds inf or NaN: ``"propagate"``, ``"drop"`` or ``"raise"``, as in
            ``ConFIG``.

    Raises:
        TypeError: beta is no number, or generator none.
        ValueError: beta outside [0, 1]; weights that are not that; an unknown nonfinite.

    Source: Wang et al., ICLR 2021 (arXiv 2010.05874), eq. 4, 5.
    """

    source = "Wang et al., ICLR 2021, arXiv 2010.05874"

    def __init__(
        self,
        beta: float = 0.01,
        generator: torch.Generator | None = None,
        weights: Sequence[float] | Tensor | None = None,
        nonfinite: NonFinite = "propagate",
    ) -> None:
        number = check_number("beta", beta, 0.0, 1.0)
        preferences = check_preferences(weights)
        rule = GramianRule("gradvac", (number,), preferences, check_nonfinite(nonfinite))
        super().__init__(rule, beta=number, weights=preferences)
        self.generator = check_generator(generator)

    @property
    def targets(self) -> Tensor | None:
        """(m, m) float64: the cosines that pairs are brought up to; None before the first combination."""
        return None if self._state is None else self._state[0]

    def operand(self, m: int, device: torch.device) -> Tensor:
        """The targets and the keys of the orders, (2, m, m); these drawn."""
        state = self._kept((2, m, m), device)
        if state is None:
            state = self._begun(torch.zeros(2, m, m, dtype=torch.float64, device=device))
        if m > 2:
            state[1] = draw((m, m), device, self.generator, normal=False)
        return state
