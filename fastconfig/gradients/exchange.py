"""Gradients of replicas brought together: each rank gets the average of its share of the columns, loss by loss.

Buckets of a loss's gradient travel while the backward pass goes on, and while the next loss is backpropagated:
n·(W-1)/W elements a rank, half of what an all-reduce takes, as no rank gets what it does not read. The combined
gradient goes back by one all-gather.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastconfig.backends.rows import Rows
from fastconfig.gradients import landing
from fastconfig.gradients.across import Held, Tally, Together
from fastconfig.gradients.layout import Region, share_of
from fastconfig.gradients.memory import aligned_rows, fresh
from fastconfig.gradients.parameters import columns_of, shaped_like
from fastconfig.gradients.ranks import Ranks
from fastconfig.ops import backend_for

if TYPE_CHECKING:
    from torch.distributed import Work


BUCKET_BYTES = 25 << 20
"""Of gradients that travel together, as DistributedDataParallel's."""

IN_FLIGHT = 3
"""How many buckets may travel at a time: each takes its own size twice until it has arrived."""


def average_of(parts: Tensor, ranks: Sequence[int], out: Tensor) -> None:
    """Write the average of what these ranks have sent: added up in their order in float64, and rounded once.

    Args:
        parts: (W, s), what each rank has sent.
        ranks: which of them; where there is none, the average is zero.
        out: (s,) overwritten.
    """
    weights = torch.zeros(len(parts), dtype=torch.float64, device=parts.device)
    weights[list(ranks)] = 1.0 / max(1, len(ranks))  # what has no weight is not read
    rows = Rows(len(parts), len(out), parts.dtype, parts.device, parts, ())
    backend_for(parts.device, None, traced=False).apply(rows, weights, out)


class Bucket(NamedTuple):
    """Parameters that follow one another in a segment, and whose gradients travel together."""

    first: int
    last: int
    """Their positions in the segment, the last not with it."""
    begin: int
    end: int
    """Their columns."""
    each: int
    """How many columns a rank's share of them has."""
    at: int
    """Where the share begins in the rows."""


class SharedSegment(landing.Segment):
    """A run of columns that every rank has, each keeping the rows of its share, which is one of every bucket.

    Args:
        parameters: of one dtype of their gradients, on one device.
        count: m.
        ranks: among which the columns are shared out.
        wire_dtype: of what travels; None for the rows' own.

    Attributes:
        buckets: all columns, in order.
        rows: (m, s), s = n_segment / W and what makes shares begin at multiples of 64: this rank's share, bucket by
            bucket. Columns past a bucket's last are zero.
        grad: (n_segment,) the combined gradient; where it is left in shares, of no meaning.
        share: (s,) this rank's share of it.
        runs: which columns of the segment the share is of: (first in the share, first in the segment, how many).
    """

    def __init__(
        self, parameters: Sequence[Tensor], count: int, ranks: Ranks, wire_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(parameters, 0)
        self.wire_dtype = wire_dtype or self.dtype
        self.buckets = self._cut(ranks.count)
        width = sum(bucket.each for bucket in self.buckets)
        self.block = self.rows = aligned_rows(count, width, self.dtype, self.device)  # nothing pads a share
        self.landing = self.rows
        self.description = Rows(count, width, self.dtype, self.device, self.rows, ())
        self.grad = aligned_rows(1, self.n, self.dtype, self.device)[0]
        self.share = torch.zeros(width, dtype=self.dtype, device=self.device)
        widest = max((bucket.each for bucket in self.buckets), default=0)
        self._gathered = fresh(widest * ranks.count, self.wire_dtype, self.device)
        self._ranks = ranks
        self.runs = [run for bucket in self.buckets for run in self._run(bucket)]

    def held(self, index: int, begin: int) -> list[Held]:
        """What this rank holds, bucket by bucket, where the segment has this index and begins at this column."""
        found = []
        for bucket in self.buckets:
            at, each = bucket.at, bucket.each
            first = bucket.begin + self._ranks.rank * each
            found.append(
                Held(
                    rows=self.description.columns(at, at + each),
                    out=self.share[at : at + each],
                    regions=[Region((self._ranks.rank,), 0, each)],
                    segment=index,
                    begin=first,
                    numbers=[(0, begin + there, count) for _, there, count in self._run(bucket)],
                )
            )
        return found

    def gather(self) -> None:
        """Give every rank the whole combined gradient."""
        for bucket in self.buckets:
            share = self.share[bucket.at : bucket.at + bucket.each].to(self.wire_dtype)
            whole = self._gathered[: len(share) * self._ranks.count]
            self._ranks.gather_shares(whole, share)
            self.grad[bucket.begin : bucket.end] = whole[: bucket.end - bucket.begin]

    def _run(self, bucket: Bucket) -> list[tuple[int, int, int]]:
        first = bucket.begin + self._ranks.rank * bucket.each
        count = min(bucket.each, bucket.end - first)
        return [(bucket.at, first, count)] if count > 0 else []

    def _cut(self, ranks: int) -> list[Bucket]:
        ends = [*self.starts[1:], self.n]
        found: list[Bucket] = []
        first = at = 0
        for i, end in enumerate(ends):
            begin = self.starts[first]
            if (end - begin) * self.dtype.itemsize >= BUCKET_BYTES or i == len(ends) - 1:
                each = share_of(end - begin, ranks)
                found.append(Bucket(first, i + 1, begin, end, each, at))
                first, at = i + 1, at + each
        return found


def together_over(segments: Sequence[SharedSegment], ranks: Ranks, num_losses: int) -> Together:
    """The combination of shares: every rank owns what it keeps."""
    parts, begin = [], 0
    for index, segment in enumerate(segments):
        parts += segment.held(index, begin)
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


class _Flight(NamedTuple):
    """A bucket under way."""

    segment: SharedSegment
    bucket: Bucket
    work: Work | None
    sent: Tensor
    arriving: Tensor
    row: int
    adds: bool
    tasks: Sequence[int] | None


class SharedRows(landing.GradientRows[SharedSegment]):
    """Rows over the parameters of replicas: every rank keeps its share of each row, averaged over the ranks.

    Buckets travel in a fixed order, the last first, as the backward pass brings their gradients, and the rest when the
    block ends; then the ranks tell each other whether all is well, and what has changed since it was sent (another
    backward pass in the block, gradients clipped) is sent again. Every rank records the same losses in the same order;
    one without labels takes part with zeros.

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
        self._places: list[tuple[SharedSegment, Bucket, int]] = []  # the last of them the first parameter of the bucket
        position = 0
        for segment in segments:
            self._places += [(segment, bucket, position + bucket.first) for bucket in segment.buckets]
            position += len(segment.parameters)
        self._places.reverse()
        self._place_of = {
            position: place
            for place, (_, bucket, first) in enumerate(self._places)
            for position in range(first, first + bucket.last - bucket.first)
        }
        self._flying: deque[_Flight] = deque()
        self._idle: list[Tensor] = []
        self._is_open = self._streams = False
        self._row_now, self._adds_now, self._next = 0, False, 0
        self._tasks: Sequence[int] | None = None
        self._landed: dict[int, tuple[Tensor, int]] = {}
        self._missing: list[int] = []
        self._again: list[int] = []
        me = weakref.ref(self)
        handles = [
            parameter.register_post_accumulate_grad_hook(partial(_note_landing, me, i))
            for i, parameter in enumerate(self.parameters)
            if parameter.requires_grad
        ]
        weakref.finalize(self, landing.remove_hooks, handles)

    def zero(self) -> None:
        """As of ``GradientRows``."""
        self.settle()
        super().zero()

    def forget(self, row: int) -> None:
        """As of ``GradientRows``."""
        self.settle()
        super().forget(row)

    def open(self, row: int, call: str, adds: bool) -> None:
        """From here on gradients are of this row, and travel as they come, if nothing is to be added to."""
        self.recording = call
        self._row_now, self._adds_now, self._next, self._tasks = row, adds, 0, None
        self._is_open, self._streams = True, not adds
        self._landed = {}
        self._missing = [
            sum(self.parameters[i].requires_grad for i in range(first, first + bucket.last - bucket.first))
            for _, bucket, first in self._places
        ]

    def open_own(self, row: int, call: str) -> None:
        """As ``open``, where every rank backpropagates a loss of its own: all rows begin anew."""
        tasks = self.call_roll(None, row)
        self.open(row, call, adds=False)
        self._tasks = tasks

    def note(self, index: int, parameter: Tensor) -> None:
        """Autograd has accumulated a gradient: what is complete travels."""
        grad = parameter.grad
        if not self._streams or index in self._landed or grad is None or grad.layout is not torch.strided:
            return
        self._landed[index] = grad, grad._version
        self._missing[self._place_of[index]] -= 1
        while self._next < len(self._places) and self._missing[self._next] == 0:
            self._send(
                self._next, [landed and landed[0] for landed in map(self._landed.get, self._positions(self._next))]
            )
            self._next += 1

    def close(self, row: int, adds: bool) -> None:
        """Bring what ``p.grad`` holds on its way, and leave ``p.grad`` None."""
        self._close(row, adds, *self._sweep.take())

    def leave_out(self, row: int, adds: bool) -> None:
        """Take part with zeros: another rank may have a gradient."""
        call = self.recording
        self.open(row, "", adds)
        self.recording = call
        self._close(row, adds, [None] * len(self.parameters), self._nothing)

    def close_own(self, row: int) -> list[int]:
        """As ``close``, after ``open_own``.

        Returns:
            The losses that some rank has backpropagated.
        """
        tasks = self._tasks or ()
        self.close(row, False)
        flags = self.reached[row]
        self.reached[:] = [flags if i == row else self._nothing for i in range(len(self.reached))]
        return sorted(set(tasks))

    def fail(self, error: Exception, is_before_the_first: bool = False) -> None:
        """Tell the other ranks what has gone wrong here, where they wait for it; it is raised on all.

        Inside a block they exchange what this rank has not sent yet.

        Args:
            error: what has gone wrong.
            is_before_the_first: whether the others are about to enter a block that this rank does not.
        """
        if is_before_the_first:
            self.open(0, "", adds=False)
            self.recording = None
        if self._is_open:
            self._is_open = self._streams = False
            self._landed = {}
            for place in range(self._next, len(self._places)):
                self._send(place, [None] * len(self._positions(place)))
        self.call_roll(error)

    def settle(self) -> None:
        """Wait until what is under way has arrived."""
        while self._flying:
            self._receive()

    def call_roll(self, error: Exception | None, number: int = 0, changed: Collection[int] = ()) -> list[int]:
        """What every rank does once a block, and before a combination: say that all is well, or what it has met.

        Args:
            error: what has gone wrong here, which every rank then raises.
            number: what this rank has to tell.
            changed: buckets that were sent and have changed since; they are sent again where any rank's has.

        Returns:
            What each rank told.
        """
        tally = Tally(self._ranks, self.segments[0].device, self._ranks.count, len(self._places))
        told, again = tally.parts
        told[self._ranks.rank] = float(number)
        again[list(changed)] = 1.0
        tally.take_part(error)
        self._again = [place for place, count in enumerate(again.tolist()) if count]
        return [int(value) for value in told.tolist()]

    def _close(self, row: int, adds: bool, grads: Sequence[Tensor | None], flags: tuple[bool, ...]) -> None:
        self._streams = False
        sent = range(self._next)
        changed = {place for place in sent if any(self._has_changed(i, grads[i]) for i in self._positions(place))}
        for place in range(self._next, len(self._places)):
            self._send(place, [grads[i] for i in self._positions(place)])
        self._is_open = False
        self.call_roll(None, changed=changed)
        for place in self._again:
            self._send(place, [grads[i] for i in self._positions(place)])
        self.reached[row] = landing.either(self.reached[row], flags) if adds else flags
        self._landed = {}  # gradients are not kept alive

    def _has_changed(self, index: int, grad: Tensor | None) -> bool:
        """Whether a parameter's gradient is another than the one that was sent."""
        landed = self._landed.get(index)
        if landed is None:
            return grad is not None
        return grad is not landed[0] or grad._version != landed[1]

    def _positions(self, place: int) -> range:
        _, bucket, first = self._places[place]
        return range(first, first + bucket.last - bucket.first)

    def _send(self, place: int, grads: Sequence[Tensor | None]) -> None:
        """Have a bucket travel, zeros where there is no gradient."""
        if len(self._flying) >= IN_FLIGHT:
            self._receive()
        segment, bucket, first = self._places[place]
        whole = self._memory(bucket.each * self._ranks.count, segment.dtype, segment.device)
        with torch.no_grad():
            for i, grad in enumerate(grads):
                parameter = segment.parameters[bucket.first + i]
                begin = segment.starts[bucket.first + i] - bucket.begin
                columns = whole[begin : begin + columns_of(parameter)]
                if grad is None:
                    columns.zero_()
                    continue
                dense = grad if grad.layout is torch.strided else self._densified(grad, first + i)
                shaped_like(parameter, columns).copy_(dense)
        whole[bucket.end - bucket.begin :].zero_()
        sent = whole.to(segment.wire_dtype)
        if sent is not whole:
            self._idle.append(whole)
        own = self._tasks is not None or segment.device.type == "cpu"
        parts = self._ranks.count if own else 1
        arriving = self._memory(parts * bucket.each, sent.dtype, sent.device).view(parts, bucket.each)
        # gloo reduces all and hands out shares; so exchange, and add up here, in the ranks' order, rounding once.
        start = self._ranks.start_exchange if own else self._ranks.start_averaging
        work = start(sent, arriving.view(-1))
        self._flying.append(_Flight(segment, bucket, work, sent, arriving, self._row_now, self._adds_now, self._tasks))

    def _receive(self) -> None:
        """Wait for the bucket that was sent first, and put it into its row, or add it."""
        segment, bucket, work, sent, travelled, row, adds, tasks = self._flying.popleft()
        if work is not None:
            work.wait()
        arriving = travelled.to(segment.dtype)
        for i in range(len(self.reached)) if tasks is not None else (row,):
            out = segment.rows[i, bucket.at : bucket.at + bucket.each]
            before = out.clone() if adds else None
            if len(arriving) < self._ranks.count:
                out.copy_(arriving[0])
            else:
                average_of(arriving, [r for r in range(len(arriving)) if tasks is None or tasks[r] == i], out)
            if before is not None:
                out.add_(before)
        self._idle += [sent, travelled.view(-1)]

    def _memory(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(count,) without a value: what a bucket left that has arrived, where there is some."""
        for i, block in enumerate(self._idle):
            if (len(block), block.dtype, block.device) == (count, dtype, device):
                return self._idle.pop(i)
        return fresh(count, dtype, device)


def _note_landing(rows: weakref.ref[SharedRows], index: int, parameter: Tensor) -> None:
    """A hook of the parameter."""
    found = rows()
    if found is not None:
        found.note(index, parameter)
