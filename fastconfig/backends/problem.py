"""What the reference of a method works on: the gradients that have a direction, on the host, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastconfig.backends.rules import GramianRule

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

NOTHING = 1e-12
"""Eigenvalues and squared lengths that count as zero, relative to what they are made of: ConFIG's default rtol."""


@dataclass(frozen=True)
class Problem:
    """The k of m rows that are finite and not zero. The others constrain nothing, and get weight 0.

    Attributes:
        m: all losses.
        index: (k,) where the rows stand among the m.
        gramian: (k, k).
        given: (k,) the preferences as given; None for equal ones.
        total: the sum of the preferences of all finite rows, zero ones too.
    """

    m: int
    index: NDArray[np.int64]
    gramian: Matrix
    given: Vector | None
    total: float

    @property
    def k(self) -> int:
        """How many rows take part."""
        return len(self.index)

    @cached_property
    def norms(self) -> Vector:
        """(k,) the gradients' norms."""
        return np.sqrt(np.diagonal(self.gramian))

    @cached_property
    def unit(self) -> Matrix:
        """(k, k) the Gramian of the unit rows: their cosines, 1 on the diagonal."""
        unit = self.gramian / self.norms / self.norms[:, None]
        np.fill_diagonal(unit, 1.0)
        return unit

    @property
    def preferences(self) -> Vector:
        """(k,) as given, 1 where none were."""
        return np.ones(self.k) if self.given is None else self.given

    @property
    def shares(self) -> Vector:
        """(k,) the preferences over that sum: 1/m where none were given. Zeros where only dropped rows had any."""
        return self.preferences / self.total if self.total > 0.0 else np.zeros(self.k)


Reference = Callable[[Problem, Sequence[float], "NDArray[np.float64] | None"], Vector]
"""A method written down: from the problem, its parameters and its operand over all m losses to the weights (k,)."""

_REFERENCES: dict[str, tuple[Reference, bool]] = {}


def reference_of(kind: str, only_preferred: bool = False) -> Callable[[Reference], Reference]:
    """Make the decorated function the specification of the methods of this kind.

    Args:
        kind: as in ``GramianRule``.
        only_preferred: whether a row of preference 0 takes no part at all, as if it were zero.
    """

    def register(reference: Reference) -> Reference:
        _REFERENCES[kind] = reference, only_preferred
        return reference

    return register


def rule_weights(gramian: Tensor, rule: GramianRule, operand: Tensor | None) -> Tensor:
    """A method's coefficients c from the Gramian: its own reference on the rows that have a direction.

    A non-finite row makes every weight NaN ("propagate"), is left out ("drop"), or has raised before ("raise"). This
    runs on the host, so on an accelerator it waits for the device.

    Args:
        gramian: (m, m) float64.
        rule: which method, and its numbers.
        operand: what the method takes besides, of this call alone; updated in place by those that have a state.

    Returns:
        (m,) float64 on the Gramian's device.
    """
    everything = gramian.detach().cpu().numpy()
    squares = np.diagonal(everything)
    m = len(squares)
    finite = np.isfinite(squares)
    if rule.nonfinite != "drop" and not finite.all():
        return torch.full((m,), torch.nan, dtype=torch.float64, device=gramian.device)
    reference, only_preferred = _REFERENCES[rule.kind]
    preferences = None if rule.preferences is None else np.array(rule.preferences)
    active = finite & (squares > 0)
    if only_preferred and preferences is not None:
        active &= preferences > 0
    index = np.flatnonzero(active)
    weights = np.zeros(m)
    if len(index):
        problem = Problem(
            m,
            index,
            everything[np.ix_(index, index)],
            None if preferences is None else preferences[index],
            float(finite.sum() if preferences is None else preferences[finite].sum()),
        )
        local = None if operand is None else operand.detach().cpu().numpy()  # on the CPU the operand's own memory
        weights[index] = reference(problem, rule.parameters, local)
        if operand is not None and operand.device.type != "cpu":
            operand.copy_(torch.from_numpy(local))
    return torch.from_numpy(weights).to(gramian.device)
