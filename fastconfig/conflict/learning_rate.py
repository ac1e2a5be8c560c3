"""ConflictAwareLR: a learning rate that shrinks while the losses' gradients pull against each other."""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastconfig.validation import check_number


class HasCosines(Protocol):
    """What is read of a combination."""

    @property
    def cosines(self) -> Tensor:
        """(m, m) between the gradients; a row of zeros, the diagonal included, for one without a direction."""


class HasCombination(Protocol):
    """What tells of the last combination: ``fc.GradientBuffer``, ``fc.optim.MConFIG``, or an object of yours."""

    @property
    def combination(self) -> HasCosines | None:
        """The last one; None before the first."""


class ConflictAwareLR(LRScheduler):
    """Multiply the learning rates by a factor, smaller while gradients conflict and never above 1.

    At each ``step()`` the worst cosine between two gradients of the last combination decides: under ``threshold`` the
    factor is multiplied by ``shrink``, otherwise by ``grow``, within ``min_factor`` and 1. Where there is no pair of
    gradients to compare (nothing was combined yet, one loss only, zero or non-finite gradients) it stays.

    **It composes with any other scheduler, called before or after it**: the factor is in the groups' ``lr`` only while
    ``optimizer.step()`` runs, so that others, recursive or not, find there what they left. ``get_last_lr()`` tells what
    the next step will use, ``param_groups[i]["lr"]`` what the others say. A checkpoint of the optimizer has no factor
    in it, and that of this scheduler has all of it.

    For parameters on an accelerator the factor is a float32 tensor there, decided without waiting for the device, and
    ``lr`` is a tensor during a step, which torch's optimizers read without waiting only if made with ``fused=True`` or
    ``capturable=True``; a UserWarning says where they were not. ``MConFIG`` always does. On the CPU both are floats.

    Args:
        optimizer: whose steps are scaled.
        buffer: a ``GradientBuffer`` or ``MConFIG``, or any object whose ``combination`` has ``cosines`` (m, m) or is
            None.
        threshold: the cosine, -1 to 1, under which gradients count as in conflict.
        shrink: between 0 and 1.
        grow: 1 or more.
        min_factor: the least factor, 0 to 1.
        last_epoch: as in every scheduler of torch; -1 to begin.

    Raises:
        TypeError: no optimizer, no such buffer, or an argument that is no number.
        ValueError: a number out of its range.

    Example:
        >>> import torch, fastconfig as fc
        >>> model, x = torch.nn.Linear(1, 1, bias=False), torch.ones(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> buf = fc.GradientBuffer(model.parameters(), num_losses=2)
        >>> scheduler = fc.ConflictAwareLR(optimizer, buf, threshold=0.0, shrink=0.5)
        >>> buf.backward([model(x).mean(), -2 * model(x).mean()])
        >>> info = buf.combine()
        >>> optimizer.step()
        >>> scheduler.step()
        >>> scheduler.get_last_lr()
        [0.05]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        buffer: HasCombination,
        threshold: float = -0.5,
        shrink: float = 0.5,
        grow: float = 1.1,
        *,
        min_factor: float = 0.01,
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not hasattr(buffer, "combination"):
            raise TypeError(
                f"buffer must have a combination, as fc.GradientBuffer and fc.optim.MConFIG do, got "
                f"{type(buffer).__name__}"
            )
        check_number("threshold", threshold, -1.0, 1.0)
        check_number("shrink", shrink, 0.0, 1.0, ends=False)
        check_number("grow", grow, 1.0)
        check_number("min_factor", min_factor, 0.0, 1.0)
        self._buffer = buffer
        self.threshold = threshold
        self.shrink = shrink
        self.grow = grow
        self.min_factor = min_factor
        self._factor = _unit_factor(optimizer)
        super().__init__(optimizer, last_epoch)
        _scale_steps(optimizer, self)

    def __repr__(self) -> str:
        return (
            f"ConflictAwareLR(factor={float(self._factor):.4g}, threshold={self.threshold:g}, shrink={self.shrink:g}, "
            f"grow={self.grow:g}, min_factor={self.min_factor:g})"
        )

    @property
    def factor(self) -> float | Tensor:
        """What the learning rates are multiplied by; a 0-d tensor, a copy, for parameters on an accelerator."""
        return self._factor.clone() if isinstance(self._factor, Tensor) else self._factor

    def step(self, epoch: int | None = None) -> None:
        """Adapt the factor to the last combination. Call it after ``optimizer.step()``.

        Args:
            epoch: deprecated by torch; it does not change the factor.
        """
        if self._step_count > 0:  # else torch's constructor calls, before there was a step
            self._adapt()
        super().step(epoch)

    def get_lr(self) -> list[float | Tensor]:
        """What the other schedulers left in the groups; ``get_last_lr`` tells the product with the factor."""
        return [lr.clone() if isinstance(lr, Tensor) else lr for lr in self._plain()]

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rate that each group's next step will use."""
        return [self._factor * lr for lr in self._plain()]

    def state_dict(self) -> dict[str, Any]:
        """All of it but optimizer and buffer."""
        return {**{k: v for k, v in super().state_dict().items() if k != "_buffer"}, "_factor": self.factor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a ``state_dict``, of any device.

        Raises:
            ValueError: not the state of a ConflictAwareLR; nothing has changed.
        """
        if "_factor" not in state_dict:
            raise ValueError(
                f"state_dict must be that of a ConflictAwareLR, which has '_factor', got {sorted(state_dict)}"
            )
        state = dict(state_dict)
        factor = state.pop("_factor")
        super().load_state_dict(state)
        self._set_factor(factor)

    def _plain(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def _adapt(self) -> None:
        combination = self._buffer.combination
        if combination is None:
            return
        worst = worst_cosine(combination.cosines.detach())
        factor = torch.as_tensor(self._factor, dtype=torch.float64, device=worst.device)
        shrunk = (factor * self.shrink).clamp(min=self.min_factor)
        grown = (factor * self.grow).clamp(max=1.0)
        known = torch.where(worst < math.inf, grown, factor)
        self._set_factor(torch.where(worst < self.threshold, shrunk, known))

    def _set_factor(self, factor: float | Tensor) -> None:
        if isinstance(self._factor, Tensor):
            self._factor.copy_(torch.as_tensor(factor))  # in place: a captured step reads this memory
        else:
            self._factor = float(factor)

    @contextmanager
    def _applied(self) -> Generator[None, None, None]:
        """Have the factor in the groups' ``lr``, and afterwards, whatever happens, the very values of before."""
        groups, plain = list(self.optimizer.param_groups), self._plain()
        for group, lr in zip(groups, self.get_last_lr(), strict=True):
            group["lr"] = lr
        try:
            yield
        finally:
            for group, lr in zip(groups, plain, strict=True):
                group["lr"] = lr


def worst_cosine(cosines: Tensor) -> Tensor:
    """0-d, the least cosine between two gradients that both have a direction; inf where there are no two."""
    directed = cosines.diagonal() > 0
    pairs = (directed.unsqueeze(0) & directed.unsqueeze(1)).triu(1)
    return torch.where(pairs, cosines, math.inf).amin()


def _unit_factor(optimizer: Optimizer) -> float | Tensor:
    """1, as a tensor where the parameters are on an accelerator; float32, as fused optimizers want ``lr``."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device if parameters else torch.device("cpu")
    if device.type == "cpu":
        return 1.0
    for i, group in enumerate(optimizer.param_groups):
        asked = {group[name] for name in ("fused", "capturable") if name in group}
        if asked and not any(asked):
            warnings.warn(
                f"each step of {type(optimizer).__name__} will wait for {device} to read the learning rate of group "
                f"{i}, a tensor now; make the optimizer with fused=True or capturable=True",
                UserWarning,
                stacklevel=3,
            )
            break
    return torch.ones((), dtype=torch.float32, device=device)


def _scale_steps(optimizer: Optimizer, scheduler: ConflictAwareLR) -> None:
    """Have every ``optimizer.step()`` run under the scheduler's factor, as long as the scheduler lives.

    A pair of torch's step hooks would leave the factor behind where a step raises.
    """
    step, alive = optimizer.step, weakref.ref(scheduler)

    @functools.wraps(step)
    def scaled(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the optimizer's own signature
        scheduler = alive()
        if scheduler is None:
            return step(*args, **kwargs)
        with scheduler._applied():
            return step(*args, **kwargs)

    optimizer.step = scaled  # type: ignore[method-assign]
