"""CAGrad: near the mean gradient, the update whose worst product with any gradient is largest.

    d = argmax min_i g_i·d  over  |d - g₀| ≤ c|g₀|,   g₀ = Σ p_i g_i,   p = 1/m or the preferences over their sum

Its dual (the paper's eq. 3) minimises g_w·g₀ + c|g₀||g_w| over g_w = Σ w_i g_i, w on the simplex, and d = g₀ +
c|g₀|·g_w/|g_w|. Here d = g₀ + Gᵀv: for a level t, v(t) = argmin |Gᵀv|²/2 + (b - t)·v over v ≥ 0, b = Gg₀, leads to the
point nearest to g₀ at which every product is at least t, and t is raised until that distance is c|g₀|.

Source: Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021 (arXiv 2110.14048), eq. 1 to
3 and, for ``fast``, the subset of losses of its section 3.3; ``rescale`` from its official code.

Degenerate cases: c = 0 is the mean; c → ∞ tends to MGDA's direction. Where the hull of the gradients holds the origin,
as for opposed gradients, no direction goes along with all of them; d is then the point nearest to g₀ that goes against
none, or as far towards it as the ball allows. |g₀| = 0 gives zero, for the ball has no extent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastconfig.backends.problem import Matrix, Problem, Vector, reference_of
from fastconfig.backends.rules import GramianRule, NonFinite
from fastconfig.methods.base import (
    StatefulMethod,
    check_count,
    check_generator,
    check_nonfinite,
    check_preferences,
)
from fastconfig.methods.solvers import least_norm_point, nonnegative
from fastconfig.validation import check_number

RESCALES = (0, 1, 2)


@reference_of("cagrad", only_preferred=True)
def _cagrad(problem: Problem, parameters: Sequence[float], operand: Vector | None) -> Vector:
    """parameters: c and the rescaling's number."""
    del operand
    c, rescale = parameters
    # In units of the largest norm: else products of two, times the radius, may leave float64's range.
    norms, shares = problem.norms / problem.norms.max(), problem.shares
    b = norms * (problem.unit @ (norms * shares))
    radius = c * _length(problem.unit, norms * shares)
    raised = _raised(problem.unit, norms, b, radius) if radius > 0 else np.zeros(problem.k)
    return (shares + raised) / (1.0, 1.0 + c * c, 1.0 + c)[int(rescale)]


def _length(unit: Matrix, y: Vector) -> float:
    """Of the combination Σ y_i u_i of the unit rows."""
    return math.sqrt(max(float(y @ unit @ y), 0.0))


def _raised(unit: Matrix, norms: Vector, b: Vector, radius: float) -> Vector:
    """V of the level t at which |Gᵀv(t)|, which grows with t, is the radius: by bisection."""

    def at(t: float) -> tuple[Vector, float]:
        y = nonnegative(unit, (t - b) / norms)
        return y / norms, _length(unit, y)

    w, is_apart = least_norm_point(unit, norms)
    low = b.min()  # what g₀ reaches
    # No level is higher than the dual's value for some w; none is positive where the hull holds the origin.
    high = max(low, b @ w + radius * _length(unit, norms * w) if is_apart else 0.0)
    v, distance = at(high)
    if distance <= radius:
        return v
    for _ in range(200):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        v, distance = at(middle)
        low, high = (middle, high) if distance < radius else (low, middle)
    return v


class CAGrad(StatefulMethod):
    """Conflict-averse gradient descent, its program solved exactly.

    Args:
        c: the ball's radius relative to |g₀|, from 0 on; the paper uses 0.2 to 0.8.
        rescale: what the result is divided by, as in the official code: 0 for nothing, 1 for 1 + c², 2 for 1 + c.
        fast: how many backward passes a step may cost; None for one a loss. See ``reduced``.
        weights: preferences of the losses in g₀, m finite numbers from 0 on, not all zero; used over their sum. None
            for equal ones.
        generator: what ``reduced`` draws from, a CPU generator; None for torch's own.
        nonfinite: what becomes of a gradient that holds inf or NaN: ``"propagate"``, ``"drop"`` or ``"raise"``, as in
            ``ConFIG``.

    Raises:
        TypeError: c is no number, rescale or fast no int, generator none.
        ValueError: c is negative or not finite; rescale not 0, 1 or 2; fast under 2, or with weights; weights that are
            not that; an unknown nonfinite.

    Source: Liu et al., NeurIPS 2021 (arXiv 2110.14048), eq. 1 to 3.
    """

    source = "Liu et al., NeurIPS 2021, arXiv 2110.14048"

    def __init__(
        self,
        c: float = 0.5,
        rescale: int = 0,
        fast: int | None = None,
        weights: Sequence[float] | Tensor | None = None,
        generator: torch.Generator | None = None,
        nonfinite: NonFinite = "propagate",
    ) -> None:
        rescale = check_count("rescale", rescale, least=0)
        if rescale not in RESCALES:
            raise ValueError(f"rescale must be 0 (none), 1 (by 1 + c²) or 2 (by 1 + c), got {rescale!r}")
        self._c, self._rescale = check_number("c", c, 0.0), float(rescale)
        self._fast = None if fast is None else check_count("fast", fast, least=2)
        preferences = check_preferences(weights)
        if fast is not None and preferences is not None:
            raise ValueError("weights cannot be combined with fast: the losses that are left out enter by their mean")
        rule = GramianRule("cagrad", (self._c, self._rescale), preferences, check_nonfinite(nonfinite))
        super().__init__(rule, c=self._c, rescale=rescale, fast=self._fast, weights=preferences)
        self.generator = check_generator(generator)

    @property
    def is_fused(self) -> bool:
        """Where every row of a buffer is of this step."""
        return self._fast is None and type(self).weights is CAGrad.weights

    @property
    def recorded_rows(self) -> frozenset[int] | None:
        """With ``fast``, the rows that the next combination is of; None for all."""
        preferences = self._rule.preferences
        if self._fast is None or preferences is None:
            return None
        return frozenset(i for i, preference in enumerate(preferences) if preference > 0)

    def weights(self, gramian: Tensor) -> Tensor:
        """As every method's; with ``fast`` of the rows of this step alone, whatever the others hold."""
        preferences = self._rule.preferences
        if self._fast is None or preferences is None or len(preferences) != len(gramian):
            return super().weights(gramian)
        chosen = gramian.new_tensor(preferences) > 0
        return super().weights(torch.where(chosen & chosen.unsqueeze(1), gramian, 0.0))

    def reduced(self, losses: Sequence[Tensor | Callable[[], Tensor]]) -> list[tuple[int, Callable[[], Tensor]]]:
        """What to backpropagate in this step with ``fast``: so many rows of a buffer, and for each a loss to call.

        All but one are losses drawn without replacement; the last is the mean of all others. The next combination
        is of these rows alone, whatever the others hold, and counts the last as so many losses, which is the paper's
        program for a subset.

        Args:
            losses: m of them, callables that return a tensor of one element, or such tensors: if these share a graph,
                backpropagate all but the last with ``retain_graph=True``.

        Raises:
            ValueError: the method was made without ``fast``, or there are fewer losses.

        Example:
            >>> import torch, fastconfig as fc
            >>> x = torch.ones(3, requires_grad=True)
            >>> buf, method = fc.GradientBuffer([x], num_losses=4), fc.CAGrad(fast=2)
            >>> losses = [lambda i=i: (x[i % 3] - i).square() for i in range(4)]
            >>> for row, loss in method.reduced(losses):
            ...     with buf.record(row):
            ...         loss().backward()
            >>> info = buf.combine(method)
        """
        m = len(losses)
        if self._fast is None or m < self._fast:
            raise ValueError(f"reduced needs fast, of at most {m} for {m} losses, got fast={self._fast}")
        order = torch.randperm(m, generator=self.generator).tolist()
        alone, others = order[: self._fast - 1], order[self._fast - 1 :]
        preferences = [0.0] * m
        for row in alone:
            preferences[row] = 1.0
        preferences[others[0]] = float(len(others))
        self._rule = GramianRule("cagrad", self._rule.parameters, tuple(preferences), self._rule.nonfinite)

        def mean() -> Tensor:
            return torch.stack([_value(losses[row]).reshape(()) for row in others]).mean()

        return [*((row, lambda row=row: _value(losses[row])) for row in alone), (others[0], mean)]


def _value(loss: Tensor | Callable[[], Tensor]) -> Tensor:
    return loss if isinstance(loss, Tensor) else loss()
