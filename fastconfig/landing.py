"""Where gradients land: rows over the columns of parameters, which autograd's results are brought home to."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from fastconfig.rows import Rows
from fastconfig.validation import FLOAT_DTYPES, REAL_OF_COMPLEX

ROW_BYTES = 128
"""Rows lie multiples of this apart, a GPU's cache line: unaligned ones cannot be read 16 bytes at a time."""


class Segment:
    """A run of columns of one dtype on one device: the gradients of all parameters that share both.

    Attributes:
        rows: (k, n_segment), contiguous rows a multiple of ``ROW_BYTES`` apart, where gradients land. Complex
            parameters stand here as their real view, two columns an element.
        parameters: those whose gradients lie here, in column order, each in the order of its own memory.
        starts: the first column of each parameter.
        n: the number of columns.
    """

    def __init__(self, parameters: Sequence[Tensor], count: int) -> None:
        first = parameters[0]
        self.parameters = tuple(parameters)
        self.device = first.device
        self.dtype = REAL_OF_COMPLEX.get(first.dtype, first.dtype)
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


def aligned_rows(count: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, (count, n), contiguous rows a multiple of ``ROW_BYTES`` apart."""
    with torch.inference_mode(False):  # autograd must be able to accumulate into the rows
        padded = n + -n % (ROW_BYTES // dtype.itemsize)
        return torch.zeros(count, padded, dtype=dtype, device=device)[:, :n]


_TAKES_MANY = "Iterable" in str(inspect.signature(torch.autograd.graph.increment_version))  # newer PyTorch's


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that a kernel wrote to tensors by their addresses, as any in-place operation does."""
    if _TAKES_MANY:
        torch.autograd.graph.increment_version(tensors)
        return
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


class _Recorded(NamedTuple):
    """What a parameter was when the buffer was made: its storage must stay the one the views were shaped for."""

    address: int
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size


_BEING_RECORDED: set[int] = set()
"""The identities of parameters over which a buffer or optimizer records now; it keeps them alive meanwhile."""


class _Landing:
    """Where gradients go while a row is recorded, and which parameters they were of.

    Autograd hands a parameter's first gradient over as it computed it, and one copy takes it home: read and written
    once. Accumulating into a zeroed row would write it twice and read it twice. Further gradients are accumulated
    there. (Measured in bench/landing.py.)
    """

    def __init__(self) -> None:
        # Autograd itself says which parameters a backward pass reached; a view's content cannot (a gradient may be 0).
        self.reached: set[int] = set()  # positions, as no compiler traces a set of tensors
        self._views: list[Tensor] | None = None

    def open(self, views: list[Tensor]) -> None:
        """Let gradients land in these views, one a parameter."""
        self.reached.clear()
        self._views = views

    def close(self) -> None:
        """Leave gradients where autograd puts them."""
        self._views = None

    def land(self, index: int, parameter: Tensor) -> None:
        """Bring home the gradient that autograd has just accumulated: a hook of the parameter."""
        self.reached.add(index)
        grad = parameter.grad
        if self._views is None or grad is None:
            return
        view = self._views[index]
        if grad.layout is torch.strided and grad.data_ptr() == view.data_ptr():
            return  # accumulated into the row itself, by a second backward pass
        if grad.layout is torch.strided:
            view.copy_(grad.detach())
        else:
            view.zero_().add_(grad.detach())
        parameter.grad = view.detach()  # an alias: `p.grad.data = …` then repoints that, not the buffer's own view


Place = TypeVar("Place", bound=Segment)


class GradientRows(Generic[Place]):
    """k rows over parameters: while one is recorded, each gradient is copied into its place there, and freed.

    Args:
        segments: the columns, in the order of the parameters.
        count: k.
        owner: the class that errors name.

    Attributes:
        segments: as given.
        parameters: of all segments, in column order.
        addresses: where their memory was when this was made.
        reached: for each row, the positions of the parameters that its backward passes reached.
        recording: the call of the user's that records a row now, if any.
    """

    def __init__(self, segments: Sequence[Place], count: int, owner: str) -> None:
        self.segments = tuple(segments)
        self.parameters = tuple(parameter for segment in segments for parameter in segment.parameters)
        self.reached: list[set[int]] = [set() for _ in range(count)]
        self.recording: str | None = None
        self._owner = owner
        self._made_for = tuple(_record(parameter, parameter.data_ptr()) for parameter in self.parameters)
        self.addresses = [parameter.data_ptr() for parameter in self.parameters]
        self._views: list[list[Tensor] | None] = [None] * count
        self._identities = frozenset(map(id, self.parameters))
        self._landing = _Landing()
        handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._landing.land, i))
            for i, parameter in enumerate(self.parameters)
        ]
        weakref.finalize(self, _remove_hooks, handles)

    def views(self, row: int) -> list[Tensor]:
        """A row seen as one tensor a parameter."""
        views = self._views[row]
        if views is None:
            views = [view for segment in self.segments for view in segment.views(segment.rows[row])]
            self._views[row] = views
        return views

    def zero(self) -> None:
        """Set every row to zero and forget which parameters the rows' backward passes reached."""
        for segment in self.segments:
            segment.rows.zero_()
        for reached in self.reached:
            reached.clear()

    @contextmanager
    def record(self, row: int, call: str, shown: bool = False) -> Generator[None, None, None]:
        """Let backward passes inside the ``with`` block write a row; ``GradientBuffer.record`` says how.

        Args:
            row: which.
            call: the user's call, for errors.
            shown: leave ``p.grad`` of the parameters that were reached as a view of the row, not what it was before.

        Raises:
            RuntimeError: inside another ``record``, of this object or of one over some of the same parameters; or a
                parameter is no longer the one this was made for.
        """
        self.check_not_recording(call)
        self.check_parameters()
        if not _BEING_RECORDED.isdisjoint(self._identities):
            raise RuntimeError(
                f"{call} was called while another buffer or optimizer over some of the same parameters records; leave "
                "that `with` block first: a gradient can only go to one row"
            )
        before = [parameter.grad for parameter in self.parameters]
        self.recording = call
        _BEING_RECORDED.update(self._identities)
        complete = False
        try:
            views = self.views(row)
            for parameter in self.parameters:
                parameter.grad = None
            self._landing.open(views)
            yield
            self._collect(row, views)
            complete = True
        finally:
            self.recording = None
            _BEING_RECORDED.difference_update(self._identities)
            self._landing.close()
            kept = self.reached[row] if shown and complete else ()
            for i, (parameter, grad) in enumerate(zip(self.parameters, before, strict=True)):
                if i not in kept:
                    parameter.grad = grad
            if not complete:
                self._forget(row)

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
            if _record(parameter, made_for.address if compiling else parameter.data_ptr()) != made_for:
                raise RuntimeError(
                    f"parameter {i} of the {self._owner}, shape {tuple(made_for.shape)}, had its storage replaced "
                    f"after that was made (it was {made_for.dtype} on {made_for.device}, it is {parameter.dtype} on "
                    f"{parameter.device}, shape {tuple(parameter.shape)}), as .to(), .half() or an assignment to .data "
                    f"do; make a new {self._owner} after such a change"
                )

    def lie_where_they_did(self) -> bool:
        """Whether every parameter's memory and shape are what they were: the quick question."""
        return [parameter.data_ptr() for parameter in self.parameters] == self.addresses and all(
            parameter.shape == made_for.shape and parameter.dtype == made_for.dtype
            for parameter, made_for in zip(self.parameters, self._made_for, strict=True)
        )

    def _collect(self, row: int, views: list[Tensor]) -> None:
        """Note which parameters were reached; bring home a gradient that was put elsewhere than in its view."""
        reached = set(self._landing.reached)
        for i, (parameter, view) in enumerate(zip(self.parameters, views, strict=True)):
            if parameter.grad is None:  # not reached, or discarded inside the block, by zero_grad for instance
                view.zero_()
                reached.discard(i)
            elif parameter.grad.data_ptr() != view.data_ptr() or parameter.grad.stride() != view.stride():
                view.copy_(parameter.grad.detach())
                parameter.grad = view.detach()
        self.reached[row] = reached

    def _forget(self, row: int) -> None:
        for segment in self.segments:
            segment.rows[row].zero_()
        self.reached[row] = set()


def _remove_hooks(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _record(parameter: Tensor, address: int) -> _Recorded:
    return _Recorded(address, parameter.dtype, parameter.device, parameter.shape)


def with_names(
    parameters: Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
) -> tuple[Iterable[Tensor], dict[int, str] | None]:
    """The parameters of a module, of pairs or as they are, unchecked; and their names by identity, where they have any.

    Raises:
        ValueError: two of one name.
    """
    if isinstance(parameters, Module):
        parameters = parameters.named_parameters()
    elif isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        return parameters, None
    given = list(parameters)
    pairs = [item for item in given if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)]
    if not pairs or len(pairs) < len(given):
        return cast("list[Tensor]", given), None
    owners: dict[str, int] = {}
    for name, parameter in pairs:
        if owners.setdefault(name, id(parameter)) != id(parameter):
            raise ValueError(
                f"parameters must have a name each, got {name!r} for two; prefix those of a second model, as "
                "model.named_parameters(prefix='head') does"
            )
    names: dict[int, str] = {}
    for name, identity in owners.items():
        names.setdefault(identity, name)
    return [parameter for _, parameter in pairs], names


def trained(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The distinct parameters that need a gradient, checked.

    Raises:
        TypeError: not dense floating-point or complex tensors.
        ValueError: none that needs a gradient; a non-leaf or uninitialised one.
    """
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"parameters must be an iterable of tensors, got one {type(parameters).__name__}; pass model.parameters()"
        )
    distinct: dict[int, Tensor] = {}
    for i, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters[{i}] must be a tensor, got {type(parameter).__name__}")
        if not parameter.requires_grad:
            continue
        if torch.nn.parameter.is_lazy(parameter):
            raise ValueError(f"parameters[{i}] is not initialised yet; run the model once first")
        if not parameter.is_leaf:
            raise ValueError(
                f"parameters[{i}] is not a leaf: it has no .grad of its own; pass the parameter it is from"
            )
        if parameter.layout is not torch.strided or parameter.dtype not in (*FLOAT_DTYPES, *REAL_OF_COMPLEX):
            raise TypeError(
                f"parameters[{i}] must be a dense float32, float64, bfloat16, float16 or complex tensor, got "
                f"{parameter.dtype}, layout {parameter.layout}"
            )
        distinct.setdefault(id(parameter), parameter)
    if not distinct:
        raise ValueError("there are no parameters to train: none was given that requires a gradient")
    return list(distinct.values())


def trained_in(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those that require a gradient."""
    return [parameter for parameter in parameters if parameter.requires_grad]


def by_kind(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """The parameters grouped by device and dtype, in order of first appearance."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return list(groups.values())


def columns_of(parameter: Tensor) -> int:
    """How many columns a parameter takes: its elements, two for a complex one."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def shaped_like(parameter: Tensor, flat: Tensor) -> Tensor:
    """``flat`` (..., columns) with the parameter's shape last, and its strides where they are dense.

    So optimizers take their fast path, and what lies in memory in one order is added up in one order.
    """
    if parameter.is_complex():
        flat = torch.view_as_complex(flat.unflatten(-1, (-1, 2)))
    leading = flat.dim() - 1
    return flat.as_strided(
        (*flat.shape[:leading], *parameter.shape), (*flat.stride()[:leading], *_dense_strides(parameter))
    )


def is_dense(parameter: Tensor) -> bool:
    """Whether a parameter's elements fill a run of memory, in any order of its dimensions."""
    strides = zip(parameter.shape, parameter.stride(), _dense_strides(parameter), strict=True)
    return parameter.numel() == 0 or all(size == 1 or ours == dense for size, ours, dense in strides)


def memory_of(parameter: Tensor) -> Tensor:
    """The memory of a dense parameter as a (columns,) real vector, in the order of its columns in a segment."""
    flat = parameter.detach().as_strided((parameter.numel(),), (1,))
    return torch.view_as_real(flat).flatten() if flat.is_complex() else flat


def _dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """The parameter's strides where they are dense and do not overlap, else those that it would have if they were."""
    return torch.empty_like(parameter, device="meta").stride()
