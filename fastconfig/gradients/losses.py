"""How many losses there are, how they are called, and what is taken for one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from fastconfig.backends.rules import NonFiniteError, nonfinite_message

Loss = Tensor | Callable[[], Tensor] | None
"""What is taken for a loss: it, what returns it, or None where this batch has no labels for it."""


class Losses:
    """The m losses of one problem: their number, or their names in the order of the rows.

    Args:
        num_losses: m; or m names, unique and not empty, that stand for the losses in tables, pictures and errors.

    Attributes:
        names: m of them; "0", "1" ... where none were given.
        named: whether they were.

    Raises:
        TypeError: neither an int nor a sequence of str.
        ValueError: no loss; an empty name, or one that is given twice.
    """

    def __init__(self, num_losses: int | Sequence[str]) -> None:
        self.named = not isinstance(num_losses, int)
        if isinstance(num_losses, (bool, str)) or not isinstance(num_losses, (int, Sequence)):
            raise TypeError(f"num_losses must be an int or a list of the losses' names, got {num_losses!r}")
        count = num_losses if isinstance(num_losses, int) else len(num_losses)
        if count < 1:
            raise ValueError(f"num_losses must be at least 1, got {num_losses!r}")
        self.names = tuple(map(str, range(count))) if isinstance(num_losses, int) else _checked_names(num_losses)

    def __len__(self) -> int:
        return len(self.names)

    def index(self, loss: SupportsIndex | str) -> int:
        """The row of a loss, given by its index, an integer of any kind, or by its name.

        Raises:
            TypeError: no integer, and no name where the losses have some.
            IndexError: no such loss.
        """
        if isinstance(loss, str) and self.named:
            if loss not in self.names:
                raise IndexError(f"loss must be one of {', '.join(map(repr, self.names))}, got {loss!r}")
            return self.names.index(loss)
        if isinstance(loss, (bool, Tensor)) or not isinstance(loss, SupportsIndex):
            names = "or its name" if self.named else "as num_losses gives them no names"
            raise TypeError(f"loss must be the index of a loss, an int, {names}, got {loss!r}")
        index = operator.index(loss)
        if not 0 <= index < len(self):
            raise IndexError(f"loss must be 0 to {len(self) - 1}, got {index}")
        return index

    def label(self, index: int) -> str:
        """How an error calls a loss: ``loss 2``, or ``loss 'pde'``."""
        return f"loss {self.argument(index)}"

    def argument(self, index: int) -> str:
        """How a call of the user's names a loss: ``2``, or ``'pde'``."""
        return repr(self.names[index]) if self.named else str(index)

    def in_order(self, losses: Sequence[Loss] | Mapping[str, Loss] | Mapping[int, Loss]) -> Sequence[Loss]:
        """The m losses by row, given as a sequence, or as a dict by name or number.

        Raises:
            TypeError: neither.
            ValueError: a wrong number of them, or a dict that lacks one.
            IndexError: a dict names no such loss.
        """
        # Lists first: to ask for the abstract class takes a microsecond.
        if not isinstance(losses, (list, tuple)) and isinstance(losses, Mapping):
            by_row = {self.index(key): loss for key, loss in losses.items()}
            if missing := [self.argument(i) for i in range(len(self)) if i not in by_row]:
                raise ValueError(
                    f"losses must hold every loss, and lacks {', '.join(missing)}; give None for one without labels in "
                    "this batch"
                )
            return [by_row[i] for i in range(len(self))]
        if isinstance(losses, Tensor) or not isinstance(losses, Sequence):
            raise TypeError(f"losses must be a sequence or a dict of {len(self)} losses, got {type(losses).__name__}")
        if len(losses) != len(self):
            raise ValueError(
                f"losses must hold {len(self)} losses, one a row, got {len(losses)}; give None for one without labels "
                "in this batch"
            )
        return losses

    def check(self, losses: Sequence[Loss], may_all_be_absent: bool) -> int:
        """The position of the last tensor among losses in order, -1 where there is none.

        Raises:
            TypeError: one that is neither a tensor nor a callable nor None.
            ValueError: a tensor that cannot be backpropagated; all are None, and may not be.
        """
        last, is_any = -1, False
        for i, loss in enumerate(losses):
            if isinstance(loss, Tensor):
                self.check_one(loss, i)
                last = i
            elif loss is not None and not callable(loss):
                raise TypeError(
                    f"{self._given(i)} must be a tensor, a callable that returns one, or None where the batch has no "
                    f"labels for it, got {loss!r}"
                )
            is_any = is_any or loss is not None
        if not is_any and not may_all_be_absent:
            raise ValueError("every loss is None, so there is nothing to backpropagate; leave this batch out")
        return last

    def check_one(self, loss: Tensor, index: int) -> None:
        """Raise TypeError unless it is a tensor, ValueError unless of one element and with a graph."""
        if not isinstance(loss, Tensor):
            raise TypeError(f"{self._given(index)} must return a tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(
                f"{self._given(index)} must have one element, got shape {tuple(loss.shape)}; reduce it, e.g. .mean()"
            )
        if not loss.requires_grad:
            raise ValueError(
                f"{self._given(index)} does not require grad, so no gradient can come of it; compute it from the "
                "parameters, outside torch.no_grad() and without .detach() or .item()"
            )

    def _given(self, index: int) -> str:
        """How an error calls one of the losses that were given."""
        return f"losses[{index}]" + (f" ({self.argument(index)})" if self.named else "")

    def with_name(self, error: NonFiniteError) -> FloatingPointError:
        """The error of a backend, which knows rows alone, with the loss's name."""
        return FloatingPointError(nonfinite_message(self.label(error.row)))


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"num_losses[{i}] must be a str, the name of a loss, got {name!r}")
        if not name.strip():
            raise ValueError(
                f"num_losses[{i}] must not be empty, got {name!r}; give every loss a name, or their number"
            )
        if name in names[:i]:
            raise ValueError(f"num_losses must name each loss once, got {name!r} twice in {list(names)}")
    return tuple(names)


def backpropagate(loss: Tensor, retain_graph: bool) -> None:
    """Accumulate the gradient of a loss of one element."""
    loss.backward(torch.ones_like(loss) if loss.dim() else None, retain_graph=retain_graph)
