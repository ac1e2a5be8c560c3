"""UPGrad: each gradient is projected on the cone of the directions that go against no loss; then they are averaged.

    x⁽ⁱ⁾ = argmin |g_i + Gᵀx|² over x ≥ 0;   c = Σ p_i (e_i + x⁽ⁱ⁾),   p = 1/m or the preferences over their sum

It is non-conflicting, and linear under scaling: scaling g_i scales only its own term.

Source: Quinton & Rey, Jacobian Descent for Multi-Objective Optimization, 2024 (arXiv 2406.16232), eq. 6.

Degenerate cases: exactly opposed gradients are projected to zero; duplicates share the correction; without conflict
c = p.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastconfig.backends.problem import Problem, Vector, reference_of
from fastconfig.backends.rules import GramianRule, NonFinite
from fastconfig.methods.base import GramianMethod, check_nonfinite, check_preferences
from fastconfig.methods.solvers import nonnegative


@reference_of("upgrad")
def _upgrad(problem: Problem, parameters: Sequence[float], operand: Vector | None) -> Vector:
    del parameters, operand
    total = np.array(problem.shares)
    for i in np.flatnonzero(problem.shares):
        correction = problem.norms[i] * nonnegative(problem.unit, -problem.unit[i]) / problem.norms
        total += problem.shares[i] * correction
    return total


class UPGrad(GramianMethod):
    """Unconflicting projection of gradients: each one projected on the dual cone, then their weighted mean.

    Args:
        weights: preferences, m finite numbers from 0 on, not all zero; used over their sum. None for equal ones.
        nonfinite: what becomes of a gradient that holds inf or NaN: ``"propagate"``, ``"drop"`` or ``"raise"``, as in
            ``ConFIG``.

    Raises:
        ValueError: weights that are not that; an unknown nonfinite.

    Source: Quinton & Rey, 2024 (arXiv 2406.16232), eq. 6.
    """

    source = "Quinton & Rey, 2024, arXiv 2406.16232"

    def __init__(self, weights: Sequence[float] | Tensor | None = None, nonfinite: NonFinite = "propagate") -> None:
        preferences = check_preferences(weights)
        rule = GramianRule("upgrad", (), preferences, check_nonfinite(nonfinite))
        super().__init__(rule, weights=preferences)
