"""Rules that change one gradient after the other by those that it meets, all rows at once: PCGrad, Priority, GradVac.

Source: PCGrad, arXiv 2001.06782, alg. 1; GradVac, arXiv 2010.05874, alg. 1. Row i of A says what gradient i has
become, in the unit rows u: g_i' = |g_i| Σ_j A_ij u_j. It starts as u_i and meets each other row once, so that a step
adds one coefficient to every row, and to the products B = AC that the next steps look at.
"""

import triton
import triton.language as tl

from .matrices import cells

RTOL = tl.constexpr(1e-12)


@triton.jit
def store_order(keys, active, order, ASYMMETRIC: tl.constexpr, M: tl.constexpr, MP: tl.constexpr):
    """Write whom each row meets, first to last, in the rows of ``order``, and -1 behind the last.

    Args:
        keys: (M, M) float64, ascending along each row, ties by index; None for 0 to M - 1. With ASYMMETRIC (M,), the
            rows' places: each row meets those before it, the nearest first.
        active: MP float64, 1 or 0: the rows that meet and are met.
        order: (MP, MP) float64, written.
    """
    r = tl.arange(0, MP)[:, None]
    c = tl.arange(0, MP)[None, :]
    inside = (r < M) & (c < M)
    met = (tl.load(active + r) > 0.0) & (tl.load(active + c) > 0.0) & (r != c)
    if ASYMMETRIC:
        key = -tl.load(keys + c, mask=c < M, other=0.0)
        met = met & (key > -tl.load(keys + r, mask=r < M, other=0.0))
    elif keys is None:
        key = c.to(tl.float64)
    else:
        key = tl.load(keys + r * M + c, mask=inside, other=0.0)
    place = tl.zeros([MP, MP], tl.int32)
    for k in range(M):
        there = (tl.load(active + r) * tl.load(active + k) > 0.0) & (r != k)
        if ASYMMETRIC:
            other = -tl.load(keys + k)
            there = there & (other > -tl.load(keys + r, mask=r < M, other=0.0))
        elif keys is None:
            other = (c * 0 + k).to(tl.float64)
        else:
            other = tl.load(keys + r * M + k, mask=r < M, other=0.0)
        before = there & ((other < key) | ((other == key) & (k < c)))
        place += tl.where(before, 1, 0)
    tl.store(order + cells(MP), tl.full([MP, MP], -1.0, tl.float64))
    tl.debug_barrier()
    tl.store(order + r * MP + place, c.to(tl.float64) + r * 0, mask=met)
    tl.debug_barrier()


@triton.jit
def start_surgery(unit, changed, products, MP: tl.constexpr):
    """A = 1, B = C."""
    r = tl.arange(0, MP)[:, None]
    c = tl.arange(0, MP)[None, :]
    tl.store(changed + cells(MP), tl.where(r == c, 1.0, 0.0).to(tl.float64))
    tl.store(products + cells(MP), tl.load(unit + cells(MP)))
    tl.debug_barrier()


@triton.jit
def add_rows(unit, changed, products, order, change, step, MP: tl.constexpr):
    """Give every row ``change`` (MP float64) times the unit row that it meets in this step."""
    i = tl.arange(0, MP)
    row = i[:, None]
    met = tl.load(order + i * MP + step)
    tl.store(changed + i * MP + tl.maximum(met, 0.0).to(tl.int32), tl.load(change + i), mask=met >= 0.0)
    met_row = tl.maximum(tl.load(order + row * MP + step), 0.0).to(tl.int32)
    amount = tl.load(change + row)
    values = tl.load(products + cells(MP)) + amount * tl.load(unit + met_row * MP + i[None, :])
    tl.debug_barrier()
    tl.store(products + cells(MP), values)
    tl.debug_barrier()


@triton.jit
def project_conflicts(unit, changed, products, order, change, M: tl.constexpr, MP: tl.constexpr):
    """PCGrad: what a row has of the opposite of the one that it meets is taken from it."""
    i = tl.arange(0, MP)
    start_surgery(unit, changed, products, MP)
    for step in range(M - 1):
        met = tl.load(order + i * MP + step)
        product = tl.load(products + i * MP + tl.maximum(met, 0.0).to(tl.int32))
        tl.store(change + i, tl.where((met >= 0.0) & (product < 0.0), -product, 0.0))
        tl.debug_barrier()
        add_rows(unit, changed, products, order, change, step, MP)


@triton.jit
def raise_cosines(
    unit, changed, products, order, targets, beta, learns, squares, terms, change, M: tl.constexpr, MP: tl.constexpr
):
    """GradVac: a row's cosine with the one that it meets is raised to a target, a moving average of such cosines.

    Args:
        targets: (M, M) float64, brought up to date where ``learns``.
        squares, terms, change: MP float64, overwritten; the rows' squared norms, and the lengths that they are made of.
    """
    i = tl.arange(0, MP)
    start_surgery(unit, changed, products, MP)
    tl.store(squares + i, tl.full([MP], 1.0, tl.float64))
    tl.store(terms + i, tl.full([MP], 1.0, tl.float64))
    tl.debug_barrier()
    for step in range(M - 1):
        met = tl.load(order + i * MP + step)
        other = tl.maximum(met, 0.0).to(tl.int32)
        there = (met >= 0.0) & (i < M)
        product = tl.load(products + i * MP + other)
        square = tl.load(squares + i)
        length = tl.load(terms + i)
        is_there = square > RTOL * length * length  # what is left of a row that has vanished is rounding
        norm = tl.sqrt(tl.where(is_there, square, 0.0))
        cosine = tl.where(norm > 0.0, product / tl.where(norm > 0.0, norm, 1.0), 0.0)
        cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
        target = tl.load(targets + i * M + other, mask=there, other=0.0)
        room = 1.0 - target * target
        raised = there & (cosine < target) & (room > RTOL)
        root = tl.sqrt(tl.where(raised, room, 1.0))
        amount = norm * (target * tl.sqrt(1.0 - cosine * cosine) - cosine * root) / root
        amount = tl.where(raised, amount, 0.0)
        tl.debug_barrier()
        tl.store(change + i, amount)
        tl.store(squares + i, square + amount * (2.0 * product + amount))
        tl.store(terms + i, length + amount)
        tl.store(
            targets + i * M + other, (1.0 - beta) * target + beta * cosine, mask=there & (i < tl.where(learns, M, 0))
        )
        tl.debug_barrier()
        add_rows(unit, changed, products, order, change, step, MP)


@triton.jit
def sum_of_changed(changed, preference, inverse_norms, MP: tl.constexpr):
    """[MP] the weights of Σ_i p_i g_i'."""
    i = tl.arange(0, MP)
    inverse = tl.load(inverse_norms + i)[:, None]
    own = tl.where(inverse > 0.0, tl.load(preference + i)[:, None] / tl.where(inverse > 0.0, inverse, 1.0), 0.0)
    return tl.sum(tl.load(changed + cells(MP)) * own, axis=0) * tl.load(inverse_norms + i)
