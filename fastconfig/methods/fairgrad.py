"""FairGrad: α-fairness among the losses' decreases.

    K a = w·a^(-1/α),  a > 0;   c = a

α = 1 is Nash-MTL's solution, unbounded; α → 0 tends to the sum, α → ∞ to max-min fairness. The solution minimises
½aᵀKa - Σ w_i ∫a^(-1/α) da, which is convex.

Source: Ban & Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024 (arXiv 2402.15638), eq. 4; their code
approximates the solution by nonlinear least squares.

Degenerate cases: as Nash-MTL: opposed gradients have no solution: zero; duplicates share; zero gradients take no part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastconfig.backends.problem import Problem, Vector, reference_of
from fastconfig.backends.rules import GramianRule, NonFinite
from fastconfig.methods.base import GramianMethod, check_nonfinite, check_preferences
from fastconfig.methods.solvers import bargain
from fastconfig.validation import check_number


@reference_of("fairgrad", only_preferred=True)
def _fairgrad(problem: Problem, parameters: Sequence[float], operand: Vector | None) -> Vector:
    """parameters: α."""
    del operand
    beta = 1.0 / parameters[0]
    # With x = a·|g|: C x = w·|g|^(β-1)·x^(-β), where a common factor of the right hand side scales x alone.
    logarithms = np.log(problem.preferences) + (beta - 1.0) * np.log(problem.norms)
    x = bargain(problem.unit, np.exp(logarithms - logarithms.max()), beta)
    if x is None:
        return np.zeros(problem.k)
    weights: Vector = np.exp(logarithms.max() / (1.0 + beta)) * x / problem.norms
    return weights


class FairGrad(GramianMethod):
    """FairGrad: K a = a^(-1/α), exactly.

    Args:
        alpha: α from 0.05 to 10, how much a small decrease counts before a large one; the paper uses 1 and 2.
        weights: w, m finite numbers from 0 on, not all zero; None for 1 each.
        nonfinite: what becomes of a gradient that holds inf or NaN: ``"propagate"``, ``"drop"`` or ``"raise"``, as in
            ``ConFIG``.

    Raises:
        TypeError: alpha is no number.
        ValueError: alpha outside [0.05, 10], where powers leave float64; weights that are not that; an unknown
            nonfinite.

    Source: Ban & Ji, ICML 2024 (arXiv 2402.15638), eq. 4.
    """

    source = "Ban & Ji, ICML 2024, arXiv 2402.15638"

    def __init__(
        self,
        alpha: float = 1.0,
        weights: Sequence[float] | Tensor | None = None,
        nonfinite: NonFinite = "propagate",
    ) -> None:
        number = check_number("alpha", alpha, 0.05, 10.0)
        preferences = check_preferences(weights)
        rule = GramianRule("fairgrad", (number,), preferences, check_nonfinite(nonfinite))
        super().__init__(rule, alpha=number, weights=preferences)
