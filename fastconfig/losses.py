"""How many losses there are, and how they are called."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex

from torch import Tensor

from fastconfig.backends.rules import NonFiniteError, nonfinite_message


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
