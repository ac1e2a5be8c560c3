"""GradientBuffer: one contiguous block of rows where gradients land and the kernels read, so nothing is stacked."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Module

from fastconfig import landing
from fastconfig.backends.rules import NonFiniteError
from fastconfig.combination import Combination, combine_segments
from fastconfig.landing import GradientRows
from fastconfig.losses import Losses
from fastconfig.methods import DEFAULT_METHOD, ConFIG, Method, StreamingMethod
from fastconfig.ops import backend_for, is_traced
from fastconfig.rows import Rows

By = Literal["module", "parameter"] | Callable[[str], str]
"""What makes the parts of a model: the module that owns a parameter, the parameter, or a function of its name."""


class Segment(landing.Segment):
    """A run of columns of one dtype on one device, as ``landing.Segment``, and the combined gradient beside the rows.

    Attributes:
        grad: (n_segment,) contiguous, the combined gradient.
    """

    def __init__(self, parameters: Sequence[Tensor], num_losses: int) -> None:
        super().__init__(parameters, num_losses)
        self.grad = landing.aligned_rows(1, self.n, self.dtype, self.device)[0]


class GradientBuffer:
    """The gradients of m losses over the same parameters, each in its row of one contiguous block.

    Each gradient goes to its place in its loss's row as soon as autograd has computed it, and is freed; the kernels
    read the rows where they lie, and every ``p.grad`` ends as a view of one flat combined gradient: no loss's gradient
    is ever held twice, stacked or flattened.

    Args:
        parameters: the parameters that the losses share: a module, or as from ``model.parameters()``, or pairs as from
            ``model.named_parameters()``. Those that need no gradient are left out; one given twice counts once.
            Only a module or pairs give them the names that ``gramian(by=...)`` asks for.
        num_losses: m, the number of losses; or m names of theirs, for ``record`` and for errors, tables and pictures.

    Raises:
        TypeError: a parameter that is not a dense floating-point or complex tensor; num_losses neither an int nor a
            list of names.
        ValueError: no parameter that needs a gradient; a non-leaf tensor; two parameters of one name; num_losses under
            1; a loss's name that is empty or not the only such.

    Attributes:
        combination: what the last ``combine`` returned; None before the first.

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

    def __init__(
        self, parameters: Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]], num_losses: int | Sequence[str]
    ) -> None:
        self._losses = Losses(num_losses)
        self._num_losses = m = len(self._losses)
        tensors, names = landing.with_names(parameters)
        trained = landing.trained(tensors)
        groups = landing.by_kind(trained)
        self._rows = GradientRows([Segment(group, m) for group in groups], m, "GradientBuffer")
        places = {id(parameter): i for i, parameter in enumerate(self._rows.parameters)}
        self._places = None if names is None else {names[id(p)]: places[id(p)] for p in trained}  # in the order given
        self._grad_views = [view for segment in self.segments for view in segment.views(segment.grad)]
        self.combination: Combination | None = None

    @property
    def num_losses(self) -> int:
        """m, the number of losses."""
        return self._num_losses

    @property
    def names(self) -> tuple[str, ...]:
        """The m losses' names; "0", "1" ... where they have none."""
        return self._losses.names

    @property
    def segments(self) -> tuple[Segment, ...]:
        """One a (device, dtype) of the parameters, in order of first appearance; one only for most models."""
        return self._rows.segments

    @property
    def rows(self) -> Tensor:
        """(m, n) view of the gradients, row i loss i's. ValueError where the buffer has several segments."""
        return self._only_segment("rows").rows

    @property
    def grad(self) -> Tensor:
        """(n,) the combined gradient, flat. ValueError where the buffer has several segments."""
        return self._only_segment("grad").grad

    @property
    def has_names(self) -> bool:
        """Whether the parameters have names, which ``gramian(by=...)`` asks for."""
        return self._places is not None

    def zero(self) -> None:
        """Set every row to zero and forget which parameters the losses reached. ``p.grad`` is left as it is."""
        self._rows.check_not_recording("zero")
        self._rows.zero()

    @contextmanager
    def record(self, loss: int | str) -> Generator[None, None, None]:
        """Let backward passes inside the ``with`` block write row ``loss``.

        The row begins anew: what a backward pass does not reach is zero when the block ends, and inside it may still
        hold what it did. Several backward passes in one block add up. Each ``p.grad`` is None inside the block until a
        backward pass reaches it, then the row's view, and after the block what it was before; parameters outside the
        buffer accumulate ``.grad`` as usual. If the block raises, the row is zeroed.

        Args:
            loss: the row, 0 to m - 1, or the loss's name.

        Raises:
            TypeError, IndexError: no such loss.
            RuntimeError: inside another ``record``, of this buffer or of one over some of the same parameters; or a
                parameter is no longer the one the buffer was made for.
        """
        row = self._losses.index(loss)
        with self._rows.record(row, f"record({self._losses.argument(row)})"):
            yield

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
                _check_loss(loss, self._given(i))
            elif not callable(loss):
                raise TypeError(f"{self._given(i)} must be a tensor or a callable that returns one, got {loss!r}")
        last_tensor = max((i for i, loss in enumerate(losses) if isinstance(loss, Tensor)), default=-1)
        self._rows.check_not_recording("backward")
        self._rows.check_parameters()
        try:
            for i, loss in enumerate(losses):
                with self.record(i):
                    if isinstance(loss, Tensor):
                        _backward(loss, retain_graph or i < last_tensor)
                    else:
                        value = loss()
                        _check_loss(value, self._given(i))
                        _backward(value, retain_graph=False)
        except BaseException:
            self.zero()
            raise

    def combine(self, method: Method | StreamingMethod | None = None) -> Combination:
        """Combine the rows into ``grad`` and make every ``p.grad`` a view of it.

        Rows keep their content until they are recorded again or ``zero`` is called. A parameter that no loss reached
        ends with ``.grad`` None, as after a plain backward pass. Whatever a backward pass outside the buffer left in
        ``p.grad`` is replaced.

        Args:
            method: the rule from the Gramian to the weights, or ``GradDrop``; ``ConFIG()`` by default.

        Raises:
            RuntimeError: inside ``record``; nothing was recorded since the buffer was made or zeroed; or a parameter is
                no longer the one the buffer was made for.
            ValueError, TypeError, FloatingPointError: as ``fc.combine``; nothing has been written.
        """
        self._rows.check_not_recording("combine")
        self._rows.check_parameters()
        reached = set().union(*self._rows.reached)
        if not reached:
            raise RuntimeError(
                "combine found nothing to combine: no backward pass has reached a parameter of this buffer. Call "
                "backward or record first; if the model's parameters were replaced, make a new GradientBuffer"
            )
        method = DEFAULT_METHOD if method is None else method
        home = self.segments[0].device
        m = self._num_losses
        kept = torch.empty(m + 1, m, dtype=torch.float64, device=home)
        gramian, weights = kept[:m], kept[m]
        segments = [(segment.description, segment.grad) for segment in self.segments]
        try:
            combine_segments(segments, method, gramian, weights)
        except NonFiniteError as error:
            raise self._losses.with_name(error) from None
        self._hang_grad(reached)
        rtol = (method if isinstance(method, ConFIG) else DEFAULT_METHOD).rule.rtol
        self.combination = Combination(gramian, weights, rtol, self._losses)
        return self.combination

    @overload
    def gramian(self, by: None = None) -> Tensor: ...

    @overload
    def gramian(self, by: By) -> dict[str, Tensor]: ...

    def gramian(self, by: By | None = None) -> Tensor | dict[str, Tensor]:
        """The Gramian of the rows as they are, K_ij = g_i · g_j: of all columns, or one for each part of the model.

        One pass over the rows either way: the Gramian is additive over columns, so the parts' add up to the whole.

        Args:
            by: None for the whole. ``"module"``: the parameters that one module owns itself are a part, under the name
                it has in ``model.named_modules()`` ("" for the model). ``"parameter"``: each parameter is. Or a
                function from a parameter's name to that of its part, for instance
                ``lambda name: name.split(".")[0]``. A parameter that several modules share goes by its first name.

        Returns:
            (m, m) float64, symmetric to the bit, on the device of the first segment; with ``by`` one for each part, in
            the parameters' order. Nothing waits for a device.

        Raises:
            RuntimeError: inside ``record``.
            ValueError: another ``by``; or the buffer was made from parameters without names.
            TypeError: a function that answers anything but a str.
        """
        self._rows.check_not_recording("gramian")
        if by is None:
            return self._sum_of_gramians([segment.description for segment in self.segments])
        return {part: self._sum_of_gramians(rows) for part, rows in self._rows_of_parts(by).items()}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{seg.rows.shape[1]} {str(seg.dtype)[6:]} on {seg.device}" for seg in self.segments)
        losses = list(self.names) if self._losses.named else self._num_losses
        return f"GradientBuffer(num_losses={losses}, columns: {sizes})"

    def _given(self, index: int) -> str:
        """How an error calls what ``backward`` was given for a loss."""
        return f"losses[{index}]" + (f" ({self._losses.argument(index)})" if self._losses.named else "")

    def _sum_of_gramians(self, parts: Sequence[Rows]) -> Tensor:
        home = self.segments[0].device
        traced = is_traced(None, [rows.matrix for rows in parts if rows.matrix is not None])
        gramians = (backend_for(rows.device, None, traced).gramian(rows).to(home) for rows in parts)
        return reduce(Tensor.add_, gramians)

    def _rows_of_parts(self, by: By) -> dict[str, list[Rows]]:
        """The rows cut into the parts' columns, as few runs a part as can be. Views: nothing is copied."""
        part_of = _part_of(by)
        if self._places is None:
            raise ValueError(
                f"gramian(by={by!r}) needs the parameters' names, and this buffer was made without; make it by "
                "GradientBuffer(model, ...) or GradientBuffer(model.named_parameters(), ...)"
            )
        parts = {place: _checked_part(part_of(name), name) for name, place in self._places.items()}
        runs: dict[str, list[tuple[int, int, int]]] = {part: [] for part in parts.values()}  # segment, first and last
        spans = [
            (s, first, first + landing.columns_of(parameter))
            for s, segment in enumerate(self.segments)
            for parameter, first in zip(segment.parameters, segment.starts, strict=True)
        ]
        for place, (s, first, last) in enumerate(spans):
            run = runs[parts[place]]
            if run and run[-1][0] == s and run[-1][2] == first:
                run[-1] = s, run[-1][1], last
            else:
                run.append((s, first, last))
        return {
            part: [self.segments[s].description.columns(first, last) for s, first, last in run]
            for part, run in runs.items()
        }

    def _only_segment(self, name: str) -> Segment:
        if len(self.segments) > 1:
            kinds = ", ".join(f"{segment.parameters[0].dtype} on {segment.device}" for segment in self.segments)
            raise ValueError(
                f"buffer.{name} is one tensor only where all parameters share dtype and device; this buffer has "
                f"{len(self.segments)} segments ({kinds}): read buffer.segments[i].{name}"
            )
        return self.segments[0]

    def _hang_grad(self, reached: set[int]) -> None:
        """Make ``.grad`` of the reached parameters a view of the combined gradient, that of the others None."""
        if is_dynamo_compiling():
            # Views made in the graph: it cannot return older ones, inputs beside the memory that it overwrites.
            views = [view for segment in self.segments for view in segment.views(segment.grad)]
        else:
            views = self._grad_views
            for segment in self.segments:
                torch.autograd.graph.increment_version(segment.grad)
        for i, (parameter, view) in enumerate(zip(self._rows.parameters, views, strict=True)):
            parameter.grad = view.detach() if i in reached else None


def _part_of(by: By) -> Callable[[str], str]:
    """From a parameter's name to that of its part."""
    if callable(by):
        return by
    if by == "parameter":
        return str
    if by == "module":
        return lambda name: name.rpartition(".")[0]
    raise ValueError(f"by must be 'module', 'parameter', a function of a parameter's name or None, got {by!r}")


def _checked_part(part: str, name: str) -> str:
    if not isinstance(part, str):
        raise TypeError(f"by must return a str, the name of a part, got {part!r} for parameter {name!r}")
    return part


def _check_loss(loss: Tensor, given: str) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{given} must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{given} must have one element, got shape {tuple(loss.shape)}; reduce it, e.g. .mean()")
    if not loss.requires_grad:
        raise ValueError(
            f"{given} does not require grad, so no gradient can come of it; compute it from the parameters, "
            "outside torch.no_grad() and without .detach() or .item()"
        )


def _backward(loss: Tensor, retain_graph: bool) -> None:
    loss.backward(torch.ones_like(loss) if loss.dim() else None, retain_graph=retain_graph)
