"""ConFIG by the singular value decomposition in float64 on numpy: shares no code and no algorithm with the package.

The package works on the Gramian; this works on the unit rows U themselves, as the paper writes it (arXiv 2408.11104,
eq. 2 to 4): d = U⁺ŵ, g = L·d/|d|.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Answer:
    """ConFIG's combined gradient and what is needed to say how far from it a correct implementation may be."""

    value: np.ndarray  # (n,) the combined gradient
    coefficients: np.ndarray  # (m,) c with value = Σ c_i g_i
    terms: np.ndarray  # (n,) Σ |c_i g_ij|: what rounding of the combination is relative to
    cosines: np.ndarray  # (m,) of the rows with the direction
    solve_error: float  # absolute error in any element that a float64 solve from the Gramian may make

    def tolerance(self, dtype: torch.dtype) -> np.ndarray:
        """(n,) absolute error allowed to a result of ``dtype``.

        Three roundings: m products and sums in the accumulator's precision (float32, or float64 for float64 rows),
        c itself rounded to it; the result rounded to ``dtype``; and the m×m solve.
        """
        accumulator = UNIT_ROUNDOFF[torch.float64 if dtype is torch.float64 else torch.float32]
        m = len(self.coefficients)
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        return (
            (m + 3) * accumulator * self.terms
            + 2 * UNIT_ROUNDOFF[dtype] * np.abs(self.value)
            + self.solve_error
            + (m * smallest if self.coefficients.any() else 0.0)
        )


def config(
    grads: np.ndarray,
    weights: Sequence[float] | None = None,
    length: str | int | Callable[[np.ndarray, np.ndarray], float] = "projection",
    rtol: float = 1e-12,
) -> Answer:
    """The ConFIG combination of finite gradients (m, n)."""
    grads = np.asarray(grads, dtype=np.float64)
    m, n = grads.shape
    wanted = np.ones(m) if weights is None else np.asarray(weights, dtype=np.float64)
    norms = np.linalg.norm(grads, axis=1)
    active = norms > 0
    unit = grads[active] / norms[active, None]  # U
    wanted = wanted[active]

    left, singular, right = np.linalg.svd(unit, full_matrices=False)
    kept = singular > np.sqrt(rtol) * singular.max(initial=0.0)
    left, singular, right = left[:, kept], singular[kept], right[kept]
    inside = left.T @ wanted  # the part of ŵ that the rows can reach
    direction = (inside / singular) @ right  # U⁺ŵ
    square = direction @ direction
    if square * singular.max(initial=0.0) ** 2 <= rtol * (wanted @ wanted):
        return Answer(np.zeros(n), np.zeros(m), np.zeros(n), np.zeros(m), 0.0)

    direction /= np.sqrt(square)
    cosines = np.zeros(m)
    cosines[active] = unit @ direction
    lengths = norms if callable(length) else _lengths(length, norms)
    scale = float(length(norms, cosines)) if callable(length) else lengths @ cosines
    coefficients = np.zeros(m)
    coefficients[active] = scale * (left @ (inside / singular**2)) / np.sqrt(square) / norms[active]
    terms = (np.abs(coefficients)[:, None] * np.abs(grads)).sum(axis=0)
    # A direction that is off by ε moves its own place by ε·L and L itself by ε·Σ lengths.
    solve_error = _direction_error(singular, inside, wanted) * (abs(scale) + lengths.sum())
    return Answer(scale * direction, coefficients, terms, cosines, solve_error)


def _direction_error(singular: np.ndarray, inside: np.ndarray, wanted: np.ndarray) -> float:
    """How far d/|d| may move when C = UUᵀ is rounded to float64, to first order.

    κ(U)² of a rounding; where the rows are dependent, also κ(U)³ of it times how much of ŵ lies out of their reach.
    """
    condition = singular[0] / singular[-1]
    outside = max(wanted @ wanted - inside @ inside, 0.0) if len(inside) < len(wanted) else 0.0
    rounding = 16 * (len(wanted) + 4) * UNIT_ROUNDOFF[torch.float64]
    return rounding * condition**2 * (1 + condition * np.sqrt(outside / (inside @ inside)))


def _lengths(length: str | int, norms: np.ndarray) -> np.ndarray:
    """(m,) the length at which each row's projection on the direction is taken; 0 for a zero row."""
    if length == "projection":
        return norms
    active = norms[norms > 0]
    if isinstance(length, int):
        tracked = norms[length]
    elif length == "harmonic":
        tracked = len(active) / np.sum(1.0 / active)
    elif length == "geometric":
        tracked = np.exp(np.mean(np.log(active)))
    else:
        tracked = {"minimum": np.min, "maximum": np.max, "arithmetic": np.mean}[length](active)
    return np.where(norms > 0, tracked, 0.0)


def as_numpy(grads: torch.Tensor | Sequence[torch.Tensor]) -> np.ndarray:
    """The (m, n) float64 values of rows given in any accepted real form."""
    if not isinstance(grads, torch.Tensor):
        grads = torch.stack(list(grads))
    return grads.detach().to(torch.float64).numpy()


def assert_matches(actual: torch.Tensor, answer: Answer, dtype: torch.dtype | None = None) -> None:
    """``actual`` is the oracle's answer up to the rounding that ``Answer.tolerance`` allows."""
    assert actual.shape == answer.value.shape
    error = np.abs(actual.to(torch.float64).numpy() - answer.value)
    allowed = answer.tolerance(dtype or actual.dtype)
    within = error <= allowed  # False for NaN
    assert within.all(), (
        f"{(~within).sum()} of {within.size} elements differ: largest error {np.max(error)}, "
        f"allowed there {allowed[np.argmax(error)]}, value {answer.value[np.argmax(error)]}"
    )
