"""The processes that train one model together, and the few numbers that travel between them, by torch.distributed."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

Value = TypeVar("Value")


class Ranks:
    """The ranks of a process group, as one of them sees it. Every method is a collective call of all of them.

    Args:
        group: the group; this process is in it.

    Attributes:
        rank: this process's number in the group.
        count: W, how many there are.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.count = dist.get_world_size(group)

    def gather(self, value: Value) -> list[Value]:
        """What each rank told, in their order."""
        told: list[Any] = [None] * self.count
        dist.all_gather_object(told, value, group=self.group)
        return told

    def sum(self, numbers: Tensor) -> None:
        """Replace numbers by their sums over the ranks."""
        dist.all_reduce(numbers, group=self.group)

    def total(self, numbers: Tensor) -> None:
        """Replace numbers by their sums over the ranks, whose bits are rank 0's on every rank."""
        self.sum(numbers)
        self.broadcast(numbers)

    def broadcast(self, numbers: Tensor, rank: int = 0) -> None:
        """Replace numbers by those of one rank."""
        dist.broadcast(numbers, dist.get_global_rank(self.group, rank), group=self.group)

    def start_exchange(self, sent: Tensor, received: Tensor) -> Work | None:
        """Begin to give each rank its W-th of what is sent; it gets as much from each, in the ranks' order."""
        work: Work | None = dist.all_to_all_single(received, sent, group=self.group, async_op=True)
        return work

    def start_averaging(self, sent: Tensor, received: Tensor) -> Work | None:
        """Begin to give each rank the average of its W-th of what all send."""
        call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # newer and older PyTorch's
        work: Work | None = call(received, sent, dist.ReduceOp.AVG, group=self.group, async_op=True)
        return work

    def gather_shares(self, whole: Tensor, share: Tensor) -> None:
        """Give every rank all shares, one behind the other."""
        call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        call(whole, share, group=self.group)

    def tell(self, value: Value, rank: int = 0) -> Value:
        """What one rank says."""
        told: list[Any] = [value]
        dist.broadcast_object_list(told, dist.get_global_rank(self.group, rank), group=self.group)
        said: Value = told[0]
        return said

    def raise_error_of(self, rank: int, error: Exception | None) -> None:
        """Raise on every rank what one rank has met: there the error itself, elsewhere one that names the rank."""
        known = self.tell(_as_sent(error), rank)
        if error is not None:
            setattr(error, _TOLD, True)
            raise error
        message = f"rank {rank} raised {type(known).__name__}: {known}; the step is over on every rank"
        kinds = (FloatingPointError, ValueError, TypeError)
        told = next((kind for kind in kinds if isinstance(known, kind)), RuntimeError)(message)
        setattr(told, _TOLD, True)
        raise told from known


_TOLD = "_fastconfig_is_told"


def is_told(error: BaseException) -> bool:
    """Whether every rank knows of an error already."""
    return getattr(error, _TOLD, False)


def _as_sent(error: Exception | None) -> Exception | None:
    """The error, or one that says the same, where it cannot travel."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does when it is taken apart
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def is_group(value: object) -> TypeGuard[ProcessGroup]:
    """Whether something is a process group."""
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def world() -> ProcessGroup | None:
    """The default group, where torch.distributed is initialised with more than one process."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD
