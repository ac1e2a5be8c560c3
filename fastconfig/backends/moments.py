"""What a step of M-ConFIG works on: the losses' moving averages, wherever they lie, and the m×m numbers beside them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """The moving averages over one segment's n columns, in the state's dtype, float32 or float64."""

    first: Tensor
    """(m, n), m_i in row i; each row contiguous, any distance apart."""
    second: Tensor
    """(n,) v, of the pseudo-gradient."""


class Recorded(NamedTuple):
    """The gradients of one step over one segment: of k ≤ m losses, in dtypes no wider than the state's."""

    losses: tuple[int, ...]
    """I, k distinct indices."""
    rows: tuple[Tensor, ...]
    """k of (n,), contiguous; row s is the gradient of losses[s]."""


class Piece(NamedTuple):
    """A run of a segment's columns and where its update goes: a parameter's own memory, or a vector for the update."""

    values: Tensor
    """(count,) contiguous, of the gradients' dtype."""
    first: int
    """The column of its first element."""
    group: int
    """Which of ``StepRule.groups`` it belongs to."""


class Group(NamedTuple):
    """What parameter groups may differ in."""

    lr: float | Tensor
    """Learning rate; a tensor of one element is read on its device."""
    weight_decay: float
    """Decoupled, as in AdamW: θ ← θ - lr·weight_decay·θ."""
    eps: float
    maximize: bool
    assign: bool = False
    """Write the update itself instead of stepping by -lr times it. The memory is then not read."""


class StepRule(NamedTuple):
    """A step's numbers, as the host knows them."""

    beta1: float
    beta2: float
    groups: tuple[Group, ...]
    max_norm: float | None = None
    """Each gradient is scaled to at most this norm before it enters its average."""
    max_update_norm: float | None = None
    """The whole update is scaled to at most this norm."""


class Ledger(NamedTuple):
    """The m×m numbers between steps, float64, on one device: no step asks the host for them."""

    gramian: Tensor
    """(m, m) the products of the first moments, as they stand, not freed of bias."""
    weights: Tensor
    """(m,) f = Σ weights_i m_i: the last combined gradient times 1 - β₁ᵗ. Zeros before the first."""
    counts: Tensor
    """(m,) t_i, how many gradients each average took."""
    totals: Tensor
    """(2,) t, the updates so far, and how many steps were left out for a gradient that was not finite."""

    @classmethod
    def zeros(cls, m: int, device: torch.device) -> Ledger:
        """The ledger before the first step of m losses."""
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((m, m), m, m, 2)))

    def become(self, after: Ledger) -> None:
        """Take over the numbers of another one. Nothing is allocated."""
        for here, there in zip(self, after, strict=True):
            here.copy_(there)


HEAD = 5
"""Numbers of a decision before its vectors."""


class Decision(NamedTuple):
    """What the m×m part of a step found out: all that the pass over the parameters has to know.

    Views of one (HEAD + 2m + k,) float64 tensor, ``numbers``, which the kernels read by its address.
    """

    numbers: Tensor
    take: Tensor
    """1 where the gradients enter their averages; else 0, and nothing at all is written."""
    update: Tensor
    """1 where parameters and second moment are written, too."""
    gradient: Tensor
    """1 / (1 - β₁ᵗ), which makes ĝ of f."""
    second: Tensor
    """1 / (1 - β₂ᵗ), which frees v of its bias."""
    clip: Tensor
    """What the update is scaled by, for its norm's sake."""
    forward: Tensor
    """(m,) f_t = Σ forward_i m_i of the new averages. A row of weight 0 is not read for f."""
    backward: Tensor
    """(m,) β₁ f_{t-1} = Σ backward_i m_i of the averages before this step."""
    scales: Tensor
    """(k,) what each recorded gradient is multiplied by before it enters its average."""

    @classmethod
    def of(cls, numbers: Tensor, m: int) -> Decision:
        """The views of ``numbers``."""
        forward, backward, scales = numbers[HEAD:].split([m, m, len(numbers) - HEAD - 2 * m])
        take, update, gradient, second, clip = numbers[:HEAD].unbind()
        return cls(numbers, take, update, gradient, second, clip, forward, backward, scales)
