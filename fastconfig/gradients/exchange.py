"""Gradients of replicas brought together: each rank gets the average of its share of the columns, loss by loss.

A loss's gradient is copied to one vector when its block ends, and travels while the next loss is backpropagated:
n·(W-1)/W elements a rank, half of what an all-reduce takes, as no rank gets what it does not read. The combined
gradient goes back by one all-gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastconfig.backends.rows import Rows
from fastconfig.gradients import landing
from fastconfig.gradients.across import Held, Tally, Together
from fastconfig.gradients.layout import ALIGNED, Region
from fastconfig.gradients.memory import aligned_rows
from fastconfig.gradients.ranks import Ranks
from fastconfig.ops import backend_for

if TYPE_CHECKING:
    from torch.distributed import Work


class SharedSegment(landing.Segment):
    """A run of columns that every rank has, each keeping the rows of its share.

    Args:
        parameters: of one dtype of their gradients, on one device.
        count: m.
        ranks: among which the columns are shared out.
        wire_dtype: of what travels; None for the rows' own.

    Attributes:
        rows: (m, s), s = n_segment / W rounded up: this rank's share. Columns past the last are zero.
        landing: (1, n_segment), a whole gradient, until it has travelled.
        grad: (n_segment,) the combined gradient; where it is left in shares, of no meaning.
        share: (s,) this rank's share of it.
        columns: the first column of the share, and the last but not with it.
    """

    def __init__(
        self, parameters: Sequence[Tensor], count: int, ranks: Ranks, wire_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(parameters, 0)
        each = -(-self.n // ranks.count)
        each += -each % ALIGNED
        self._ranks = ranks
        self._wire_dtype = wire_dtype or self.dtype
        self._whole = aligned_rows(1, each * ranks.count, self.dtype, self.device)
        self.landing = self._whole[:, : self.n]
        self._sent = self._arriving = torch.empty(0, each, dtype=self._wire_dtype, device=self.device)
        self.block = self.rows = aligned_rows(count, each, self.dtype, self.device)  # nothing pads a share
        self.description = Rows(count, each, self.dtype, self.device, self.rows, ())
        self._combined = aligned_rows(1, each * ranks.count, self.dtype, self.device)[0]
        self.grad = self._combined[: self.n]
        self.share = torch.zeros(each, dtype=self.dtype, device=self.device)
        self.columns = min(ranks.rank * each, self.n), min((ranks.rank + 1) * each, self.n)
        self.regions = [Region((ranks.rank,), 0, each)]

    def numbers(self, begin: int) -> list[tuple[int, int, int]]:
        """Which columns of the whole model the share is, where the segment begins at ``begin``: as ``Layout`` tells."""
        first, last = self.columns
        return [(0, begin + first, last - first)] if first < last else []

    def send(self) -> Work | None:
        """Have the landed gradient travel."""
        if self.device.type == "cpu":
            # gloo reduces all and hands out shares; so exchange, and add up here, in the ranks' order, rounding once.
            return self.send_own()
        self._make_room(1)
        return self._ranks.start_averaging(self._sent, self._arriving[0])

    def send_own(self) -> Work | None:
        """Have the landed gradient travel, to be told from those of the other ranks."""
        self._make_room(self._ranks.count)
        return self._ranks.start_exchange(self._sent, self._arriving.view(-1))

    def _make_room(self, parts: int) -> None:
        """For what is sent, and so many shares that arrive."""
        self._sent = self._whole.view(-1).to(self._wire_dtype)
        if len(self._arriving) < parts:
            self._arriving = self._arriving.new_empty(parts, len(self.share))

    def receive(self, row: int, adds: bool) -> None:
        """Put what has arrived into a row, or add it."""
        if adds:
            before = self.rows[row].clone()
        if self.device.type == "cpu":
            self._average(range(self._ranks.count), self.rows[row])
        else:
            self.rows[row].copy_(self._arriving[0])
        if adds:
            self.rows[row].add_(before)

    def receive_own(self, tasks: Sequence[int]) -> None:
        """Put what has arrived into the rows of the ranks' own losses, those of one loss averaged."""
        for row in range(len(self.rows)):
            self._average([rank for rank, task in enumerate(tasks) if task == row], self.rows[row])

    def _average(self, ranks: Sequence[int], out: Tensor) -> None:
        """Write the average of what these ranks have sent: added up in their order in float64, and rounded once."""
        weights = torch.zeros(self._ranks.count, dtype=torch.float64, device=self.device)
        weights[list(ranks)] = 1.0 / max(1, len(ranks))  # what has no weight is not read
        arriving = self._arriving.to(self.dtype)
        rows = Rows(len(arriving), len(self.share), self.dtype, self.device, arriving, ())
        backend_for(self.device, None, traced=False).apply(rows, weights, out)

    def gather(self) -> None:
        """Give every rank the whole combined gradient."""
        if self._wire_dtype == self.dtype:
            self._ranks.gather_shares(self._combined, self.share)
            return
        whole = torch.empty_like(self._combined, dtype=self._wire_dtype)
        self._ranks.gather_shares(whole, self.share.to(self._wire_dtype))
        self._combined.copy_(whole)


def together_over(segments: Sequence[SharedSegment], ranks: Ranks, num_losses: int) -> Together:
    """The combination of shares: every rank owns what it keeps."""
    parts, begin = [], 0
    for segment in segments:
        first, _ = segment.columns
        parts.append(Held(segment.description, segment.share, segment.regions, first, segment.numbers(begin)))
        begin += segment.n
    count = sum(len(segment.parameters) for segment in segments)
    return Together(ranks, parts, range(count), count, num_losses)


def make_equal(parameters: Sequence[Tensor], ranks: Ranks) -> None:
    """Give every rank rank 0's parameters, as DistributedDataParallel does: replicas that begin apart stay apart.

    Raises:
        RuntimeError: the ranks have other parameters.
    """
    kinds = [(tuple(parameter.shape), str(parameter.dtype)) for parameter in parameters]
    told = ranks.gather(kinds)
    if other := next((rank for rank, theirs in enumerate(told) if theirs != told[0]), 0):
        raise RuntimeError(
            f"sync= is for replicas, and rank {other} has other parameters than rank 0 ({len(told[other])} and "
            f"{len(told[0])}, or of other shapes or dtypes); give group= and local= where ranks hold different parts"
        )
    for parameter in parameters:
        ranks.broadcast(parameter.detach())


class SharedRows(landing.GradientRows[SharedSegment]):
    """Rows over the parameters of replicas: every rank keeps its share of each row, averaged over the ranks.

    Every rank records the same losses in the same order; one without labels takes part with zeros.

    Args:
        segments: the columns, in the order of the parameters.
        count: m.
        owner: the class that errors name.
        vectors: as of ``GradientRows``.
        ranks: who takes part.
    """

    def __init__(self, segments: Sequence[SharedSegment], count: int, owner: str, vectors: int, ranks: Ranks) -> None:
        super().__init__(segments, count, owner, vectors, hooks=False)
        self._ranks = ranks
        self._under_way: list[tuple[SharedSegment, Work | None, int, bool]] = []

    def zero(self) -> None:
        """As of ``GradientRows``."""
        self.settle()
        super().zero()

    def forget(self, row: int) -> None:
        """As of ``GradientRows``."""
        self.settle()
        super().forget(row)

    def leave_out(self, row: int, adds: bool) -> None:
        """Take part with zeros: another rank may have a gradient."""
        self._land_and_send(row, adds, is_left_out=True)

    def close(self, row: int, adds: bool) -> None:
        """Bring what ``p.grad`` holds on its way, and leave ``p.grad`` None."""
        self._landing.home = None
        self._land_and_send(row, adds, is_left_out=False)

    def close_own(self, row: int) -> list[int]:
        """As ``close``, where every rank has backpropagated a loss of its own: all rows begin anew.

        Returns:
            The losses that some rank has backpropagated.
        """
        self._landing.home = None
        tasks = self.call_roll(None, row)
        self.settle()
        super().close(row, False)
        flags = self.reached[row]
        for segment in self.segments:
            work = segment.send_own()
            if work is not None:
                work.wait()
            segment.receive_own(tasks)
        self.reached[:] = [flags if i == row else self._nothing for i in range(len(self.reached))]
        return sorted(set(tasks))

    def settle(self) -> None:
        """Wait until what is under way has arrived."""
        under_way, self._under_way = self._under_way, []
        for segment, work, row, adds in under_way:
            if work is not None:
                work.wait()
            segment.receive(row, adds)

    def call_roll(self, error: Exception | None, number: int = 0) -> list[int]:
        """What every rank does before each exchange: say that it takes part, or what it has met.

        Args:
            error: what has gone wrong here, which every rank then raises.
            number: what this rank has to tell.

        Returns:
            What each rank told.
        """
        tally = Tally(self._ranks, self.segments[0].device, self._ranks.count)
        (told,) = tally.parts
        told[self._ranks.rank] = float(number)
        tally.take_part(error)
        return [int(value) for value in told.tolist()]

    def _land_and_send(self, row: int, adds: bool, is_left_out: bool) -> None:
        self.call_roll(None)
        self.settle()  # until then the vector may not be overwritten
        before = self.reached[row]
        if is_left_out:
            for segment in self.segments:
                segment.landing.zero_()
            self.reached[row] = self._nothing
        else:
            super().close(row, False)
        if adds:
            self.reached[row] = landing.either(before, self.reached[row])
        self._under_way = [(segment, segment.send(), row, adds) for segment in self.segments]

    def _row(self, row: int) -> landing.Row:
        del row  # all land in one vector
        return super()._row(0)
