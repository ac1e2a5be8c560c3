"""MConFIG: ConFIG on moving averages of the losses' gradients, a few of which are backpropagated a step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Module
from torch.optim.optimizer import Optimizer

from fastconfig.backends.moments import Group, Ledger, StepRule
from fastconfig.backends.rules import NonFiniteError
from fastconfig.gradients import landing, step_hook
from fastconfig.gradients.averaged import AveragedRows
from fastconfig.gradients.combination import Combination
from fastconfig.gradients.exchange import make_equal
from fastconfig.gradients.landing import Recording
from fastconfig.gradients.layout import Layout
from fastconfig.gradients.losses import Losses
from fastconfig.gradients.parameters import Source, Watch, check_in_memory, trained
from fastconfig.gradients.processes import Solitude, Sync, Wrappers, identities_of, ranks_of
from fastconfig.gradients.ranks import is_group, is_told
from fastconfig.methods import DEFAULT_METHOD, ConFIG, Method, Stateful, method_of
from fastconfig.optim.averages import Averages
from fastconfig.optim.checks import check_count, check_group, check_parameter, checked_method, checked_norm
from fastconfig.optim.momentum import Across, combination_of, take_step
from fastconfig.optim.selection import LossSelector, Selection
from fastconfig.optim.state import IN_GROUP, copy_state, in_group, packed_state

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Parameters = Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class MConFIG(Optimizer):
    """Momentum ConFIG: each step backpropagates some of the losses, and combines the moving averages of all.

    A step costs one backward pass or a few instead of m. Each loss's gradient enters its own average; a method, ConFIG,
    combines the averages, freed of bias; and the result is scaled element by element as Adam's is, by the second moment
    of the gradient whose average the result would be. Nothing is updated until every loss has been recorded once.
    A step whose gradient is not finite changes nothing: neither parameters nor averages nor counters.

    Source: ConFIG, arXiv 2408.11104, section 3.3 and algorithm 1; ``fastconfig.backends.momentum.reference`` has the
    formulas.

    Args:
        params: a module, or parameters, or dicts of parameter groups with ``lr``, ``weight_decay``, ``eps`` or
            ``maximize`` of their own. float32, float64, bfloat16, float16 or complex. Those that need no gradient now
            are left out until ``refresh``; those that need none later rest until they do again. One that no loss has
            reached is left alone; one that is first reached late starts under the counters of the others, which makes
            its first updates larger. Only of a module is it noticed that a layer was replaced or added.
        lr: learning rate, a number or a tensor of one element.
        num_losses: m; or m names of the losses, for ``record`` and for errors, tables and pictures.
        betas: β₁ of the averages and β₂ of the second moment, in [0, 1). All groups share them.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW.
        method: what combines the averages, or its name, as ``fastconfig methods`` lists them; ``ConFIG()`` by default.
            With ``nonfinite="raise"`` a gradient that is not finite raises FloatingPointError, which waits for an
            accelerator; else the step is left out and counted.
        losses_per_step: k, how many losses a step may record.
        selection: in which order ``next_loss`` goes: ``"ordered"``, ``"random"``, m weights, or a function that gives
            them, see ``optim.Selection``.
        generator: what ``selection`` draws from, on the CPU; by default one seeded from torch's.
        max_norm: a gradient of a larger norm is scaled down to it before it enters its average. One more pass over the
            recorded gradients.
        max_update_norm: an update (before the learning rate) of a larger norm is scaled down to it. One more pass over
            the averages.
        state_dtype: of averages and second moment: torch.float32, the default for all but float64 parameters, or
            torch.float64. Sixteen bits cannot hold them: v would stop moving at β₂ = 0.999.
        maximize: ascend.
        differentiable: must be False.
        backend: as in ``fc.combine``.
        sync, group, local: as of ``fc.GradientBuffer``: how the gradients of several ranks meet. With ``sync=group``
            they are averaged here when a block of ``record`` ends; every rank has all averages. Products of averages
            are summed over the columns that each rank owns, rank 0 asks the method, and every rank draws the same
            losses. The constructor, ``record``, ``step`` and ``refresh`` are then calls of all ranks.

    Raises:
        TypeError, ValueError: an argument that cannot be; the message names it, its value and the remedy.
        RuntimeError: several processes, plain parameters, and nothing that says how their gradients meet.

    Memory: m + 1 vectors of the state's dtype, beside k rows for the gradients, which are what ``p.grad`` then shows.
    Rows and averages are dense, also of a table whose gradients are sparse.

    A loss without labels in this batch is not recorded, or by a block without a backward pass, which is the same: its
    average and its counters stay. ``next_loss(present)`` draws among the others.

    Example:
        >>> import torch, fastconfig as fc
        >>> model, inputs = torch.nn.Linear(2, 2), torch.ones(4, 2)
        >>> optimizer = fc.optim.MConFIG(model.parameters(), lr=1e-2, num_losses=2)
        >>> for _ in range(10):
        ...     loss = optimizer.next_loss()
        ...     with optimizer.record(loss):
        ...         model(inputs)[:, loss].square().mean().backward()
        ...     optimizer.step()
        >>> optimizer.combination.cosines.shape
        torch.Size([2, 2])
    """

    _step_supports_amp_scaling = True  # a GradScaler then hands its scale over instead of touching the gradients

    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        *,
        num_losses: int | Sequence[str],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        method: Method | str | None = None,
        losses_per_step: int = 1,
        selection: Selection = "ordered",
        generator: torch.Generator | None = None,
        max_norm: float | None = None,
        max_update_norm: float | None = None,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        backend: str | None = None,
        sync: Sync = "auto",
        group: ProcessGroup | None = None,
        local: Sequence[Module | Tensor] = (),
    ) -> None:
        self._losses = Losses(num_losses)
        self._num_losses = m = len(self._losses)
        check_count("losses_per_step", losses_per_step)
        if losses_per_step > m:
            raise ValueError(f"losses_per_step must be at most num_losses={m}, got {losses_per_step}")
        if differentiable:
            raise ValueError("differentiable must be False, got True: a step is a kernel that autograd cannot see into")
        if state_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(
                f"state_dtype must be torch.float32, torch.float64 or None, got {state_dtype}; sixteen bits cannot "
                "hold moving averages"
            )
        self._losses_per_step = losses_per_step
        chosen = method_of(method, m) if isinstance(method, str) else method
        self._method = DEFAULT_METHOD if chosen is None else checked_method(chosen, m)
        self._max_norm = checked_norm("max_norm", max_norm)
        self._max_update_norm = checked_norm("max_update_norm", max_update_norm)
        self._state_dtype = state_dtype
        self._backend = backend
        self._sync, self._group, self._local = sync, group, tuple(local)
        self._selector = LossSelector(selection, m, losses_per_step, generator)
        self._last_beta1: float | None = None  # of the last step: a scheduler may have changed the groups' since
        self._calls = [f"record({self._losses.argument(i)})" for i in range(m)]
        self._recorded: list[int] = []  # the losses, in the order of their rows
        self._latest: list[int] = []  # the rows, the one recorded last in front
        self._unreached: list[int] = []  # those of a block without a gradient
        self._failed = False  # whether a step by them raised
        self._seen: set[int] = set()  # losses of all steps
        self._rule_of: tuple[list[tuple[object, ...]], StepRule] | None = None
        self._built = False
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        check_group(defaults)
        module = params if isinstance(params, Module) else None
        super().__init__(params.parameters() if isinstance(params, Module) else params, defaults)
        self._build(module)

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
        """This process's number among the ranks that step together; 0 where it trains alone."""
        return 0 if self._across is None else self._across.ranks.rank

    @property
    def combination(self) -> Combination:
        """What the last update combined: the averages' Gramian, freed of bias, and their weights. Read, it is computed.

        Before the first update the weights are zeros.
        """
        rule = (self._method if isinstance(self._method, ConFIG) else DEFAULT_METHOD).rule
        beta1 = self.param_groups[0]["betas"][0] if self._last_beta1 is None else self._last_beta1
        return combination_of(self._ledger, beta1, rule.rtol, self._losses)

    @property
    def steps_left_out(self) -> int:
        """How many steps changed nothing because a gradient was not finite. Reading it waits for the device."""
        return int(self._ledger.totals[1])

    def next_loss(self, present: Collection[int | str] | None = None) -> int | str:
        """The loss to record next, by ``selection``: its number, or its name where the losses have names.

        Those drawn for one step are distinct.

        Args:
            present: the losses that have labels in this batch, by number or name; None for all.

        Raises:
            TypeError, IndexError: no such loss.
            ValueError: there is none left to draw among them.
        """
        among = None if present is None else {self._losses.index(loss) for loss in present}
        loss = self._selector.next(among)
        return self._losses.names[loss] if self._losses.named else loss

    def next_losses(self) -> tuple[int | str, ...]:
        """The ``losses_per_step`` losses to record in the next step, each in a ``record`` of its own."""
        return tuple(self.next_loss() for _ in range(self._losses_per_step))

    def record(self, loss: int | str, *, accumulate: bool = False) -> Recording:
        """Take what is backpropagated inside the ``with`` block as the gradient of ``loss`` for the next ``step``.

        Several backward passes in one block add up. What counts is what each ``p.grad`` holds when the block ends,
        whoever put it there. It is None when the block begins. After the block it shows the gradient, in the
        memory from which ``step`` takes it, so what changes ``p.grad`` in place changes the step; where several losses
        are recorded, the last one that reached the parameter. To take another tensor for ``p.grad`` changes nothing;
        ``zero_grad`` of this optimizer forgets what was recorded. Parameters of no group accumulate ``.grad`` as usual.
        If the block raises, nothing was recorded.

        Args:
            loss: 0 to m - 1, or its name.
            accumulate: add to what was recorded of the loss for this step, as for micro-batches, whose losses are to be
                divided by their number. ``step`` ends the accumulation, so True may be said in every call of a loop.
                The block's gradients stay in ``p.grad`` until it ends, n elements more. If the block raises, the
                gradients of the whole step are forgotten.

        Raises:
            TypeError, IndexError: no such loss.
            ValueError: entered where the loss was already recorded for this step and ``accumulate`` is False, or
                ``losses_per_step`` other losses were.
            RuntimeError: entered inside another ``record`` over some of the same parameters, or a parameter is no
                longer the one that the optimizer was made for.
        """
        index = self._losses.index(loss)
        return Recording(
            self._rows, partial(self._prepared, index, accumulate), partial(self._after_record, index), True
        )

    def _prepared(self, index: int, accumulate: bool) -> tuple[int, str, bool]:
        """A block of ``record`` is entered."""
        call = self._calls[index]
        self._wrappers.check_open(call)
        if self._failed:  # the user goes on with another batch
            self._forget()
        adds = index in self._recorded
        if adds and not accumulate:
            raise ValueError(
                f"{self._losses.label(index)} was already recorded for this step; say accumulate=True to add up "
                "micro-batches, or step() in between"
            )
        slot = self._recorded.index(index) if adds else len(self._recorded)
        if slot == self._losses_per_step:
            raise ValueError(
                f"{call} would make {slot + 1} losses in this step, more than losses_per_step={slot}; call "
                "step() first, or make the optimizer with a larger losses_per_step"
            )
        return slot, call, adds

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what was recorded for the next step, and reset every ``p.grad`` as any optimizer does."""
        self._rows.check_not_recording("zero_grad")
        self._forget()
        super().zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take the recorded gradients into their averages and, once every loss has been seen, update the parameters.

        Args:
            closure: records and backpropagates, and returns a loss, which is returned.

        Raises:
            RuntimeError: nothing was recorded since the last step, or of a loss no backward pass reached a parameter;
                inside ``record``; a parameter is no longer the one that the optimizer was made for, or one requires a
                gradient that did not then (``refresh`` takes it in); a GradScaler's ``unscale_`` reached only one of
                several gradients.
            ValueError: parameter groups of different betas.
            FloatingPointError: a gradient is not finite and the method raises on it. The gradients are forgotten.

        Nothing has been written then. ``step`` may be called again, by the same gradients, where what it complained of
        can be mended; or training goes on with the next ``record``, which forgets them.
        """
        if is_dynamo_compiling():
            # By addresses, which no graph can hold.
            eager: Callable[[Callable[[], float] | None], float | None] = torch.compiler.disable(self._step)
            return eager(closure)
        if torch.autograd._profiler_enabled() or self._has_hooks():  # type: ignore[attr-defined]
            return _STEP_WITH_HOOKS(self, closure)
        return self._step(closure)

    def _has_hooks(self) -> bool:
        """Whether torch is to call somebody before or after ``step``; where a subclass has its own, torch does it."""
        return type(self).step is MConFIG.step and (
            bool(self._optimizer_step_pre_hooks)
            or bool(self._optimizer_step_post_hooks)
            or step_hook.is_watched_by_others()
        )

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        result = None
        try:
            if closure is not None:
                with torch.enable_grad():
                    result = closure()
            if not self._recorded and self._begins_for_a_checkpoint():
                self._averages.reach(range(len(self._averages.parameters)), self.state)
                return result
            losses = self._losses_of_the_step()
            self._step_by_recorded(losses)
        except Exception as error:
            self._failed = True
            if isinstance(error, FloatingPointError):
                self._forget()
            # A GradScaler removes what it set only once step has returned, and multiplies its next scale by it.
            vars(self).pop("grad_scale", None)
            vars(self).pop("found_inf", None)
            raise
        return result

    def _begins_for_a_checkpoint(self) -> bool:
        """Whether torch.distributed.checkpoint wants to see the state that a checkpoint is to be read into.

        It then gives every parameter a gradient of zeros, sets all rates to 0, and takes a step: nothing is recorded.
        """
        return (
            not self.state
            and not self._recorded
            and all(float(group["lr"]) == 0.0 for group in self.param_groups)
            and all(parameter.grad is not None for parameter in self._averages.parameters if parameter.requires_grad)
        )

    def _losses_of_the_step(self) -> tuple[int, ...]:
        """The losses whose gradients make this step, where nothing forbids it."""
        try:
            self._rows.check_not_recording("step")
            losses = tuple(self._recorded)
            self._check_recorded(losses)
            self._check_unscaled(losses)
        except Exception as error:
            if self._across is not None:
                self._across.fail(error)
            raise
        return losses

    def _check_unscaled(self, losses: tuple[int, ...]) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and grad_scale is None and len(losses) > 1:
            raise RuntimeError(
                "scaler.unscale_(optimizer) divided only the last of several recorded gradients by the scale; leave it "
                "out, as step unscales by itself, and clip by max_norm="
            )

    def _step_by_recorded(self, losses: tuple[int, ...]) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        rule, averages = self._rule(), self._averages
        new = averages.newly_reached(len(losses))
        left_out = self.steps_left_out if new else 0
        averages.bring_values()
        try:
            active = averages.active(losses, new, self.state)
            if self._across is not None:
                self._across.owned = averages.owned(active)
            take_step(
                active,
                self._ledger,
                rule,
                self._method,
                all_seen=len(self._seen) == self._num_losses or len(self._seen.union(losses)) == self._num_losses,
                backend=self._backend,
                grad_scale=grad_scale,
                found_inf=found_inf if isinstance(found_inf, Tensor) else None,  # 0 where no parameter has a gradient
                across=self._across,
            )
        except Exception as error:
            averages.unreach(new, self.state)
            if isinstance(error, NonFiniteError):
                raise self._losses.with_name(error) from None
            raise
        averages.return_values()
        if new and self.steps_left_out > left_out:  # seldom asked, as it waits for the device
            averages.unreach(new, self.state)
        self._seen.update(losses)
        self._forget()
        self._last_beta1 = rule.beta1
        landing.mark_written(averages.parameters)

    def _check_recorded(self, losses: tuple[int, ...]) -> None:
        """RuntimeError unless there is a gradient for each loss, over parameters that are where they were."""
        self._watch.check("step")
        self._solitude.check("step")
        if self._unreached and not losses:
            raise RuntimeError(
                "step found no gradient: no backward pass inside record reached a parameter, for "
                f"{', '.join(map(self._losses.label, self._unreached))}; if the model's parameters were replaced, make "
                "a new MConFIG, and if the batch has no labels for it, leave step() out"
            )
        if not losses:
            raise RuntimeError(
                "step found no gradient: nothing was recorded since the last step. Call backward() inside "
                "`with optimizer.record(loss):` first"
            )
        rows = self._rows
        if not rows.lie_where_they_did():  # shape and dtype were looked at by record
            rows.check_parameters()  # which says what is wrong

    def _after_record(self, loss: int, slot: int, adds: bool, failed: BaseException | None) -> None:
        """A block of ``record`` has ended."""
        unreduced: RuntimeError | None = None
        if failed is None:
            try:
                self._wrappers.check_close(self._calls[loss], any(self._rows.reached[slot]))
            except RuntimeError as error:
                failed = unreduced = error
        if failed is not None:
            if adds or self._across is not None:
                self._forget()
            self._tell_failure(failed)
            if unreduced is not None:
                raise unreduced
            return
        if not adds:
            if not any(self._rows.reached[slot]):
                self._unreached.append(loss)
                return
            self._recorded.append(loss)
            if slot == 0 and not all(self._rows.reached[0]):
                for parameter, has in zip(self._rows.parameters, self._rows.reached[0], strict=True):
                    if not has:
                        parameter.grad = None  # it showed a step that is over
        before = [row for row in self._latest if row != slot]
        self._averages.carry_nonfinite(slot, before)
        self._latest = [slot, *before]

    def _tell_failure(self, failed: BaseException) -> None:
        """Tell the other ranks, who are on their way to ``step``, that this one's step is over; raises it."""
        if self._across is None or not isinstance(failed, Exception) or is_told(failed):
            return
        if isinstance(self._rows, AveragedRows):
            self._rows.call_roll(failed)
        else:
            self._across.fail(failed)

    def _forget(self) -> None:
        self._recorded.clear()
        self._latest.clear()
        self._unreached.clear()
        self._failed = False

    def refresh(self) -> None:
        """Take in parameters that need a gradient now and did not before, or, where a module was given, are new in it.

        Averages and second moments of the others are kept; those of parameters that the module no longer has are gone.
        What is new starts at zero under the counters of the others, as a parameter that is first reached late does, so
        its first updates are larger; make a new optimizer where that matters. What was recorded for the next step is
        forgotten. A new parameter of a module joins the first group.

        Raises:
            RuntimeError: inside ``record``.
            TypeError, ValueError: a parameter that cannot be trained; nothing has changed.
        """
        self._rows.check_not_recording("refresh")
        older, old_state = self._averages, dict(self.state)
        groups = [list(group["params"]) for group in self.param_groups]
        if self._source.module is not None:
            elsewhere = {id(parameter) for group in groups[1:] for parameter in group}
            groups[0] = [p for p in dict.fromkeys(self._source.now()[0]) if id(p) not in elsewhere]
        averages, across = self._averages_over(groups, {id(parameter) for parameter in older.parameters})
        for group, members in zip(self.param_groups, groups, strict=True):
            group["params"] = members
        self.state.clear()
        averages.take_over(older, old_state, self.state)
        self._watch_over(averages, across)
        self._forget()
        self._ledger.gramian.copy_(averages.gramian_of_owned(self._ledger.gramian.device))
        if across is not None:
            across.ranks.total(self._ledger.gramian)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, before the first ``record``.

        Raises:
            RuntimeError: a gradient was recorded already. The averages of new parameters would start from zero under
                the counters of the old, and be too small by what they missed; make a new optimizer instead.
            TypeError, ValueError: a group that cannot be; none has been added.
        """
        if not self._built:  # by the base class's constructor
            super().add_param_group(param_group)
            check_group(self.param_groups[-1])
            return
        self._rows.check_not_recording("add_param_group")
        if self._seen or self._recorded:
            raise RuntimeError(
                "add_param_group came after the first record: the averages of new parameters would start at zero under "
                "the other losses' counters. Make a new MConFIG over all parameters"
            )
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
            self._build(self._source.module)
        except Exception:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, with ``"shared"`` beside ``"state"``: what belongs to no parameter, the method's too.

        Of a parameter the state holds ``exp_avgs`` (m, *shape), its losses' moving averages, and ``exp_avg_sq``, the
        second moment. All tensors are the optimizer's own, as those of torch's optimizers are. What was recorded for
        the next step is not in it. ``torch.distributed.checkpoint`` keeps nothing beside states and groups, so the
        first group holds ``"shared"`` once more. Of a sharded parameter the averages are DTensors.
        """
        shared = {
            "num_losses": self._num_losses,
            **{name: value.clone() for name, value in self._ledger._asdict().items()},
            "selection": self._selector.state(),
            "method": self._method.state_dict() if isinstance(self._method, Stateful) else None,
        }
        state = super().state_dict()
        state["param_groups"][0][IN_GROUP] = in_group(shared, self._losses_per_step)
        return {**state, "shared": shared}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a ``state_dict`` of any backend and device: on the same ones with the same bits.

        What was recorded for the next step is forgotten.

        Raises:
            TypeError, ValueError: not the state of an MConFIG, or of one over other losses or parameters. Nothing has
                changed.
        """
        self._rows.check_not_recording("load_state_dict")
        averages = self._averages
        packed = packed_state(state_dict, self.param_groups, averages.parameters, self._num_losses)
        if isinstance(self._method, Stateful) and packed.shared["method"] is not None:
            self._method.load_state_dict(packed.shared["method"])
        groups = [{key: group[key] for key in group if key != IN_GROUP} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups, "state": {}})
        self._forget()
        self._last_beta1 = None
        # What the checkpoint holds may be the optimizer's own memory, as in load_state_dict(state_dict()).
        averages.zero(i for i in range(len(averages.parameters)) if i not in packed.parameters)
        averages.unreach(averages.reached(), self.state)
        averages.reach(sorted(packed.parameters), self.state)
        copy_state(packed, self.state, averages.parameters, self._ledger)
        self._seen.clear()
        self._seen.update(i for i, count in enumerate(packed.shared["counts"].tolist()) if count > 0)
        self._selector.load(packed.shared["selection"])

    def __getstate__(self) -> dict[str, Any]:
        """Refuse: a copy of the averages would step the parameters of the original."""
        raise TypeError("MConFIG cannot be pickled or copied; make a new one, and load_state_dict(old.state_dict())")

    def _build(self, module: Module | None) -> None:
        """Rows, averages and the m×m numbers for the parameters of all groups, in the order of the groups."""
        groups = [group["params"] for group in self.param_groups]
        self._source = Source(module if module is not None else [p for group in groups for p in group])
        self._wrappers = Wrappers(module)
        self._watch_over(*self._averages_over(groups, ()))
        self._ledger = Ledger.zeros(self._num_losses, self._rows.segments[0].device)
        if self._across is not None:
            self._selector.load(self._across.ranks.tell(self._selector.state()))  # every rank draws as rank 0 does
        self._built = True

    def _averages_over(
        self, groups: Sequence[Sequence[Tensor]], kept: Collection[int]
    ) -> tuple[Averages, Across | None]:
        """Averages for those that need a gradient, and for those to be kept though they need none now."""
        everything = [parameter for group in groups for parameter in group]
        distinct = trained(everything)
        check_in_memory(everything)
        for i, parameter in enumerate(distinct):
            check_parameter(parameter, i)
        wanted = [[p for p in group if p.requires_grad or id(p) in kept] for group in groups]
        flat = [parameter for group in wanted for parameter in group]
        ranks = ranks_of(self._source.module, flat, self._sync, self._group, "MConFIG")
        self._solitude = Solitude("MConFIG", self._sync)
        layout = None if ranks is None else Layout(flat, self._names(), ranks, identities_of(self._local))
        averages = Averages(
            wanted,
            self._num_losses,
            self._losses_per_step,
            self._state_dtype,
            self._backend,
            layout,
            ranks,
            is_group(self._sync),
        )
        if is_group(self._sync) and ranks is not None:
            make_equal(averages.parameters, ranks)
        home = averages.rows.segments[0].device
        return averages, None if ranks is None else Across(ranks, self._num_losses, home)

    def _names(self) -> dict[int, str] | None:
        """The parameters' names, by identity, where a module or pairs were given."""
        names = self._source.now()[1]
        if names is None and all("param_names" in group for group in self.param_groups):
            pairs = (zip(group["params"], group["param_names"], strict=True) for group in self.param_groups)
            return {id(parameter): name for pair in pairs for parameter, name in pair}
        return names

    def _watch_over(self, averages: Averages, across: Across | None) -> None:
        self._averages, self._rows, self._across = averages, averages.rows, across
        self._source.read_again()
        self._watch = Watch(self._source, averages.parameters, "MConFIG")

    def _rule(self) -> StepRule:
        """The groups' numbers, the same object as long as they stay; what a tensor holds is not known here."""
        numbers: list[tuple[object, ...]] = [
            (group["lr"], group["weight_decay"], group["eps"], group["maximize"], *group["betas"])
            for group in self.param_groups
        ]
        # A rate that is a tensor may be filled anew, and to compare one would wait for its device.
        is_plain = not any(isinstance(group["lr"], Tensor) for group in self.param_groups)
        known = self._rule_of
        if is_plain and known is not None and known[0] == numbers:
            return known[1]
        betas = self.param_groups[0]["betas"]
        for i, group in enumerate(self.param_groups):
            if tuple(group["betas"]) != tuple(betas):
                raise ValueError(f"all groups must share betas, got {betas} in group 0 and {group['betas']} in {i}")
        groups = tuple(
            Group(group["lr"], group["weight_decay"], group["eps"], group["maximize"]) for group in self.param_groups
        )
        rule = StepRule(betas[0], betas[1], groups, self._max_norm, self._max_update_norm)
        self._rule_of = (numbers, rule) if is_plain else None
        return rule


# Torch wraps an optimizer's step in hooks and a label for its profiler, 20 µs after a backward pass. This says that it
# has been done; where somebody profiles or hooks, ``step`` goes through that very wrapper.
MConFIG.step.hooked = True  # type: ignore[attr-defined]
_STEP_WITH_HOOKS = Optimizer.profile_hook_step(MConFIG._step)
