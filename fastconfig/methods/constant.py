"""Sum, mean and constant weights: c = 1, 1/m, w. Gradient descent on one loss, what every method is compared with.

Degenerate cases: none. A zero gradient's weight is 0, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastconfig.backends.problem import Problem, Vector, reference_of
from fastconfig.backends.rules import GramianRule, NonFinite
from fastconfig.methods.base import GramianMethod, check_nonfinite, check_preferences


@reference_of("constant")
def _constant(problem: Problem, parameters: Sequence[float], operand: Vector | None) -> Vector:
    """parameters: whether to divide by the number of rows. operand: (m,) the weights; None for the preferences."""
    weights = problem.preferences if operand is None else operand[problem.index]
    return weights / problem.total if parameters[0] else weights


class Sum(GramianMethod):
    """The sum of the gradients: gradient descent on the sum of the losses, c_i = 1.

    Args:
        nonfinite: what becomes of a gradient that holds inf or NaN: ``"propagate"``, ``"drop"`` or ``"raise"``, as in
            ``ConFIG``.

    Raises:
        ValueError: an unknown nonfinite.
    """

    source = "gradient descent on the sum of the losses"

    def __init__(self, nonfinite: NonFinite = "propagate") -> None:
        super().__init__(GramianRule("constant", (0.0,), None, check_nonfinite(nonfinite)))


class Mean(GramianMethod):
    """The mean of the gradients: gradient descent on the mean of the losses, c_i = 1/m, zero gradients counted.

    Args:
        nonfinite: as in ``Sum``.

    Raises:
        ValueError: an unknown nonfinite.
    """

    source = "gradient descent on the mean of the losses"

    def __init__(self, nonfinite: NonFinite = "propagate") -> None:
        super().__init__(GramianRule("constant", (1.0,), None, check_nonfinite(nonfinite)))


class Constant(GramianMethod):
    """Weights of your own, the same in every step: c = w.

    Args:
        weights: w, m finite numbers, not all zero; negative ones are taken.
        nonfinite: as in ``Sum``.

    Raises:
        ValueError: weights that are not that; an unknown nonfinite.
    """

    source = "gradient descent on a weighted sum of the losses"

    def __init__(self, weights: Sequence[float] | Tensor, nonfinite: NonFinite = "propagate") -> None:
        preferences = check_preferences(weights, signed=True)
        if preferences is None:
            raise ValueError("weights must be a vector of real numbers, one a loss, got None; Sum() needs none")
        rule = GramianRule("constant", (0.0,), preferences, check_nonfinite(nonfinite))
        super().__init__(rule, weights=list(preferences))
