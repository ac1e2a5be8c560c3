"""The combination on several ranks: K summed over the columns that each owns, decided once, applied to what each holds.

What travels is m×m: K, with a flag a parameter and one a rank, in one sum, then K and c in one broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastconfig.backends import Backend
from fastconfig.backends.rows import Rows
from fastconfig.backends.rules import NonFiniteError
from fastconfig.gradients.combination import Run, may_raise, weights_of
from fastconfig.gradients.layout import Layout, Region
from fastconfig.gradients.ranks import Ranks
from fastconfig.methods import (
    GradDrop,
    Method,
    StreamingMethod,
    check_weights_of,
    is_streaming,
)
from fastconfig.methods.base import StatefulMethod
from fastconfig.ops import backend_for
from fastconfig.validation import check_method_weights

_UNEQUAL = 1e-3
"""By which share of the largest the norms of copies may differ: replicas are computed apart, and round apart."""

_RAISED = -1.0
"""The status of a method that raised; a row's number plus 1 says that this row is not finite."""


class Held(NamedTuple):
    """Columns of one dtype on one device that a rank holds."""

    rows: Rows
    out: Tensor
    """(n_held,), for the combined gradient."""
    regions: Sequence[Region]
    segment: int
    """Which of this rank's segments they are of."""
    begin: int
    """Which column of its segment the first of the rows is: not 0 where the rows are a share of it."""
    numbers: Sequence[tuple[int, int, int]]
    """Runs of (first column here, number of the first in the whole model, how many), in order."""


class Columns(Protocol):
    """What is asked of a buffer's segment."""

    device: torch.device
    parameters: tuple[Tensor, ...]
    description: Rows
    grad: Tensor


def owned(held: Held, ranks: Ranks, within: tuple[int, int] | None = None) -> list[Rows]:
    """The rows of the columns that this rank owns, where they lie; of a run of its segment's columns, or of all."""
    first, last = (held.begin, held.begin + held.rows.n) if within is None else within
    found = []
    for begin, end in (region.share(ranks.rank) for region in held.regions):
        begin, end = max(begin, first - held.begin), min(end, last - held.begin)
        if begin < end:
            found.append(held.rows.columns(begin, end))
    return found


def _sum_of_gramians(parts: Sequence[Rows], out: Tensor) -> None:
    """Add the Gramians of rows to ``out`` (m, m)."""
    for rows in parts:
        out += _backend(rows).gramian(rows).to(out.device)


class Tally:
    """Numbers that the ranks sum up, and with them whether one of them has failed: one vector, whatever happened where.

    Args:
        ranks: who takes part.
        home: the device.
        sizes: of the parts.

    Attributes:
        parts: float64 vectors of these sizes, zeros to be filled.
    """

    def __init__(self, ranks: Ranks, home: torch.device, *sizes: int) -> None:
        self._ranks = ranks
        self._numbers = torch.zeros(sum(sizes) + ranks.count, dtype=torch.float64, device=home)
        *self.parts, self._failed = self._numbers.split([*sizes, ranks.count])

    def take_part(self, error: Exception | None) -> None:
        """Sum over the ranks. Waits for the device, so that a rank that has failed ends the step on all.

        Args:
            error: what has gone wrong here.

        Raises:
            On every rank what one of them has met.
        """
        if error is not None:
            self._failed[self._ranks.rank] = 1.0
        self._ranks.sum(self._numbers)
        failed = self._failed.tolist()
        if any(failed):
            self._ranks.raise_error_of(next(rank for rank, flag in enumerate(failed) if flag), error)


def decide(ranks: Ranks, method: Method, gramian: Tensor, weights: Tensor) -> None:
    """Have rank 0 find the weights, and give K and c to all, the same bits.

    The others ask a built-in method that remembers, too, so that they remember the same; only rank 0's answer counts.

    Raises:
        What the method raises on rank 0, on every rank: NonFiniteError, and else what ``Ranks`` makes of it.
    """
    m = len(weights)
    packed = torch.zeros(m * m + m + 1, dtype=torch.float64, device=gramian.device)
    error: Exception | None = None
    if ranks.rank == 0 or isinstance(method, StatefulMethod):
        try:
            packed[: m * m] = gramian.flatten()
            packed[m * m : -1] = check_method_weights(weights_of(method, gramian), gramian, method)
        except NonFiniteError as nonfinite:
            packed[-1] = nonfinite.row + 1
        except Exception as raised:  # whatever a user's rule does: the others wait for an answer
            packed[-1], error = _RAISED, raised
    ranks.broadcast(packed)
    if may_raise(method) or gramian.device.type == "cpu":
        status = float(packed[-1])
        if status == _RAISED:
            ranks.raise_error_of(0, error)
        elif status:
            raise NonFiniteError(int(status) - 1)
    gramian.copy_(packed[: m * m].view(m, m))
    weights.copy_(packed[m * m : -1])


class Together:
    """The buffers of several ranks over one model, as one of them sees it. Every method is a collective call.

    Args:
        ranks: those that hold a part of the model.
        parts: what this rank holds.
        numbers: of each parameter here, its number among those of the whole model.
        names: how many these are.
        num_losses: m.

    Attributes:
        is_nothing_reached: whether, in the last ``sum_up``, no loss had reached a parameter on any rank.
    """

    def __init__(
        self, ranks: Ranks, parts: Sequence[Held], numbers: Sequence[int], names: int, num_losses: int
    ) -> None:
        self.ranks = ranks
        self._parts = parts
        self._numbers = numbers
        self._names = names
        self._num_losses = num_losses
        self._home = parts[0].out.device
        self._are_copies_checked = False
        self.is_nothing_reached = False

    @classmethod
    def by_layout(cls, ranks: Ranks, layout: Layout, segments: Sequence[Columns], num_losses: int) -> Together:
        """Of ranks that hold what a layout says, in segments that it ordered."""
        parts = [
            Held(
                rows=segment.description,
                out=segment.grad,
                regions=layout.regions(segment.parameters),
                segment=index,
                begin=0,
                numbers=layout.numbers(segment.parameters),
            )
            for index, segment in enumerate(segments)
        ]
        numbers = [layout.number(parameter) for segment in segments for parameter in segment.parameters]
        return cls(ranks, parts, numbers, len(layout.names), num_losses)

    def fail(self, error: Exception) -> None:
        """Take part in the combination that the others wait for, by saying what has gone wrong here; it is raised."""
        self._tally().take_part(error)

    def sum_up(
        self, gramian: Tensor, reached: Sequence[bool], absent: Sequence[bool], new: Sequence[bool]
    ) -> tuple[tuple[bool, ...], list[int]]:
        """Form K of the whole model.

        Args:
            gramian: (m, m) float64, overwritten.
            reached: of each parameter here, whether a loss has reached it here.
            absent: of each loss, whether it is absent here.
            new: of each loss, whether its row was recorded here since the last combination.

        Returns:
            ``reached`` on any rank; the losses that are absent on all.

        Raises:
            RuntimeError: the ranks have recorded different losses; copies hold different gradients.
            What one of them has met.
        """
        tally = self._tally()
        square, names, recorded, fresh = tally.parts
        error: Exception | None = None
        try:
            names[list(compress(self._numbers, reached))] = 1.0
            recorded[[i for i, is_absent in enumerate(absent) if not is_absent]] = 1.0
            fresh[list(compress(range(len(new)), new))] = 1.0
            self._add_owned(square.view_as(gramian))
        except Exception as raised:  # out of memory, say: the others wait
            error = raised
        tally.take_part(error)
        check_same_losses(fresh, self.ranks)
        anywhere = names.gt(0).tolist()
        self.is_nothing_reached = True not in anywhere
        if not self._are_copies_checked:
            check_copies(self.ranks, self._parts)
            self._are_copies_checked = True
        gramian.copy_(square.view_as(gramian))
        return tuple([anywhere[i] for i in self._numbers]), [i for i, has in enumerate(recorded.tolist()) if not has]

    def combine(self, method: Method | StreamingMethod, gramian: Tensor, weights: Tensor, scale: Tensor | None) -> None:
        """Combine what each rank holds as one problem.

        Args:
            method: as in ``combine_segments``; rank 0's is the one that is asked.
            gramian: (m, m) float64, K as ``sum_up`` formed it; overwritten with rank 0's.
            weights: (m,) float64, overwritten with c.
            scale: as in ``combine_segments``.
        """
        if scale is not None:
            gramian /= scale.square()
        if is_streaming(method):
            self.ranks.broadcast(gramian)
            self._combine_rows(method)
            weights.fill_(torch.nan)
            return
        decide(self.ranks, check_weights_of(method), gramian, weights)
        for held in self._parts:
            _backend(held.rows).apply(held.rows, weights.to(held.rows.device), held.out)

    def _tally(self) -> Tally:
        return Tally(self.ranks, self._home, self._num_losses**2, self._names, self._num_losses, self._num_losses)

    def _combine_rows(self, method: StreamingMethod) -> None:
        if isinstance(method, GradDrop):
            self.ranks.broadcast(method.seed_on(self._home))
            runs = [run for held in self._parts for run in _numbered(held)]
            method.combine_rows([run[:3] for run in runs], [run[3] for run in runs])
        else:
            method.combine_rows([(_backend(held.rows), held.rows, held.out) for held in self._parts])

    def gramian(self) -> Tensor:
        """(m, m) float64: K of the whole model, the same bits on every rank."""
        total = torch.zeros(self._num_losses, self._num_losses, dtype=torch.float64, device=self._home)
        self._add_owned(total)
        self.ranks.total(total)
        return total

    def gramians(self, runs: Mapping[str, Sequence[Run]]) -> dict[str, Tensor]:
        """(m, m) float64 for each part of the whole model, the same bits on every rank.

        Args:
            runs: the columns here of the parts that this rank has columns of.
        """
        names = list(dict.fromkeys(name for told in self.ranks.gather(list(runs)) for name in told))
        m = self._num_losses
        totals = torch.zeros(len(names), m, m, dtype=torch.float64, device=self._home)
        for name, total in zip(names, totals, strict=True):
            for s, first, last in runs.get(name, ()):
                for held in self._parts:
                    if held.segment == s:
                        _sum_of_gramians(owned(held, self.ranks, (first, last)), total)
        self.ranks.total(totals)
        return dict(zip(names, totals.unbind(), strict=True))

    def _add_owned(self, out: Tensor) -> None:
        for held in self._parts:
            _sum_of_gramians(owned(held, self.ranks), out)


class Batch:
    """The parts of one batch on several ranks, as one of them sees it: each has columns of its own, none twice.

    A rank's loss is the mean over its part, and the whole's the mean of these: its gradient of what a rank has is a
    W-th of the rank's own. Every method but the constructor is a collective call.

    Args:
        ranks: those that have a part.
        num_losses: m.
        home: the device where the weights are found.
    """

    def __init__(self, ranks: Ranks, num_losses: int, home: torch.device) -> None:
        self._ranks = ranks
        self._tally = Tally(ranks, home, num_losses**2, num_losses, ranks.count)
        self._home = home

    def fail(self, error: Exception) -> None:
        """Take part in the combination that the others wait for, by saying what has gone wrong here; it is raised."""
        self._tally.take_part(error)

    def combine(
        self,
        segments: Sequence[tuple[Rows, Tensor]],
        method: Method | StreamingMethod,
        gramian: Tensor,
        weights: Tensor,
        scale: Tensor | None,
        absent: Sequence[int],
    ) -> list[int]:
        """Combine all columns of all ranks as one problem, as ``combine_segments`` those of one.

        Args:
            segments: as there.
            method: rank 0's is the one that is asked.
            gramian: (m, m) float64, overwritten with the whole batch's.
            weights: (m,) float64, overwritten with c.
            scale: as there.
            absent: the losses that are absent here.

        Returns:
            Those that are absent on all.

        Raises:
            What one of the ranks has met.
        """
        square, recorded, columns = self._tally.parts
        error: Exception | None = None
        try:
            _sum_of_gramians([rows for rows, _ in segments], square.view_as(gramian))
            recorded[[i for i in range(len(weights)) if i not in absent]] = 1.0
            columns[self._ranks.rank] = sum(rows.n for rows, _ in segments)
        except Exception as raised:  # out of memory, say: the others wait
            error = raised
        self._tally.take_part(error)
        gramian.copy_(square.view_as(gramian)).div_(self._ranks.count**2)
        if scale is not None:
            gramian /= scale.square()
        if is_streaming(method):
            self._combine_rows(segments, method, columns)
            weights.fill_(torch.nan)
        else:
            decide(self._ranks, check_weights_of(method), gramian, weights)
            for rows, out in segments:
                _backend(rows).apply(rows, weights.to(rows.device), out)
        return [i for i, has in enumerate(recorded.tolist()) if not has]

    def _combine_rows(self, segments: Sequence[tuple[Rows, Tensor]], method: StreamingMethod, columns: Tensor) -> None:
        parts = [(_backend(rows), rows, out) for rows, out in segments]
        if not isinstance(method, GradDrop):
            method.combine_rows(parts)
            return
        self._ranks.broadcast(method.seed_on(self._home))
        before = int(columns[: self._ranks.rank].sum())
        first = [before + sum(rows.n for rows, _ in segments[:i]) for i in range(len(segments))]
        method.combine_rows(parts, first)


def check_same_losses(counts: Tensor, ranks: Ranks) -> None:
    """Raise RuntimeError, on every rank, unless all have recorded the same losses.

    Args:
        counts: (m,) how many ranks have recorded each.
        ranks: all.
    """
    recorded = [int(count) for count in counts.tolist()]
    if any(0 < count < ranks.count for count in recorded):
        told = ", ".join(f"loss {i} on {count}" for i, count in enumerate(recorded) if count)
        raise RuntimeError(
            f"the {ranks.count} ranks have recorded different losses for this step ({told}), so gradients of different "
            "losses may have been averaged; choose them alike on all ranks, by MConFIG's next_loss or generators of "
            "one seed, and give a rank without labels None or an empty block"
        )


def check_copies(ranks: Ranks, parts: Sequence[Held]) -> None:
    """Raise RuntimeError on every rank where copies of the same columns hold different gradients.

    Looked at once, by norms: gradients that nobody has reduced, or other parameters of the same name.
    """
    squares: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    for held in parts:
        for region in held.regions:
            if len(region.holders) > 1:
                rows = held.rows.columns(region.first, region.last)
                key = str(rows.dtype), region.holders
                here = _backend(rows).gramian(rows).diagonal().cpu()
                squares[key] = squares[key] + here if key in squares else here
    told = ranks.gather({key: values.sqrt().tolist() for key, values in squares.items()})
    for rank, theirs in enumerate(told):
        for (dtype, holders), norms in theirs.items():
            wanted = told[holders[0]][dtype, holders]
            for loss, (norm, same) in enumerate(zip(norms, wanted, strict=True)):
                if abs(norm - same) > _UNEQUAL * max(wanted):
                    raise RuntimeError(
                        f"the gradients of loss {loss} over the same parameters differ between rank {holders[0]} (norm "
                        f"{same:.4g}) and rank {rank} (norm {norm:.4g}), so nothing has averaged them; wrap the model "
                        "in DistributedDataParallel, or name parameters that are a rank's own in local="
                    )


def _numbered(held: Held) -> list[tuple[Backend, Rows, Tensor, int]]:
    backend = _backend(held.rows)
    return [
        (backend, held.rows.columns(first, first + count), held.out[first : first + count], number)
        for first, number, count in held.numbers
    ]


def _backend(rows: Rows) -> Backend:
    return backend_for(rows.device, None, traced=False)
