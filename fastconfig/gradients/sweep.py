"""Sweeps over all parameters, in the compiled core where it is: a loop of Python takes several times as long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastconfig.backends import cpu
from fastconfig.gradients.local import is_sharded, local_of

__all__ = ["Copies", "Sweep", "sweep_over"]


def address_of(tensor: Tensor) -> int:
    """Where it lies, or, of a DTensor, which has no address, this rank's part."""
    return local_of(tensor).data_ptr()


class PlainSweep:
    """What is asked of, and done to, every parameter of a tuple: what the core's ``Sweep`` does, in Python.

    Args:
        parameters: the parameters, kept.
    """

    def __init__(self, parameters: tuple[Tensor, ...]) -> None:
        self._parameters = parameters
        self._made = self._now()

    def _now(self) -> list[tuple[int, torch.dtype, torch.Size]]:
        return [(address_of(parameter), parameter.dtype, parameter.shape) for parameter in self._parameters]

    def lies_where_it_did(self) -> bool:
        """Whether every parameter's memory is where it was when this was made: the quicker question."""
        return [address_of(parameter) for parameter in self._parameters] == [made[0] for made in self._made]

    def is_unchanged(self) -> bool:
        """Whether every parameter's memory, dtype and shape are what they were when this was made."""
        return self._now() == self._made

    def take(self) -> tuple[list[Tensor | None], tuple[bool, ...]]:
        """Every ``p.grad``, which is None from here on; and for each whether there was one."""
        grads = [parameter.grad for parameter in self._parameters]
        flags = tuple([grad is not None for grad in grads])
        self.give([None] * len(grads), False)
        return grads, flags

    def give(self, grads: Sequence[Tensor | None], are_none: bool) -> None:
        """Set every ``p.grad``; where all ``are_none`` now, those alone that are to be something else."""
        for parameter, grad in zip(self._parameters, grads, strict=True):
            if grad is not None or not are_none:
                parameter.grad = grad

    def show(
        self, aliases: list[Tensor], addresses: list[int], flags: tuple[bool, ...], hides: bool, begin: int
    ) -> int:
        """Make ``p.grad`` the alias of each parameter with a true flag, from position ``begin`` on.

        Args:
            aliases: one a parameter.
            addresses: where each is to lie.
            flags: one a parameter.
            hides: set ``p.grad`` of the others to None; else leave it.
            begin: the first position.

        Returns:
            The first position whose alias lies elsewhere or requires a gradient, before which this ends; -1 at the end.
        """
        for i in range(begin, len(flags)):
            if not flags[i]:
                if hides:
                    self._parameters[i].grad = None
                continue
            if address_of(aliases[i]) != addresses[i] or aliases[i].requires_grad:
                return i
            self._parameters[i].grad = aliases[i]
        return -1


class PlainCopies:
    """Gradients on the CPU that are to be copied whole, in Python: all are left to the caller.

    Args:
        copies: of each, its position among the parameters, the address to copy it to, and its bytes.
        dtype: which a gradient must be of.
        layout: likewise.
    """

    def __init__(self, copies: list[tuple[int, int, int]], dtype: torch.dtype, layout: torch.layout) -> None:
        del dtype, layout
        self._positions = [position for position, _, _ in copies]

    def copy(self, grads: Sequence[Tensor | None]) -> list[int]:
        """Copy each that is contiguous, of that dtype and layout. The positions of the others."""
        del grads
        return self._positions


if TYPE_CHECKING or cpu.available() is not None:
    Sweep = PlainSweep
    Copies = PlainCopies
else:
    from fastconfig._core import Copies, Sweep


def sweep_over(parameters: tuple[Tensor, ...]) -> Sweep:
    """The core's where it can be: it asks tensors for their addresses, and a DTensor has none."""
    return PlainSweep(parameters) if any(map(is_sharded, parameters)) else Sweep(parameters)
