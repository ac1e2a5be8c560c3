"""M-ConFIG's step, once a backend: ``Segment``, as ``reference`` defines it, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastconfig import backends
from fastconfig.backends.moments import Decision, Ledger, Moments, Piece, Recorded, StepRule
from fastconfig.backends.momentum import cpu, reference, triton
from fastconfig.backends.rules import ConFIGRule

__all__ = ["Segment", "segment_on"]


class Segment(Protocol):
    """What every backend's ``Segment`` provides; the meaning of each method is in ``reference``."""

    def products(self, recorded: Recorded, scales: Tensor, beta1: float) -> Tensor:
        """The products of the new averages with all, (k, m) float64."""

    def update(self, recorded: Recorded, rule: StepRule, decision: Decision) -> None:
        """Write averages, second moment and parameters."""

    def update_square(self, recorded: Recorded, rule: StepRule, decision: Decision) -> Tensor:
        """|update|², 0-d float64."""

    def step(
        self,
        ledger: Ledger,
        recorded: Recorded,
        rule: StepRule,
        method: ConFIGRule,
        scales: Tensor,
        found_inf: Tensor | None = None,
    ) -> None:
        """All of it, for one segment and ConFIG."""


_SEGMENTS: dict[str, Callable[[Moments, Sequence[Piece]], Segment]] = {
    "reference": reference.Segment,
    "cpu": cpu.Segment,
    "triton": triton.Segment,
}


def segment_on(device: torch.device, backend: str | None, moments: Moments, pieces: Sequence[Piece]) -> Segment:
    """A segment for tensors on ``device``, by the backend that ``backends.select`` chooses.

    Raises:
        ValueError, RuntimeError: as ``backends.select``.
    """
    selected = backends.select(device, backend)
    name = next(name for name, module in backends.BACKENDS.items() if module is selected)
    return _SEGMENTS[name](moments, pieces)
