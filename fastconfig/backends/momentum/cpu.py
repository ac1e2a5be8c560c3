"""M-ConFIG's step by the compiled core: what each function means stands in ``reference``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastconfig.backends import cpu
from fastconfig.backends.moments import Decision, Group, Ledger, Moments, Piece, Recorded, StepRule
from fastconfig.backends.rules import ConFIGRule, NonFiniteError

if cpu.available() is None:
    from fastconfig import _core


class Segment:
    """As reference.Segment: two passes over memory, several threads, the same bits for any number of them."""

    def __init__(self, moments: Moments, pieces: Sequence[Piece]) -> None:
        first, second = moments
        m, n = first.shape
        addresses = [(piece.values.data_ptr(), piece.first, len(piece.values), piece.group) for piece in pieces]
        step = first.stride(0) * first.element_size()
        self._kept = (moments, pieces)  # the core reads and writes them by address
        self._m = m
        self._rules: tuple[StepRule, _core.StepRule] | None = None
        self._recorded: dict[int, tuple[Recorded, _core.Recorded]] = {}
        self._native = _core.MomentumSegment(
            first.data_ptr(), step, m, second.data_ptr(), n, cpu.DTYPES[first.dtype], addresses
        )

    def products(self, recorded: Recorded, scales: Tensor, beta1: float) -> Tensor:
        """As reference.Segment.products."""
        out = torch.empty(len(recorded.losses), self._m, dtype=torch.float64, device="cpu")
        self._native.products(
            _native_recorded(recorded), scales.data_ptr(), beta1, out.data_ptr(), torch.get_num_threads()
        )
        return out

    def update(self, recorded: Recorded, rule: StepRule, decision: Decision) -> None:
        """As reference.Segment.update."""
        self._native.update(
            _native_recorded(recorded), _native_rule(rule), decision.numbers.data_ptr(), torch.get_num_threads()
        )

    def update_square(self, recorded: Recorded, rule: StepRule, decision: Decision) -> Tensor:
        """As reference.Segment.update_square."""
        square = self._native.update_square(
            _native_recorded(recorded), _native_rule(rule), decision.numbers.data_ptr(), torch.get_num_threads()
        )
        return torch.tensor(square, dtype=torch.float64, device="cpu")

    def step(
        self,
        ledger: Ledger,
        recorded: Recorded,
        rule: StepRule,
        method: ConFIGRule,
        scales: Tensor,
        found_inf: Tensor | None = None,
    ) -> None:
        """As reference.Segment.step, in one call into the core."""
        bad = self._native.step(
            self._native_recorded(recorded),
            self._native_rule(rule),
            cpu.native_rule(method, self._m),
            0,
            scales.data_ptr(),
            found_inf is not None and bool(found_inf),
            ledger.gramian.data_ptr(),
            ledger.weights.data_ptr(),
            ledger.counts.data_ptr(),
            ledger.totals.data_ptr(),
            torch.get_num_threads(),
        )
        if bad != _core.FINITE:
            raise NonFiniteError(bad)

    def _native_recorded(self, recorded: Recorded) -> _core.Recorded:
        """Of the same object the same one: an optimizer keeps its own, one for each choice of losses."""
        known = self._recorded.get(id(recorded))
        if known is None or known[0] is not recorded:
            if len(self._recorded) >= _MOST_RECORDED:
                self._recorded.clear()
            known = self._recorded[id(recorded)] = recorded, _native_recorded(recorded)
        return known[1]

    def _native_rule(self, rule: StepRule) -> _core.StepRule:
        """Likewise, but where a learning rate is a tensor, which may have been filled anew."""
        if any(isinstance(group.lr, Tensor) for group in rule.groups):
            return _native_rule(rule)
        if self._rules is None or self._rules[0] is not rule:
            self._rules = rule, _native_rule(rule)
        return self._rules[1]


_MOST_RECORDED = 64
"""Descriptions of gradients that are kept: an optimizer has one for each choice of losses."""


def _native_recorded(recorded: Recorded) -> _core.Recorded:
    rows = recorded.rows
    return _core.Recorded(recorded.losses, [row.data_ptr() for row in rows], cpu.DTYPES[rows[0].dtype])


def _native_rule(rule: StepRule) -> _core.StepRule:
    return _core.StepRule(rule.beta1, rule.beta2, [_native_group(group) for group in rule.groups])


def _native_group(group: Group) -> tuple[float, float, float, bool]:
    """θ ← θ + rate·update - decay·θ: decay, rate, ε, and whether the update itself is written."""
    if group.assign:
        return 0.0, 1.0, group.eps, True
    lr = float(group.lr)
    return lr * group.weight_decay, lr if group.maximize else -lr, group.eps, False
