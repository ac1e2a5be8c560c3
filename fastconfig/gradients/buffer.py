"""GradientBuffer: one contiguous block of rows where gradients land and the kernels read, so nothing is stacked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Module
from torch.optim import Optimizer

from fastconfig.backends.rows import Rows
from fastconfig.backends.rules import NonFiniteError
from fastconfig.gradients import landing, step_hook
from fastconfig.gradients.across import Together
from fastconfig.gradients.apart import AnyMethod, Apart
from fastconfig.gradients.batched import checked_chunk, gradients_in_batches
from fastconfig.gradients.combination import (
    Combination,
    Scaler,
    combine_segments,
    overflow_of,
    rtol_of,
    scale_of,
)
from fastconfig.gradients.exchange import SharedRows, SharedSegment, make_equal, together_over
from fastconfig.gradients.forgotten import Reminder, frames_to_scaler, words_for
from fastconfig.gradients.heads import OutsideParameters
from fastconfig.gradients.landing import GradientRows, Recording, Shown
from fastconfig.gradients.layout import Layout
from fastconfig.gradients.losses import Loss, Losses, backpropagate
from fastconfig.gradients.memory import aligned_rows
from fastconfig.gradients.parameters import (
    Parameters,
    Source,
    Watch,
    by_kind,
    check_in_memory,
    columns_of,
    trained,
)
from fastconfig.gradients.parts import By, rows_of_parts, runs_of_parts
from fastconfig.gradients.processes import Solitude, Sync, Wrappers, identities_of, ranks_of
from fastconfig.gradients.ranks import Ranks, is_group, is_told
from fastconfig.methods import DEFAULT_METHOD, Method, StreamingMethod, method_of
from fastconfig.ops import backend_for, is_traced
from fastconfig.validation import FLOAT_DTYPES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Stale = Literal["warn", "error", "use"]

_EMPTY, _NEW, _USED = 0, 1, 2
"""What a row is: zero; recorded since the last combination; of a step before that."""

_STEPS_A_BLOCK = 16
"""How many steps' K and c share a block of memory."""


class Segment(landing.Segment):
    """A run of columns of one dtype on one device, as ``landing.Segment``, and the combined gradient beside the rows.

    Attributes:
        grad: (n_segment,) contiguous, the combined gradient.
    """

    def __init__(self, parameters: Sequence[Tensor], num_losses: int) -> None:
        super().__init__(parameters, num_losses)
        self.grad = aligned_rows(1, self.n, self.dtype, self.device)[0]


class GradientBuffer:
    """The gradients of m losses over the same parameters, each in its row of one contiguous block.

    Each gradient is brought to its place in its loss's row, large ones as soon as autograd has computed them, and is
    freed; the kernels read the rows where they lie, and every ``p.grad`` ends as a view of one flat combined gradient:
    no loss's gradient is stacked or flattened.

    Which parameters belong in it: those that the losses share. Task heads that one loss alone reaches may be in it,
    too, or may stay outside, where they get the plain sum of the losses' gradients, as after ``backward()``, and want
    ``optimizer.zero_grad()`` in every step. With heads inside, norms and cosines are of all parameters, so losses with
    large heads count as less alike than they are on the trunk, and the heads' updates are weighted, too.

    Args:
        parameters: the parameters that the losses share: a module, or as from ``model.parameters()``, or pairs as from
            ``model.named_parameters()``. Those that need no gradient are left out; one given twice counts once.
            Only a module or pairs give them the names that ``gramian(by=...)`` asks for, and only of a module is it
            noticed that a layer was replaced or added.
        num_losses: m, the number of losses; or m names of theirs, for ``record`` and for errors, tables and pictures.
        sync: ``"auto"``: where torch.distributed runs several processes, the parameters tell how their gradients meet:
            DTensors (``fully_shard``, tensor parallel) by themselves, a module within ``DistributedDataParallel`` by
            that, others as ``group`` says, and it is an error if nothing does. A process group: of plain replicas,
            whose gradients are averaged here, without DistributedDataParallel: each rank keeps its share of every row,
            (m, n/W), and m backward passes through one forward pass are right. Parameters are made rank 0's. None:
            this process trains for itself, or its user brings rows together.
        group: the process group of all ranks that hold a part of the model, where that does not follow from the
            parameters: pipeline stages, experts. Plain parameters of one name are then copies, whose gradients are
            equal on the ranks that have them.
        local: modules or parameters that are this rank's alone, though other ranks have some of the same name.
        wire_dtype: with ``sync=group``, of the gradients that travel and of the combined one on its way back, for
            instance torch.bfloat16: half the bytes, and rounding to it. None for the gradients' own.

    On several ranks ``combine`` and ``gramian`` are calls of all of them, as the constructor is. What travels is m×m: K
    is the sum over ranks of the Gramians of the columns that each owns, rank 0 asks the method, and all get the same
    weights, to the bit. See docs/distributed.md.

    Raises:
        RuntimeError: several processes, plain parameters, and nothing that says how their gradients meet.
        TypeError: a parameter that is not a dense floating-point or complex tensor; pairs and tensors mixed; num_losses
            neither an int nor a list of names.
        ValueError: no parameter that needs a gradient; a non-leaf or uninitialised tensor or one on the meta device;
            two parameters of one name; num_losses under 1; a loss's name that is empty or not the only such.

    Attributes:
        combination: what the last ``combine`` returned; None before the first.

    Memory: (m + 1)·n elements of the gradients' dtype (a parameter's ``grad_dtype``, where PyTorch has that). Rows
    start as zeros, and a zero row constrains nothing. Rows are dense: a table whose gradients are sparse takes m + 1
    times its own size, and a warning says so where that is over 16 MiB.

    A copy (``copy.deepcopy``, ``pickle``), made together with the model, is a buffer over the copied parameters.

    With L-BFGS: the combination is no function's gradient, so a line search, and the curvature that L-BFGS takes from
    the differences of gradients, mean nothing on it. Combine once before the step, and minimise Σ c_i L_i in it with
    the weights c of that combination held fixed: a function whose gradient, where the step begins, is the combination.

    Example:
        >>> import torch, fastconfig as fc
        >>> model = torch.nn.Linear(3, 2)
        >>> buf = fc.GradientBuffer(model, num_losses=2)
        >>> prediction = model(torch.ones(3))
        >>> buf.backward([prediction[0].square(), prediction[1].square()])
        >>> info = buf.combine(fc.ConFIG())
        >>> model.weight.grad.data_ptr() == buf.grad.data_ptr()
        True
    """

    def __init__(
        self,
        parameters: Parameters,
        num_losses: int | Sequence[str],
        *,
        sync: Sync = "auto",
        group: ProcessGroup | None = None,
        local: Sequence[Module | Tensor] = (),
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        self._losses = Losses(num_losses)
        self._num_losses = len(self._losses)
        self._calls = [f"record({self._losses.argument(i)})" for i in range(self._num_losses)]
        self._source = Source(parameters)
        self._sync, self._group, self._local, self._wire_dtype = sync, group, tuple(local), wire_dtype
        if wire_dtype is not None and (not is_group(sync) or wire_dtype not in FLOAT_DTYPES):
            raise ValueError(
                f"wire_dtype must be None, or with sync=group a floating-point dtype, got {wire_dtype}; by other "
                "buffers no gradients travel"
            )
        self._wrappers = Wrappers(self._source.module)
        self._methods: dict[str, Method | StreamingMethod] = {}
        self._reminder = Reminder()
        self._is_scaled = self._awaits_step = self._accumulates = self._was_stepped = False  # see before_step
        self._is_in_shares = False
        self._apart: Apart | None = None
        self.combination: Combination | None = None
        self._build()
        self._states = [_EMPTY] * self._num_losses
        self._absent = [False] * self._num_losses
        self._outside = OutsideParameters()
        step_hook.watch(self)

    @property
    def num_losses(self) -> int:
        """m, the number of losses."""
        return self._num_losses

    @property
    def names(self) -> tuple[str, ...]:
        """The m losses' names; "0", "1" ... where they have none."""
        return self._losses.names

    @property
    def rank(self) -> int:
        """This process's number among the ranks that combine together; 0 where it trains alone."""
        return 0 if self._together is None else self._together.ranks.rank

    @property
    def segments(self) -> tuple[Segment, ...]:
        """One a (device, dtype) of the gradients, in order of first appearance; one only for most models."""
        return self._rows.segments

    @property
    def rows(self) -> Tensor:
        """(m, n) view of the gradients, row i loss i's. ValueError where the buffer has several segments.

        With ``sync=group`` (m, s): this rank's share of the columns.
        """
        self._rows.settle()
        return self._only_segment("rows").rows

    @property
    def block(self) -> Tensor:
        """(m, n and what pads it) contiguous: the memory of ``rows``, for collective calls of one's own.

        ``dist.all_reduce(buf.rows)`` is silently wrong by some backends, gloo among them, as rows have gaps between
        them; ``dist.all_reduce(buf.block)`` is right. ValueError where the buffer has several segments.
        """
        self._rows.settle()
        return self._only_segment("block").block

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
        self._states = [_EMPTY] * self._num_losses
        self._absent = [False] * self._num_losses

    def refresh(self) -> None:
        """Take in parameters that need a gradient now and did not when the buffer was made, or are new in the module.

        The rows of the parameters that stay keep their content, with zeros for what is new; those of parameters that
        the module no longer has are gone. Rows that ranks share out (``sync=group``) begin as zeros. ``rows``, ``grad``
        and ``segments`` are new tensors afterwards, and a ``p.grad`` stays a view of the old ones until the next
        ``combine``. While it runs, old and new rows are in memory.

        Raises:
            RuntimeError: inside ``record``.
            TypeError, ValueError: as the constructor; nothing has changed.
        """
        self._rows.check_not_recording("refresh")
        if self._shared is not None:
            self._build(kept=self._rows.parameters)
            self._states, self._absent = [_EMPTY] * self._num_losses, [False] * self._num_losses
            return
        old, old_views = self._rows, [self._rows.shown(i).views for i in range(self._num_losses)]
        self._build(kept=old.parameters)
        place = {
            id(parameter): i
            for i, (parameter, view) in enumerate(zip(old.parameters, old_views[0], strict=True))
            if parameter.shape == view.shape  # else what its rows hold is of another parameter
        }
        sources = [place.get(id(parameter)) for parameter in self._rows.parameters]
        for row in range(self._num_losses):
            for view, source in zip(self._rows.shown(row).views, sources, strict=True):
                if source is not None:
                    view.copy_(old_views[row][source])
            self._rows.reached[row] = tuple([s is not None and old.reached[row][s] for s in sources])

    def record(self, loss: int | str, *, accumulate: bool | None = None) -> Recording:
        """Let backward passes inside the ``with`` block write row ``loss``.

        The row begins anew: what has no gradient when the block ends is zero, and inside it may still hold what it did.
        Several backward passes in one block add up. What counts is what each ``p.grad`` holds when the block ends,
        whoever put it there. It is None when the block begins, and after the block what it was before; parameters
        outside the buffer accumulate ``.grad`` as usual. If the block raises, the row is zeroed.

        Args:
            loss: the row, 0 to m - 1, or the loss's name.
            accumulate: True adds to the row what was recorded of the loss since the last ``combine``, as for
                micro-batches: ``combine`` ends the accumulation, so True may be said in every call of a loop. The
                block's gradients stay in ``p.grad`` until it ends, n elements more. False begins anew. None, too, and
                warns once where that discards a gradient that was never combined.

        Raises:
            TypeError, IndexError: no such loss.
            RuntimeError: entered inside another ``record``, of this buffer or of one over some of the same parameters;
                or a parameter is no longer the one the buffer was made for.
        """
        row = self._losses.index(loss)
        return Recording(self._rows, partial(self._prepared, row, accumulate), self._recorded, False)

    def backward(
        self,
        losses: Sequence[Loss] | Mapping[str, Loss] | Mapping[int, Loss],
        *,
        accumulate: bool | None = None,
        retain_graph: bool = False,
        batched: bool | int | None = None,
    ) -> None:
        """Backpropagate every loss into its row.

        Each call is a step of its own unless told to accumulate: a loop over micro-batches without ``accumulate=True``
        keeps the last of them alone, and a warning says so once.

        Args:
            losses: m of them, or a dict of them by name or number. Tensors of one element: the graph they share is
                retained until the last. Callables that return one: called and backpropagated one by one, so that no
                graph outlives its loss. None for a loss without labels in this batch: its row is zero and takes no
                part, and ``combination.absent`` names it.
            accumulate: True adds to the rows what was recorded since the last ``combine``, as for micro-batches, whose
                losses are to be divided by their number: the rows are those of one pass over the joined batch, to
                rounding. ``combine`` ends the accumulation, so True may be said in every call of a loop. A loss is
                absent where every micro-batch lacks it. n elements more in memory, no second set of rows. False begins
                anew. None, too, and warns once where that discards gradients that were never combined.
            retain_graph: keep the graph after the last tensor, too.
            batched: True backpropagates all losses in one pass, vectorised by ``torch.vmap``; an int, so many a pass.
                The losses are to be tensors, of a model in one process. A pass holds its k gradients beside the rows,
                and computes k times everything that two of its losses share, but launches it once: on a CPU that is
                quicker for small networks (10,000 parameters) whose losses share them, and slower for large ones or
                with heads of their own; docs/performance.md has numbers. Hooks of the buffer's parameters see batched
                gradients, and those after accumulation none. None or False: a pass a loss.

        Raises:
            TypeError: a loss that is neither a tensor nor a callable nor None; ``batched`` is no int.
            ValueError: a wrong number of losses, or a dict that lacks one; every loss is None, without ``accumulate``;
                a loss of several elements, or that does not require grad. Losses given as tensors are all checked
                before any row is written. ``batched`` under 1, of callables, on several ranks or of sharded parameters.
            IndexError: a dict names no such loss.
            RuntimeError: what ``torch.vmap`` cannot do, with ``batched``: operations in place, recurrent networks of
                cuDNN, an ``autograd.Function`` that looks at values.

        If a callable or a backward pass raises, every row is zeroed: rows of two steps are never combined.
        """
        rows = self._rows
        rows.check_not_recording("backward")
        try:
            given = self._losses.in_order(losses)
            # Of several ranks one may have no labels at all; combine says so where none has.
            may_all_be_absent = bool(accumulate) or self._together is not None
            last_tensor = self._losses.check(given, may_all_be_absent)
            self._wrappers.check_open("backward")
            self._wrappers.check_tensors(given)
            chunk = checked_chunk(batched, given, self._rows.parameters, self._together is None)
        except Exception as error:
            self._tell_failure(error, is_before_the_first=True)
            raise
        adds = [False] * self._num_losses
        if _NEW in self._states:
            for i in range(self._num_losses):
                adds[i] = self._adds(i, accumulate, "backward")
        else:
            self._begin_step(accumulate, [loss for loss in given if isinstance(loss, Tensor)])
        rows.begin("backward")
        last = max((i for i, loss in enumerate(given) if loss is not None), default=-1)
        if chunk:
            self._run_batched(given, adds, chunk, retain_graph)
            return
        try:
            self._wrappers.hold()
            for i, loss in enumerate(given):
                if i == last:
                    self._wrappers.release()
                if loss is None:
                    rows.leave_out(i, adds[i])
                    if not adds[i]:
                        self._states[i], self._absent[i] = _NEW, True
                    continue
                rows.open(i, self._calls[i], adds[i])
                if isinstance(loss, Tensor):
                    backpropagate(loss, retain_graph or i < last_tensor)
                else:
                    value = loss()
                    self._losses.check_one(value, i)
                    self._outside.see(value, rows)
                    backpropagate(value, retain_graph=False)
                rows.close(i, adds[i])
                self._wrappers.check_close(self._calls[i], any(rows.reached[i]))
                self._states[i], self._absent[i] = _NEW, False
        except BaseException as failed:
            self._wrappers.release()
            rows.end(complete=False)
            self.zero()
            self._tell_failure(failed)
            raise
        rows.end(complete=True)
        self._outside.after()

    def _run_batched(self, losses: Sequence[Loss], adds: Sequence[bool], chunk: int, retain_graph: bool) -> None:
        """Backpropagate losses that are tensors, so many in a pass; ``rows.begin`` has been called."""
        rows, given = self._rows, {i: loss for i, loss in enumerate(losses) if isinstance(loss, Tensor)}
        try:
            gradients_in_batches(rows, given, adds, chunk, retain_graph)
            for i, adding in enumerate(adds):
                if i not in given:
                    rows.leave_out(i, adding)
                if i in given or not adding:
                    self._states[i], self._absent[i] = _NEW, i not in given
        except BaseException:
            rows.end(complete=False)
            self.zero()
            raise
        rows.end(complete=True)
        self._outside.after()

    def backward_own(self, task: int | str, loss: Tensor | Callable[[], Tensor], *, retain_graph: bool = False) -> None:
        """Backpropagate one loss on this rank, others on other ranks, and bring all of them to all rows.

        One backward pass a rank gives m fresh gradients, of a buffer with ``sync=group`` on W ≥ m ranks. Each row is
        the average over the ranks that took its loss, so it is of their part of the batch alone: with W = m of one
        rank's, whose gradient has √m times the noise that ``backward`` on all ranks would leave. A loss that no rank
        took is absent. What was recorded before is overwritten.

        Args:
            task: the loss of this rank, by number or name.
            loss: it, or a callable that returns it.
            retain_graph: keep the graph.

        Raises:
            ValueError: the buffer was made without ``sync=group``; as of ``backward``.
            TypeError, IndexError, RuntimeError: as of ``backward`` and ``record``.
        """
        shared, row = self._shared, self._losses.index(task)
        if shared is None:
            raise ValueError("backward_own is of a buffer with sync=group, whose ranks bring gradients together by it")
        shared.begin("backward_own")
        try:
            shared.open_own(row, self._calls[row])
            value = loss if isinstance(loss, Tensor) else loss()
            self._losses.check_one(value, row)
            backpropagate(value, retain_graph)
            taken = shared.close_own(row)
        except BaseException as failed:
            shared.end(complete=False)
            self._tell_failure(failed)
            raise
        shared.end(complete=True)
        self._states = [_NEW] * self._num_losses
        self._absent = [i not in taken for i in range(self._num_losses)]

    def combine(
        self,
        method: AnyMethod | Mapping[str, AnyMethod] = None,
        *,
        by: By | None = None,
        scaler: Scaler | None = None,
        stale: Stale = "warn",
        sharded: bool = False,
    ) -> Combination:
        """Combine the rows into ``grad`` and make every ``p.grad`` a view of it.

        Rows keep their content until they are recorded again or ``zero`` is called. A parameter that no loss reached
        ends with ``.grad`` None, as after a plain backward pass. Whatever a backward pass outside the buffer left in
        ``p.grad`` is replaced.

        Args:
            method: the rule from the Gramian to the weights, or ``GradDrop``, or the name of one, as ``fastconfig
                methods`` lists them, made once for the buffer; ``ConFIG()`` by default. With ``by``, a dict of them may
                stand for one, a method for each part. One that remembers (``GradVac``, ``SDMGrad``, ``CRMOGM``) is then
                given by name, or in a dict.
            by: the parts of the model, as in ``gramian``: ``"module"``, ``"parameter"`` or a function of a parameter's
                name. Each part is combined by its own Gramian, so that none conflicts in any part (GradVac's paper,
                arXiv 2010.05874, section 3.3, does so by layer; torchjd calls it grouping), and the length of each
                part's update is its own, too. ``combination.parts`` tells K and c of each; of the whole there is the
                sum of K, and no c: NaN. In one process. None for the model as a whole.
            scaler: the ``torch.amp.GradScaler`` by which the losses were multiplied. The weights are those of the true
                gradients, as is what ``combination`` tells; ``grad`` stays scaled, so that ``scaler.unscale_``,
                ``scaler.step`` and ``scaler.update`` go on as always, after this call. A gradient that overflowed is
                left to the scaler to find in ``p.grad``, also where the method drops it from the weights: the step is
                skipped, and the scale backs off. Without it, a method whose answer is not proportional to the gradients
                (``NashMTL``, ``SDMGrad``, ``InverseNorm``, ...) solves another problem. Nothing waits for the device.
            stale: what to do where some rows were recorded since the last ``combine`` and others were not and still
                hold gradients of a step before: ``"warn"`` once, ``"error"``, or ``"use"`` them silently.
            sharded: of a buffer with ``sync=group``: leave the combined gradient where its rows are, in
                ``segments[i].share``, for an optimizer that shares out its state; every ``p.grad`` ends as None. Of
                other buffers gradients lie where their parameters do, and it changes nothing.

        Raises:
            RuntimeError: inside ``record``; nothing was recorded since the buffer was made or zeroed; a row is stale
                and stale="error"; a parameter is no longer the one the buffer was made for, or one requires a gradient
                that did not then (``refresh`` takes it in).
            ValueError, TypeError, FloatingPointError: as ``fc.combine``; nothing has been written. With ``by``, as
                ``gramian``; a dict that lacks a part or names another; GradDrop, which has no Gramian; several ranks.
        """
        # Collective calls, and a table of parts, stay outside of graphs.
        if is_dynamo_compiling() and (self._together is not None or by is not None):
            eager: Callable[..., Combination] = torch.compiler.disable(self.combine)
            return eager(method, by=by, scaler=scaler, stale=stale, sharded=sharded)
        if by is not None:
            return self._combine_apart(method, by, scaler, stale)
        if isinstance(method, Mapping):
            raise TypeError("method is a dict, one a part, and there are no parts; say by=, or give one method")
        try:
            rule = self._checked_for_combining(method, stale)
        except Exception as error:
            if self._shared is not None:
                self._shared.fail(error)
            elif self._together is not None:
                self._together.fail(error)
            raise
        if self._shared is not None:
            self._shared.call_roll(None)
        self._rows.settle()
        home = self.segments[0].device
        gramian, weights = self._fresh_record()
        scale = scale_of(scaler, home)
        reached, absent = self._reached(), [i for i, is_absent in enumerate(self._absent) if is_absent]
        try:
            if self._together is None:
                combine_segments(
                    [(segment.description, segment.grad) for segment in self.segments], rule, gramian, weights, scale
                )
            else:
                reached, absent = self._combine_across(self._together, rule, gramian, weights, scale)
                for segment in self._shared.segments if self._shared is not None and not sharded else ():
                    segment.gather()
        except NonFiniteError as error:
            raise self._losses.with_name(error) from None
        if scaler is not None:
            self._leave_overflow_to_be_found(gramian, reached)
        self._hang_grad(reached if self._shared is None or not sharded else (False,) * len(reached))
        self._is_in_shares = self._shared is not None and sharded
        return self._combined(Combination(gramian, weights, rtol_of(rule), self._losses, absent), scaler is not None)

    def _combined(self, combination: Combination, is_scaled: bool) -> Combination:
        """``p.grad`` shows a combination."""
        self.combination = combination
        self._states = [_USED if state == _NEW else state for state in self._states]
        self._is_scaled = is_scaled
        self._awaits_step = not is_scaled  # a scaler leaves steps out
        return combination

    def _combine_apart(
        self, method: AnyMethod | Mapping[str, AnyMethod], by: By, scaler: Scaler | None, stale: Stale
    ) -> Combination:
        """Combine part by part."""
        if self._together is not None:
            raise ValueError(f"combine(by={by!r}) is of one process, and this buffer is of several ranks; leave it out")
        apart = self._apart
        if apart is None or apart.by is not by:
            outputs = [segment.grad for segment in self.segments]
            apart = self._apart = Apart(self.segments, outputs, self._places, by, self._methods)
        methods = apart.methods(method, self._num_losses)
        self._checked_for_combining(methods[0], stale)
        self._rows.settle()
        absent = [i for i, is_absent in enumerate(self._absent) if is_absent]
        try:
            info = apart.combine(methods, self._losses, absent, scale_of(scaler, self.segments[0].device))
        except NonFiniteError as error:
            raise self._losses.with_name(error) from None
        if scaler is not None:
            self._leave_overflow_to_be_found(info.gramian, self._reached())
        self._hang_grad(self._reached())
        return self._combined(info, scaler is not None)

    def _checked_for_combining(
        self, method: Method | StreamingMethod | str | None, stale: Stale
    ) -> Method | StreamingMethod:
        """The method, where there is nothing that forbids to combine."""
        rows = self._rows
        rows.check_not_recording("combine")
        rows.check_parameters()
        if not is_dynamo_compiling():
            self._watch.check("combine")
            self._solitude.check("combine")
        if stale not in ("warn", "error", "use"):
            raise ValueError(f"stale must be 'warn', 'error' or 'use', got {stale!r}")
        if self._together is None and True not in self._reached():
            raise RuntimeError(self._why_nothing())
        rule = self._method_of(method)
        if stale != "use" and _NEW in self._states and _USED in self._states:
            self._tell_stale(rule, stale)
        return rule

    def _combine_across(
        self,
        together: Together,
        rule: Method | StreamingMethod,
        gramian: Tensor,
        weights: Tensor,
        scale: Tensor | None,
    ) -> tuple[tuple[bool, ...], list[int]]:
        """Combine with other ranks: which parameters here are reached on any, which losses are absent on all."""
        try:
            new = [state == _NEW for state in self._states]
            reached, absent = together.sum_up(gramian, self._reached(), self._absent, new)
        except Exception:
            self.zero()  # rows of a step that another rank could not finish
            raise
        if together.is_nothing_reached:
            raise RuntimeError(self._why_nothing())
        together.combine(rule, gramian, weights, scale)
        return reached, absent

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
        self._rows.settle()
        if by is None:
            if self._together is not None:
                return self._together.gramian()
            return self._sum_of_gramians([segment.description for segment in self.segments])
        if self._together is not None:
            return self._together.gramians(runs_of_parts(self.segments, self._places, by))
        parts = rows_of_parts(self.segments, self._places, by)
        return {part: self._sum_of_gramians(rows) for part, rows in parts.items()}

    def before_step(self, optimizer: Optimizer) -> None:
        """Look, before an optimizer's step, at what of a loop is easily forgotten; for ``step_hook``.

        Whether the optimizer steps over this buffer's parameters is a question of n names, so it is asked only where
        there is something to be said or noted.
        """
        is_new = _NEW in self._states
        is_first = not self._outside.is_done
        is_awaited = self._awaits_step and self._accumulates
        scaler = 0 if self._is_scaled or self._reminder.has_said("scaler") else frames_to_scaler()
        if not (is_new or is_first or is_awaited or scaler or self._is_in_shares):
            return
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not self._rows.overlaps(stepped):
            return
        if is_new:
            self._reminder.say("combine", 4)
            return
        if self._is_in_shares:
            self._reminder.say("shares", 4)
            return
        if is_first:
            self._outside.stepping(stepped, self._rows)
        if self._is_shown():
            self._awaits_step, self._was_stepped = False, True
            if scaler:
                self._reminder.say("scaler", scaler)

    def _is_shown(self) -> bool:
        """Whether ``p.grad`` shows the combination of this buffer, not of another or none."""
        known = self._reached_of
        return known is not None and self._shown.is_grad_of(self._rows.parameters, known[1])

    def holds(self, parameter: Tensor) -> bool:
        """Whether a parameter has columns here."""
        return self._rows.has(parameter)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{seg.rows.shape[1]} {str(seg.dtype)[6:]} on {seg.device}" for seg in self.segments)
        losses = list(self.names) if self._losses.named else self._num_losses
        return f"GradientBuffer(num_losses={losses}, columns: {sizes})"

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientBuffer:
        """A buffer over the copied parameters, with the same rows."""
        self._check_copied()
        return _rebuilt(*copy.deepcopy(self._parts(), memo))

    def __reduce__(self) -> tuple[Callable[..., GradientBuffer], tuple[object, ...]]:
        """As deepcopy: pickled together with its model, it comes back over that model's parameters."""
        self._check_copied()
        return _rebuilt, self._parts()

    def _check_copied(self) -> None:
        if self._together is not None:
            raise TypeError(
                "a GradientBuffer of several ranks cannot be copied or pickled: every rank takes part in making one; "
                "make a new one over the copied model"
            )

    def _parts(self) -> tuple[Parameters, Module | None, int | list[str], dict[str, Any]]:
        """What a copy is made of. A module that holds the buffer is not whole yet while that is copied."""
        names, tensors = self._source.names, self._source.tensors
        given: Parameters = tensors if names is None else [(names[id(tensor)], tensor) for tensor in tensors]
        state = {
            "rows": [(segment.rows, segment.grad) for segment in self.segments],
            "parameters": list(self._rows.parameters),
            "reached": list(self._rows.reached),
            "states": list(self._states),
            "absent": list(self._absent),
            "methods": dict(self._methods),
            "combination": self.combination,
        }
        losses = list(self.names) if self._losses.named else self._num_losses
        return given, self._source.module, losses, state

    def _build(self, kept: Sequence[Tensor] = ()) -> None:
        """Rows for the parameters that need a gradient, and for those to be kept though they need none now."""
        tensors, names = self._source.now()
        staying = set(map(id, kept))
        trained(tensors)  # checks them
        check_in_memory(tensors)
        wanted = list({id(p): p for p in tensors if p.requires_grad or id(p) in staying}.values())
        ranks = ranks_of(self._source.module, wanted, self._sync, self._group, "GradientBuffer")
        self._solitude = Solitude("GradientBuffer", self._sync)
        self._rows, self._together = self._rows_on(ranks, wanted, names)
        self._shared = self._rows if isinstance(self._rows, SharedRows) else None
        self._source.read_again()
        self._watch = Watch(self._source, wanted, "GradientBuffer")
        places = {id(parameter): i for i, parameter in enumerate(self._rows.parameters)}
        self._places = None if names is None else {names[id(p)]: places[id(p)] for p in wanted}  # in the order given
        self._reached_of: tuple[list[tuple[bool, ...]], tuple[bool, ...]] | None = None
        self._records: list[tuple[Tensor, Tensor]] = []
        self._apart = None
        self._shown = Shown(
            [view for segment in self.segments for view in segment.views(segment.grad)], self._rows.parameters
        )

    def _rows_on(
        self, ranks: Ranks | None, wanted: Sequence[Tensor], names: dict[int, str] | None
    ) -> tuple[GradientRows[Any], Together | None]:
        """Rows for these parameters, and how their ranks combine."""
        m, owner, kinds = self._num_losses, "GradientBuffer", by_kind(wanted)
        if ranks is None:
            return GradientRows([Segment(kind, m) for kind in kinds], m, owner, vectors=m + 1), None
        if is_group(self._sync):
            make_equal(wanted, ranks)
            shares = [SharedSegment(kind, m, ranks, self._wire_dtype) for kind in kinds]
            return SharedRows(shares, m, owner, vectors=m + 1, ranks=ranks), together_over(shares, ranks, m)
        layout = Layout(wanted, names, ranks, identities_of(self._local))
        segments = [Segment(layout.ordered(kind), m) for kind in kinds]
        together = Together.by_layout(ranks, layout, segments, m)
        return GradientRows(segments, m, owner, vectors=m + 1), together

    def _adds(self, row: int, accumulate: bool | None, call: str, frames: int = 3) -> bool:
        """Whether what is recorded next is to be added to the row."""
        if self._states[row] != _NEW:
            return False
        if accumulate is None and not self._absent[row]:
            self._reminder.say("accumulate", frames, call=call)
        return bool(accumulate)

    def _prepared(self, row: int, accumulate: bool | None) -> tuple[int, str, bool]:
        """A block of ``record`` is entered."""
        self._wrappers.check_open(self._calls[row])
        if _NEW not in self._states:
            self._begin_step(accumulate, (), frames=4)
        return row, self._calls[row], self._adds(row, accumulate, self._calls[row], frames=4)

    def _begin_step(self, accumulate: bool | None, losses: Sequence[Tensor], frames: int = 3) -> None:
        """Nothing was recorded since the last combination: see what of the step before was forgotten."""
        if accumulate:
            self._accumulates = True
            if self._awaits_step and self._was_stepped:
                self._reminder.say("step", frames)
        if not self._outside.is_done:
            self._outside.before(losses, self._rows, frames)

    def _recorded(self, row: int, adds: bool, failed: BaseException | None) -> None:
        """A block of ``record`` has ended."""
        del adds
        unreduced: RuntimeError | None = None
        if failed is None:
            try:
                self._wrappers.check_close(self._calls[row], any(self._rows.reached[row]))
            except RuntimeError as error:
                failed = unreduced = error
                self._rows.forget(row)
        self._states[row], self._absent[row] = (_NEW if failed is None else _EMPTY), False
        self._tell_failure(failed)
        if unreduced is not None:
            raise unreduced

    def _tell_failure(self, failed: BaseException | None, is_before_the_first: bool = False) -> None:
        """Tell the other ranks, who are on their way to ``combine``, that this one's step is over; raises it.

        Args:
            failed: what has gone wrong.
            is_before_the_first: whether the others are about to backpropagate a loss that this rank has not begun.
        """
        if self._together is None or not isinstance(failed, Exception):
            return
        if is_told(failed):  # by another rank, as this one was about to exchange its gradient
            self.zero()
        elif self._shared is not None:
            try:
                self._shared.fail(failed, is_before_the_first)
            finally:
                self.zero()
        else:
            self.zero()
            self._together.fail(failed)

    def _why_nothing(self) -> str:
        if all(self._absent):
            return "combine found nothing to combine: every loss was absent; leave this batch out"
        return (
            "combine found nothing to combine: no backward pass has reached a parameter of this buffer. Call "
            "backward or record first; if the model's parameters were replaced, make a new GradientBuffer"
        )

    def _tell_stale(self, method: object, stale: Stale) -> None:
        used = getattr(method, "recorded_rows", None)
        old = [i for i, state in enumerate(self._states) if state == _USED and (used is None or i in used)]
        if not old:
            return
        losses = ", ".join(map(self._losses.label, old))
        if stale == "error":
            raise RuntimeError(words_for("fresh rows", losses=losses))
        self._reminder.say("fresh rows", 4, losses=losses)

    def _reached(self) -> tuple[bool, ...]:
        """For each parameter, whether a row has a part of its gradient."""
        rows, known = self._rows.reached, self._reached_of
        if is_dynamo_compiling():
            return tuple([any(flags) for flags in zip(*rows, strict=True)])
        if known is None or known[0] != rows:
            known = self._reached_of = list(rows), tuple([any(flags) for flags in zip(*rows, strict=True)])
        return known[1]

    def _fresh_record(self) -> tuple[Tensor, Tensor]:
        """Memory for K (m, m) and c (m,), float64, cut from a block for several steps: a view costs 2 µs."""
        m, home = self._num_losses, self.segments[0].device
        if is_dynamo_compiling():
            kept = torch.empty(m + 1, m, dtype=torch.float64, device=home)
            return kept[:m], kept[m]
        if not self._records:
            with torch.inference_mode(False):
                block = torch.empty(_STEPS_A_BLOCK, m + 1, m, dtype=torch.float64, device=home)
            self._records = list(zip(block[:, :m].unbind(), block[:, m].unbind(), strict=True))
        return self._records.pop()

    def _method_of(self, method: Method | StreamingMethod | str | None) -> Method | StreamingMethod:
        """The method; one given by name is made once, as it may remember."""
        if not isinstance(method, str):
            return DEFAULT_METHOD if method is None else method
        name = method.lower()
        if name not in self._methods:
            self._methods[name] = method_of(name, self._num_losses)
        return self._methods[name]

    def _leave_overflow_to_be_found(self, gramian: Tensor, reached: Sequence[bool]) -> None:
        """Put NaN where a scaler looks, if a row is not finite: a method that drops it leaves no other trace."""
        bad = overflow_of(gramian)
        for shared in self._shared.segments if self._shared is not None else ():
            shared.share[:1] += bad.to(shared.device)
        flags = iter(reached)
        for segment in self.segments:
            for parameter, start in zip(segment.parameters, segment.starts, strict=True):
                if next(flags) and columns_of(parameter):
                    segment.grad[start : start + 1] += bad.to(segment.device)
                    return

    def _sum_of_gramians(self, parts: Sequence[Rows]) -> Tensor:
        home = self.segments[0].device
        traced = is_traced(None, [rows.matrix for rows in parts if rows.matrix is not None])
        gramians = (backend_for(rows.device, None, traced).gramian(rows).to(home) for rows in parts)
        return reduce(Tensor.add_, gramians)

    def _only_segment(self, name: str) -> Segment:
        if len(self.segments) > 1:
            kinds = ", ".join(f"{segment.parameters[0].dtype} on {segment.device}" for segment in self.segments)
            raise ValueError(
                f"buffer.{name} is one tensor only where all parameters share dtype and device; this buffer has "
                f"{len(self.segments)} segments ({kinds}): read buffer.segments[i].{name}"
            )
        return self.segments[0]

    def _hang_grad(self, reached: tuple[bool, ...]) -> None:
        """Make ``.grad`` of the reached parameters a view of the combined gradient, that of the others None."""
        if is_dynamo_compiling():
            # Views made in the graph: it cannot return older ones, inputs beside the memory that it overwrites.
            views = [view for segment in self.segments for view in segment.views(segment.grad)]
            for i, (parameter, view) in enumerate(zip(self._rows.parameters, views, strict=True)):
                parameter.grad = view.detach() if reached[i] else None
            return
        for segment in self.segments:
            torch.autograd.graph.increment_version(segment.grad)
        self._rows.show(self._shown, reached)


def _rebuilt(
    given: Parameters, module: Module | None, num_losses: int | list[str], state: dict[str, Any]
) -> GradientBuffer:
    """A buffer as ``GradientBuffer._parts`` took it apart."""
    buffer = GradientBuffer(given, num_losses)
    buffer._build(kept=state["parameters"])
    for segment, (rows, grad) in zip(buffer.segments, state["rows"], strict=True):
        segment.rows.copy_(rows)
        segment.grad.copy_(grad)
    buffer._rows.reached[:] = state["reached"]
    buffer._states, buffer._absent = list(state["states"]), list(state["absent"])
    buffer._methods, buffer.combination = state["methods"], state["combination"]
    buffer._source.belongs_to(module)
    return buffer
