"""M-ConFIG's step, once a backend: ``Segment``, as ``reference`` defines it, and the choice between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastconfig import backends
from fastconfig.backends.momentum import cpu, reference
from fastconfig.backends.rules import ConFIGRule
from fastconfig.moments import Decision, Ledger, Moments, Piece, Recorded, StepRule

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


def segment_on(device: torch.device, backend: str | None, moments: Moments, pieces: Sequence[Piece]) -> Segment:
    """A segment for tensors on ``device``, by the backend that ``backends.select`` chooses.

    Raises:
        ValueError, RuntimeError: as ``backends.select``.
    """
    if backends.select(device, backend) is backends.BACKENDS["cpu"]:
        return cpu.Segment(moments, pieces)
    return reference.Segment(moments, pieces)
