"""GradientBuffer: one contiguous block of rows where gradients land and the kernels read, so nothing is stacked."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from fastconfig.combination import Combination, combine_segments
from fastconfig.methods import DEFAULT_METHOD, ConFIG, Method
from fastconfig.rows import Rows
from fastconfig.validation import FLOAT_DTYPES, REAL_OF_COMPLEX

ROW_BYTES = 128
"""Rows lie multiples of this apart, a GPU's cache line: unaligned ones cannot be read 16 bytes at a time."""


class Segment:
    """A run of columns of one dtype on one device: the gradients of all parameters that share both.

    Attributes:
        rows: (m, n_segment), contiguous rows a multiple of ``ROW_BYTES`` apart; row i holds loss i's gradient. Complex
            parameters stand here as their real view, two columns an element.
        grad: (n_segment,) contiguous, the combined gradient.
        parameters: those whose gradients lie here, in column order, each in the order of its own memory.
    """

    def __init__(self, parameters: Sequence[Tensor], num_losses: int) -> None:
        first = parameters[0]
        self.parameters = tuple(parameters)
        self.device = first.device
        self.dtype = REAL_OF_COMPLEX.get(first.dtype, first.dtype)
        n = sum(_columns(parameter) for parameter in parameters)
        with torch.inference_mode(False):  # autograd must be able to accumulate into the rows
            padded = n + -n % (ROW_BYTES // self.dtype.itemsize)
            self.rows = torch.zeros(num_losses, padded, dtype=self.dtype, device=self.device)[:, :n]
            self.grad = torch.zeros(n, dtype=self.dtype, device=self.device)
        self.description = Rows(num_losses, n, self.dtype, self.device, self.rows, ())

    def views(self, flat: Tensor) -> list[Tensor]:
        """A contiguous (n_segment,) vector seen as one tensor a parameter, with the parameter's shape and strides."""
        views, start = [], 0
        for parameter in self.parameters:
            stop = start + _columns(parameter)
            views.append(_shaped_like(parameter, flat[start:stop]))
            start = stop
        return views


class _Recorded(NamedTuple):
    """What a parameter was when the buffer was made: its storage must stay the one the views were shaped for."""

    address: int
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size


_BEING_RECORDED: set[int] = set()
"""The identities of parameters that some buffer records now, for which it keeps them alive."""


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


class GradientBuffer:
    """The gradients of m losses over the same parameters, each in its row of one contiguous block.

    Each gradient goes to its place in its loss's row as soon as autograd has computed it, and is freed; the kernels
    read the rows where they lie, and every ``p.grad`` ends as a view of one flat combined gradient: no loss's gradient
    is ever held twice, stacked or flattened.

    Args:
        parameters: the parameters that the losses share, as from ``model.parameters()``. Those that need no gradient
            are left out; one given twice counts once.
        num_losses: m, the number of losses.

    Raises:
        TypeError: a parameter that is not a dense floating-point or complex tensor; num_losses not an int.
        ValueError: no parameter that needs a gradient; a non-leaf tensor; num_losses under 1.

    Memory: (m + 1)·n elements. Rows start as zeros, and a zero row constrains nothing.

    Example:
        >>> import torch, fastconfig as fc
        >>> model = torch.nn.Linear(3, 2)
        >>> buf = fc.GradientBuffer(model.parameters(), num_losses=2)
        >>> prediction = model(torch.ones(3))
        >>> buf.backward([prediction[0].square(), prediction[1].square()])
        >>> info = buf.combine(fc.ConFIG())
        >>> model.weight.grad.data_ptr() == buf.grad.data_ptr()
        True
    """

    def __init__(self, parameters: Iterable[Tensor], num_losses: int) -> None:
        if isinstance(num_losses, bool) or not isinstance(num_losses, int):
            raise TypeError(f"num_losses must be an int, got {num_losses!r}")
        if num_losses < 1:
            raise ValueError(f"num_losses must be at least 1, got {num_losses}")
        trained = _trained(parameters)
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in trained:
            groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        self._num_losses = num_losses
        self._segments = tuple(Segment(group, num_losses) for group in groups.values())
        self._parameters = tuple(parameter for segment in self._segments for parameter in segment.parameters)
        self._made_for = tuple(_record(parameter, parameter.data_ptr()) for parameter in self._parameters)
        self._row_views: list[list[Tensor] | None] = [None] * num_losses
        self._grad_views = [view for segment in self._segments for view in segment.views(segment.grad)]
        self._reached: list[set[int]] = [set() for _ in range(num_losses)]
        self._recording: int | None = None
        self._identities = frozenset(map(id, self._parameters))
        self._landing = _Landing()
        handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._landing.land, i))
            for i, parameter in enumerate(self._parameters)
        ]
        weakref.finalize(self, _remove_hooks, handles)

    @property
    def num_losses(self) -> int:
        """m, the number of losses."""
        return self._num_losses

    @property
    def segments(self) -> tuple[Segment, ...]:
        """One a (device, dtype) of the parameters, in order of first appearance; one only for most models."""
        return self._segments

    @property
    def rows(self) -> Tensor:
        """(m, n) view of the gradients, row i loss i's. ValueError where the buffer has several segments."""
        return self._only_segment("rows").rows

    @property
    def grad(self) -> Tensor:
        """(n,) the combined gradient, flat. ValueError where the buffer has several segments."""
        return self._only_segment("grad").grad

    def zero(self) -> None:
        """Set every row to zero and forget which parameters the losses reached. ``p.grad`` is left as it is."""
        self._check_not_recording("zero")
        for segment in self._segments:
            segment.rows.zero_()
        self._reached = [set() for _ in range(self._num_losses)]

    @contextmanager
    def record(self, loss: int) -> Generator[None, None, None]:
        """Let backward passes inside the ``with`` block write row ``loss``.

        The row begins anew: what a backward pass does not reach is zero when the block ends, and inside it may still
        hold what it did. Several backward passes in one block add up. Each ``p.grad`` is None inside the block until a
        backward pass reaches it, then the row's view, and after the block what it was before; parameters outside the
        buffer accumulate ``.grad`` as usual. If the block raises, the row is zeroed.

        Args:
            loss: the row, 0 to m - 1.

        Raises:
            IndexError: no such loss.
            RuntimeError: inside another ``record``, of this buffer or of one over some of the same parameters; or a
                parameter is no longer the one the buffer was made for.
        """
        if isinstance(loss, bool) or not isinstance(loss, int):
            raise TypeError(f"loss must be the index of a row, an int, got {loss!r}")
        if not 0 <= loss < self._num_losses:
            raise IndexError(f"loss must be 0 to {self._num_losses - 1}, got {loss}")
        self._check_not_recording("record")
        self._check_parameters()
        if not _BEING_RECORDED.isdisjoint(self._identities):
            raise RuntimeError(
                f"record({loss}) was called while another buffer over some of the same parameters records; leave that "
                "`with` block first: a gradient can only go to one row"
            )
        before = [parameter.grad for parameter in self._parameters]
        self._recording = loss
        _BEING_RECORDED.update(self._identities)
        complete = False
        try:
            views = self._open_row(loss)
            yield
            self._collect_row(loss, views)
            complete = True
        finally:
            self._recording = None
            _BEING_RECORDED.difference_update(self._identities)
            self._landing.close()
            for parameter, grad in zip(self._parameters, before, strict=True):
                parameter.grad = grad
            if not complete:
                self._forget_row(loss)

    def backward(self, losses: Sequence[Tensor | Callable[[], Tensor]], *, retain_graph: bool = False) -> None:
        """Backpropagate every loss into its row.

        Args:
            losses: m of them. Tensors of one element: the graph they share is retained until the last. Callables that
                return one: called and backpropagated one by one, so that no graph outlives its loss.
            retain_graph: keep the graph after the last tensor, too.

        Raises:
            TypeError: a loss that is neither a tensor nor a callable.
            ValueError: a wrong number of losses; a loss of several elements, or that does not require grad. Losses
                given as tensors are all checked before any row is written.

        If a callable or a backward pass raises, every row is zeroed: rows of two steps are never combined.
        """
        if isinstance(losses, Tensor) or not isinstance(losses, Sequence):
            raise TypeError(f"losses must be a sequence of {self._num_losses} losses, got {type(losses).__name__}")
        if len(losses) != self._num_losses:
            raise ValueError(f"losses must hold {self._num_losses} losses, one a row, got {len(losses)}")
        for i, loss in enumerate(losses):
            if isinstance(loss, Tensor):
                _check_loss(loss, i)
            elif not callable(loss):
                raise TypeError(f"losses[{i}] must be a tensor or a callable that returns one, got {loss!r}")
        last_tensor = max((i for i, loss in enumerate(losses) if isinstance(loss, Tensor)), default=-1)
        self._check_not_recording("backward")
        self._check_parameters()
        try:
            for i, loss in enumerate(losses):
                with self.record(i):
                    if isinstance(loss, Tensor):
                        _backward(loss, retain_graph or i < last_tensor)
                    else:
                        value = loss()
                        _check_loss(value, i)
                        _backward(value, retain_graph=False)
        except BaseException:
            self.zero()
            raise

    def combine(self, method: Method | None = None) -> Combination:
        """Combine the rows into ``grad`` and make every ``p.grad`` a view of it.

        Rows keep their content until they are recorded again or ``zero`` is called. A parameter that no loss reached
        ends with ``.grad`` None, as after a plain backward pass. Whatever a backward pass outside the buffer left in
        ``p.grad`` is replaced.

        Args:
            method: the rule from the Gramian to the weights; ``ConFIG()`` by default.

        Raises:
            RuntimeError: inside ``record``; nothing was recorded since the buffer was made or zeroed; or a parameter is
                no longer the one the buffer was made for.
            ValueError, TypeError, FloatingPointError: as ``fc.combine``; nothing has been written.
        """
        self._check_not_recording("combine")
        self._check_parameters()
        reached = set().union(*self._reached)
        if not reached:
            raise RuntimeError(
                "combine found nothing to combine: no backward pass has reached a parameter of this buffer. Call "
                "backward or record first; if the model's parameters were replaced, make a new GradientBuffer"
            )
        method = DEFAULT_METHOD if method is None else method
        home = self._segments[0].device
        m = self._num_losses
        kept = torch.empty(m + 1, m, dtype=torch.float64, device=home)
        gramian, weights = kept[:m], kept[m]
        segments = [(segment.description, segment.grad) for segment in self._segments]
        combine_segments(segments, method, gramian, weights)
        self._hang_grad(reached)
        rtol = (method if isinstance(method, ConFIG) else DEFAULT_METHOD).rule.rtol
        return Combination(gramian, weights, rtol)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{seg.rows.shape[1]} {str(seg.dtype)[6:]} on {seg.device}" for seg in self._segments)
        return f"GradientBuffer(num_losses={self._num_losses}, columns: {sizes})"

    def _only_segment(self, name: str) -> Segment:
        if len(self._segments) > 1:
            kinds = ", ".join(f"{segment.parameters[0].dtype} on {segment.device}" for segment in self._segments)
            raise ValueError(
                f"buffer.{name} is one tensor only where all parameters share dtype and device; this buffer has "
                f"{len(self._segments)} segments ({kinds}): read buffer.segments[i].{name}"
            )
        return self._segments[0]

    def _hang_grad(self, reached: set[int]) -> None:
        """Make ``.grad`` of the reached parameters a view of the combined gradient, that of the others None."""
        if is_dynamo_compiling():
            # Views made in the graph: it cannot return older ones, inputs beside the memory that it overwrites.
            views = [view for segment in self._segments for view in segment.views(segment.grad)]
        else:
            views = self._grad_views
            for segment in self._segments:
                torch.autograd.graph.increment_version(segment.grad)
        for i, (parameter, view) in enumerate(zip(self._parameters, views, strict=True)):
            parameter.grad = view.detach() if i in reached else None

    def _open_row(self, loss: int) -> list[Tensor]:
        """Let gradients land in the row from now on."""
        views = self._row_views[loss]
        if views is None:
            views = [view for segment in self._segments for view in segment.views(segment.rows[loss])]
            self._row_views[loss] = views
        for parameter in self._parameters:
            parameter.grad = None
        self._landing.open(views)
        return views

    def _collect_row(self, loss: int, views: list[Tensor]) -> None:
        """Note which parameters were reached; bring home a gradient that was put elsewhere than in its view."""
        reached = set(self._landing.reached)
        for i, (parameter, view) in enumerate(zip(self._parameters, views, strict=True)):
            if parameter.grad is None:  # not reached, or discarded inside the block, by zero_grad for instance
                view.zero_()
                reached.discard(i)
            elif parameter.grad.data_ptr() != view.data_ptr() or parameter.grad.stride() != view.stride():
                view.copy_(parameter.grad.detach())
        self._reached[loss] = reached

    def _forget_row(self, loss: int) -> None:
        for segment in self._segments:
            segment.rows[loss].zero_()
        self._reached[loss] = set()

    def _check_not_recording(self, name: str) -> None:
        if self._recording is not None:
            raise RuntimeError(
                f"{name} was called inside record({self._recording}); leave that `with` block first: "
                "one backward pass can only fill one row"
            )

    def _check_parameters(self) -> None:
        compiling = is_dynamo_compiling()  # then no address can be read; what filled the rows did read them
        for i, (parameter, made_for) in enumerate(zip(self._parameters, self._made_for, strict=True)):
            if _record(parameter, made_for.address if compiling else parameter.data_ptr()) != made_for:
                raise RuntimeError(
                    f"parameter {i} of the buffer, shape {tuple(made_for.shape)}, had its storage replaced after the "
                    f"buffer was made (it was {made_for.dtype} on {made_for.device}, it is {parameter.dtype} on "
                    f"{parameter.device}, shape {tuple(parameter.shape)}), as .to(), .half() or an assignment to .data "
                    "do; make a new GradientBuffer after such a change"
                )


def _remove_hooks(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _record(parameter: Tensor, address: int) -> _Recorded:
    return _Recorded(address, parameter.dtype, parameter.device, parameter.shape)


def _trained(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The distinct parameters that need a gradient, checked."""
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
            raise ValueError(f"parameters[{i}] is not initialised yet; run the model once before making the buffer")
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
        raise ValueError("the buffer has no parameters: none was given that requires a gradient")
    return list(distinct.values())


def _columns(parameter: Tensor) -> int:
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def _shaped_like(parameter: Tensor, flat: Tensor) -> Tensor:
    """``flat`` with the parameter's shape, and its strides where they are dense, so optimizers take their fast path."""
    if parameter.is_complex():
        flat = torch.view_as_complex(flat.view(-1, 2))
    dense = torch.empty_like(parameter, device="meta")  # keeps the strides of any dense, non-overlapping tensor
    return flat.as_strided(parameter.shape, dense.stride())


def _check_loss(loss: Tensor, index: int) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"losses[{index}] must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"losses[{index}] must have one element, got shape {tuple(loss.shape)}; reduce it, e.g. .mean()"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"losses[{index}] does not require grad, so no gradient can come of it; compute it from the parameters, "
            "outside torch.no_grad() and without .detach() or .item()"
        )


def _backward(loss: Tensor, retain_graph: bool) -> None:
    loss.backward(torch.ones_like(loss) if loss.dim() else None, retain_graph=retain_graph)
