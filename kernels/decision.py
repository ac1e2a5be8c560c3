"""The m×m part of M-ConFIG's step, in one program: ``fastconfig.backends.momentum.reference.decide`` for ConFIG.

What it decides goes to memory in the layout of ``fastconfig.backends.moments.Decision``: HEAD numbers, then forward
and backward weights and the scales. The ledger is brought up to date in place; what is not to change is written as it
was.
"""

import triton
import triton.language as tl

from .config_rule import write_config_weights

HEAD = tl.constexpr(5)
"""Numbers of a decision before its vectors, as ``fastconfig.backends.moments.HEAD``."""


@triton.jit
def power(base, exponent, most):
    """base^exponent by squaring: exact for 0 and 1, and no logarithm, so that it holds for base 0, too.

    Args:
        base: a float64 number.
        exponent: int32, a number or a tensor, at least 0.
        most: int32, the largest of them.
    """
    result = exponent.to(tl.float64) * 0.0 + 1.0
    base = result * base  # a tensor: the interpreter would keep a number in float32
    while most > 0:
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
        most = most >> 1
    return result


@triton.jit
def write_decision(
    gramian,
    ledger_gramian,
    ledger_weights,
    ledger_counts,
    ledger_totals,
    numbers,
    recorded,
    scales,
    count,
    beta1,
    beta2,
    found_inf,
    weights,
    direction,
    tracked,
    rtol,
    scratch,
    M: tl.constexpr,
    MP: tl.constexpr,
    LENGTH: tl.constexpr,
    DROP: tl.constexpr,
):
    """Decide, and bring the ledger up to date.

    Args:
        gramian: (M, M) float64 of the new averages, which this program can see; afterwards that of the unbiased ones.
        ledger_gramian, ledger_weights, ledger_counts, ledger_totals: a ``fastconfig.backends.moments.Ledger``.
        numbers: (HEAD + 2·M + count,) float64, written: the ``Decision``.
        recorded: int64, bit i says whether loss i has a gradient.
        scales: (count,) float64, of the gradients; may lie where ``numbers`` has them.
        beta1, beta2: float64.
        found_inf: one float32, not zero where a gradient is not finite; or None.
        weights: (M,) float64 for the method's weights.
        direction, tracked, rtol, scratch, LENGTH, DROP: as ``config_rule.write_config_weights``.
    """
    i = tl.arange(0, MP)
    inside = i < M
    forward = numbers + HEAD + i
    take, update, counts, unbiased, first = taken(
        gramian, ledger_counts, ledger_totals, recorded, beta1, found_inf, M, MP
    )
    write_head(numbers, take, update, first, ledger_totals, beta2)
    tl.store(forward, unbiased, mask=inside)  # for a while, to be read along both sides of the matrix
    tl.store(forward + 2 * M, tl.load(scales + i, mask=i < count, other=0.0), mask=i < count)
    tl.debug_barrier()
    tl.store(ledger_counts + i, counts, mask=i < tl.where(take, M, 0))
    store_unbiased(gramian, ledger_gramian, numbers + HEAD, take, M, MP)

    write_config_weights(gramian, weights, direction, tracked, rtol, scratch, M, MP, LENGTH, DROP)
    tl.debug_barrier()
    # Read again what was known before: kept in registers all along, it would spill.
    solved = tl.load(weights + i, mask=inside, other=0.0)
    unbiased = tl.load(forward, mask=inside, other=1.0)
    before = tl.load(ledger_weights + i, mask=inside, other=0.0)
    update = tl.load(numbers + 1) != 0.0
    first = first_of(ledger_totals, beta1)
    now = tl.where(solved == 0.0, solved, solved / unbiased * first)  # 0·inf is no weight
    tl.debug_barrier()
    tl.store(forward, now, mask=inside)
    tl.store(forward + M, beta1 * before, mask=inside)
    tl.store(ledger_weights + i, now, mask=i < tl.where(update, M, 0))
    count_step(ledger_totals, update, tl.load(numbers) != 0.0)


@triton.jit
def taken(gramian, ledger_counts, ledger_totals, recorded, beta1, found_inf, M: tl.constexpr, MP: tl.constexpr):
    """(whether the gradients enter, whether all is written, [MP] t_i, [MP] 1 - β₁^{t_i}, 1 - β₁ᵗ)."""
    i = tl.arange(0, MP)
    inside = i < M
    squares = tl.load(gramian + i * M + i, mask=inside, other=0.0)
    finite = (squares == squares) & (squares < float("inf"))
    take = tl.sum(tl.where(finite, 0, 1)) == 0
    if found_inf is not None:
        take = take & (tl.load(found_inf) == 0.0)
    counts = tl.load(ledger_counts + i, mask=inside, other=1.0)
    counts = counts + ((recorded >> i.to(tl.int64)) & 1).to(tl.float64)
    update = take & (tl.sum(tl.where(counts > 0.0, 0, 1)) == 0)
    exponents = counts.to(tl.int32)
    unbiased = tl.where(counts > 0.0, 1.0 - power(beta1, exponents, tl.max(exponents)), 1.0)
    return take, update, counts, unbiased, first_of(ledger_totals, beta1)


@triton.jit
def first_of(ledger_totals, beta):
    """1 - βᵗ of the step that begins."""
    step = (tl.load(ledger_totals) + 1.0).to(tl.int32)
    return 1.0 - power(beta, step, step)


@triton.jit
def write_head(numbers, take, update, first, ledger_totals, beta2):
    """Write what a decision begins with; the update's norm is not limited here."""
    tl.store(numbers, take.to(tl.float64))
    tl.store(numbers + 1, update.to(tl.float64))
    tl.store(numbers + 2, 1.0 / first)
    tl.store(numbers + 3, 1.0 / first_of(ledger_totals, beta2))
    tl.store(numbers + 4, 1.0)


@triton.jit
def store_unbiased(gramian, ledger_gramian, unbiased, take, M: tl.constexpr, MP: tl.constexpr):
    """Keep the Gramian in the ledger where the gradients enter, and free it of its bias in place."""
    r = tl.arange(0, MP)[:, None]
    c = tl.arange(0, MP)[None, :]
    inside = (r < M) & (c < M)
    products = tl.load(gramian + r * M + c, mask=inside, other=0.0)
    tl.store(ledger_gramian + r * M + c, products, mask=inside & (r < tl.where(take, M, 0)))
    products = products / tl.load(unbiased + c, mask=c < M, other=1.0)
    products = products / tl.load(unbiased + r, mask=r < M, other=1.0)
    tl.debug_barrier()
    tl.store(gramian + r * M + c, products, mask=inside)
    tl.debug_barrier()


@triton.jit
def count_step(ledger_totals, update, take):
    """One more update, or one more step left out, or, until every loss has had a gradient, neither."""
    updates = tl.load(ledger_totals)
    left_out = tl.load(ledger_totals + 1)
    tl.debug_barrier()
    tl.store(ledger_totals, updates + update.to(tl.float64))
    tl.store(ledger_totals + 1, left_out + tl.where(take, 0.0, 1.0))
