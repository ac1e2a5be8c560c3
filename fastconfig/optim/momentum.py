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
from fastconfig.gradients.combination import Combination, weights_of
from fastconfig.gradients.losses import Losses
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

    Raises:
        FloatingPointError: a gradient is not finite, and the method is a ConFIG that raises on it.
        TypeError, ValueError: what the method answers is no vector of weights.
        Nothing has been written then.
    """
    segment, recorded = segments[0]
    home = ledger.gramian.device
    scales = _scales(segments, rule.max_norm, grad_scale, home, backend)
    config = method.rule if type(method) is ConFIG else None
    if config is not None:
        config.check_losses(len(ledger.weights))
        if len(segments) == 1 and not callable(config.length) and rule.max_update_norm is None:
            segment.step(ledger, recorded, rule, config, scales, found_inf)
            return
    parts = [
        segment.products(recorded, scales.to(recorded.rows[0].device), rule.beta1).to(home)
        for segment, recorded in segments
    ]
    products = parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)
    if isinstance(method, (ConFIG, GramianMethod)) and method.rule.nonfinite == "raise":
        raise_if_nonfinite(products, recorded.losses)
    ask = all_seen and (home.type != "cpu" or _has_use_for(ledger, recorded.losses, products, found_inf))
    decision = decide(ledger, recorded.losses, products, scales, rule, _weights_by(method, ask), found_inf)
    beside = [
        (segment, recorded, Decision.of(decision.numbers.to(recorded.rows[0].device), len(ledger.weights)))
        for segment, recorded in segments
    ]
    if rule.max_update_norm is not None:
        square = torch.stack([segment.update_square(r, rule, local).to(home) for segment, r, local in beside]).sum()
        for _, _, local in beside:
            local.clip.copy_((rule.max_update_norm / square.sqrt()).clamp(max=1.0))
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


def _weights_by(method: Method, ask: bool) -> Callable[[Tensor], Tensor]:
    """The method's checked weights; zeros where there is no use in asking it."""

    def weights(gramian: Tensor) -> Tensor:
        if not ask:
            return gramian.new_zeros(len(gramian))
        return check_method_weights(weights_of(method, gramian), gramian, method)

    return weights


def _has_use_for(ledger: Ledger, losses: Sequence[int], products: Tensor, found_inf: Tensor | None) -> bool:
    """Whether a method's answer would be used: the gradients are finite, and so was one of every other loss."""
    seen = ledger.counts > 0
    seen[list(losses)] = True
    finite = torch.isfinite(products).all() and (found_inf is None or not found_inf)
    return bool(seen.all() and finite)


def _scales(
    segments: Sequence[tuple[Segment, Recorded]],
    max_norm: float | None,
    grad_scale: Tensor | None,
    home: torch.device,
    backend: str | None,
) -> Tensor:
    """What each gradient is multiplied by before it enters its average, (k,) float64."""
    scales = _ones(len(segments[0][1].losses), home)
    if grad_scale is not None:
        scales = scales / grad_scale.to(home, torch.float64).reshape(())
    if max_norm is not None:
        parts = [_squares(recorded, backend).to(home) for _, recorded in segments]
        norms = torch.stack(parts).sum(dim=0).sqrt() * scales
        clip = (max_norm / norms).clamp(max=1.0)
        scales = scales * torch.where(torch.isfinite(norms), clip, torch.nan)  # 0 would make a finite gradient vanish
    return scales


@lru_cache(maxsize=64)
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, dtype=torch.float64, device=device)


def _squares(recorded: Recorded, backend: str | None) -> Tensor:
    """The squared norms of one segment's gradients, (k,) float64."""
    first = recorded.rows[0]
    rows = Rows(len(recorded.rows), len(first), first.dtype, first.device, None, recorded.rows)
    return backends.select(first.device, backend).gramian(rows).diagonal()
