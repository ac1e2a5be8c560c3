"""Weights against the gradients' magnitude: c_i ∝ w_i·|g_i|^(-power), of the sum that w has.

With power 1 every gradient enters with the same length; power 0 is the weighted sum.

Degenerate cases: opposed gradients of equal weight cancel to rounding. The sum is over the gradients that are not zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fastconfig.backends.problem import Problem, Vector, reference_of
from fastconfig.backends.rules import GramianRule, NonFinite
from fastconfig.methods.base import GramianMethod, check_nonfinite, check_preferences
from fastconfig.validation import check_number


@reference_of("inverse_norm", only_preferred=True)
def _inverse_norm(problem: Problem, parameters: Sequence[float], operand: Vector | None) -> Vector:
    """parameters: the power."""
    del operand
    power = parameters[0]
    # Relative to the norm whose factor is largest, so that no power overflows.
    reference = problem.norms.min() if power >= 0 else problem.norms.max()
    weights: Vector = problem.preferences * (reference / problem.norms) ** power
    weights *= problem.preferences.sum() / weights.sum()
    return weights


class InverseNorm(GramianMethod):
    """Weights that take away the gradients' magnitudes: c_i ∝ w_i·|g_i|^(-power), Σ c = Σ w.

    Args:
        power: 1 gives every gradient the same length, 0 the weighted sum; any finite number.
        weights: w, m finite numbers from 0 on, not all zero; None for 1 each.
        nonfinite: what becomes of a gradient that holds inf or NaN: ``"propagate"``, ``"drop"`` or ``"raise"``, as in
            ``ConFIG``.

    Raises:
        TypeError: power is no number.
        ValueError: power is not finite; weights that are not that; an unknown nonfinite.
    """

    source = "re-weighting by gradient magnitude"

    def __init__(
        self,
        power: float = 1.0,
        weights: Sequence[float] | Tensor | None = None,
        nonfinite: NonFinite = "propagate",
    ) -> None:
        preferences = check_preferences(weights)
        number = check_number("power", power, -math.inf)
        super().__init__(
            GramianRule("inverse_norm", (number,), preferences, check_nonfinite(nonfinite)),
            power=number,
            weights=preferences,
        )
