"""A step of M-ConFIG over any number of segments and by any method; ConFIG on a single segment is one fused call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fastconfig import backends
from fastconfig.backends.moments import Decision, Ledger, Recorded, StepRule
from fastconfig.backends.momentum import Segment
from fastconfig.backends.momentum.reference import decide, raise_if_nonfinite
from fastconfig.backends.rows import Rows
from fastconfig.gradients.across import Tally, check_same_losses
from fastconfig.gradients.across import decide as decide_together
from fastconfig.gradients.combination import Combination, weights_of
from fastconfig.gradients.losses import Losses
from fastconfig.gradients.ranks import Ranks
from fastconfig.methods import ConFIG, GramianMethod, Method
from fastconfig.validation import check_method_weights


def take_step(
    segments: Sequence[tuple[Segment, Recorded]],
    ledger: Ledger,
    rule: StepRule,
    method: Method,
    *,
    all_seen: bool,
    backend: str | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    across: Across | None = None,
) -> None:
    """One step of M-ConFIG, as ``backends.momentum.reference`` writes it down.

    Args:
        segments: each with its part of this step's gradients.
        ledger: on the device where the method is to run; updated.
        rule: the step's numbers.
        method: from the Gramian of the averages, freed of bias, to their weights.
        all_seen: whether every loss has been recorded by now, as the host knows; else the method is not asked.
        backend: as in ``fc.combine``.
        grad_scale: what a GradScaler multiplied the losses by: one element. None for 1.
        found_inf: one element, not zero where a GradScaler found a gradient that is not finite.
        across: the other ranks that take this step, where there are some.

    Raises:
        FloatingPointError: a gradient is not finite, and the method is a ConFIG that raises on it.
        TypeError, ValueError: what the method answers is no vector of weights.
        Nothing has been written then.
    """
    segment, recorded = segments[0]
    home = ledger.gramian.device
    owned = segments if across is None else across.owned
    squares = None if rule.max_norm is None else _squares(owned, home, backend)
    if across is not None:
        squares, found_inf = across.agree(recorded.losses, squares, found_inf)
    scales = _scales(len(recorded.losses), squares, rule.max_norm, grad_scale, home)
    config = method.rule if type(method) is ConFIG else None
    if config is not None:
        config.check_losses(len(ledger.weights))
        if across is None and len(segments) == 1 and not callable(config.length) and rule.max_update_norm is None:
            segment.step(ledger, recorded, rule, config, scales, found_inf)
            return
    products = torch.zeros(len(recorded.losses), len(ledger.weights), dtype=torch.float64, device=home)
    for part, gradients in owned:
        products += part.products(gradients, scales.to(gradients.rows[0].device), rule.beta1).to(home)
    if across is not None:
        across.ranks.total(products)
    if isinstance(method, (ConFIG, GramianMethod)) and method.rule.nonfinite == "raise":
        raise_if_nonfinite(products, recorded.losses)
    ask = all_seen and (home.type != "cpu" or _has_use_for(ledger, recorded.losses, products, found_inf))
    weigh = _weights_by(method, ask, across)
    decision, after = decide(ledger, recorded.losses, products, scales, rule, weigh, found_inf)
    beside = [
        (segment, recorded, Decision.of(decision.numbers.to(recorded.rows[0].device), len(ledger.weights)))
        for segment, recorded in segments
    ]
    if rule.max_update_norm is not None:
        square = torch.zeros((), dtype=torch.float64, device=home)
        for part, gradients in owned:
            local = Decision.of(decision.numbers.to(gradients.rows[0].device), len(ledger.weights))
            square += part.update_square(gradients, rule, local).to(home)
        if across is not None:
            across.ranks.total(square)
        for _, _, local in beside:
            local.clip.copy_((rule.max_update_norm / square.sqrt()).clamp(max=1.0))
    ledger.become(after)
    for segment, recorded, local in beside:
        segment.update(recorded, rule, local)


def combination_of(ledger: Ledger, beta1: float, rtol: float, losses: Losses) -> Combination:
    """What the last step combined: the averages freed of bias, their products and weights. Nothing waits for a device.

    An average that has not begun counts as zero.
    """
    bias = torch.where(ledger.counts > 0, 1.0 - beta1**ledger.counts, 1.0)
    step = ledger.totals[0].clamp(min=1.0)
    weights = ledger.weights * bias / (1.0 - beta1**step)
    return Combination(ledger.gramian / bias / bias.unsqueeze(1), weights, rtol, losses)


class Across:
    """The other ranks of a step.

    Args:
        ranks: all that take it.
        num_losses: m.
        home: the device of the m×m numbers.

    Attributes:
        owned: the columns that this rank owns, with this step's gradients.
    """

    def __init__(self, ranks: Ranks, num_losses: int, home: torch.device) -> None:
        self.ranks = ranks
        self.owned: Sequence[tuple[Segment, Recorded]] = ()
        self._num_losses = num_losses
        self._home = home

    def fail(self, error: Exception) -> None:
        """Take part in the step that the others wait for, by saying what has gone wrong here; it is raised."""
        self._tally().take_part(error)

    def agree(
        self, losses: Sequence[int], squares: Tensor | None, found_inf: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """That every rank takes the same step.

        Args:
            losses: which this rank has recorded.
            squares: (k,) float64, the squared norms of their gradients over the columns owned here, if they matter.
            found_inf: as in ``take_step``.

        Returns:
            The squared norms over the whole model; what is not zero where a GradScaler found on any rank a gradient
            that is not finite.

        Raises:
            RuntimeError: the ranks have recorded different losses.
            What one of them has met.
        """
        tally = self._tally()
        recorded, norms, found = tally.parts
        chosen = list(losses)
        recorded[chosen] = 1.0
        if squares is not None:
            norms[chosen] = squares
        if found_inf is not None:
            found += found_inf.to(found)
        tally.take_part(None)
        check_same_losses(recorded, self.ranks)
        return None if squares is None else norms[chosen], found

    def _tally(self) -> Tally:
        return Tally(self.ranks, self._home, self._num_losses, self._num_losses, 1)


def _weights_by(method: Method, ask: bool, across: Across | None) -> Callable[[Tensor], Tensor]:
    """The method's checked weights, on several ranks rank 0's; zeros where there is no use in asking it."""

    def weights(gramian: Tensor) -> Tensor:
        if not ask:
            return gramian.new_zeros(len(gramian))
        if across is None:
            return check_method_weights(weights_of(method, gramian), gramian, method)
        found = gramian.new_zeros(len(gramian))
        decide_together(across.ranks, method, gramian.clone(), found)
        return found

    return weights


def _has_use_for(ledger: Ledger, losses: Sequence[int], products: Tensor, found_inf: Tensor | None) -> bool:
    """Whether a method's answer would be used: the gradients are finite, and so was one of every other loss."""
    seen = ledger.counts > 0
    seen[list(losses)] = True
    finite = torch.isfinite(products).all() and (found_inf is None or not found_inf)
    return bool(seen.all() and finite)


def _scales(
    count: int, squares: Tensor | None, max_norm: float | None, grad_scale: Tensor | None, home: torch.device
) -> Tensor:
    """What each gradient is multiplied by before it enters its average, (k,) float64."""
    scales = _ones(count, home)
    if grad_scale is not None:
        scales = scales / grad_scale.to(home, torch.float64).reshape(())
    if max_norm is not None and squares is not None:
        norms = squares.sqrt() * scales
        clip = (max_norm / norms).clamp(max=1.0)
        scales = scales * torch.where(torch.isfinite(norms), clip, torch.nan)  # 0 would make a finite gradient vanish
    return scales


@lru_cache(maxsize=64)
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, dtype=torch.float64, device=device)


def _squares(segments: Sequence[tuple[Segment, Recorded]], home: torch.device, backend: str | None) -> Tensor:
    """The squared norms of the gradients over all segments, (k,) float64."""
    total: Tensor | None = None
    for _, recorded in segments:
        first = recorded.rows[0]
        rows = Rows(len(recorded.rows), len(first), first.dtype, first.device, None, recorded.rows)
        here = backends.select(first.device, backend).gramian(rows).diagonal().to(home)
        total = here if total is None else total + here
    return torch.zeros((), dtype=torch.float64, device=home) if total is None else total
