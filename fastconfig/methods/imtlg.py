"""IMTL-G: the affine combination, Σ c_i = 1, whose projections on all gradients' directions are equal.

    c ∝ D(DKD)⁺1,   D = diag(1/|g_i|);   Σ c = 1

It is ConFIG's direction of equal cosines, at another length. The closed form of the paper is the same for independent
gradients.

Source: Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, eq. 4 to 7 (IMTL-G).

Degenerate cases: opposed gradients leave no direction, and the answer is zero; dependent ones are met as well as they
can be, as in ConFIG. Σ c = 1 may ask for a negative factor, or a huge one where ConFIG's weights nearly add up to 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastconfig.backends.problem import NOTHING, Problem, Vector, reference_of
from fastconfig.backends.rules import GramianRule, NonFinite
from fastconfig.methods.base import GramianMethod, check_nonfinite


@reference_of("imtlg")
def _imtlg(problem: Problem, parameters: Sequence[float], operand: Vector | None) -> Vector:
    del parameters, operand
    eigenvalues, vectors = np.linalg.eigh(problem.unit)
    kept = eigenvalues > NOTHING * eigenvalues[-1]
    solution = vectors[:, kept] @ (vectors[:, kept].sum(axis=0) / eigenvalues[kept])
    if solution.sum() * eigenvalues[-1] <= NOTHING * problem.k:  # as ConFIG: |U⁺1|² counts as zero
        return np.zeros(problem.k)
    weights = solution / problem.norms
    return weights / weights.sum() if weights.sum() else np.zeros(problem.k)


class IMTLG(GramianMethod):
    """IMTL-G, impartial multi-task learning on the gradients, in closed form.

    Args:
        nonfinite: what becomes of a gradient that holds inf or NaN: ``"propagate"``, ``"drop"`` or ``"raise"``, as in
            ``ConFIG``.

    Raises:
        ValueError: an unknown nonfinite.

    Source: Liu et al., ICLR 2021, eq. 4 to 7.
    """

    source = "Liu et al., ICLR 2021, openreview IMPnRXEWpvr"

    def __init__(self, nonfinite: NonFinite = "propagate") -> None:
        super().__init__(GramianRule("imtlg", (), None, check_nonfinite(nonfinite)))
