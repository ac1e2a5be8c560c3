"""DualProj: the mean gradient, projected on the cone of the directions that go against no loss.

    x = argmin |Gᵀ(p + x)|² over x ≥ 0;   c = p + x,   p = 1/m or the preferences over their sum

Source: Lopez-Paz & Ranzato, Gradient Episodic Memory, NeurIPS 2017 (arXiv 1706.08840), eq. 8 to 11; by this name in
Quinton & Rey, Jacobian Descent, 2024 (arXiv 2406.16232), section 5.

Degenerate cases: opposed gradients leave what of the mean stands at right angles to them; duplicates share the
correction; without conflict c = p.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastconfig.backends.problem import Problem, Vector, reference_of
from fastconfig.backends.rules import GramianRule, NonFinite
from fastconfig.methods.base import GramianMethod, check_nonfinite, check_preferences
from fastconfig.methods.solvers import nonnegative


@reference_of("dualproj")
def _dualproj(problem: Problem, parameters: Sequence[float], operand: Vector | None) -> Vector:
    del parameters, operand
    against = -problem.gramian @ problem.shares / problem.norms
    return problem.shares + nonnegative(problem.unit, against) / problem.norms


class DualProj(GramianMethod):
    """The weighted mean of the gradients, projected on the directions that go against no loss.

    Args:
        weights: preferences, m finite numbers from 0 on, not all zero; used over their sum. None for equal ones.
        nonfinite: what becomes of a gradient that holds inf or NaN: ``"propagate"``, ``"drop"`` or ``"raise"``, as in
            ``ConFIG``.

    Raises:
        ValueError: weights that are not that; an unknown nonfinite.

    Source: Lopez-Paz & Ranzato, NeurIPS 2017 (arXiv 1706.08840), eq. 8 to 11.
    """

    source = "Lopez-Paz & Ranzato, NeurIPS 2017, arXiv 1706.08840 (GEM)"

    def __init__(self, weights: Sequence[float] | Tensor | None = None, nonfinite: NonFinite = "propagate") -> None:
        preferences = check_preferences(weights)
        rule = GramianRule("dualproj", (), preferences, check_nonfinite(nonfinite))
        super().__init__(rule, weights=preferences)
