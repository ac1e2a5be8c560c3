"""Asymmetric surgery: a loss's gradient is projected from those of higher priority alone, and the first is untouched.

    for i:  g_i' ← g_i;  for the j of higher priority, the highest last:
            if g_i'·g_j < 0:  g_i' ← g_i' - (g_i'·g_j/|g_j|²) g_j
    g = Σ w_i g_i'

As the highest priority comes last, no g_i' ends against it: to first order the step decreases the first loss at least
as fast as its own gradient of weight w_0 would. For two losses this is projection of the second from the first, as in
protecting a reconstruction from an adversarial loss.

Source: PCGrad's projection (Yu et al., NeurIPS 2020, arXiv 2001.06782) applied one way.

Degenerate cases: a gradient opposed to one of higher priority vanishes; a zero gradient is in conflict with none.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastconfig.backends.problem import Problem, Vector, reference_of
from fastconfig.backends.rules import GramianRule, NonFinite
from fastconfig.methods.base import GramianMethod, check_nonfinite, check_preferences
from fastconfig.methods.pcgrad import projected


@reference_of("priority")
def _priority(problem: Problem, parameters: Sequence[float], operand: Vector | None) -> Vector:
    """parameters: the m rows, highest priority first; empty for 0 to m - 1."""
    del operand
    order = [int(row) for row in parameters] or list(range(problem.m))
    place = {int(row): i for i, row in enumerate(problem.index)}
    ranked = [place[row] for row in order if row in place]
    total = np.zeros(problem.k)
    for rank, i in enumerate(ranked):
        total += problem.preferences[i] * projected(problem, i, reversed(ranked[:rank]))
    return total


class Priority(GramianMethod):
    """Surgery one way: a loss yields to those of higher priority, never the other way round.

    Args:
        order: the losses from the highest priority to the lowest, each once; None for 0 to m - 1.
        weights: of the projected gradients in the sum, m finite numbers from 0 on; None for 1 each.
        nonfinite: what becomes of a gradient that holds inf or NaN: ``"propagate"``, ``"drop"`` or ``"raise"``, as in
            ``ConFIG``.

    Raises:
        TypeError: order holds something else than ints.
        ValueError: order is not a permutation of 0 to m - 1; weights that are not that; an unknown nonfinite.
    """

    source = "PCGrad's projection (arXiv 2001.06782), applied one way"

    def __init__(
        self,
        order: Sequence[int] | None = None,
        weights: Sequence[float] | Tensor | None = None,
        nonfinite: NonFinite = "propagate",
    ) -> None:
        try:
            rows = () if order is None else tuple(operator.index(row) for row in order)
        except TypeError:
            raise TypeError(f"order must be a sequence of ints, the losses' places, got {order!r}") from None
        if sorted(rows) != list(range(len(rows))) or (order is not None and not rows):
            raise ValueError(f"order must name each of the losses 0 to m - 1 once, got {order!r}")
        preferences = check_preferences(weights)
        rule = GramianRule("priority", tuple(map(float, rows)), preferences, check_nonfinite(nonfinite))
        super().__init__(rule, order=list(rows) or None, weights=preferences)
