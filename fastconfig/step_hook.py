"""What is asked before an optimizer's step: whether a buffer has rows that were not combined."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.optim import optimizer as torchs
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


class Uncombined(Protocol):
    """What may have to be combined before an optimizer steps."""

    def has_new_rows(self) -> bool:
        """Whether rows were recorded and not combined since."""

    def holds_any(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it is over one of these."""

    def tell_not_combined(self) -> None:
        """Warn that an optimizer steps without them."""


_LIVING: weakref.WeakSet[Uncombined] = weakref.WeakSet()


def watch(buffer: Uncombined) -> None:
    """Have every optimizer's step ask this buffer first, as long as it lives."""
    _LIVING.add(buffer)
    _register()


def is_watched_by_others() -> bool:
    """Whether hooks for every optimizer's step are registered beside the one of this module."""
    return len(torchs._global_optimizer_pre_hooks) > _register.cache_info().currsize or bool(
        torchs._global_optimizer_post_hooks
    )


@lru_cache(maxsize=1)
def _register() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    del args, kwargs
    if is_dynamo_compiling():
        return
    for buffer in _LIVING:
        if buffer.has_new_rows() and any(buffer.holds_any(group["params"]) for group in optimizer.param_groups):
            buffer.tell_not_combined()
