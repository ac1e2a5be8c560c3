"""Parameters outside a buffer, task heads as a rule: whether they come to a step with an old gradient."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastconfig.gradients import step_hook
from fastconfig.gradients.landing import GradientRows, Place

_MOST_NODES = 100_000
"""Of an autograd graph that are looked at, 60 ms: this is a help, not a guarantee."""


class OutsideParameters:
    """Looks once whether the heads outside a buffer gather their gradients over the steps, as without ``zero_grad()``.

    The graphs of the first step's losses, where they are given, and the optimizer that steps over the buffer's
    parameters tell which parameters are outside; the second step, whether they still have the gradient of the first.
    Then it is over: no later step pays for it.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._parameters: dict[int, Parameter] = {}
        self._left: list[tuple[Tensor, Tensor]] = []

    @property
    def is_done(self) -> bool:
        """Whether it has looked."""
        return self._steps >= 2

    def before(self, losses: Sequence[Tensor], rows: GradientRows[Place], frames: int) -> None:
        """A step begins, with these losses' graphs. The user's line is so many frames up, the caller's the first."""
        if self._steps == 1:
            self._look(frames + 2)
        for loss in losses if self._steps == 0 else ():
            self.see(loss, rows)

    def see(self, loss: Tensor, rows: GradientRows[Place]) -> None:
        """Note the parameters outside that a loss of the first step reaches."""
        if self._steps == 0:
            self._parameters.update((id(p), p) for p in _parameters_of(loss) if not rows.has(p))

    def after(self) -> None:
        """A step's backward passes are over."""
        if self._steps == 0:
            self._steps = 1
            self._left = [(p, p.grad) for p in self._parameters.values() if p.grad is not None]
            self._parameters = {}

    def stepping(self, parameters: Sequence[Tensor], rows: GradientRows[Place]) -> None:
        """An optimizer steps over the buffer's parameters and others."""
        self._steps = 1
        known = {id(parameter) for parameter, _ in self._left}
        self._left += [(p, p.grad) for p in parameters if p.grad is not None and not rows.has(p) and id(p) not in known]

    def _look(self, frames: int) -> None:
        self._steps = 2
        left, self._left = self._left, []
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return  # to look at values would wait, which a captured graph cannot
        old = [
            parameter
            for parameter, grad in left
            if parameter.grad is grad and not step_hook.is_held(parameter) and bool(grad.any())
        ]
        if old:
            warnings.warn(
                f"{len(old)} parameters outside the GradientBuffer, the first of shape {tuple(old[0].shape)}, still "
                "have the gradient of the step before, and add this one's to it; call optimizer.zero_grad() in every "
                "step, as without a buffer",
                UserWarning,
                stacklevel=frames,
            )


def _parameters_of(loss: Tensor) -> Iterator[Parameter]:
    """The parameters that a loss's graph leads to."""
    for node in islice(_nodes_of(loss), _MOST_NODES):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Parameter):
            yield leaf


def _nodes_of(loss: Tensor) -> Iterator[Any]:
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(next_node for next_node, _ in node.next_functions)
