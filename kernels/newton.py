"""The bargaining equations (Cx)_i = q_i x_i^-β, x > 0, by Newton's method on ½ xᵀCx - Σ q_i φ(x_i), φ' = x^-β.

Source: Nash-MTL, arXiv 2202.01017, eq. 4, has β = 1, where φ = log and the function is self-concordant (Boyd &
Vandenberghe, sec. 9.6); FairGrad, arXiv 2402.15638, eq. 6, has β = 1/α. Steps are taken relative to x, so that the
system is XCX + β·diag(x_i q_i x_i^-β): as regular as the problem, whatever the scale of its variables.
"""

import triton
import triton.language as tl

from .matrices import cells, sums, times
from .pivoting import pivot_on_all, solve_free

MAX_STEPS = tl.constexpr(100)  # 25 were seen at condition 1e10, 40 with β = 0.1
MAX_TRIALS = tl.constexpr(40)  # of the length of a step
BALANCED = tl.constexpr(1e-14)
"""Sides that differ by this part of their terms are equal."""
RUN_OFF = tl.constexpr(1e-13)
"""Where both sides are no more than this part of their terms, x is on its way to infinity."""
SETTLED = tl.constexpr(1e-8)
"""After a step in which no x changes by more than this part of it, none is off by more than its square."""
MET = tl.constexpr(1e-10)
"""Sides that differ by less than this part of their terms are a solution,"""
CERTAIN = tl.constexpr(1e-12)
"""if they are more than this part of them, and not rounding."""


@triton.jit
def power_of(base, exponent):
    """base^exponent of positive numbers."""
    if exponent == -1.0:  # what Nash-MTL asks for
        found = 1.0 / base
    elif exponent == -0.5:  # and FairGrad with α = 2
        found = 1.0 / tl.sqrt(base)
    else:
        found = tl.exp(exponent * tl.log(base))
    return found


@triton.jit
def solve_bargain(unit, factors, beta, matrix, tableau, active, x, pull, work, M: tl.constexpr, MP: tl.constexpr):
    """Write x, 1 where not active. Where there is no solution, what it runs off to; see ``is_solved``.

    Args:
        unit: C.
        factors: q, positive where active, which is 1 or 0.
        matrix, tableau: (MP, MP) float64, overwritten.
        pull: MP float64, overwritten: q x^-β.
        work: 5·MP float64.
    """
    i = tl.arange(0, MP)
    gradient = work
    change = work + MP
    store_start(unit, factors, beta, active, x, MP)
    steps = 0
    going = beta > 0.0
    while going & (steps < MAX_STEPS):
        steps += 1
        store_system(unit, factors, beta, active, x, matrix, gradient, pull, MP)
        pivot_on_all(matrix, tableau, active, work + 2 * MP, M, MP)
        solve_free(matrix, tableau, active, gradient, change, work + 2 * MP, MP)
        length, descends = step_length(unit, pull, beta, x, change, work + 2 * MP, MP)
        changed = tl.max(tl.abs(tl.load(change + i)))
        going = keeps_going(unit, pull, active, x, MP) & descends & ~(changed <= SETTLED)
        moved = tl.load(x + i) * (1.0 + length * tl.load(change + i))
        tl.debug_barrier()
        tl.store(x + i, moved)
        tl.debug_barrier()


@triton.jit
def store_start(unit, factors, beta, active, x, MP: tl.constexpr):
    """Write the solution for C = 1, scaled to the best length."""
    i = tl.arange(0, MP)
    inside = tl.load(active + i) > 0.0
    alone = power_of(tl.where(inside, tl.load(factors + i), 1.0), 1.0 / (1.0 + beta))
    tl.store(x + i, tl.where(inside, alone, 0.0))
    tl.debug_barrier()
    alone = tl.load(x + i)
    own = tl.sum(alone * alone)
    together = tl.maximum(tl.sum(alone * times(unit, x, MP)), 1e-14 * own)
    scale = power_of(tl.where(own > 0.0, own / tl.where(own > 0.0, together, 1.0), 1.0), 1.0 / (1.0 + beta))
    tl.debug_barrier()
    tl.store(x + i, tl.where(inside, scale * alone, 1.0))
    tl.debug_barrier()


@triton.jit
def wanted_products(factors, beta, active, x, MP: tl.constexpr):
    """[MP] q x^-β; 0 where not active."""
    i = tl.arange(0, MP)
    inside = tl.load(active + i) > 0.0
    return tl.where(inside, tl.load(factors + i) * power_of(tl.load(x + i), -beta), 0.0)


@triton.jit
def store_system(unit, factors, beta, active, x, matrix, gradient, pull, MP: tl.constexpr):
    """Write Newton's matrix, relative to x, what it is to be solved for, and q x^-β."""
    i = tl.arange(0, MP)
    values = tl.load(x + i)
    wanted = wanted_products(factors, beta, active, x, MP)
    tl.store(pull + i, wanted)
    tl.store(gradient + i, values * (wanted - times(unit, x, MP)))
    scaled = tl.load(unit + cells(MP)) * tl.load(x + i)[:, None] * tl.load(x + i)[None, :]
    tl.store(matrix + cells(MP), scaled)
    tl.debug_barrier()
    diagonal = tl.load(matrix + i * MP + i) + tl.where(tl.load(active + i) > 0.0, beta * values * wanted, 1.0)
    tl.debug_barrier()
    tl.store(matrix + i * MP + i, diagonal)
    tl.debug_barrier()


@triton.jit
def keeps_going(unit, pull, active, x, MP: tl.constexpr):
    """Whether another step is due after this one: x is neither a solution nor on its way to infinity."""
    i = tl.arange(0, MP)
    wanted = tl.load(pull + i)
    products, sizes = sums(unit, x, MP)
    unbalanced = tl.abs(wanted - products) > BALANCED * (wanted + sizes)
    lost = (tl.load(active + i) > 0.0) & (tl.maximum(products, wanted) <= RUN_OFF * sizes)
    return (tl.max(tl.where(unbalanced, 1, 0)) > 0) & (tl.max(tl.where(lost, 1, 0)) == 0)


@triton.jit
def is_solved(unit, factors, beta, active, x, MP: tl.constexpr):
    """Whether x meets the equations, beyond doubt."""
    i = tl.arange(0, MP)
    wanted = wanted_products(factors, beta, active, x, MP)
    products, sizes = sums(unit, x, MP)
    met = (tl.abs(wanted - products) < MET * (wanted + sizes)) & (products > CERTAIN * sizes)
    return tl.min(tl.where(met | (tl.load(active + i) == 0.0), 1, 0)) > 0


@triton.jit
def step_length(unit, pull, beta, x, change, work, MP: tl.constexpr):
    """(length, whether the function falls along ``change``): half the slope or less is left there, and no x_i ≤ 0."""
    i = tl.arange(0, MP)
    direction = tl.load(change + i)
    values = tl.load(x + i)
    tl.store(work + i, direction * values)
    tl.debug_barrier()
    curvature = tl.sum(direction * values * times(unit, work, MP))
    linear = tl.sum(direction * values * times(unit, x, MP))
    pulled = values * tl.load(pull + i) * direction
    start = linear - tl.sum(pulled)
    shorter = start * 0.0
    longer = start * 0.0 + float("inf")
    length = start * 0.0 + 1.0
    trials = 0
    trying = start < 0.0
    while trying & (trials < MAX_TRIALS):
        trials += 1
        growth = 1.0 + length * direction
        inside = tl.min(growth) > 0.0
        slope = length * curvature + linear - tl.sum(pulled * power_of(tl.where(inside, growth, 1.0), -beta))
        slope = tl.where(inside, slope, float("inf"))
        trying = tl.abs(slope) > -0.5 * start
        longer = tl.where(trying & (slope > 0.0), length, longer)
        shorter = tl.where(trying & (slope <= 0.0), length, shorter)
        bracketed = longer < float("inf")
        next_length = tl.where(bracketed, 0.5 * (shorter + tl.where(bracketed, longer, 0.0)), 4.0 * length)
        length = tl.where(trying, next_length, length)
    tl.debug_barrier()
    return tl.where(start < 0.0, tl.where(trying, shorter, length), 0.0), start < 0.0
