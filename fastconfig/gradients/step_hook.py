"""Buffers hear of every optimizer's step: whether rows were not combined before it, and what it steps besides."""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Protocol

from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


class Listener(Protocol):
    """What hears of an optimizer's step."""

    def before_step(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step, over parameters of this buffer or others."""

    def holds(self, parameter: Tensor) -> bool:
        """Whether the parameter has columns in this buffer."""


_LISTENERS: list[weakref.ref[Listener]] = []
"""Read as a whole: another thread may make a buffer while one steps, which a set does not bear."""


def watch(buffer: Listener) -> None:
    """Tell this buffer of every optimizer's step, as long as it lives."""
    _LISTENERS[:] = [*(reference for reference in _LISTENERS if reference() is not None), weakref.ref(buffer)]
    _register()


def is_held(parameter: Tensor) -> bool:
    """Whether a living buffer has columns of the parameter."""
    return any(buffer.holds(parameter) for buffer in _living())


def is_watched_by_others() -> bool:
    """Whether hooks for every optimizer's step are registered beside the one of this module."""
    return len(torch_optimizer._global_optimizer_pre_hooks) > _register.cache_info().currsize or bool(
        torch_optimizer._global_optimizer_post_hooks
    )


@lru_cache(maxsize=1)
def _register() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    del args, kwargs
    if is_dynamo_compiling():
        return
    for buffer in _living():
        buffer.before_step(optimizer)


def _living() -> list[Listener]:
    return [buffer for reference in tuple(_LISTENERS) if (buffer := reference()) is not None]
