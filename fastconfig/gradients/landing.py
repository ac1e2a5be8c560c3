"""Where gradients land: rows over the columns of parameters, which autograd's results are brought home to."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from fastconfig.backends.rows import Rows
from fastconfig.gradients.local import is_sharded, like_parameter, local_gradient
from fastconfig.gradients.memory import aligned_block
from fastconfig.gradients.parameters import Made, columns_of, gradient_dtype, shaped_like
from fastconfig.gradients.sweep import Copies, Sweep, address_of, sweep_over
from fastconfig.validation import REAL_OF_COMPLEX

HOOKED_BYTES = 1 << 18
"""From this size on a gradient is copied home as soon as autograd has it, and freed. Of smaller ones a call of Python
costs more than the memory is worth: they wait for the end of the block, and one call copies them all."""

TOLD_BYTES = 1 << 24
"""From this size on it is said that a table with sparse gradients has dense rows."""


class Segment:
    """A run of columns of one dtype on one device: the gradients of all parameters that share both.

    Args:
        parameters: of one dtype of their gradients, on one device.
        count: k.
        dtype: of the rows; by default that of the gradients.

    Attributes:
        rows: (k, n_segment), contiguous rows a multiple of ``memory.ROW_BYTES`` apart. Complex parameters stand here as
            their real view, two columns an element.
        block: (k, n_segment and what pads it), contiguous: the memory of the rows, zeros behind each. For collective
            calls, of which some take the rows, as they have gaps between them, for other numbers.
        landing: where gradients land: the rows.
        parameters: those whose gradients lie here, in column order, each in the order of its own memory.
        starts: the first column of each parameter.
        n: the number of columns.
    """

    def __init__(self, parameters: Sequence[Tensor], count: int, dtype: torch.dtype | None = None) -> None:
        first = parameters[0]
        self.parameters = tuple(parameters)
        self.device = first.device
        dtype = dtype or gradient_dtype(first)
        self.dtype = REAL_OF_COMPLEX.get(dtype, dtype)
        *starts, self.n = accumulate(map(columns_of, parameters), initial=0)
        self.starts = tuple(starts)
        self.block = aligned_block(count, self.n, self.dtype, self.device)
        self.rows = self.block[:, : self.n]
        self.landing = self.rows
        self.description = Rows(count, self.n, self.dtype, self.device, self.rows, ())

    def views(self, flat: Tensor) -> list[Tensor]:
        """A contiguous (n_segment,) vector seen as one tensor a parameter, with the parameter's shape and strides."""
        return [
            shaped_like(parameter, flat[start : start + columns_of(parameter)])
            for parameter, start in zip(self.parameters, self.starts, strict=True)
        ]


_TAKES_MANY = "Iterable" in str(inspect.signature(torch.autograd.graph.increment_version))  # newer PyTorch's


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that a kernel wrote to tensors by their addresses, as any in-place operation does."""
    if _TAKES_MANY:
        torch.autograd.graph.increment_version(tensors)
        return
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


_RECORDING: list[GradientRows[Any]] = []
"""Those that record now: one, but for those over other parameters."""


class Shown:
    """Views that stand as ``p.grad``, one a parameter, each an alias: to repoint ``p.grad.data`` moves that alone.

    An alias serves again and again as long as it lies where its view does; making one takes as long as ten questions.
    """

    def __init__(self, views: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        self.views = views
        self._parameters = parameters
        self._aliases = list(map(self._alias, range(len(views))))
        self._addresses = [view.data_ptr() for view in views]

    def __getitem__(self, index: int) -> Tensor:
        alias = self._aliases[index]
        if address_of(alias) != self._addresses[index] or alias.requires_grad:
            alias = self._aliases[index] = self._alias(index)
        return alias

    def _alias(self, index: int) -> Tensor:
        return like_parameter(self.views[index].detach(), self._parameters[index])

    def is_grad_of(self, parameters: Sequence[Tensor], flags: tuple[bool, ...]) -> bool:
        """Whether ``p.grad`` of the first flagged parameter that has elements lies where its view does."""
        for parameter, address, flag in zip(parameters, self._addresses, flags, strict=True):
            if flag and address:
                return parameter.grad is not None and address_of(parameter.grad) == address
        return False

    def show(self, sweep: Sweep, flags: tuple[bool, ...], hides: bool) -> None:
        """Make ``p.grad`` of the flagged parameters their views, and, where it ``hides``, that of the others None."""
        begin = 0
        while (begin := sweep.show(self._aliases, self._addresses, flags, hides, begin)) >= 0:
            self._aliases[begin] = self._alias(begin)


class _Plan(NamedTuple):
    """What is to be done with one row where these parameters have a gradient and the others none."""

    flags: tuple[bool, ...]
    """Which have, a flag a parameter: the same object every time."""
    copies: list[Copies]
    """How those on the CPU are copied that are not brought by a hook, a segment each."""
    others: list[int]
    """Positions of those that are not."""
    added: list[int]
    """Positions of all that have, which is what has to be added where the row is not begun anew."""
    gaps: list[Tensor]
    """Runs of the row's columns of the parameters that have none, to be zero."""


class Row:
    """One row, seen by parameter.

    Args:
        segments: the columns.
        row: which row.
        plain: for each parameter, whether its gradient, where it is contiguous, has the bytes of its place in the row.
    """

    def __init__(self, segments: Sequence[Segment], row: int, plain: Sequence[bool]) -> None:
        self._segments = segments
        self._row = row
        self._plain = plain
        self._plans: dict[tuple[bool, ...], _Plan] = {}
        self.shown = Shown(
            [view for segment in segments for view in segment.views(segment.landing[row])],
            [parameter for segment in segments for parameter in segment.parameters],
        )

    def plan_for(self, flags: tuple[bool, ...]) -> _Plan:
        """What to do where the parameters with a true flag have a gradient."""
        plan = self._plans.get(flags)
        if plan is None:
            if len(self._plans) >= 64:  # as with a network that takes another way every time
                self._plans.clear()
            plan = self._plans[flags] = self._new_plan(flags)
        return plan

    def _new_plan(self, flags: tuple[bool, ...]) -> _Plan:
        reached = [i for i, has in enumerate(flags) if has]
        copies, position = [], 0
        for segment in self._segments:
            dtype = gradient_dtype(segment.parameters[0])
            places = range(position, position := position + len(segment.parameters))
            if some := [self._copy_of(i) for i in places if flags[i] and self._plain[i]]:
                copies.append(Copies(some, dtype, torch.strided))
        return _Plan(flags, copies, [i for i in reached if not self._plain[i]], reached, self._gaps(flags))

    def _copy_of(self, position: int) -> tuple[int, int, int]:
        view = self.shown.views[position]
        return position, view.data_ptr(), view.numel() * view.element_size()

    def _gaps(self, flags: tuple[bool, ...]) -> list[Tensor]:
        gaps: list[Tensor] = []
        given = iter(flags)
        for segment in self._segments:
            row, begin = segment.landing[self._row], 0
            for start, parameter in zip(segment.starts, segment.parameters, strict=True):
                end = start + columns_of(parameter)
                if next(given):
                    if begin < start:
                        gaps.append(row[begin:start])
                    begin = end
            if begin < segment.n:
                gaps.append(row[begin:])
        return gaps


class _Landing:
    """The hooks' side of recording: large gradients go home while the backward pass runs.

    Autograd hands a parameter's first gradient over as it computed it, and one copy takes it home: read and written
    once. Accumulating into a zeroed row would write it twice and read it twice. Further gradients are accumulated
    there. (Measured in bench/landing.py.)
    """

    def __init__(self) -> None:
        self.home: Shown | None = None
        """Where to; None leaves gradients where autograd puts them."""

    def land(self, index: int, parameter: Tensor) -> None:
        """Bring home the gradient that autograd has just accumulated: a hook of the parameter."""
        grad = parameter.grad
        if self.home is None or grad is None or grad.layout is not torch.strided:
            return
        view = self.home.views[index]
        if grad.data_ptr() != view.data_ptr():  # else accumulated into the row itself, by a second backward pass
            view.copy_(grad.detach())
            parameter.grad = self.home[index]


Place = TypeVar("Place", bound=Segment)


class GradientRows(Generic[Place]):
    """k rows over parameters: what a backward pass leaves in ``.grad`` while one is recorded is brought there.

    What counts is whether ``.grad`` is there when the block ends, whoever put it there: autograd,
    DistributedDataParallel for a parameter that only another rank used, or an assignment.

    Args:
        segments: the columns, in the order of the parameters.
        count: k.
        owner: the class that errors name.
        vectors: how many vectors of the parameters' size that one holds, these rows among them.
        hooks: whether large gradients go home while the backward pass runs.

    Attributes:
        segments: as given.
        parameters: of all segments, in column order.
        reached: for each row, a flag a parameter: whether its gradient has a part in the row.
        recording: the call of the user's that records a row now, if any.
        relocations: how often parameters were found to lie elsewhere than before.
    """

    def __init__(self, segments: Sequence[Place], count: int, owner: str, vectors: int, hooks: bool = True) -> None:
        self.segments = tuple(segments)
        self.parameters = tuple(parameter for segment in segments for parameter in segment.parameters)
        self._matrices = [segment.landing for segment in segments]
        self._nothing = (False,) * len(self.parameters)
        self.reached: list[tuple[bool, ...]] = [self._nothing] * count
        self.recording: str | None = None
        self.relocations = 0
        self._owner = owner
        self._vectors = vectors
        self._sweep = sweep_over(self.parameters)
        self._made_for = tuple(Made.of(parameter, address_of(parameter)) for parameter in self.parameters)
        kinds = [segment.dtype for segment in segments for _ in segment.parameters]
        self._shows = tuple(
            REAL_OF_COMPLEX.get(gradient_dtype(p), gradient_dtype(p)) == kind
            for p, kind in zip(self.parameters, kinds, strict=True)
        )
        self._all_show = all(self._shows)
        # A parameter that is frozen, as one may be after refresh(), takes no hook, and needs none.
        self._hooked = [
            hooks and shows and p.requires_grad and not is_sharded(p) and p.numel() * p.element_size() >= HOOKED_BYTES
            for p, shows in zip(self.parameters, self._shows, strict=True)
        ]
        self._plain = [
            shows and not hooked and not is_sharded(p) and p.device.type == "cpu" and p.is_contiguous()
            for p, shows, hooked in zip(self.parameters, self._shows, self._hooked, strict=True)
        ]
        self._rows: list[Row | None] = [None] * count
        self._identities = frozenset(map(id, self.parameters))
        self._before: list[Tensor | None] = []
        self._landing = _Landing()
        self._told: set[int] = set()  # of which sparse parameters it was said that their rows are dense
        handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._landing.land, i))
            for i, parameter in enumerate(self.parameters)
            if self._hooked[i]
        ]
        weakref.finalize(self, remove_hooks, handles)

    def shown(self, row: int) -> Shown:
        """A row seen as one tensor a parameter."""
        return self._row(row).shown

    def overlaps(self, parameters: Sequence[Tensor]) -> bool:
        """Whether one of them has columns here."""
        return not self._identities.isdisjoint(map(id, parameters))

    def has(self, parameter: Tensor) -> bool:
        """Whether it has columns here."""
        return id(parameter) in self._identities

    def zero(self) -> None:
        """Set every row to zero and forget which parameters the rows' backward passes reached."""
        for segment in self.segments:
            segment.rows.zero_()
        self.reached[:] = [self._nothing] * len(self.reached)

    def forget(self, row: int) -> None:
        """Set one row to zero, and forget which parameters it reached."""
        for segment in self.segments:
            segment.rows[row].zero_()
        self.reached[row] = self._nothing

    def leave_out(self, row: int, adds: bool) -> None:
        """A loss has no gradient in this step: its row is zero, or, where it ``adds``, stays what it is."""
        if not adds:
            self.forget(row)

    def settle(self) -> None:
        """Wait until the rows hold what was recorded: at once, where no rank waits for another."""

    def begin(self, call: str) -> None:
        """Take every ``p.grad`` away and keep it until ``end``.

        Raises:
            RuntimeError: inside another ``record``, of this object or of one over some of the same parameters; or a
                parameter is no longer the one this was made for.
        """
        self.check_not_recording(call)
        self.check_parameters()
        if _RECORDING and not all(self._identities.isdisjoint(other._identities) for other in tuple(_RECORDING)):
            raise RuntimeError(
                f"{call} was called while another buffer or optimizer over some of the same parameters records; leave "
                "that `with` block first: a gradient can only go to one row"
            )
        self._before = self._sweep.take()[0]
        self.recording = call
        _RECORDING.append(self)

    def open(self, row: int, call: str, adds: bool) -> None:
        """From here on gradients are of this row. They wait in ``p.grad`` where they are to be added to it."""
        self.recording = call
        self._landing.home = None if adds else self._row(row).shown

    def close(self, row: int, adds: bool) -> None:
        """Bring what ``p.grad`` holds into the row, or add it, and leave ``p.grad`` None.

        Args:
            row: which.
            adds: add to what the row holds; else what has no gradient becomes zero.
        """
        self._landing.home = None
        home = self._row(row)
        grads, flags = self._sweep.take()
        plan = home.plan_for(flags)
        if adds:
            self._bring(grads, plan.added, home.shown.views, adds)
            self.reached[row] = either(self.reached[row], flags)
            return
        left = plan.others
        if plan.copies:
            for copies in plan.copies:
                left = left + copies.copy(grads)
            mark_written(self._matrices)
        if left:
            self._bring(grads, left, home.shown.views, adds)
        for gap in plan.gaps:
            gap.zero_()
        self.reached[row] = plan.flags

    def put(self, rows: Sequence[int], grads: Sequence[Tensor | None], adds: Sequence[bool]) -> None:
        """Bring the gradients of several losses into their rows, or add them: a copy a parameter where it can be one.

        Args:
            rows: k of them.
            grads: for each parameter its gradients (k, *shape), or None where no loss reaches it.
            adds: for each row, whether to add to what it holds.
        """
        flags = tuple([grad is not None for grad in grads])
        for row, add in zip(rows, adds, strict=True):
            self.reached[row] = either(self.reached[row], flags) if add else flags
        is_run = rows[-1] - rows[0] == len(rows) - 1 and not any(adds)
        given = iter(grads)
        for segment in self.segments:
            for parameter, start in zip(segment.parameters, segment.starts, strict=True):
                grad = next(given)
                places = shaped_like(parameter, segment.landing[:, start : start + columns_of(parameter)])
                if is_run and grad is not None:
                    places[rows[0] : rows[-1] + 1].copy_(grad)
                    continue
                for i, (row, add) in enumerate(zip(rows, adds, strict=True)):
                    if grad is not None and add:
                        places[row].add_(grad[i])
                    elif grad is not None:
                        places[row].copy_(grad[i])
                    elif not add:
                        places[row].zero_()

    def end(self, complete: bool, shown: int | None = None) -> None:
        """Give every ``p.grad`` back.

        Args:
            complete: whether the last row was closed, so that every ``p.grad`` is None now.
            shown: a row whose parameters' ``p.grad`` shows it instead, where it may be of the row's dtype.
        """
        self._landing.home = None
        self.recording = None
        _RECORDING.remove(self)
        before, self._before = self._before, []
        self._sweep.give(before, complete)
        if shown is not None:
            flags = self.reached[shown]
            if not self._all_show:
                flags = tuple([a and b for a, b in zip(flags, self._shows, strict=True)])
            self.shown(shown).show(self._sweep, flags, hides=False)

    def show(self, shown: Shown, flags: tuple[bool, ...]) -> None:
        """Make ``p.grad`` of the flagged parameters their views, that of the others None."""
        shown.show(self._sweep, flags, hides=True)

    def check_not_recording(self, call: str) -> None:
        """Raise RuntimeError inside ``record``."""
        if self.recording is not None:
            raise RuntimeError(
                f"{call} was called inside {self.recording}; leave that `with` block first: "
                "one backward pass can only fill one row"
            )

    def check_parameters(self) -> None:
        """Raise RuntimeError where a parameter is no longer the one the rows were made for.

        A DTensor's own part may lie elsewhere now: FSDP2 moves it in the first forward pass, to pad it or to pin it.
        """
        compiling = is_dynamo_compiling()  # then no address can be read; what filled the rows did read them
        if not compiling and self._sweep.is_unchanged():
            return
        found = []
        for i, (parameter, made_for) in enumerate(zip(self.parameters, self._made_for, strict=True)):
            now = Made.of(parameter, made_for.address if compiling else address_of(parameter))
            found.append(now)
            if now != made_for and not (is_sharded(parameter) and now[1:] == made_for[1:]):
                raise RuntimeError(
                    f"parameter {i} of the {self._owner}, shape {tuple(made_for.shape)}, had its storage replaced "
                    f"after that was made ({made_for.changes(now)}), as .to(), .half() or an assignment to .data do; "
                    f"make a new {self._owner} after such a change"
                )
        if not compiling:
            self._sweep = sweep_over(self.parameters)
            self._made_for = tuple(found)
            self.relocations += 1

    def lie_where_they_did(self) -> bool:
        """Whether every parameter's memory is where it was: the quick question."""
        return self._sweep.lies_where_it_did()

    def _row(self, row: int) -> Row:
        found = self._rows[row]
        if found is None:
            found = self._rows[row] = Row(self.segments, row, self._plain)
        return found

    def _bring(
        self, grads: Sequence[Tensor | None], positions: Sequence[int], views: Sequence[Tensor], adds: bool
    ) -> None:
        """Copy the gradients at these positions to their places, or add them, as far as they are not there already."""
        places, sources = [], []
        for i in positions:
            grad, view = grads[i], views[i]
            if grad is None:
                continue
            if is_sharded(grad):
                grad = local_gradient(grad, self.parameters[i])
            if grad.layout is not torch.strided:
                grad = self._densified(grad, i)
            elif not adds and grad.data_ptr() == view.data_ptr() and grad.stride() == view.stride():
                continue  # a hook brought it
            places.append(view)
            sources.append(grad)
        if sources:
            with torch.no_grad():
                (torch._foreach_add_ if adds else torch._foreach_copy_)(places, sources)

    def _densified(self, grad: Tensor, index: int) -> Tensor:
        size = grad.numel() * grad.element_size()
        if index not in self._told and self._vectors * size >= TOLD_BYTES:
            self._told.add(index)
            warnings.warn(
                f"parameter {index} of the {self._owner}, shape {tuple(grad.shape)}, has sparse gradients, and what is "
                f"kept of it is dense: {self._vectors} × {size / 2**20:,.0f} MiB. Leave such a table out of the "
                f"{self._owner} where that is too much",
                stacklevel=5,
            )
        return grad.to_dense()


class Recording:
    """A ``with`` block in which backward passes write a row of ``GradientRows``.

    Args:
        rows: whose.
        prepare: called when the block is entered: which row, the user's call, for errors, and whether to add to the row
            instead of beginning it anew.
        done: called with the row, whether it was added to, and what the block raised, if it did not end well.
        shown: leave ``p.grad`` of the parameters that were reached as a view of the row, not what it was before.
    """

    __slots__ = ("_adds", "_done", "_prepare", "_row", "_rows", "_shown")

    def __init__(
        self,
        rows: GradientRows[Place],
        prepare: Callable[[], tuple[int, str, bool]],
        done: Callable[[int, bool, BaseException | None], None],
        shown: bool,
    ) -> None:
        self._rows = rows
        self._prepare = prepare
        self._done = done
        self._shown = shown
        self._row = -1
        self._adds = False

    def __enter__(self) -> None:
        self._row, call, self._adds = self._prepare()
        self._rows.begin(call)
        try:
            self._rows.open(self._row, call, self._adds)
        except BaseException:  # then nobody calls __exit__
            self._rows.end(complete=False)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failed = error
        try:
            if failed is None:
                self._rows.close(self._row, self._adds)
        except BaseException as raised:
            failed = raised
            raise
        finally:
            complete = failed is None
            self._rows.end(complete, self._row if self._shown and complete else None)
            if not complete:
                self._rows.forget(self._row)
            self._done(self._row, self._adds, failed)


def either(some: tuple[bool, ...], others: tuple[bool, ...]) -> tuple[bool, ...]:
    """Flag by flag, whether one of both is set."""
    return tuple([a or b for a, b in zip(some, others, strict=True)])


def remove_hooks(handles: Sequence[RemovableHandle]) -> None:
    """Take hooks away that are of no use any more."""
    for handle in handles:
        handle.remove()
