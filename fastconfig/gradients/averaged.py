"""Gradients of replicas averaged over the ranks as each block ends, whole on every rank: for ``MConFIG``.

One backward pass a step: there is no next loss to hide the exchange behind, and an optimizer shows the gradient that it
takes in ``p.grad``. What travels is what an all-reduce takes, and is added in the ranks' order in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastconfig.gradients import landing
from fastconfig.gradients.across import Tally
from fastconfig.gradients.exchange import average_of
from fastconfig.gradients.layout import share_of
from fastconfig.gradients.memory import aligned_rows
from fastconfig.gradients.ranks import Ranks


class AveragedSegment(landing.Segment):
    """A run of columns that every rank has, with whole rows of averaged gradients.

    Args:
        parameters: of one dtype of their gradients, on one device.
        count: k.
        dtype: of the rows.
        ranks: who has them.

    Attributes:
        landing: (1, n_segment), this rank's gradient, until it is averaged.
    """

    def __init__(self, parameters: Sequence[Tensor], count: int, dtype: torch.dtype, ranks: Ranks) -> None:
        super().__init__(parameters, count, dtype)
        each = share_of(self.n, ranks.count)
        self._ranks = ranks
        self._whole = aligned_rows(1, each * ranks.count, self.dtype, self.device)
        self._arriving = self._whole.new_empty(ranks.count if self.device.type == "cpu" else 1, each)
        self._share = self._whole.new_empty(each)
        self.landing = self._whole[:, : self.n]

    def average(self, row: int, adds: bool) -> None:
        """Put the average of what has landed on the ranks into a row, or add it."""
        start = self._ranks.start_exchange if self.device.type == "cpu" else self._ranks.start_averaging
        work = start(self._whole.view(-1), self._arriving.view(-1))
        if work is not None:
            work.wait()
        if self.device.type == "cpu":
            average_of(self._arriving, range(self._ranks.count), self._share)
        else:
            self._share.copy_(self._arriving[0])
        self._ranks.gather_shares(self._whole.view(-1), self._share)
        self.rows[row].add_(self.landing[0]) if adds else self.rows[row].copy_(self.landing[0])


class AveragedRows(landing.GradientRows[AveragedSegment]):
    """Rows over the parameters of replicas, averaged over the ranks as each block ends: for ``MConFIG``.

    Args:
        segments, count, owner, vectors: as of ``GradientRows``.
        ranks: who takes part.
    """

    def __init__(self, segments: Sequence[AveragedSegment], count: int, owner: str, vectors: int, ranks: Ranks) -> None:
        super().__init__(segments, count, owner, vectors, hooks=False)
        self._ranks = ranks
        self._averaged: list[landing.Shown | None] = [None] * count

    def shown(self, row: int) -> landing.Shown:
        """A row seen as one tensor a parameter."""
        found = self._averaged[row]
        if found is None:
            views = [view for segment in self.segments for view in segment.views(segment.rows[row])]
            found = self._averaged[row] = landing.Shown(views, self.parameters)
        return found

    def close(self, row: int, adds: bool) -> None:
        """Average what ``p.grad`` holds over the ranks, bring it into the row, or add it, and leave ``p.grad`` None."""
        before = self.reached[row]
        super().close(row, False)
        here, self.reached[row] = self.reached[row], before
        anywhere = self.call_roll(None, here)
        for segment in self.segments:
            segment.average(row, adds)
        self.reached[row] = landing.either(before, anywhere) if adds else anywhere

    def call_roll(self, error: Exception | None, reached: Sequence[bool] = ()) -> tuple[bool, ...]:
        """What every rank does before gradients are averaged: say that it takes part, or what it has met.

        Args:
            error: what has gone wrong here, which every rank then raises.
            reached: of each parameter, whether it has a gradient here.

        Returns:
            Whether it has one on any rank.
        """
        tally = Tally(self._ranks, self.segments[0].device, len(self.parameters))
        (flags,) = tally.parts
        if reached:
            flags.copy_(torch.tensor(reached))
        tally.take_part(error)
        return tuple(flags.gt(0).tolist())

    def _row(self, row: int) -> landing.Row:
        del row  # all land in one vector
        return super()._row(0)
