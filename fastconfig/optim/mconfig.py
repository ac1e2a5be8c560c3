"""MConFIG: ConFIG on moving averages of the losses' gradients, a few of which are backpropagated a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastconfig import backends, landing
from fastconfig.backends.momentum import Segment, segment_on
from fastconfig.backends.rules import NonFiniteError
from fastconfig.combination import Combination
from fastconfig.landing import GradientRows
from fastconfig.losses import Losses
from fastconfig.methods import DEFAULT_METHOD, ConFIG, Method, Stateful
from fastconfig.moments import Group, Ledger, Moments, Piece, Recorded, StepRule
from fastconfig.momentum import combination_of, take_step
from fastconfig.optim.checks import check_count, check_group, check_parameter, checked_method, checked_norm
from fastconfig.optim.selection import LossSelector, Selection
from fastconfig.optim.state import copy_state, packed_state

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


_NONE: tuple[int, list[bool]] = (-1, [])
"""No step's parameters."""


class _Place(NamedTuple):
    """Where a parameter's columns are."""

    segment: int
    first: int
    group: int
    memory: Tensor
    """(columns,) the parameter's own memory, real."""


class MConFIG(torch.optim.Optimizer):
    """Momentum ConFIG: each step backpropagates some of the losses, and combines the moving averages of all.

    A step costs one backward pass or a few instead of m. Each loss's gradient enters its own average; a method, ConFIG,
    combines the averages, freed of bias; and the result is scaled element by element as Adam's is, by the second moment
    of the gradient whose average the result would be. Nothing is updated until every loss has been recorded once.
    A step whose gradient is not finite changes nothing: neither parameters nor averages nor counters.

    Source: ConFIG, arXiv 2408.11104, section 3.3 and algorithm 1; ``fastconfig.backends.momentum.reference`` has the
    formulas.

    Args:
        params: parameters, or dicts of parameter groups with ``lr``, ``weight_decay``, ``eps`` or ``maximize`` of their
            own. float32, float64, bfloat16, float16 or complex. Those that need no gradient now are left out for good;
            those that need none later rest until they do again. One that no loss has reached is left alone; one that is
            first reached late starts under the counters of the others, which makes its first updates larger.
        lr: learning rate, a number or a tensor of one element.
        num_losses: m; or m names of the losses, for ``record`` and for errors, tables and pictures.
        betas: β₁ of the averages and β₂ of the second moment, in [0, 1). All groups share them.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW.
        method: what combines the averages; ``ConFIG()`` by default. With ``nonfinite="raise"`` a gradient that is not
            finite raises FloatingPointError, which waits for an accelerator; else the step is left out and counted.
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

    Raises:
        TypeError, ValueError: an argument that cannot be; the message names it, its value and the remedy.

    Memory: m + 1 vectors of the state's dtype, beside k rows for the gradients, which are what ``p.grad`` then shows.

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
        method: Method | None = None,
        losses_per_step: int = 1,
        selection: Selection = "ordered",
        generator: torch.Generator | None = None,
        max_norm: float | None = None,
        max_update_norm: float | None = None,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        backend: str | None = None,
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
        self._method = DEFAULT_METHOD if method is None else checked_method(method, m)
        self._max_norm = checked_norm("max_norm", max_norm)
        self._max_update_norm = checked_norm("max_update_norm", max_update_norm)
        self._state_dtype = state_dtype
        self._backend = backend
        self._selector = LossSelector(selection, m, losses_per_step, generator)
        self._last_beta1: float | None = None  # of the last step: a scheduler may have changed the groups' since
        self._built = False
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        check_group(defaults)
        super().__init__(params, defaults)
        self._build()

    @property
    def num_losses(self) -> int:
        """m, the number of losses."""
        return self._num_losses

    @property
    def names(self) -> tuple[str, ...]:
        """The m losses' names; "0", "1" ... where they have none."""
        return self._losses.names

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

    def next_loss(self) -> int:
        """The loss to record next, by ``selection``. Those drawn for one step are distinct."""
        return self._selector.next()

    def next_losses(self) -> tuple[int, ...]:
        """The ``losses_per_step`` losses to record in the next step, each in a ``record`` of its own."""
        return tuple(self._selector.next() for _ in range(self._losses_per_step))

    @contextmanager
    def record(self, loss: int | str) -> Generator[None, None, None]:
        """Take what is backpropagated inside the ``with`` block as the gradient of ``loss`` for the next ``step``.

        Several backward passes in one block add up, as micro-batches do. Each ``p.grad`` is None inside the block until
        a backward pass reaches it. After the block it shows the gradient, in the memory from which ``step`` takes it,
        so what changes ``p.grad`` in place changes the step; where several losses are recorded, the last one that
        reached the parameter. To take another tensor for ``p.grad`` changes nothing; ``zero_grad`` of this optimizer
        forgets what was recorded. Parameters of no group accumulate ``.grad`` as usual. If the block raises, nothing
        was recorded.

        Args:
            loss: 0 to m - 1, or its name.

        Raises:
            TypeError, IndexError: no such loss.
            ValueError: the loss was already recorded for this step, or ``losses_per_step`` losses were.
            RuntimeError: inside another ``record`` over some of the same parameters, or a parameter is no longer the
                one that the optimizer was made for.
        """
        loss = self._losses.index(loss)
        call = f"record({self._losses.argument(loss)})"
        if loss in self._recorded:
            raise ValueError(
                f"{self._losses.label(loss)} was already recorded for this step; call all its backward passes inside "
                "one record, or step() in between"
            )
        slot = len(self._recorded)
        if slot == self._losses_per_step:
            raise ValueError(
                f"{call} would make {slot + 1} losses in this step, more than losses_per_step={slot}; call "
                "step() first, or make the optimizer with a larger losses_per_step"
            )
        with self._rows.record(slot, call, shown=True):
            yield
        self._recorded.append(loss)
        if slot > 0:
            self._carry_nonfinite(slot)
        elif len(self._rows.reached[0]) < len(self._rows.parameters):
            for i, parameter in enumerate(self._rows.parameters):
                if i not in self._rows.reached[0]:
                    parameter.grad = None  # it showed a step that is over

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what was recorded for the next step, and reset every ``p.grad`` as any optimizer does."""
        self._rows.check_not_recording("zero_grad")
        self._recorded.clear()
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
            RuntimeError: nothing was recorded since the last step, or no backward pass reached a parameter; inside
                ``record``; a parameter is no longer the one that the optimizer was made for; a GradScaler's
                ``unscale_`` reached only one of several gradients.
            ValueError: parameter groups of different betas.
            FloatingPointError: a gradient is not finite and the method raises on it. The gradients are forgotten.
            Nothing has been written then.
        """
        if is_dynamo_compiling():
            # By addresses, which no graph can hold.
            eager: Callable[[Callable[[], float] | None], float | None] = torch.compiler.disable(self._step)
            return eager(closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._rows.check_not_recording("step")
        try:
            self._step_by_recorded()
        except Exception as error:
            if isinstance(error, FloatingPointError):
                self._recorded.clear()
            # A GradScaler removes what it set only once step has returned, and multiplies its next scale by it.
            vars(self).pop("grad_scale", None)
            vars(self).pop("found_inf", None)
            raise
        return result

    def _step_by_recorded(self) -> None:
        if not self._recorded:
            raise RuntimeError(
                "step found no gradient: nothing was recorded since the last step. Call backward() inside "
                "`with optimizer.record(loss):` first"
            )
        if not any(self._rows.reached[: len(self._recorded)]):
            raise RuntimeError(
                "step found no gradient: no backward pass inside record reached a parameter, for "
                f"{', '.join(map(self._losses.label, self._recorded))}; if the model's parameters were replaced, make "
                "a new MConFIG"
            )
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and grad_scale is None and len(self._recorded) > 1:
            raise RuntimeError(
                "scaler.unscale_(optimizer) divided only the last of several recorded gradients by the scale; leave it "
                "out, as step unscales by itself, and clip by max_norm="
            )
        losses, rule = tuple(self._recorded), self._rule()
        newly_reached = set().union(*self._rows.reached[: len(losses)]) - self._ever_reached
        left_out = self.steps_left_out if newly_reached else 0
        try:
            take_step(
                self._active_segments(losses),
                self._ledger,
                rule,
                self._method,
                all_seen=len(self._seen.union(losses)) == self._num_losses,
                backend=self._backend,
                grad_scale=grad_scale,
                found_inf=found_inf if isinstance(found_inf, Tensor) else None,  # 0 where no parameter has a gradient
            )
        except Exception as error:
            self._unreach(newly_reached)
            if isinstance(error, NonFiniteError):
                raise self._losses.with_name(error) from None
            raise
        if newly_reached and self.steps_left_out > left_out:  # seldom asked, as it waits for the device
            self._unreach(newly_reached)
        self._seen.update(losses)
        self._recorded.clear()
        self._last_beta1 = rule.beta1
        landing.mark_written(self._rows.parameters)

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
            self._build()
        except Exception:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, with ``"shared"`` beside ``"state"``: what belongs to no parameter, the method's too.

        Of a parameter the state holds ``exp_avgs`` (m, *shape), its losses' moving averages, and ``exp_avg_sq``, the
        second moment. All tensors are the optimizer's own, as those of torch's optimizers are. What was recorded for
        the next step is not in it.
        """
        return {
            **super().state_dict(),
            "shared": {
                "num_losses": self._num_losses,
                **{name: value.clone() for name, value in self._ledger._asdict().items()},
                "selection": self._selector.state(),
                "method": self._method.state_dict() if isinstance(self._method, Stateful) else None,
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a ``state_dict`` of any backend and device: on the same ones with the same bits.

        What was recorded for the next step is forgotten.

        Raises:
            TypeError, ValueError: not the state of an MConFIG, or of one over other losses or parameters. Nothing has
                changed.
        """
        self._rows.check_not_recording("load_state_dict")
        packed = packed_state(state_dict, self.param_groups, self._rows.parameters, self._num_losses)
        if isinstance(self._method, Stateful) and packed.shared["method"] is not None:
            self._method.load_state_dict(packed.shared["method"])
        super().load_state_dict({**state_dict, "state": {}})
        self._recorded.clear()
        self._last_beta1 = None
        for i, place in enumerate(self._places):
            # What the checkpoint holds may be the optimizer's own memory, as in load_state_dict(state_dict()).
            if i not in packed.parameters:
                for average in self._moments[place.segment]:
                    average[..., place.first : place.first + len(place.memory)].zero_()
        self._active_for = _NONE
        self._ever_reached.clear()
        self._ever_reached.update(packed.parameters)
        self._describe_state()
        copy_state(packed, self.state, self._rows.parameters, self._ledger)
        self._seen.clear()
        self._seen.update(i for i, count in enumerate(packed.shared["counts"].tolist()) if count > 0)
        self._selector.load(packed.shared["selection"])

    def __getstate__(self) -> dict[str, Any]:
        """Refuse: a copy of the averages would step the parameters of the original."""
        raise TypeError("MConFIG cannot be pickled or copied; make a new one, and load_state_dict(old.state_dict())")

    def _build(self) -> None:
        """Rows, averages and the m×m numbers for the parameters of all groups, in the order of the groups."""
        groups = [landing.trained_in(group["params"]) for group in self.param_groups]
        group_of = {id(parameter): i for i, group in enumerate(groups) for parameter in group}
        trained = landing.trained(parameter for group in groups for parameter in group)
        for i, parameter in enumerate(trained):
            check_parameter(parameter, i)
        count = self._losses_per_step
        segments = [landing.Segment(kind, count) for kind in landing.by_kind(trained)]
        for segment in segments:
            backends.select(segment.device, self._backend)  # now, not in the first step, is the time to complain
        self._moments = [self._moments_of(segment) for segment in segments]
        self._rows = GradientRows(segments, count, "MConFIG")
        self._places = [
            _Place(s, first, group_of[id(parameter)], landing.memory_of(parameter))
            for s, segment in enumerate(segments)
            for parameter, first in zip(segment.parameters, segment.starts, strict=True)
        ]
        self._gradients = [segment.rows.unbind() for segment in segments]
        self._ledger = Ledger.zeros(self._num_losses, segments[0].device)
        self._recorded: list[int] = []
        self._seen: set[int] = set()  # losses recorded so far
        self._ever_reached: set[int] = set()  # positions of parameters
        self._active: list[Segment] = []
        self._active_for = _NONE  # how many were reached, which need a gradient
        self._built = True

    def _moments_of(self, segment: landing.Segment) -> Moments:
        dtype = self._state_dtype or (torch.float64 if segment.dtype == torch.float64 else torch.float32)
        if dtype.itemsize < segment.dtype.itemsize:
            raise ValueError(f"state_dtype must be no narrower than the parameters' {segment.dtype}, got {dtype}")
        first = landing.aligned_rows(self._num_losses, segment.n, dtype, segment.device)
        return Moments(first, landing.aligned_rows(1, segment.n, dtype, segment.device)[0])

    def _rule(self) -> StepRule:
        betas = self.param_groups[0]["betas"]
        for i, group in enumerate(self.param_groups):
            if tuple(group["betas"]) != tuple(betas):
                raise ValueError(f"all groups must share betas, got {betas} in group 0 and {group['betas']} in {i}")
        groups = tuple(
            Group(group["lr"], group["weight_decay"], group["eps"], group["maximize"]) for group in self.param_groups
        )
        return StepRule(betas[0], betas[1], groups, self._max_norm, self._max_update_norm)

    def _active_segments(self, losses: tuple[int, ...]) -> list[tuple[Segment, Recorded]]:
        """The segments with the gradients of this step; only parameters that are to be updated lie in their pieces."""
        parameters = self._rows.parameters
        if [parameter.data_ptr() for parameter in parameters] != self._rows.addresses:
            self._rows.check_parameters()  # which says what is wrong
        for slot in range(len(losses)):
            if not self._ever_reached.issuperset(self._rows.reached[slot]):
                self._ever_reached.update(self._rows.reached[slot])
                self._describe_state()
        needing = [parameter.requires_grad for parameter in parameters]
        if (len(self._ever_reached), needing) != self._active_for:
            resting = [i for i, needs in enumerate(needing) if i not in self._ever_reached or not needs]
            self._active = [self._segment_without(resting, s) for s in range(len(self._moments))]
            self._active_for = len(self._ever_reached), needing
        return [
            (segment, Recorded(losses, rows[: len(losses)]))
            for segment, rows in zip(self._active, self._gradients, strict=True)
        ]

    def _segment_without(self, resting: Sequence[int], index: int) -> Segment:
        pieces = [
            Piece(place.memory, place.first, place.group)
            for i, place in enumerate(self._places)
            if place.segment == index and i not in resting
        ]
        return segment_on(self._rows.segments[index].device, self._backend, self._moments[index], pieces)

    def _describe_state(self) -> None:
        """Make ``state`` show the averages of each parameter that a loss has reached, as views."""
        for i in sorted(self._ever_reached):
            parameter, place = self._rows.parameters[i], self._places[i]
            if not self.state.get(parameter):  # reading optimizer.state[parameter] makes an empty entry
                columns = slice(place.first, place.first + len(place.memory))
                first, second = self._moments[place.segment]
                self.state[parameter] = {
                    "exp_avgs": landing.shaped_like(parameter, first[:, columns]),
                    "exp_avg_sq": landing.shaped_like(parameter, second[columns]),
                }

    def _unreach(self, positions: set[int]) -> None:
        """Leave parameters alone again: what reached them for the first time was left out."""
        self._ever_reached.difference_update(positions)
        self._active_for = _NONE
        for i in positions:
            self.state.pop(self._rows.parameters[i], None)

    def _carry_nonfinite(self, slot: int) -> None:
        """Make the gradient just recorded show NaN where one before, which no ``p.grad`` shows now, is not finite.

        The step is left out either way. So a GradScaler that sees the last gradient of each parameter knows of all.
        """
        for s, segment in enumerate(self._rows.segments):
            shown, *before = (self._first_reached(s, row) for row in range(slot, -1, -1))
            hidden = next((slot - 1 - i for i, column in enumerate(before) if column is not None), None)
            if shown is not None and hidden is not None:
                largest = torch.linalg.vector_norm(segment.rows[hidden], ord=math.inf)
                segment.rows[slot, shown] += largest * 0

    def _first_reached(self, segment: int, slot: int) -> int | None:
        """A column of the segment in which a recorded gradient has an element."""
        places = (self._places[i] for i in self._rows.reached[slot])
        return min((place.first for place in places if place.segment == segment and len(place.memory)), default=None)
