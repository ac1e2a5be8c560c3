"""Where gradients land: rows over the columns of parameters, which autograd's results are brought home to."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from fastconfig.memory import aligned_rows
from fastconfig.parameters import Made, columns_of, gradient_dtype, shaped_like
from fastconfig.rows import Rows
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
        rows: (k, n_segment), contiguous rows a multiple of ``memory.ROW_BYTES`` apart, where gradients land. Complex
            parameters stand here as their real view, two columns an element.
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
        self.rows = aligned_rows(count, self.n, self.dtype, self.device)
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


_BEING_RECORDED: set[int] = set()
"""The identities of parameters over which a buffer or optimizer records now; it keeps them alive meanwhile."""


class Shown:
    """Views that stand as ``p.grad``, one a parameter, each an alias: to repoint ``p.grad.data`` moves that alone.

    An alias serves again and again as long as it lies where its view does; making one takes as long as ten questions.
    """

    def __init__(self, views: Sequence[Tensor]) -> None:
        self.views = views
        self._aliases = [view.detach() for view in views]
        self._addresses = [view.data_ptr() for view in views]

    def __getitem__(self, index: int) -> Tensor:
        alias = self._aliases[index]
        if alias.data_ptr() != self._addresses[index] or alias.requires_grad or alias.shape != self.views[index].shape:
            alias = self._aliases[index] = self.views[index].detach()
        return alias


class _Plan(NamedTuple):
    """What is to be done with one row where these parameters have a gradient and the others none."""

    flags: tuple[bool, ...]
    """Which have, a flag a parameter: the same object every time."""
    reached: tuple[int, ...]
    """Positions of those that have."""
    views: list[Tensor]
    """Where the gradients of those go, but of the hooked ones."""
    plain: tuple[int, ...]
    """Positions of these."""
    hooked: tuple[int, ...]
    """Positions of the hooked ones."""
    gaps: list[Tensor]
    """Runs of the row's columns of the parameters that have none, to be zero."""


class _Row:
    """One row, seen by parameter."""

    def __init__(self, segments: Sequence[Segment], row: int, hooked: Sequence[bool]) -> None:
        self._segments = segments
        self._row = row
        self._hooked = hooked
        self._plans: dict[tuple[bool, ...], _Plan] = {}
        self.shown = Shown([view for segment in segments for view in segment.views(segment.rows[row])])

    def plan_for(self, flags: tuple[bool, ...]) -> _Plan:
        """What to do where the parameters with a true flag have a gradient."""
        plan = self._plans.get(flags)
        if plan is None:
            if len(self._plans) >= 64:  # as with a network that takes another way every time
                self._plans.clear()
            plan = self._plans[flags] = self._new_plan(flags)
        return plan

    def _new_plan(self, flags: tuple[bool, ...]) -> _Plan:
        reached = tuple(i for i, has in enumerate(flags) if has)
        plain = tuple(i for i in reached if not self._hooked[i])
        hooked = tuple(i for i in reached if self._hooked[i])
        return _Plan(flags, reached, [self.shown.views[i] for i in plain], plain, hooked, self._gaps(flags))

    def _gaps(self, flags: tuple[bool, ...]) -> list[Tensor]:
        gaps: list[Tensor] = []
        given = iter(flags)
        for segment in self._segments:
            row, begin = segment.rows[self._row], 0
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

    Attributes:
        segments: as given.
        parameters: of all segments, in column order.
        addresses: where their memory was when this was made.
        reached: for each row, a flag a parameter: whether its gradient has a part in the row.
        recording: the call of the user's that records a row now, if any.
    """

    def __init__(self, segments: Sequence[Place], count: int, owner: str) -> None:
        self.segments = tuple(segments)
        self.parameters = tuple(parameter for segment in segments for parameter in segment.parameters)
        self._nothing = (False,) * len(self.parameters)
        self.reached: list[tuple[bool, ...]] = [self._nothing] * count
        self.recording: str | None = None
        self._owner = owner
        self.addresses = [parameter.data_ptr() for parameter in self.parameters]
        self._shapes = [parameter.shape for parameter in self.parameters]
        self._dtypes = [parameter.dtype for parameter in self.parameters]
        self._made_for = tuple(map(Made.of, self.parameters, self.addresses))
        kinds = [segment.dtype for segment in segments for _ in segment.parameters]
        self._shows = [
            REAL_OF_COMPLEX.get(gradient_dtype(p), gradient_dtype(p)) == kind
            for p, kind in zip(self.parameters, kinds, strict=True)
        ]
        # A parameter that is frozen, as one may be after refresh(), takes no hook, and needs none.
        self._hooked = [
            shows and p.requires_grad and p.numel() * p.element_size() >= HOOKED_BYTES
            for p, shows in zip(self.parameters, self._shows, strict=True)
        ]
        self._rows: list[_Row | None] = [None] * count
        self._identities = frozenset(map(id, self.parameters))
        self._before: list[Tensor | None] = []
        self._landing = _Landing()
        self._told: set[int] = set()  # of which sparse parameters it was said that their rows are dense
        handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._landing.land, i))
            for i, parameter in enumerate(self.parameters)
            if self._hooked[i]
        ]
        weakref.finalize(self, _remove_hooks, handles)

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

    def begin(self, call: str) -> None:
        """Take every ``p.grad`` away and keep it until ``end``.

        Raises:
            RuntimeError: inside another ``record``, of this object or of one over some of the same parameters; or a
                parameter is no longer the one this was made for.
        """
        self.check_not_recording(call)
        self.check_parameters()
        if _BEING_RECORDED and not _BEING_RECORDED.isdisjoint(self._identities):
            raise RuntimeError(
                f"{call} was called while another buffer or optimizer over some of the same parameters records; leave "
                "that `with` block first: a gradient can only go to one row"
            )
        self._before = [parameter.grad for parameter in self.parameters]
        self.recording = call
        _BEING_RECORDED.update(self._identities)
        for parameter in self.parameters:
            parameter.grad = None

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
        grads = [parameter.grad for parameter in self.parameters]
        flags = tuple([grad is not None for grad in grads])
        plan = home.plan_for(flags)
        for i in plan.reached:
            self.parameters[i].grad = None
        with torch.no_grad():
            sources = self._dense([grads[i] for i in plan.plain], plan.plain)
            if sources:
                (torch._foreach_add_ if adds else torch._foreach_copy_)(plan.views, sources)
            for i in plan.hooked:
                self._bring(grads[i], home.shown.views[i], i, adds)
            if not adds:
                for gap in plan.gaps:
                    gap.zero_()
        self.reached[row] = _either(self.reached[row], flags) if adds else plan.flags

    def end(self, shown: int | None = None) -> None:
        """Give every ``p.grad`` back.

        Args:
            shown: a row whose parameters' ``p.grad`` shows it instead, where it may be of the row's dtype.
        """
        self._landing.home = None
        self.recording = None
        _BEING_RECORDED.difference_update(self._identities)
        before, self._before = self._before, []
        for parameter, grad in zip(self.parameters, before, strict=True):
            parameter.grad = grad
        if shown is not None:
            views = self._row(shown).shown
            for i, has in enumerate(self.reached[shown]):
                if has and self._shows[i]:
                    self.parameters[i].grad = views[i]

    def check_not_recording(self, call: str) -> None:
        """Raise RuntimeError inside ``record``."""
        if self.recording is not None:
            raise RuntimeError(
                f"{call} was called inside {self.recording}; leave that `with` block first: "
                "one backward pass can only fill one row"
            )

    def check_parameters(self) -> None:
        """Raise RuntimeError where a parameter is no longer the one the rows were made for."""
        compiling = is_dynamo_compiling()  # then no address can be read; what filled the rows did read them
        if not compiling and self.lie_where_they_did():
            return
        for i, (parameter, made_for) in enumerate(zip(self.parameters, self._made_for, strict=True)):
            now = Made.of(parameter, made_for.address if compiling else parameter.data_ptr())
            if now != made_for:
                raise RuntimeError(
                    f"parameter {i} of the {self._owner}, shape {tuple(made_for.shape)}, had its storage replaced "
                    f"after that was made ({made_for.changes(now)}), as .to(), .half() or an assignment to .data do; "
                    f"make a new {self._owner} after such a change"
                )

    def lie_where_they_did(self) -> bool:
        """Whether every parameter's memory and shape are what they were: the quick question."""
        parameters = self.parameters
        return (
            [parameter.data_ptr() for parameter in parameters] == self.addresses
            and [parameter.shape for parameter in parameters] == self._shapes
            and [parameter.dtype for parameter in parameters] == self._dtypes
        )

    def _row(self, row: int) -> _Row:
        found = self._rows[row]
        if found is None:
            found = self._rows[row] = _Row(self.segments, row, self._hooked)
        return found

    def _dense(self, grads: list[Tensor | None], positions: Sequence[int]) -> list[Tensor]:
        """The gradients of parameters that have one, sparse ones made dense."""
        return [
            grad if grad.layout is torch.strided else self._densified(grad, i)
            for grad, i in zip(grads, positions, strict=True)
            if grad is not None
        ]

    def _bring(self, grad: Tensor | None, view: Tensor, index: int, adds: bool) -> None:
        """Bring home a large gradient that is not there yet."""
        if grad is None:
            return
        if grad.layout is not torch.strided:
            grad = self._densified(grad, index)
        if adds:
            view.add_(grad)
        elif grad.data_ptr() != view.data_ptr() or grad.stride() != view.stride():
            view.copy_(grad)

    def _densified(self, grad: Tensor, index: int) -> Tensor:
        count, size = len(self.reached) + 1, columns_of(grad) * grad.element_size()
        if index not in self._told and count * size >= TOLD_BYTES:
            self._told.add(index)
            warnings.warn(
                f"parameter {index} of the {self._owner}, shape {tuple(grad.shape)}, has sparse gradients, and its "
                f"rows are dense: {count} × {size / 2**20:,.0f} MiB. Leave such a table out of the {self._owner} where "
                "that is too much",
                stacklevel=5,
            )
        return grad.to_dense()


class Recording:
    """One ``with`` block in which backward passes write a row of ``GradientRows``.

    Args:
        rows: whose.
        row: which.
        call: the user's call, for errors.
        adds: add to the row instead of beginning it anew.
        shown: leave ``p.grad`` of the parameters that were reached as a view of the row, not what it was before.
        done: called when the block has ended well, and with False when it raised.
    """

    __slots__ = ("_adds", "_call", "_done", "_row", "_rows", "_shown")

    def __init__(
        self,
        rows: GradientRows[Place],
        row: int,
        call: str,
        adds: bool,
        shown: bool,
        done: Callable[[bool], None],
    ) -> None:
        self._rows = rows
        self._row = row
        self._call = call
        self._adds = adds
        self._shown = shown
        self._done = done

    def __enter__(self) -> None:
        self._rows.begin(self._call)
        self._rows.open(self._row, self._call, self._adds)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        complete = False
        try:
            if kind is None:
                self._rows.close(self._row, self._adds)
                complete = True
        finally:
            self._rows.end(self._row if self._shown and complete else None)
            if not complete:
                self._rows.forget(self._row)
            self._done(complete)


def _either(some: tuple[bool, ...], others: tuple[bool, ...]) -> tuple[bool, ...]:
    return tuple([a or b for a, b in zip(some, others, strict=True)])


def _remove_hooks(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
