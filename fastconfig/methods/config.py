"""ConFIG: the update with the same positive cosine with every loss's gradient (arXiv 2408.11104, ICLR 2025)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from fastconfig.backends.rules import LENGTH_NAMES, ConFIGRule, LengthModel, LengthName, NonFinite
from fastconfig.methods.base import check_gramian, check_nonfinite, check_preferences
from fastconfig.ops import backend_for, is_traced


class ConFIG:
    """Conflict-Free Inverse Gradients, as a rule on the Gramian.

    The direction g_u is U⁺ŵ normalised, with unit rows u_i = g_i/|g_i| in U and direction weights ŵ (ConFIG paper,
    eq. 2 and 3): where the gradients are independent, its cosines with them are in the ratio of ŵ, so all equal and
    positive by default. The combined gradient is L·g_u, with L from the length model (paper, eq. 4).

    Args:
        weights: direction weights ŵ, m finite numbers, not all zero; None for equal weights. A tensor is read once,
            here, so one on an accelerator synchronises now and never again.
        length: how long the combined gradient is.
            ``"projection"`` (the paper's): the sum of the gradients' projections on the direction.
            ``"minimum"``, ``"maximum"``, ``"harmonic"``, ``"arithmetic"``, ``"geometric"``: as if every gradient had
            the smallest, largest or mean norm; an int: the norm of that loss's gradient.
            A callable ``length(norms, cosines) -> L`` takes the gradients' norms (m,) and their cosines with the
            direction (m,), float64 on the gradients' device, 0 for rows that constrain nothing.
            Zero gradients take no part in any minimum or mean.
        rtol: eigenvalues of the unit rows' Gramian at or under ``rtol`` times the largest count as zero. Does not
            depend on n. 1e-12 is 1e-6 on the singular values of U.
        nonfinite: a gradient that holds inf or NaN makes the whole answer NaN (``"propagate"``, what a GradScaler looks
            for), is left out (``"drop"``; a GradScaler sees it where a buffer's ``combine`` is told of the scaler), or
            raises FloatingPointError (``"raise"``, which synchronises).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: weights not a non-empty vector of finite numbers, or all zero; an unknown length or nonfinite; rtol
            negative or not finite.

    Squared norms are float64: float32, bfloat16 and float16 gradients are safe at any scale, float64 ones with norms of
    about 1e-150 to 1e150; beyond, they count as zero or non-finite.

    A zero gradient constrains nothing: its weight is 0. Exactly opposed gradients (g, -g) leave no direction: the
    answer is zero, never NaN.
    """

    source = "Liu et al., ICLR 2025, arXiv 2408.11104"

    def __init__(
        self,
        weights: Sequence[float] | Tensor | None = None,
        length: LengthName | int | LengthModel = "projection",
        rtol: float = 1e-12,
        nonfinite: NonFinite = "propagate",
    ) -> None:
        self._weights = check_preferences(weights, signed=True)
        self._rule = ConFIGRule(
            _normalised(self._weights), _check_length(length), _check_rtol(rtol), check_nonfinite(nonfinite)
        )

    @property
    def rule(self) -> ConFIGRule:
        """The validated parameters, as backends read them."""
        return self._rule

    def weights(self, gramian: Tensor) -> Tensor:
        """The coefficients c, (m,) float64, for a Gramian (m, m): g = Σ c_i g_i.

        Raises:
            ValueError: the Gramian is not square, or the direction weights or the tracked loss do not fit it.
            FloatingPointError: a gradient is not finite and ``nonfinite="raise"``.
        """
        check_gramian(gramian)
        self._rule.check_losses(len(gramian))
        backend = backend_for(gramian.device, None, is_traced(gramian))
        return backend.config_weights(gramian.detach().to(torch.float64), self._rule)

    def __repr__(self) -> str:
        rule = self._rule
        weights = None if self._weights is None else list(self._weights)
        return f"ConFIG(weights={weights}, length={rule.length!r}, rtol={rule.rtol:g}, nonfinite={rule.nonfinite!r})"


def _normalised(direction: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Direction weights scaled by a power of two to a largest near 1, so that their squares stay in float64's range."""
    if direction is None:
        return None
    exponent = max(math.frexp(value)[1] for value in direction if value)
    return tuple(math.ldexp(value, -exponent) for value in direction)


def _check_length(length: LengthName | int | LengthModel) -> str | int | LengthModel:
    if isinstance(length, SupportsIndex) and not isinstance(length, (bool, Tensor)):
        return operator.index(length)
    if not isinstance(length, str) and not callable(length):
        raise TypeError(f"length must be a name, the index of a loss or a callable, got {length!r}")
    if isinstance(length, str) and length not in LENGTH_NAMES:
        raise ValueError(f"length must be one of {', '.join(LENGTH_NAMES)}, an int or a callable, got {length!r}")
    return length


def _check_rtol(rtol: float) -> float:
    if isinstance(rtol, bool) or not isinstance(rtol, (int, float)):
        raise TypeError(f"rtol must be a number, got {rtol!r}")
    if not (math.isfinite(rtol) and 0 <= rtol < 1):
        raise ValueError(f"rtol must lie in [0, 1), got {rtol}; the default is 1e-12")
    return float(rtol)
