"""SDMGrad: MGDA drawn towards the mean, its weights followed by a few projected gradient steps instead of solved for.

    in every combination, ``steps`` times:  w ← Π_Δ(w - lr·velocity),  velocity ← momentum·velocity + K(w + λp)/s²
    c = (w + λp)/(1 + λ);  w is kept for the next combination

s is the mean of the gradients' norms, Π_Δ the projection on the simplex, p = 1/m or the preferences over their sum; the
velocity begins at zero. The stochastic method takes K between the gradients of two batches; here it is one batch's
Gramian, as with the other methods.

Source: Xiao et al., Direction-oriented Multi-objective Learning, NeurIPS 2023 (arXiv 2305.18409), algorithm 1; scaling,
momentum and the defaults from its official code.

Degenerate cases: zero gradients have weight 0, and the others' weights are projected on their simplex again; opposed
gradients end with the weights that cancel them, but for λ's part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastconfig.backends.problem import Problem, Vector, reference_of
from fastconfig.backends.rules import GramianRule, NonFinite
from fastconfig.methods.base import StatefulMethod, check_count, check_nonfinite, check_preferences
from fastconfig.validation import check_number


@reference_of("sdmgrad")
def _sdmgrad(problem: Problem, parameters: Sequence[float], operand: Vector | None) -> Vector:
    """parameters: λ, learning rate, momentum, steps. operand: (m,) the weights, updated."""
    assert operand is not None
    pull, rate, momentum, steps = parameters
    scaled = problem.gramian / problem.norms.mean() ** 2
    w = _on_simplex(operand[problem.index])
    velocity = np.zeros(problem.k)
    for _ in range(int(steps)):
        velocity = momentum * velocity + scaled @ (w + pull * problem.shares)
        w = _on_simplex(w - rate * velocity)
    operand[:] = 0.0
    operand[problem.index] = w
    return (w + pull * problem.shares) / (1.0 + pull)


def _on_simplex(w: Vector) -> Vector:
    """The nearest point with w ≥ 0 and Σ w = 1: all entries shifted by one number, and cut at 0."""
    w = w - w.max()  # changes nothing but that 1 is not lost beside large entries
    falling = np.sort(w)[::-1]
    shifts = (np.cumsum(falling) - 1.0) / np.arange(1, len(w) + 1)
    shift = shifts[np.flatnonzero(falling > shifts)[-1]]
    projected: Vector = np.maximum(w - shift, 0.0)
    return projected


class SDMGrad(StatefulMethod):
    """Stochastic direction-oriented MGDA: weights that follow MGDA's by a few steps in every combination.

    Args:
        lam: λ ≥ 0, how strongly the update is drawn to the mean.
        lr: the rate of the steps on the weights.
        momentum: of these steps, in [0, 1).
        steps: how many of them a combination.
        weights: preferences, m finite numbers from 0 on, not all zero; used over their sum. None for equal ones.
        nonfinite: what becomes of a gradient that holds inf or NaN: ``"propagate"``, ``"drop"`` or ``"raise"``, as in
            ``ConFIG``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: one outside its range; weights that are not that; an unknown nonfinite.

    Source: Xiao et al., NeurIPS 2023 (arXiv 2305.18409), algorithm 1.
    """

    source = "Xiao et al., NeurIPS 2023, arXiv 2305.18409"

    def __init__(
        self,
        lam: float = 0.3,
        lr: float = 10.0,
        momentum: float = 0.5,
        steps: int = 20,
        weights: Sequence[float] | Tensor | None = None,
        nonfinite: NonFinite = "propagate",
    ) -> None:
        numbers = (
            check_number("lam", lam, 0.0),
            check_number("lr", lr, 0.0, ends=False),
            check_number("momentum", momentum, 0.0, 1.0 - 2.0**-53),
            float(check_count("steps", steps)),
        )
        preferences = check_preferences(weights)
        super().__init__(
            GramianRule("sdmgrad", numbers, preferences, check_nonfinite(nonfinite)),
            lam=numbers[0],
            lr=numbers[1],
            momentum=numbers[2],
            steps=int(numbers[3]),
            weights=preferences,
        )

    def operand(self, m: int, device: torch.device) -> Tensor:
        """The weights (m,), which begin at the preferences."""
        state = self._kept((m,), device)
        if state is None:
            given = self._rule.preferences
            state = torch.ones(m) if given is None else torch.tensor(given, dtype=torch.float64)
            state = self._begun((state / state.sum()).to(device, torch.float64))
        return state
