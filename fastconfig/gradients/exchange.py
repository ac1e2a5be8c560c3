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


class Exchange:
    """A vector that every rank has its own of, averaged over the ranks: each gets its share of the average.

    Args:
        n: its length.
        dtype: of its elements.
        device: where it lies.
        ranks: who has one.
        wire_dtype: of what travels; None for its own.

    Attributes:
        vector: (1, n) to be filled.
        each: how many columns a share has: n / W rounded up, so that shares begin at multiples of 64.
        columns: the first column of this rank's share, and the last but not with it.
    """

    def __init__(
        self, n: int, dtype: torch.dtype, device: torch.device, ranks: Ranks, wire_dtype: torch.dtype | None = None
    ) -> None:
        each = -(-n // ranks.count)
        self.each = each = each + -each % ALIGNED
        self.columns = min(ranks.rank * each, n), min((ranks.rank + 1) * each, n)
        self._ranks, self._dtype, self._device = ranks, dtype, device
        self._wire_dtype = wire_dtype or dtype
        self._whole = aligned_rows(1, each * ranks.count, dtype, device)
        self.vector = self._whole[:, :n]
        self._sent = self._arriving = torch.empty(0, each, dtype=self._wire_dtype, device=device)

    def send(self) -> Work | None:
        """Have the vector travel."""
        if self._device.type == "cpu":
            # gloo reduces all and hands out shares; so exchange, and add up here, in the ranks' order, rounding once.
            return self.send_own()
        self._make_room(1)
        return self._ranks.start_averaging(self._sent, self._arriving[0])

    def send_own(self) -> Work | None:
        """Have the vector travel, to be told from those of the other ranks."""
        self._make_room(self._ranks.count)
        return self._ranks.start_exchange(self._sent, self._arriving.view(-1))

    def receive(self, out: Tensor) -> None:
        """Write the share of the average, once it has arrived, to (each,)."""
        if self._device.type == "cpu":
            self.receive_of(range(self._ranks.count), out)
        else:
            out.copy_(self._arriving[0])

    def receive_of(self, ranks: Sequence[int], out: Tensor) -> None:
        """Write the average of what these ranks have sent: added up in their order in float64, and rounded once."""
        weights = torch.zeros(self._ranks.count, dtype=torch.float64, device=self._device)
        weights[list(ranks)] = 1.0 / max(1, len(ranks))  # what has no weight is not read
        arriving = self._arriving.to(self._dtype)
        rows = Rows(len(arriving), self.each, self._dtype, self._device, arriving, ())
        backend_for(self._device, None, traced=False).apply(rows, weights, out)

    def gather(self, share: Tensor, whole: Tensor | None = None) -> None:
        """Give every rank all shares: in ``whole`` (W · each,), or in the vector itself."""
        whole = self._whole.view(-1) if whole is None else whole
        if self._wire_dtype == self._dtype:
            self._ranks.gather_shares(whole, share)
            return
        travelled = torch.empty_like(whole, dtype=self._wire_dtype)
        self._ranks.gather_shares(travelled, share.to(self._wire_dtype))
        whole.copy_(travelled)

    def _make_room(self, parts: int) -> None:
        """For what is sent, and so many shares that arrive."""
        self._sent = self._whole.view(-1).to(self._wire_dtype)
        if len(self._arriving) < parts:
            self._arriving = self._arriving.new_empty(parts, self.each)


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
        self.exchange = Exchange(self.n, self.dtype, self.device, ranks, wire_dtype)
        each, self.landing, self.columns = self.exchange.each, self.exchange.vector, self.exchange.columns
        self.block = self.rows = aligned_rows(count, each, self.dtype, self.device)  # nothing pads a share
        self.description = Rows(count, each, self.dtype, self.device, self.rows, ())
        self._combined = aligned_rows(1, each * ranks.count, self.dtype, self.device)[0]
        self.grad = self._combined[: self.n]
        self.share = torch.zeros(each, dtype=self.dtype, device=self.device)
        self.regions = [Region((ranks.rank,), 0, each)]

    def numbers(self, begin: int) -> list[tuple[int, int, int]]:
        """Which columns of the whole model the share is, where the segment begins at ``begin``: as ``Layout`` tells."""
        first, last = self.columns
        return [(0, begin + first, last - first)] if first < last else []

    def receive(self, row: int, adds: bool) -> None:
        """Put what has arrived into a row, or add it."""
        before = self.rows[row].clone() if adds else None
        self.exchange.receive(self.rows[row])
        if before is not None:
            self.rows[row].add_(before)

    def receive_own(self, tasks: Sequence[int]) -> None:
        """Put what has arrived into the rows of the ranks' own losses, those of one loss averaged."""
        for row in range(len(self.rows)):
            self.exchange.receive_of([rank for rank, task in enumerate(tasks) if task == row], self.rows[row])

    def gather(self) -> None:
        """Give every rank the whole combined gradient."""
        self.exchange.gather(self.share, self._combined)


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
        self._exchange = Exchange(self.n, self.dtype, self.device, ranks)
        self._share = torch.empty(self._exchange.each, dtype=self.dtype, device=self.device)
        self.landing = self._exchange.vector

    def average(self, row: int, adds: bool) -> None:
        """Put the average of what has landed on the ranks into a row, or add it."""
        work = self._exchange.send()
        if work is not None:
            work.wait()
        self._exchange.receive(self._share)
        self._exchange.gather(self._share)
        self.rows[row].add_(self.landing[0]) if adds else self.rows[row].copy_(self.landing[0])


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
            work = segment.exchange.send_own()
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
        self._under_way = [(segment, segment.exchange.send(), row, adds) for segment in self.segments]

    def _row(self, row: int) -> landing.Row:
        del row  # all land in one vector
        return super()._row(0)


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
