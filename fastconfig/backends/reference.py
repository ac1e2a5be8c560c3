"""The specification: every function of a backend in plain PyTorch and numpy, float64 inside, on any device.

Each function states one clause of the numerics contract. The compiled backends are tested against this file, so it is
written to be read and checked by hand, not to be fast: it holds at most a few chunks of columns in float64 at a time
and, but for the methods beside ConFIG, which it solves on the host, branches on no tensor's value (on an accelerator,
torch.linalg.eigh may still synchronise). One clause it leaves to the compiled backends: its matrix products are the
BLAS's, whose last bits may depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastconfig.backends import problem
from fastconfig.backends.philox import uniform
from fastconfig.backends.rows import Rows
from fastconfig.backends.rules import ConFIGRule, GramianRule, NonFiniteError

CHUNK_ELEMENTS = 1 << 22
"""Elements of one float64 chunk, 32 MiB: the reference's working memory, whatever n is."""


def available() -> str | None:
    """Why this backend cannot run here: never, so None."""
    return None


def gramian(rows: Rows) -> Tensor:
    """K = G Gᵀ, accumulated in float64 from inputs of any float dtype. Returns (m, m) float64 on the rows' device."""
    total = torch.zeros(rows.m, rows.m, dtype=torch.float64, device=rows.device)
    for chunk, _ in _chunks(rows):
        total += chunk @ chunk.T
    return total.tril() + total.tril(-1).T  # a matrix product need not be symmetric to the bit


def apply(rows: Rows, weights: Tensor, out: Tensor) -> None:
    """Write Σ c_i g_i to ``out``, accumulated in float64. A row of weight 0 takes no part, NaN or not.

    Args:
        rows: m rows of n elements.
        weights: (m,) float64, the coefficients c, on the rows' device.
        out: (n,) of the rows' dtype, overwritten.
    """
    used = (weights != 0).unsqueeze(1)
    for chunk, columns in _chunks(rows):
        out[columns] = (weights @ torch.where(used, chunk, 0.0)).to(out.dtype)


def graddrop(rows: Rows, leak: Tensor | None, seed: Tensor, column: int, out: Tensor) -> None:
    """Write GradDrop's combination to ``out``: of each column the elements of one sign, which is drawn.

    With P = ½(1 + Σ g_i / Σ |g_i|) and U uniform in [0, 1), the positive elements are kept where P > U, else the
    negative ones; out = Σ (leak_i + (1 - leak_i)·kept_i) g_i (Chen et al. 2020, arXiv 2010.06808, algorithm 1, lines 10
    to 15). P is the positive elements' share of Σ |g_i|, so that P > U is Σ max(g_i, 0) > U·Σ |g_i|: nothing is
    divided, every operation is rounded once, in float64, the sums in the order of the rows. So all backends keep the
    same elements, to the last one.

    A column of zeros is 0, one that holds inf or NaN is NaN.

    Args:
        rows: m rows of n elements.
        leak: (m,) float64 on the rows' device, what passes of the elements not kept; None for zeros.
        seed: one int64 on the rows' device. The same seed draws the same signs.
        column: the number of the first column, for ``rows`` that are a part of a whole: U depends on it and the seed.
        out: (n,) of the rows' dtype, overwritten.
    """
    leaks = [0.0] * rows.m if leak is None else leak.to(torch.float64)
    for chunk, columns in _chunks(rows):
        zeros = torch.zeros_like(chunk[0])
        positive, negative, leaked_positive, leaked_negative = zeros, zeros, zeros, zeros
        for row, share in zip(chunk, leaks, strict=True):
            up, down = row.clamp(min=0.0), row.clamp(max=0.0)
            positive, negative = positive + up, negative - down
            leaked_positive, leaked_negative = leaked_positive + share * up, leaked_negative - share * down
        magnitude = positive + negative
        keeps_positive = positive > uniform(seed, column + columns.start, len(zeros)) * magnitude
        combined = torch.where(keeps_positive, positive - leaked_negative, leaked_positive - negative)
        out[columns] = torch.where(torch.isfinite(magnitude), combined, torch.nan).to(out.dtype)


def config_weights(gramian: Tensor, rule: ConFIGRule) -> Tensor:
    """ConFIG's coefficients c from the Gramian alone: g = Σ c_i g_i.

    With unit rows u_i = g_i/|g_i| stacked in U and direction weights ŵ, ConFIG's direction is d = U⁺ŵ (ConFIG paper,
    eq. 2 and 3). As U⁺ = Uᵀ(UUᵀ)⁺, only C = UUᵀ is needed: a = C⁺ŵ, d = Σ a_i u_i, |d|² = ŵᵀC⁺ŵ = aᵀŵ.

    - Active rows have K_ii > 0; the others get weight 0.
    - Eigenvalues of C at or under rtol·λ_max count as zero.
    - |d|² counts as zero, and the answer is the zero vector, where ŵᵀC⁺ŵ·λ_max ≤ rtol·|ŵ|²: then ŵ has no more than
      √rtol of its length in the range of C, which is what rounding leaves of an exact opposition.
    - A non-finite row makes every weight NaN ("propagate"), is inactive ("drop") or raises ("raise").

    Args:
        gramian: (m, m) float64.
        rule: direction weights, length model, rtol, treatment of non-finite rows.

    Returns:
        (m,) float64 on the Gramian's device.

    Raises:
        FloatingPointError: a row is not finite and the rule says "raise"; reading that synchronises.
    """
    if rule.nonfinite == "raise":
        raise_if_nonfinite(gramian)
    direction = rule.direction_tensor(gramian)
    coefficients, norms, cosines = _unit_direction(gramian, direction, rule)
    length = rule.length_of(norms, cosines)
    # Select, never multiply: 0·∞ must not turn an opposed pair's zero into NaN.
    weights = torch.where(coefficients == 0, coefficients, coefficients * length)
    if rule.nonfinite == "drop":
        return weights
    finite = torch.isfinite(gramian.diagonal()).all()
    return torch.where(finite, weights, torch.nan)


def config_combine(
    rows: Rows, rule: ConFIGRule, out: Tensor, gramian_out: Tensor | None = None, weights_out: Tensor | None = None
) -> None:
    """The whole of ConFIG: Gramian, weights, and the combination into ``out`` (n,), with K and c kept where asked."""
    combine_in_steps(gramian, lambda k: config_weights(k, rule), apply, rows, out, gramian_out, weights_out)


def rule_weights(gramian: Tensor, rule: GramianRule, operand: Tensor | None) -> Tensor:
    """A method's coefficients c from the Gramian, as its file in ``fastconfig.methods`` writes it down, on the host.

    Args:
        gramian: (m, m) float64.
        rule: which method, its numbers, treatment of non-finite rows.
        operand: what it takes besides, of this call alone: float64 on the same device; updated by those with a state.

    Returns:
        (m,) float64 on the Gramian's device. A row that is zero has weight 0; non-finite ones as in config_weights.

    Raises:
        FloatingPointError: a row is not finite and the rule says "raise".
    """
    if rule.nonfinite == "raise":
        raise_if_nonfinite(gramian)
    return problem.rule_weights(gramian, rule, operand)


def rule_combine(
    rows: Rows,
    rule: GramianRule,
    operand: Tensor | None,
    out: Tensor,
    gramian_out: Tensor | None = None,
    weights_out: Tensor | None = None,
) -> None:
    """``config_combine`` by another method."""
    combine_in_steps(gramian, lambda k: rule_weights(k, rule, operand), apply, rows, out, gramian_out, weights_out)


def combine_in_steps(
    gramian: Callable[[Rows], Tensor],
    weights: Callable[[Tensor], Tensor],
    apply: Callable[[Rows, Tensor, Tensor], None],
    rows: Rows,
    out: Tensor,
    gramian_out: Tensor | None,
    weights_out: Tensor | None,
) -> None:
    """A combination by a backend's other functions, one after the other."""
    k = gramian(rows)
    c = weights(k)
    apply(rows, c, out)
    if gramian_out is not None:
        gramian_out.copy_(k)
    if weights_out is not None:
        weights_out.copy_(c)


def raise_if_nonfinite(gramian: Tensor) -> None:
    """FloatingPointError if a gradient is not finite, which its squared norm tells. Waits for the device."""
    bad = (~torch.isfinite(gramian.diagonal())).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(bad[0])


def _unit_direction(gramian: Tensor, direction: Tensor, rule: ConFIGRule) -> tuple[Tensor, Tensor, Tensor]:
    """(b, |g|, cos): g_u = Σ b_i g_i of unit length, the rows' norms, and their cosines with g_u; 0 where inactive."""
    squares = gramian.diagonal()
    active = torch.isfinite(squares) & (squares > 0)
    norms = torch.where(active, squares, 0.0).sqrt()
    inverse = torch.where(active, 1.0 / norms, 0.0)
    pairs = active.unsqueeze(0) & active.unsqueeze(1)
    unit = torch.where(pairs, gramian, 0.0) * inverse.unsqueeze(0) * inverse.unsqueeze(1)
    unit = torch.where(torch.eye(len(unit), dtype=torch.bool, device=unit.device) & pairs, 1.0, unit)
    direction = torch.where(active, direction, 0.0)

    eigenvalues, vectors = torch.linalg.eigh(unit)
    largest = eigenvalues[-1]
    kept = eigenvalues > (rule.rtol * largest).clamp(min=0.0)
    solution = vectors @ torch.where(kept, (vectors.T @ direction) / torch.where(kept, eigenvalues, 1.0), 0.0)

    square = solution @ direction
    opposed = square * largest <= rule.rtol * (direction @ direction)
    scale = torch.where(opposed, 0.0, 1.0 / square.clamp(min=0.0).sqrt())
    along = torch.where(opposed, 0.0, solution * scale)
    return along * inverse, norms, unit @ along


def _chunks(rows: Rows) -> Iterator[tuple[Tensor, slice]]:
    """The rows in float64, a chunk of columns at a time: (m, ≤ columns), and where those columns lie."""
    columns = max(1, CHUNK_ELEMENTS // rows.m)
    for start in range(0, rows.n, columns):
        where = slice(start, min(start + columns, rows.n))
        if rows.matrix is not None:
            yield rows.matrix.detach()[:, where].to(torch.float64), where
        else:
            yield torch.stack([vector.detach()[where].to(torch.float64) for vector in rows.vectors]), where
