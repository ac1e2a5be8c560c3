"""Aligned-MTL: the gradients are made orthogonal and of one length, along the principal directions of their Gramian.

    K = VΛVᵀ;   c = V √(s/Λ) Vᵀ p,   s the smallest, median or mean eigenvalue

p is 1/m, or the preferences over their sum. Eigenvalues at or under 1e-12 of the largest count as zero: left out.

Source: Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023 (arXiv 2305.19000), eq. 9
to 13; "median" and "rmse" from its official code.

Degenerate cases: dependent gradients (duplicates, opposed) share the directions that they span. A gradient whose norm
is under 1e-6 of the largest is left out by the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from fastconfig.backends.problem import NOTHING, Problem, Vector, reference_of
from fastconfig.backends.rules import GramianRule, NonFinite
from fastconfig.methods.base import GramianMethod, check_nonfinite, check_preferences

SCALES = ("min", "median", "rmse")


@reference_of("aligned")
def _aligned(problem: Problem, parameters: Sequence[float], operand: Vector | None) -> Vector:
    """parameters: the scale's place among SCALES."""
    del operand
    eigenvalues, vectors = np.linalg.eigh(problem.gramian)
    kept = eigenvalues > NOTHING * eigenvalues[-1]
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    scales = (eigenvalues[0], eigenvalues[(len(eigenvalues) - 1) // 2], eigenvalues.mean())
    weights: Vector = vectors @ (np.sqrt(scales[int(parameters[0])] / eigenvalues) * (vectors.T @ problem.shares))
    return weights


class AlignedMTL(GramianMethod):
    """Aligned-MTL: the mean of the gradients after the principal components of their matrix were made equally long.

    Args:
        scale: how long they are made: as the smallest singular value (``"min"``, the paper's), the lower ``"median"``,
            or the root mean square (``"rmse"``).
        weights: preferences, m finite numbers from 0 on, not all zero; used over their sum. None for equal ones.
        nonfinite: what becomes of a gradient that holds inf or NaN: ``"propagate"``, ``"drop"`` or ``"raise"``, as in
            ``ConFIG``.

    Raises:
        ValueError: an unknown scale or nonfinite; weights that are not that.

    Source: Senushkin et al., CVPR 2023 (arXiv 2305.19000), eq. 9 to 13.
    """

    source = "Senushkin et al., CVPR 2023, arXiv 2305.19000"

    def __init__(
        self,
        scale: Literal["min", "median", "rmse"] = "min",
        weights: Sequence[float] | Tensor | None = None,
        nonfinite: NonFinite = "propagate",
    ) -> None:
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
        preferences = check_preferences(weights)
        rule = GramianRule("aligned", (float(SCALES.index(scale)),), preferences, check_nonfinite(nonfinite))
        super().__init__(rule, scale=scale, weights=preferences)
