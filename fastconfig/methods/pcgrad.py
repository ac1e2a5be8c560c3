"""PCGrad: each gradient gives up its components against the others, one after the other; then they are summed.

    g_i' ← g_i;  for j ≠ i in some order:  if g_i'·g_j < 0:  g_i' ← g_i' - (g_i'·g_j/|g_j|²) g_j
    g = Σ w_i g_i'

In coefficients, g_i' = Σ_k A_ik g_k: the products g_i'·g_j are the row A_i K.

Source: Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020 (arXiv 2001.06782), algorithm 1.

Degenerate cases: exactly opposed gradients take each other away, and the answer is zero; duplicates are projected from
once and then in no conflict; a zero gradient is in conflict with none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastconfig.backends.problem import Problem, Vector, reference_of
from fastconfig.backends.rules import GramianRule, NonFinite
from fastconfig.methods.base import StatefulMethod, check_generator, check_nonfinite, check_preferences, draw


@reference_of("pcgrad")
def _pcgrad(problem: Problem, parameters: Sequence[float], operand: Vector | None) -> Vector:
    """operand: keys (m, m); row i meets the others by ascending keys. None: as they stand."""
    del parameters
    total = np.zeros(problem.k)
    for i in range(problem.k):
        others = order_of(problem, operand, i)
        total += problem.preferences[i] * projected(problem, i, others)
    return total


def order_of(problem: Problem, keys: Vector | None, i: int) -> Iterable[int]:
    """The other rows in the order in which row i meets them."""
    order = np.arange(problem.k)
    if keys is not None:
        order = order[np.argsort(keys[problem.index[i]][problem.index], kind="stable")]
    return [int(j) for j in order if j != i]


def projected(problem: Problem, i: int, others: Iterable[int]) -> Vector:
    """The coefficients (k,) of gradient i after it was projected from the others, one after the other."""
    coefficients = np.zeros(problem.k)
    coefficients[i] = 1.0
    for j in others:
        product = coefficients @ problem.gramian[:, j]
        if product < 0.0:
            coefficients[j] -= product / problem.gramian[j, j]
    return coefficients


class PCGrad(StatefulMethod):
    """PCGrad, gradient surgery: conflicting components are projected away pair by pair, then all is summed.

    Args:
        order: in which order a gradient meets the others: ``"random"``, drawn for each gradient in every combination
            as in the paper, or ``"fixed"``, 0 to m - 1. For two losses they are the same.
        generator: what the orders come from; None for torch's own on the gradients' device. One of another device
            works, and costs a copy of m² numbers.
        weights: of the projected gradients in the sum, m finite numbers from 0 on; None for 1 each.
        nonfinite: what becomes of a gradient that holds inf or NaN: ``"propagate"``, ``"drop"`` or ``"raise"``, as in
            ``ConFIG``.

    Raises:
        TypeError: generator is none.
        ValueError: an unknown order or nonfinite; weights that are not that.

    Source: Yu et al., NeurIPS 2020 (arXiv 2001.06782), algorithm 1.
    """

    source = "Yu et al., NeurIPS 2020, arXiv 2001.06782"

    def __init__(
        self,
        order: Literal["random", "fixed"] = "random",
        generator: torch.Generator | None = None,
        weights: Sequence[float] | Tensor | None = None,
        nonfinite: NonFinite = "propagate",
    ) -> None:
        if order not in ("random", "fixed"):
            raise ValueError(f"order must be 'random' or 'fixed', got {order!r}; Priority takes an order of its own")
        preferences = check_preferences(weights)
        rule = GramianRule("pcgrad", (), preferences, check_nonfinite(nonfinite))
        super().__init__(rule, order=order, weights=preferences)
        self._random = order == "random"
        self.generator = check_generator(generator)

    def operand(self, m: int, device: torch.device) -> Tensor | None:
        """The keys (m, m) of the orders, drawn; None where there is but one order."""
        return draw((m, m), device, self.generator, normal=False) if self._random and m > 2 else None
