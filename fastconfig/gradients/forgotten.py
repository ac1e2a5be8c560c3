"""What is easily forgotten in a loop, and said once: the words for it, and whether a GradScaler steps."""

from __future__ import annotations

import sys
import warnings
from typing import Literal

import torch

_MOST_FRAMES = 16
"""Between a GradScaler's step and what looks for it lie those of torch, of schedulers and of wrappers around both."""

Kind = Literal["accumulate", "combine", "fresh rows", "scaler", "shares", "step"]

_WORDS: dict[Kind, str] = {
    "accumulate": (
        "{call} discards gradients of the call before, which were never combined; say accumulate=True to add up "
        "micro-batches, or accumulate=False where that is meant"
    ),
    "combine": (
        "optimizer.step() was called after new rows of a GradientBuffer and without its combine(), so it takes another "
        "gradient than that of these rows, or none; call buf.combine() first, or buf.zero() where the rows were only "
        "to be looked at"
    ),
    "fresh rows": (
        "combine takes {losses} as recorded before the last combine, beside losses of this step; give backward None "
        "for a loss without labels, zero() the rows, or say stale='use'"
    ),
    "scaler": (
        "scaler.step() takes a combination that was not told of the scaler: its norms are those of scaled gradients, "
        "no overflow is found that the method drops, and a method whose answer is not proportional to the gradients "
        "solves another problem; call buf.combine(..., scaler=scaler)"
    ),
    "shares": (
        "optimizer.step() was called over the parameters of a GradientBuffer after combine(sharded=True), which leaves "
        "the combined gradient in segments[i].share and every p.grad None, so nothing is trained; leave sharded out, "
        "or step over shares of your own"
    ),
    "step": (
        "accumulate=True begins anew, as combine() came after the last micro-batch, and no optimizer has stepped "
        "since: that combination is lost; call combine() after all micro-batches of a step"
    ),
}


class Reminder:
    """Warns of what was forgotten, once for each kind of it."""

    def __init__(self) -> None:
        self._said: set[Kind] = set()

    def has_said(self, kind: Kind) -> bool:
        """Whether there is no more to say of it."""
        return kind in self._said

    def say(self, kind: Kind, frames: int, **names: str) -> None:
        """Warn, at the user's line: so many frames up, the caller's being the first."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(_WORDS[kind].format(**names), UserWarning, stacklevel=frames + 1)


def words_for(kind: Kind, **names: str) -> str:
    """What a warning of this kind says."""
    return _WORDS[kind].format(**names)


def frames_to_scaler() -> int:
    """How many frames up an enabled GradScaler's ``step`` was called, the caller's being the first; 0 if by none.

    From the stack, as a scaler tells neither a hook nor most optimizers of itself.
    """
    frame = sys._getframe(1)
    for depth in range(1, _MOST_FRAMES):
        if frame.f_code is _SCALERS_STEP:
            return depth + 1 if frame.f_locals["self"].is_enabled() else 0
        if frame.f_back is None:
            return 0
        frame = frame.f_back
    return 0


_SCALERS_STEP = torch.amp.GradScaler.step.__code__
