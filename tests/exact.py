"""Sums in extended precision and ConFIG in 80 digits: what random inputs are judged by."""

from __future__ import annotations

from dataclasses import dataclass

import mpmath
import numpy as np
import torch

DIGITS = 80
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def extended(values: torch.Tensor) -> np.ndarray:
    """The numbers as numpy.longdouble, whose exponent holds every product of two float64."""
    return values.detach().to(torch.float64).numpy().astype(np.longdouble)


def sum_of_products(a: np.ndarray, b: np.ndarray) -> tuple[np.longdouble, np.longdouble]:
    """Σ a·b over the last axis, and Σ |a·b|, what its rounding is relative to."""
    with np.errstate(over="ignore", invalid="ignore"):
        products = a * b
        return products.sum(axis=-1), np.abs(products).sum(axis=-1)


@dataclass(frozen=True)
class ExactConFIG:
    """ConFIG (arXiv 2408.11104, eq. 2 to 4) of a few rows, and how sure its line between regular and degenerate is."""

    value: list[mpmath.mpf]  # (n,)
    condition: float  # of the unit rows' Gramian, over what counts as not zero
    margin: float  # the least factor by which a quantity misses the line at which it would count as zero

    @classmethod
    def of(cls, rows: list[list[float]], rtol: float = 1e-12) -> ExactConFIG:
        """Of finite rows, m of n numbers, all of which are exact."""
        with mpmath.workdps(DIGITS):
            exact = [[mpmath.mpf(x) for x in row] for row in rows]
            norms = [mpmath.sqrt(mpmath.fsum(x * x for x in row)) for row in exact]
            active = [i for i, norm in enumerate(norms) if norm > 0]
            n = len(rows[0])
            zero = cls([mpmath.mpf(0)] * n, 1.0, mpmath.inf)
            if not active:
                return zero
            unit = [[x / norms[i] for x in exact[i]] for i in active]
            gramian = mpmath.matrix(
                [[mpmath.fsum(x * y for x, y in zip(a, b, strict=True)) for b in unit] for a in unit]
            )
            eigenvalues, vectors = mpmath.eigsy(gramian)
            largest = max(eigenvalues)
            line = rtol * largest
            margins = [max(abs(value) / line, line / max(abs(value), mpmath.mpf(10) ** -40)) for value in eigenvalues]
            solution = [mpmath.mpf(0)] * len(active)
            smallest = largest
            for e, value in enumerate(eigenvalues):
                if value <= line:
                    continue
                smallest = min(smallest, value)
                along = mpmath.fsum(vectors[i, e] for i in range(len(active))) / value
                for i in range(len(active)):
                    solution[i] += along * vectors[i, e]
            square = mpmath.fsum(solution)
            degenerate = rtol * len(active)
            reached = square * largest
            margins.append(max(reached / degenerate, degenerate / max(reached, mpmath.mpf(10) ** -60)))
            if reached <= degenerate:
                return cls(zero.value, 1.0, float(min(margins)))
            direction = [mpmath.fsum(s * u[k] for s, u in zip(solution, unit, strict=True)) for k in range(n)]
            size = mpmath.sqrt(square)
            direction = [x / size for x in direction]
            length = mpmath.fsum(
                norms[i] * mpmath.fsum(x * y for x, y in zip(u, direction, strict=True))
                for i, u in zip(active, unit, strict=True)
            )
            condition = float(largest / smallest * max(1, degenerate and largest * len(active) / reached))
            return cls([length * x for x in direction], condition, float(min(margins)))
