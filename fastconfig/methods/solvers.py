"""The small solvers that the methods' references share, written to be checked by hand; the fast ones are compiled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastconfig.backends.problem import NOTHING, Matrix, Vector


def nonnegative(a: Matrix, f: Vector) -> Vector:
    """The x = argmin ½xᵀAx - fᵀx over x ≥ 0, A positive semi-definite of diagonal near 1, the objective bounded.

    The active set of Lawson & Hanson (Solving Least Squares Problems, 1974, ch. 23): a row enters where the objective
    falls along it, and leaves where the way to the minimum over the rows that have entered meets its bound. A row that
    depends on those that have entered takes the place of one of them: along Az = 0 the objective falls in a line until
    a bound is met.
    """
    size = len(a)
    rounding = 4 * size * np.finfo(np.float64).eps
    x = np.zeros(size)
    free = np.zeros(size, dtype=bool)
    dependent = np.zeros(size, dtype=bool)
    for _ in range(20 * size):
        surplus = f - a @ x
        surplus[np.abs(surplus) <= rounding * (np.abs(f) + np.abs(a) @ x)] = 0.0
        surplus[free | dependent] = 0.0
        entering = int(surplus.argmax())
        if surplus[entering] <= 0.0:
            break
        free[entering] = True
        if not _is_regular(a[np.ix_(free, free)], rounding):
            free[entering] = False
            along = _minimum(a, a[entering], free)  # -z
            ways = np.where(along > 0.0, x / np.where(along > 0.0, along, 1.0), np.inf)
            is_rounding = surplus[entering] <= 1e-10 * (np.abs(f) + np.abs(a) @ x)[entering]
            if is_rounding or not np.isfinite(ways.min()):
                dependent[entering] = True
                continue
            leaving = int(ways.argmin())
            x = np.maximum(x - ways[leaving] * along, 0.0)
            x[leaving], x[entering] = 0.0, ways[leaving]
            free[leaving], free[entering] = False, True
            dependent[:] = False
            wanted = _minimum(a, f, free)
        else:
            wanted = _minimum(a, f, free)
            if wanted[entering] <= 0.0:  # only rounding said that it should enter
                free[entering] = False
                dependent[entering] = True
                continue
        while (wanted[free] <= 0.0).any():
            bound = free & (wanted <= 0.0)
            steps = x[bound] / (x[bound] - wanted[bound])
            x += steps.min() * (wanted - x)
            leaving = np.flatnonzero(bound)[steps <= steps.min()]
            x[leaving] = 0.0
            free[leaving] = False
            dependent[:] = False
            wanted = _minimum(a, f, free)
        x = wanted
    return x


def _minimum(a: Matrix, f: Vector, free: NDArray[np.bool_]) -> Vector:
    """The minimum over the free entries, the others 0; the shortest where rounding left them dependent."""
    x = np.zeros(len(f))
    block = a[np.ix_(free, free)]
    try:
        x[free] = np.linalg.solve(block, f[free])
    except np.linalg.LinAlgError:
        x[free] = np.linalg.lstsq(block, f[free], rcond=None)[0]
    return x


def _is_regular(block: Matrix, rounding: float) -> bool:
    """Whether every pivot of the block is over ``rounding``."""
    try:
        return bool((np.diagonal(np.linalg.cholesky(block)) ** 2).min() > rounding)
    except np.linalg.LinAlgError:
        return False


def least_norm_point(unit: Matrix, norms: Vector) -> tuple[Vector, bool]:
    """The w = argmin wᵀKw over Σ w = 1, w ≥ 0, and whether that point of the hull is another than the origin.

    As a program over x ≥ 0 alone: minimise ½τ²·wᵀKw + σ/2·(τ - 1)² over w on the simplex and τ > 0. For every σ > 0 the
    best w is the same, and with y = τ·w·|g| the objective is ½yᵀ(C + ηηᵀ)y - √σ·ηᵀy, η = √σ/|g|. σ is the smallest
    squared norm, so that no η passes 1.
    """
    eta = norms.min() / norms
    y = nonnegative(unit + np.outer(eta, eta), eta)
    w = y / norms
    return w / w.sum(), bool(y @ unit @ y > NOTHING * (y @ y))


def bargain(unit: Matrix, q: Vector, beta: float) -> Vector | None:
    """The x > 0 with C x = q·x^(-β), by a damped Newton method; None where there is none, as the rows are opposed.

    An entry of C x that is no more than rounding of its terms may say so, or come of norms that differ too much for
    float64; whether the hull of the unit rows holds the origin decides.

    The equation says that ½xᵀCx - Σ q ∫x^(-β) dx, which is convex, is least. A step is halved until x stays positive
    and the slope along it turns uphill by no more than half of what it was downhill.
    """
    x = q ** (1.0 / (1.0 + beta))  # the answer for C = 1
    best, least, idle = x, np.inf, 0
    for _ in range(200):
        along, wanted = unit @ x, q * x**-beta
        error = (np.abs(along - wanted) / (np.abs(unit) @ x + wanted)).max()
        idle = 0 if error < 0.5 * least else idle + 1
        if error < least:
            best, least = x, error
        if error <= 4 * len(x) * np.finfo(np.float64).eps or (idle >= 3 and least < 1e-10):
            break
        downhill = wanted - along
        step = np.linalg.solve(unit + np.diag(beta * wanted / x), downhill)
        shrinking = step < 0
        length = min(1.0, (0.95 * x[shrinking] / -step[shrinking]).min(initial=np.inf))

        for _ in range(50):
            moved = x + length * step
            if step @ (unit @ moved - q * moved**-beta) <= 0.5 * (downhill @ step):
                break
            length *= 0.5
        x = moved
    along = unit @ best
    is_met = least < 1e-10 and (along > NOTHING * (np.abs(unit) @ best)).all()
    return best if is_met or least_norm_point(unit, np.ones(len(q)))[1] else None
