"""MGDA: the point of least norm in the convex hull of the gradients.

    w = argmin |Σ w_i g_i|² = wᵀKw  over  w ≥ 0, Σ w = 1;   c = w

Where the point is not the origin, -Σ w_i g_i decreases every loss, and by the same rate those with w_i > 0.

Source: Désidéri, C. R. Acad. Sci. Paris 2012; Sener & Koltun, NeurIPS 2018 (arXiv 1810.04650), eq. 3. They iterate
(Frank-Wolfe); here an active set finds the point itself.

Degenerate cases: where the hull holds the origin, as for opposed gradients, the parameters are Pareto stationary and
the answer is zero. A zero gradient takes no part: in the paper it makes every step zero. Duplicates share one weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastconfig.backends.problem import Problem, Vector, reference_of
from fastconfig.backends.rules import GramianRule, NonFinite
from fastconfig.methods.base import GramianMethod, check_nonfinite
from fastconfig.methods.solvers import least_norm_point


@reference_of("mgda")
def _mgda(problem: Problem, parameters: Sequence[float], operand: Vector | None) -> Vector:
    del parameters, operand
    weights, is_apart = least_norm_point(problem.unit, problem.norms)
    return weights if is_apart else np.zeros(problem.k)


class MGDA(GramianMethod):
    """The multiple-gradient descent algorithm: the least-norm point of the gradients' convex hull, exactly.

    Args:
        nonfinite: what becomes of a gradient that holds inf or NaN: ``"propagate"``, ``"drop"`` or ``"raise"``, as in
            ``ConFIG``.

    Raises:
        ValueError: an unknown nonfinite.

    Source: Sener & Koltun, NeurIPS 2018 (arXiv 1810.04650), eq. 3.
    """

    source = "Sener & Koltun, NeurIPS 2018, arXiv 1810.04650"

    def __init__(self, nonfinite: NonFinite = "propagate") -> None:
        super().__init__(GramianRule("mgda", (), None, check_nonfinite(nonfinite)))
