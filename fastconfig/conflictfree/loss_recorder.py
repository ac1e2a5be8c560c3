"""Loss recorders: what a momentum operator tells its models of the losses it did not evaluate in this step.

``conflictfree.loss_recorder``.
"""

from __future__ import annotations

from typing import Any, Sequence, Tuple, Union, cast  # noqa: UP035  (users import these names from here)

from torch import Tensor

__all__ = ["LatestLossRecorder", "LossRecorder", "MomentumLossRecorder", "Sequence", "Tuple", "Union"]

Indexes = int | Sequence[int] | Tensor
Loss = float | Tensor
Losses = float | Sequence[Loss] | Tensor


class LossRecorder:
    """Base class of loss recorders: a subclass implements ``record_loss``.

    Args:
        num_losses: how many losses there are.

    Attributes:
        num_losses: as given.
        current_losses: list of the recorded losses; 0.0 for those that have not been.

    Raises:
        ValueError: num_losses under 1.
        TypeError: num_losses is no integer.
    """

    def __init__(self, num_losses: int) -> None:
        self.num_losses = check_count("num_losses", num_losses)
        self.current_losses: list[Loss] = [0.0] * num_losses

    def record_loss(self, losses_indexes: Indexes, losses: Losses) -> list[Loss]:
        """Record the losses with the given indexes.

        Args:
            losses_indexes: the index of a loss, or those of several.
            losses: their values: a number or 0-d tensor, or a sequence or 1-d tensor of such.

        Returns:
            (num_losses,) list: what is recorded of every loss.

        Raises:
            NotImplementedError: always, in this base class.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement record_loss(losses_indexes, losses) -> list")

    def record_all_losses(self, losses: Sequence[Loss] | Tensor) -> list[Loss]:
        """Record all losses, in order, and return what ``record_loss`` does.

        Raises:
            ValueError: a wrong number of losses. (conflictfree: AssertionError.)
        """
        if len(losses) != self.num_losses:
            raise ValueError(f"losses must hold all {self.num_losses} losses, got {len(losses)}; or use record_loss")
        return self.record_loss(list(range(self.num_losses)), losses)

    def _preprocess_losses(self, losses_indexes: Indexes, losses: Losses) -> tuple[list[int], list[Loss]]:
        """Indexes and losses as lists of one length, the indexes 0 to num_losses - 1.

        Unlike conflictfree's, it takes 0-d tensors, integers and arrays.

        Raises:
            IndexError: no such loss.
            ValueError: not as many losses as indexes.
            TypeError: indexes that are no integers, losses that are no sequence.
        """
        indexes = as_indexes("losses_indexes", losses_indexes, self.num_losses)
        values = as_losses(losses)
        check_pairs("losses", len(values), indexes)
        return indexes, values


class LatestLossRecorder(LossRecorder):
    """Gives the latest value of every loss.

    Args:
        num_losses: how many losses there are.
    """

    def record_loss(self, losses_indexes: Indexes, losses: Losses) -> list[Loss]:
        """Record the losses with the given indexes.

        Args:
            losses_indexes: the index of a loss, or those of several.
            losses: their values; a 0-d tensor, too, which conflictfree rejects. They are kept as they are, not copied.

        Returns:
            (num_losses,) list of the latest losses: ``current_losses`` itself, which the next call changes.

        Raises:
            IndexError, ValueError, TypeError: indexes and losses that do not fit. Nothing has been recorded.
        """
        for index, loss in zip(*self._preprocess_losses(losses_indexes, losses), strict=True):
            self.current_losses[index] = loss
        return self.current_losses


class MomentumLossRecorder(LossRecorder):
    """Gives the exponential moving average of every loss, freed of its bias towards the start, as Adam's moments are.

    After t records of loss i: m_i ← β_i m_i + (1 - β_i) L_i, and the average is m_i / (1 - β_i^t).

    conflictfree's cannot run. Here a loss that has not been recorded stays 0.0, and graphs of losses are not kept.

    Args:
        num_losses: how many losses there are.
        betas: β in [0, 1), one for all losses or one each.

    Raises:
        ValueError: a wrong number of betas, or one outside [0, 1).
    """

    def __init__(self, num_losses: int, betas: float | Sequence[float] = 0.9) -> None:
        super().__init__(num_losses)
        self.betas = [betas] * num_losses if isinstance(betas, (int, float)) else list(betas)
        if len(self.betas) != num_losses:
            raise ValueError(f"betas must hold {num_losses} numbers, one a loss, or be one number, got {betas!r}")
        for beta in self.betas:
            check_beta("betas", beta)
        self.m: list[Loss] = [0.0] * num_losses
        self.t = [0] * num_losses

    def record_loss(self, losses_indexes: Indexes, losses: Losses) -> list[Loss]:
        """Record the losses with the given indexes.

        Args:
            losses_indexes: the index of a loss, or those of several.
            losses: their values: a number or 0-d tensor, or a sequence or 1-d tensor of such.

        Returns:
            (num_losses,) new list of the averages: floats or 0-d tensors, as the losses are. Also ``current_losses``.

        Raises:
            IndexError, ValueError, TypeError: indexes and losses that do not fit. Nothing has been recorded.
        """
        for index, loss in zip(*self._preprocess_losses(losses_indexes, losses), strict=True):
            value = loss.detach() if isinstance(loss, Tensor) else loss
            beta = self.betas[index]
            self.t[index] += 1
            self.m[index] = beta * self.m[index] + (1 - beta) * value
        self.current_losses = [
            average / (1 - beta**steps) if steps else 0.0
            for average, beta, steps in zip(self.m, self.betas, self.t, strict=True)
        ]
        return self.current_losses


def as_indexes(name: str, indexes: Indexes, count: int) -> list[int]:
    """``indexes``, one integer or several in any container, as a list of 0 to count - 1.

    Raises:
        TypeError: not integers.
        IndexError: none of the ``count`` there are; negative ones count from the end.
    """
    values: Any = indexes.tolist() if hasattr(indexes, "tolist") else indexes
    if not isinstance(values, Sequence):
        values = [values]
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an int or a sequence of ints, got {indexes!r}")
        if not -count <= value < count:
            raise IndexError(f"{name} must lie in 0 to {count - 1}, got {value}; there are {count} losses")
    return [int(value) % count for value in values]


def as_losses(losses: Losses) -> list[Loss]:
    """``losses``, one number or several in any container, as a list."""
    if isinstance(losses, Tensor):
        return list(losses) if losses.dim() else [losses]
    if hasattr(losses, "__len__"):
        return list(cast("Sequence[Loss]", losses))
    return [losses]


def check_pairs(name: str, given: int, indexes: Sequence[int]) -> None:
    """Raise ValueError unless there are as many values as indexes."""
    if given != len(indexes):
        raise ValueError(f"{name} must hold one entry for each index in {list(indexes)}, got {given}")


def check_count(name: str, count: int) -> int:
    """``count``; TypeError unless it is an integer, ValueError unless it is positive."""
    if isinstance(count, bool) or not hasattr(count, "__index__"):
        raise TypeError(f"{name} must be an int, got {count!r}; pass the number, for instance len(loss_fns)")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def check_beta(name: str, beta: float) -> float:
    """``beta``; ValueError unless it lies in [0, 1)."""
    if not 0 <= beta < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {beta!r}; usual are 0.9 and 0.999")
    return beta
