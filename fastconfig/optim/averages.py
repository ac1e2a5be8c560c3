"""Where M-ConFIG's gradients and moving averages lie, and which parameters a step is to move."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, MutableMapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastconfig import backends
from fastconfig.backends.moments import Moments, Piece, Recorded
from fastconfig.backends.momentum import Segment, segment_on
from fastconfig.backends.rows import Rows
from fastconfig.gradients import landing, parameters
from fastconfig.gradients.averaged import AveragedRows, AveragedSegment
from fastconfig.gradients.landing import GradientRows
from fastconfig.gradients.layout import Layout
from fastconfig.gradients.local import like_parameter
from fastconfig.gradients.memory import aligned_rows
from fastconfig.gradients.ranks import Ranks

State = MutableMapping[Tensor, Any]

_MOST_RECORDED = 64
"""Choices of losses whose description is kept."""


class _Place(NamedTuple):
    """Where a parameter's columns are."""

    segment: int
    first: int
    group: int
    memory: Tensor
    """(columns,) the parameter's own memory, real."""
    values: Tensor
    """(columns,) what a step writes: this memory, or a copy of it in the dtype of the rows, where that is wider."""


class Averages:
    """The averages of m losses over the parameters of all groups, and k rows for a step's gradients.

    Args:
        groups: the parameters to train, group by group.
        num_losses: m.
        count: k.
        state_dtype: of the averages; None for float32, and float64 for float64 parameters.
        backend: as in ``fc.combine``.
        layout: who holds what, where several ranks train the model.
        ranks: those ranks.
        averages: whether gradients are averaged over them here.

    Attributes:
        rows: where gradients land.
        moments: the averages, one a segment.

    Raises:
        ValueError, RuntimeError: a state dtype that is narrower than the parameters'; a backend that cannot run.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        num_losses: int,
        count: int,
        state_dtype: torch.dtype | None,
        backend: str | None,
        layout: Layout | None = None,
        ranks: Ranks | None = None,
        averages: bool = False,
    ) -> None:
        group_of = {id(parameter): i for i, group in enumerate(groups) for parameter in group}
        kinds = _by_kind(parameter for group in groups for parameter in group)
        vectors = count + num_losses + 1
        if layout is not None:
            kinds = [(dtype, layout.ordered(kind)) for dtype, kind in kinds]
        self.rows: GradientRows[Any]
        if averages and ranks is not None:
            averaged = [AveragedSegment(kind, count, dtype, ranks) for dtype, kind in kinds]
            self.rows = AveragedRows(averaged, count, "MConFIG", vectors, ranks)
        else:
            plain = [landing.Segment(kind, count, dtype) for dtype, kind in kinds]
            self.rows = GradientRows(plain, count, "MConFIG", vectors)
        segments: Sequence[landing.Segment] = self.rows.segments
        self._shares = [
            [(0, segment.n)]
            if layout is None or ranks is None
            else [region.share(ranks.rank) for region in layout.regions(segment.parameters)]
            for segment in segments
        ]
        for segment in segments:
            backends.select(segment.device, backend)  # now, not in the first step, is the time to complain
        self._backend = backend
        self.moments = [_moments(segment, num_losses, state_dtype) for segment in segments]
        self._places = [
            _place(s, segment, first, group_of[id(parameter)], parameter)
            for s, segment in enumerate(segments)
            for parameter, first in zip(segment.parameters, segment.starts, strict=True)
        ]
        self._foreign = _foreign(self._places)
        self._relocations = 0
        self._recorded: dict[tuple[int, ...], list[Recorded]] = {}
        self._gradients = [segment.rows.unbind() for segment in segments]
        self._reached: list[bool] = [False] * len(self._places)
        self._active: list[Segment] = []
        self._owned: list[tuple[Segment, int, tuple[int, int]]] | None = None
        self._needing: list[bool] = []
        self._resting: set[int] = set()

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """All, in column order."""
        return self.rows.parameters

    def newly_reached(self, count: int) -> list[int]:
        """Positions of the parameters that the first ``count`` rows reached and no step before."""
        if all(self._reached):
            return []
        return [
            i
            for i, known in enumerate(self._reached)
            if not known and any(flags[i] for flags in self.rows.reached[:count])
        ]

    def active(self, losses: tuple[int, ...], new: Collection[int], state: State) -> list[tuple[Segment, Recorded]]:
        """The segments with the gradients of this step; only parameters that are to be updated lie in their pieces.

        Args:
            losses: whose gradients the first rows hold.
            new: positions of the parameters that are reached for the first time.
            state: the optimizer's, which then shows their averages.
        """
        needing = [parameter.requires_grad for parameter in self.parameters]
        if new:
            self.reach(new, state)
        if needing != self._needing:
            resting = {i for i, needs in enumerate(needing) if not (needs and self._reached[i])}
            self._active = [self._segment_without(resting, s, (0, n)) for s, n in enumerate(self._widths())]
            self._owned = None
            self._resting = resting
            self._needing = needing
        recorded = self._recorded.get(losses)
        if recorded is None:
            if len(self._recorded) >= _MOST_RECORDED:
                self._recorded.clear()
            recorded = self._recorded[losses] = [Recorded(losses, rows[: len(losses)]) for rows in self._gradients]
        return list(zip(self._active, recorded, strict=True))

    def owned(self, recorded: Sequence[tuple[Segment, Recorded]]) -> list[tuple[Segment, Recorded]]:
        """The columns among those of ``active`` that this rank owns, as segments of their own."""
        if self._owned is None:
            self._owned = [
                (self._segment_without(self._resting, s, share), s, share)
                for s, shares in enumerate(self._shares)
                for share in shares
                if share[0] < share[1]
            ]
        return [
            (segment, Recorded(recorded[s][1].losses, tuple([row[first:last] for row in recorded[s][1].rows])))
            for segment, s, (first, last) in self._owned
        ]

    def gramian_of_owned(self, home: torch.device) -> Tensor:
        """(m, m) float64: the products of the averages over the columns that this rank owns."""
        m = len(self.moments[0].first)
        total = torch.zeros(m, m, dtype=torch.float64, device=home)
        for (first, _), shares in zip(self.moments, self._shares, strict=True):
            for begin, end in shares:
                rows = Rows(m, end - begin, first.dtype, first.device, first[:, begin:end], ())
                total += backends.select(first.device, self._backend).gramian(rows).to(home)
        return total

    def reach(self, positions: Iterable[int], state: State) -> None:
        """Count parameters as reached, and make ``state`` show their averages, as views."""
        self._needing = []
        for i in positions:
            self._reached[i] = True
            parameter, place = self.parameters[i], self._places[i]
            columns = slice(place.first, place.first + len(place.memory))
            first, second = self.moments[place.segment]
            state[parameter] = {
                "exp_avgs": like_parameter(parameters.shaped_like(parameter, first[:, columns]), parameter, leading=1),
                "exp_avg_sq": like_parameter(parameters.shaped_like(parameter, second[columns]), parameter),
            }

    def unreach(self, positions: Iterable[int], state: State) -> None:
        """Leave parameters alone again: what reached them for the first time was left out."""
        self._needing = []
        for i in positions:
            self._reached[i] = False
            state.pop(self.parameters[i], None)

    def reached(self) -> list[int]:
        """Positions of the parameters that a step has reached."""
        return list(compress(range(len(self._reached)), self._reached))

    def zero(self, positions: Iterable[int]) -> None:
        """Set the averages of some parameters to zero."""
        for i in positions:
            place = self._places[i]
            for average in self.moments[place.segment]:
                average[..., place.first : place.first + len(place.memory)].zero_()

    def _find_again(self) -> None:
        """Take the parameters' memory from where it lies now."""
        self._relocations, self._needing = self.rows.relocations, []
        segments = self.rows.segments
        self._places = [
            _place(place.segment, segments[place.segment], place.first, place.group, parameter)
            for place, parameter in zip(self._places, self.parameters, strict=True)
        ]
        self._foreign = _foreign(self._places)

    def bring_values(self) -> None:
        """Copy parameters whose gradients are of a wider dtype to where a step writes."""
        if self._relocations != self.rows.relocations:
            self._find_again()
        for place in self._foreign:
            place.values.copy_(place.memory)

    def return_values(self) -> None:
        """Copy them back, rounded once."""
        for place in self._foreign:
            place.memory.copy_(place.values)

    def take_over(self, older: Averages, old_state: State, state: State) -> None:
        """Copy the averages of the parameters that another one has, too."""
        place = {id(parameter): i for i, parameter in enumerate(older.parameters)}
        known = [i for i, p in enumerate(self.parameters) if id(p) in place and older._reached[place[id(p)]]]
        before = {i: old_state[self.parameters[i]] for i in known}
        self.reach(known, state)
        for i in known:
            for name, value in before[i].items():
                state[self.parameters[i]][name].copy_(value)

    def carry_nonfinite(self, slot: int, before: Sequence[int]) -> None:
        """Make the gradient just recorded show NaN where another, which no ``p.grad`` shows now, is not finite.

        The step is left out either way. So a GradScaler that sees the last gradient of each parameter knows of all.

        Args:
            slot: its row.
            before: the other rows, the one recorded last in front: it shows what was so of those before it.
        """
        for s, segment in enumerate(self.rows.segments) if before else ():
            shown = self._first_reached(s, slot)
            hidden = next((row for row in before if self._first_reached(s, row) is not None), None)
            if shown is not None and hidden is not None:
                largest = torch.linalg.vector_norm(segment.rows[hidden], ord=math.inf)
                segment.rows[slot, shown] += largest * 0

    def _widths(self) -> list[int]:
        return [segment.n for segment in self.rows.segments]

    def _segment_without(self, resting: Collection[int], index: int, columns: tuple[int, int]) -> Segment:
        """Of a segment's columns from the first up to the last, the parameters at rest left out."""
        begin, end = columns
        pieces = []
        for i, place in enumerate(self._places):
            first, last = max(place.first, begin), min(place.first + len(place.values), end)
            if place.segment == index and i not in resting and first < last:
                pieces.append(Piece(place.values[first - place.first : last - place.first], first - begin, place.group))
        averages, second = self.moments[index]
        cut = Moments(averages[:, begin:end], second[begin:end])
        return segment_on(self.rows.segments[index].device, self._backend, cut, pieces)

    def _first_reached(self, segment: int, slot: int) -> int | None:
        """A column of the segment in which a recorded gradient has an element."""
        places = compress(self._places, self.rows.reached[slot])
        return min((place.first for place in places if place.segment == segment and len(place.memory)), default=None)


def _by_kind(trained: Iterable[Tensor]) -> list[tuple[torch.dtype, list[Tensor]]]:
    """The parameters by device and by what rows of their gradients must be: wide enough for them and the parameter."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in trained:
        dtype = torch.promote_types(parameter.dtype, parameters.gradient_dtype(parameter))
        groups.setdefault((parameter.device, dtype), []).append(parameter)
    return [(dtype, group) for (_, dtype), group in groups.items()]


def _place(index: int, segment: landing.Segment, first: int, group: int, parameter: Tensor) -> _Place:
    memory = parameters.memory_of(parameter)
    values = memory if memory.dtype == segment.dtype else memory.to(segment.dtype)
    return _Place(index, first, group, memory, values)


def _foreign(places: Sequence[_Place]) -> list[_Place]:
    """Those whose values a step writes elsewhere than where they lie."""
    return [place for place in places if place.values is not place.memory]


def _moments(segment: landing.Segment, num_losses: int, dtype: torch.dtype | None) -> Moments:
    dtype = dtype or (torch.float64 if segment.dtype == torch.float64 else torch.float32)
    if dtype.itemsize < segment.dtype.itemsize:
        raise ValueError(f"state_dtype must be no narrower than the parameters' {segment.dtype}, got {dtype}")
    first = aligned_rows(num_losses, segment.n, dtype, segment.device)
    return Moments(first, aligned_rows(1, segment.n, dtype, segment.device)[0])
