"""The quadratic program min ½ yᵀQy - bᵀy over y ≥ 0, Q positive semidefinite: exact, by principal pivots.

At first all variables that are on the wrong side of zero change sides at once, for as long as they become fewer: block
principal pivoting, Júdice & Pires 1994, which takes a handful of steps where one variable at a time takes as many as
there are. Then a primal active set, which finds the end from wherever that has led:

Source: Lawson & Hanson, Solving Least Squares Problems, ch. 23, in the form of principal pivots (van de Panne &
Whinston 1964): a variable enters once it can be raised to where its slope is zero; whatever reaches zero before leaves
first. So every basis is one pivot from the last, and rows that depend on others need no special case: a variable
without curvature is raised until another one blocks it.
"""

import triton
import triton.language as tl

from .matrices import cells, sums
from .pivoting import pivot, pivot_on_all, solve_free

DEPENDENT = tl.constexpr(1e-13)
"""A row with no more than this, of 1, left independent of the free ones depends on them: m·ε, and a margin."""
SLOPE = tl.constexpr(1e-13)
"""A slope under this part of the terms that it is the sum of is rounding."""
SLOPE_OF_DEPENDENT = tl.constexpr(1e-10)
"""The same of a dependent row, to which nearly dependent free rows give 1/√(smallest eigenvalue) times as much."""
BLOCK_TRIES = tl.constexpr(3)
"""Blocks that are exchanged without fewer variables being misplaced than ever before."""
BLOCKING = tl.constexpr(1e-14)
DAMAGE = tl.constexpr(1e3)
"""A pivot that takes a row out loses as many digits as it is large: beyond this the tableau is built anew."""


@triton.jit
def minimise_nonnegative(
    matrix, target, tableau, free, allowed, solution, work, damage, M: tl.constexpr, MP: tl.constexpr
):
    """Write the minimiser; F, its positive variables, and the tableau stay for the next call, for another b.

    Args:
        matrix: Q, with a diagonal of about 1, which every tolerance is relative to.
        target: b.
        tableau, free: of some set F, from ``start_empty`` or a call before; a variable that the new b makes negative
            leaves first.
        allowed: 1 for the variables of the program; the others stay 0.
        solution: y, written.
        work: 5·MP float64.
        damage: what ``start_empty`` or the call before returned.

    Returns:
        The damage to the tableau, for the next call.
    """
    i = tl.arange(0, MP)
    wanted = work
    raised = work + MP
    damage, searching = exchange_blocks(matrix, target, tableau, free, allowed, solution, work, damage, M, MP)
    steps = 0
    entering = -1
    height = damage * 0.0  # of the variable that enters
    while searching & (steps < 8 * M + 8):
        steps += 1
        column = tl.load(matrix + tl.maximum(entering, 0) * MP + i)
        tl.store(wanted + i, tl.load(target + i) - column * height)
        tl.debug_barrier()
        solve_free(matrix, tableau, free, wanted, raised, work + 2 * MP, MP)
        tl.store(solution + i, tl.load(raised + i) + tl.where(i == entering, height, 0.0))
        tl.debug_barrier()

        values = tl.load(solution + i)
        products, sizes = sums(matrix, solution, MP)
        slope = tl.load(target + i) - products
        is_free = tl.load(free + i) > 0.0
        lowest = tl.where(is_free, values, float("inf"))
        negative = tl.min(lowest) < 0.0
        rising = rising_of(target, tableau, sizes, slope, MP)
        rising = tl.where(is_free | (tl.load(allowed + i) == 0.0), 0.0, rising)
        found = (entering < 0) & (tl.max(rising) > 0.0)
        entering = tl.where(found & ~negative, tl.argmax(rising, 0), entering)

        there = tl.maximum(entering, 0)
        curvature = tl.load(tableau + there * MP + there)
        rate = tl.load(tableau + there * MP + i)
        own_slope = tl.maximum(tl.sum(tl.where(i == there, slope, 0.0)), 0.0)
        bent = curvature > DEPENDENT
        full = tl.where(bent, own_slope / tl.where(bent, curvature, 1.0), float("inf"))
        falling = is_free & (rate > BLOCKING)
        room = tl.where(falling, values / tl.where(falling, rate, 1.0), float("inf"))
        blocked = tl.min(room)
        leaves = negative | (blocked < full)
        k = tl.where(negative, tl.argmin(lowest, 0), tl.where(leaves, tl.argmin(room, 0), there))
        searching = negative | ((entering >= 0) & (tl.minimum(blocked, full) < float("inf")))
        if searching:
            height = tl.where(leaves, tl.where(negative, height, height + blocked), 0.0)
            entering = tl.where(leaves, entering, -1)
            damage = tl.where(leaves, damage * tl.abs(tl.load(tableau + k * MP + k)), damage)
            tl.debug_barrier()
            tl.store(free + k, tl.where(leaves, 0.0, 1.0))
            tl.debug_barrier()
            anew = damage > DAMAGE
            if anew:
                pivot_on_all(matrix, tableau, free, work + 2 * MP, M, MP)
            else:
                pivot(tableau, k, ~leaves, MP)
            damage = tl.where(anew, 1.0, damage)
    values = tl.maximum(tl.load(solution + i), 0.0)
    tl.debug_barrier()
    tl.store(solution + i, values)
    tl.debug_barrier()
    return damage


@triton.jit
def exchange_blocks(matrix, target, tableau, free, allowed, solution, work, damage, M: tl.constexpr, MP: tl.constexpr):
    """Move all variables that are negative out of F, and all with a slope into it, while they become fewer.

    Rows that depend on others stay out, for the steps of single variables. Arguments as those of
    ``minimise_nonnegative``.

    Returns:
        The damage to the tableau, and whether ``solution`` is not yet the minimiser.
    """
    i = tl.arange(0, MP)
    misplaced = work + MP
    fewest = M + 1
    left = BLOCK_TRIES
    exchanging = damage > 0.0
    searching = exchanging
    while exchanging:
        solve_free(matrix, tableau, free, target, solution, work + 2 * MP, MP)
        products, sizes = sums(matrix, solution, MP)
        is_free = tl.load(free + i) > 0.0
        rising = rising_of(target, tableau, sizes, tl.load(target + i) - products, MP)
        curved = tl.load(tableau + i * MP + i) > DEPENDENT
        wanted = ~is_free & (tl.load(allowed + i) > 0.0) & (rising > 0.0)
        negative = is_free & (tl.load(solution + i) < 0.0)
        changes = (wanted & curved) | negative
        # One sum for both: how many change sides, and how many would but for their dependence.
        counts = tl.sum(tl.where(changes, 1, tl.where(wanted, M + 1, 0)))
        count = counts % (M + 1)
        searching = counts > 0
        left = tl.where(count < fewest, BLOCK_TRIES, left - 1)
        fewest = tl.minimum(fewest, count)
        exchanging = (count > 0) & (left > 0)
        tl.store(misplaced + i, tl.where(changes & exchanging, 1.0, 0.0))
        tl.debug_barrier()
        for k in range(M):
            if tl.load(misplaced + k) > 0.0:
                own = tl.load(tableau + k * MP + k)
                leaves = tl.load(free + k) > 0.0
                if leaves | (own > DEPENDENT):
                    damage = tl.where(leaves, damage * tl.abs(own), damage)
                    pivot(tableau, k, ~leaves, MP)
                    tl.store(free + k, tl.where(leaves, 0.0, 1.0))
                    tl.debug_barrier()
        if damage > DAMAGE:
            pivot_on_all(matrix, tableau, free, work + 2 * MP, M, MP)
            damage = damage * 0.0 + 1.0
    return damage, searching


@triton.jit
def rising_of(target, tableau, sizes, slope, MP: tl.constexpr):
    """[MP] the slopes of the variables that are to rise; 0 where a slope is but rounding of terms of these sizes."""
    i = tl.arange(0, MP)
    terms = sizes + tl.abs(tl.load(target + i))
    least = tl.where(tl.load(tableau + i * MP + i) > DEPENDENT, SLOPE, SLOPE_OF_DEPENDENT)
    return tl.where(slope > least * terms, slope, 0.0)


@triton.jit
def start_empty(matrix, tableau, free, MP: tl.constexpr):
    """The tableau of no free variable. Returns its damage, 1, as a float64."""
    i = tl.arange(0, MP)
    tl.store(free + i, tl.zeros([MP], tl.float64))
    tl.store(tableau + cells(MP), tl.load(matrix + cells(MP)))
    tl.debug_barrier()
    return tl.sum(tl.where(i == 0, 1.0, 0.0).to(tl.float64))
