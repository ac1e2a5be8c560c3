"""M-ConFIG's step in plain PyTorch: the specification. Float64 inside, on any device, branching on no tensor's value.

One step, I the losses with a new gradient (ConFIG paper, arXiv 2408.11104, section 3.3 and algorithm 1):

    t_i ← t_i + 1, m_i ← β₁ m_i + (1 - β₁) g_i             for i in I
    t ← t + 1, m̂_i = m_i/(1 - β₁^{t_i}), ĝ = ConFIG(m̂)      once every t_i > 0; until then this is all
    f_t = (1 - β₁^t) ĝ,  q = (f_t - β₁ f_{t-1})/(1 - β₁)   the gradient whose average f would be
    v ← β₂ v + (1 - β₂) q²
    update = ĝ/(√(v/(1 - β₂^t)) + ε),  θ ← θ - lr·weight_decay·θ - lr·update

It is two passes over memory with an m×m problem, ``decide``, between them. The first, ``products``, only looks: it
forms the new averages and their products with all averages, and writes nothing. The second, ``update``, forms them
again and writes. So a step whose gradient is not finite changes nothing; and f_{t-1}, which is Σ weights_i m_i of the
averages before the step, needs no vector of its own: they are still there.

Only products with a new average change, so K stays exact by itself: each entry was formed when the later of its two
averages was, and nothing accumulates from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastconfig.backends.moments import HEAD, Decision, Ledger, Moments, Piece, Recorded, StepRule
from fastconfig.backends.reference import CHUNK_ELEMENTS, config_weights
from fastconfig.backends.rules import ConFIGRule, NonFiniteError


class Segment:
    """The averages of one segment of columns and where its parameters lie, and the passes over them.

    Args:
        moments: the averages; kept, read and written.
        pieces: the columns' parameters; kept, read and written. Columns that none covers keep their second moment and
            have no parameter; their averages go on all the same.
    """

    def __init__(self, moments: Moments, pieces: Sequence[Piece]) -> None:
        self.moments = moments
        self.pieces = tuple(pieces)

    def products(self, recorded: Recorded, scales: Tensor, beta1: float) -> Tensor:
        """The products of the new averages with all, (k, m) float64: row s is that of ``recorded.losses[s]``.

        Args:
            recorded: the gradients.
            scales: (k,) float64, what each gradient is multiplied by.
            beta1: β₁.
        """
        losses = list(recorded.losses)
        first = self.moments.first
        total = torch.zeros(len(losses), len(first), dtype=torch.float64, device=first.device)
        for _, new, _ in self._chunks(recorded, scales, beta1):
            total += new[losses] @ new.T
        among = total[:, losses]
        total[:, losses] = among.tril() + among.tril(-1).T  # a matrix product need not be symmetric to the bit
        return total

    def update(self, recorded: Recorded, rule: StepRule, decision: Decision) -> None:
        """Write the new averages, the second moment and the parameters, as far as the decision says.

        Each is formed in float64 and rounded once. Where a piece takes the update itself, it is zero until every loss
        has had a gradient, and NaN where a gradient is not finite.

        Args:
            recorded: the gradients.
            rule: β₁, β₂ and the groups.
            decision: what ``decide`` said.
        """
        first, second = self.moments
        take, writes = decision.take != 0, decision.update != 0
        for columns, new, f, pseudo in self._combined(recorded, rule, decision):
            for piece, where, here in self._pieces_in(columns):
                old = second[where]
                v, step = _second_and_update(old, f[here], pseudo[here], piece, rule, decision)
                step = step * decision.clip
                value = piece.values[where.start - piece.first : where.stop - piece.first]
                group = rule.groups[piece.group]
                if group.assign:
                    value.copy_(torch.where(take, torch.where(writes, step, 0.0), torch.nan))
                else:
                    theta = value.double()
                    rate = torch.as_tensor(group.lr, dtype=torch.float64, device=step.device).reshape(())
                    along = rate * step if group.maximize else -rate * step
                    value.copy_(torch.where(writes, theta - rate * group.weight_decay * theta + along, theta))
                second[where] = torch.where(writes, v, old)
            for i in recorded.losses:
                row = first[i, columns]
                row.copy_(torch.where(take, new[i].to(row.dtype), row))

    def update_square(self, recorded: Recorded, rule: StepRule, decision: Decision) -> Tensor:
        """|update|² over the pieces' columns, 0-d float64, ``clip`` left out; nothing is written."""
        total = torch.zeros((), dtype=torch.float64, device=self.moments.first.device)
        for columns, _, f, pseudo in self._combined(recorded, rule, decision):
            for piece, where, here in self._pieces_in(columns):
                old = self.moments.second[where]
                total += _second_and_update(old, f[here], pseudo[here], piece, rule, decision)[1].square().sum()
        return total

    def step(
        self,
        ledger: Ledger,
        recorded: Recorded,
        rule: StepRule,
        method: ConFIGRule,
        scales: Tensor,
        found_inf: Tensor | None = None,
    ) -> None:
        """All of it, where this is the only segment and ConFIG the method. No callable length model, no update norm.

        Raises:
            FloatingPointError: a gradient is not finite and the method raises on it. Nothing has been written.
        """
        step_in_parts(self, config_weights, ledger, recorded, rule, method, scales, found_inf)

    def _combined(
        self, recorded: Recorded, rule: StepRule, decision: Decision
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Chunk by chunk: its columns, the new averages (m, ·), f_t and the pseudo-gradient q."""
        forward, backward = decision.forward, decision.backward
        for columns, new, old in self._chunks(recorded, decision.scales, rule.beta1):
            f = forward @ torch.where((forward != 0).unsqueeze(1), new, 0.0)
            before = backward @ torch.where((backward != 0).unsqueeze(1), old, 0.0)
            yield columns, new, f, (f - before) / (1.0 - rule.beta1)

    def _chunks(self, recorded: Recorded, scales: Tensor, beta1: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The averages chunk by chunk, (m, ·) float64: columns, as they will be (rounded as stored), as they are."""
        first = self.moments.first
        m, n = first.shape
        width = max(1, CHUNK_ELEMENTS // m)
        for start in range(0, n, width):
            columns = slice(start, min(start + width, n))
            old = first[:, columns].double()
            new = old.clone()
            for i, row, scale in zip(recorded.losses, recorded.rows, scales, strict=True):
                entering = (1.0 - beta1) * scale * row[columns].double()
                new[i] = (beta1 * old[i] + entering).to(first.dtype)
            yield columns, new, old

    def _pieces_in(self, columns: slice) -> Iterator[tuple[Piece, slice, slice]]:
        """The pieces that meet a chunk: the piece, the columns they share, and the same within the chunk."""
        for piece in self.pieces:
            start, stop = max(piece.first, columns.start), min(piece.first + len(piece.values), columns.stop)
            if start < stop:
                yield piece, slice(start, stop), slice(start - columns.start, stop - columns.start)


def _second_and_update(
    old: Tensor, f: Tensor, pseudo: Tensor, piece: Piece, rule: StepRule, decision: Decision
) -> tuple[Tensor, Tensor]:
    """v, rounded as stored, and update = ĝ/(√v̂ + ε) in float64."""
    v = (rule.beta2 * old.double() + (1.0 - rule.beta2) * pseudo.square()).to(old.dtype)
    root = (v.double() * decision.second).sqrt()
    return v, f * decision.gradient / (root + rule.groups[piece.group].eps)


class Parts(Protocol):
    """What a step is made of: the methods of ``Segment``."""

    def products(self, recorded: Recorded, scales: Tensor, beta1: float) -> Tensor:
        """As Segment.products."""

    def update(self, recorded: Recorded, rule: StepRule, decision: Decision) -> None:
        """As Segment.update."""


def step_in_parts(
    segment: Parts,
    config_weights: Callable[[Tensor, ConFIGRule], Tensor],
    ledger: Ledger,
    recorded: Recorded,
    rule: StepRule,
    method: ConFIGRule,
    scales: Tensor,
    found_inf: Tensor | None,
) -> None:
    """``Segment.step`` by a backend's other functions, one after the other."""
    rows = segment.products(recorded, scales, rule.beta1)
    if method.nonfinite == "raise":
        raise_if_nonfinite(rows, recorded.losses)
    decision, after = decide(
        ledger, recorded.losses, rows, scales, rule, lambda k: config_weights(k, method), found_inf
    )
    ledger.become(after)
    segment.update(recorded, rule, decision)


def raise_if_nonfinite(products: Tensor, losses: Sequence[int]) -> None:
    """FloatingPointError if a new average, and so the gradient that entered it, is not finite. Waits for the device."""
    for row, i in zip(products.tolist(), losses, strict=True):
        if not math.isfinite(row[i]):
            raise NonFiniteError(i)


def decide(
    ledger: Ledger,
    losses: Sequence[int],
    products: Tensor,
    scales: Tensor,
    rule: StepRule,
    weights_of: Callable[[Tensor], Tensor],
    found_inf: Tensor | None = None,
) -> tuple[Decision, Ledger]:
    """The m×m part of a step: what to write, and what the ledger becomes.

    Args:
        ledger: as it is. The caller brings it up to date when nothing can fail any more.
        losses: I.
        products: (k, m) from ``products``, summed over all segments.
        scales: (k,) as there.
        rule: β₁ and β₂.
        weights_of: the method: the Gramian of the m̂_i, (m, m), to their weights (m,).
        found_inf: not zero where a GradScaler has found a gradient that is not finite.

    Returns:
        With ``clip`` 1. Where a gradient is not finite, ``take`` is 0 and the new ledger counts one step left out.
    """
    gramian, old_weights, counts, totals = ledger
    m = len(old_weights)
    new_gramian, new_counts = gramian.clone(), counts.clone()
    for row, i in zip(products, losses, strict=True):
        new_gramian[i] = row
        new_gramian[:, i] = row
        new_counts[i] += 1
    take = torch.isfinite(new_gramian.diagonal()).all()
    if found_inf is not None:
        take = take & (found_inf.reshape(()).to(take.device) == 0)
    update = take & (new_counts > 0).all()
    step = totals[0] + 1

    # 1 - β^t by expm1 and log would be no more exact where it matters, at small t, and inexact at β = 0.
    unbiased = torch.where(new_counts > 0, 1.0 - rule.beta1**new_counts, 1.0)
    weights = weights_of(new_gramian / unbiased / unbiased.unsqueeze(1))
    first = 1.0 - rule.beta1**step
    forward = torch.where(weights == 0, weights, weights / unbiased * first)  # 0·inf is no weight

    numbers = torch.empty(HEAD + 2 * m + len(losses), dtype=torch.float64, device=gramian.device)
    decision = Decision.of(numbers, m)
    numbers[:HEAD] = torch.stack(
        [take.double(), update.double(), 1.0 / first, 1.0 / (1.0 - rule.beta2**step), torch.ones_like(first)]
    )
    decision.forward.copy_(forward)
    decision.backward.copy_(rule.beta1 * old_weights)
    decision.scales.copy_(scales)

    after = Ledger(
        torch.where(take, new_gramian, gramian),
        torch.where(update, forward, old_weights),
        torch.where(take, new_counts, counts),
        totals + torch.stack([update, ~take]),
    )
    return decision, after
