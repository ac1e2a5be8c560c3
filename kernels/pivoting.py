"""Linear systems of any principal block of a positive semidefinite matrix, by principal pivots (the sweep operator).

Source: Golub & Van Loan, sec. 4.2, for the Schur complements; Beaton's sweep operator in the symmetric form. A tableau
begins as Q. Pivots on the rows of a set F, in any order, turn it into

    [ -Q_FF⁻¹        Q_FF⁻¹ Q_FN                ]
    [ Q_NF Q_FF⁻¹    Q_NN - Q_NF Q_FF⁻¹ Q_FN    ]

and a pivot on a row of F takes it out again. A pivot is one pass over the matrix, all of its elements at once. The
diagonal of the last block says how much of a row is independent of F.

Matrices are MP × MP and vectors MP long, float64, in memory, with a barrier after every write; sets are vectors of 1
and 0.
"""

import triton
import triton.language as tl

from .config_rule import cells


@triton.jit
def times(matrix, x, MP: tl.constexpr):
    """[MP] matrix @ x, both in memory."""
    return tl.sum(tl.load(matrix + cells(MP)) * tl.load(x + tl.arange(0, MP))[None, :], axis=1)


@triton.jit
def copy_matrix(source, target, MP: tl.constexpr):
    """target = source."""
    tl.store(target + cells(MP), tl.load(source + cells(MP)))
    tl.debug_barrier()


@triton.jit
def pivot(tableau, k, enters, MP: tl.constexpr):
    """Take row k into F, or out of it where it does not enter."""
    r = tl.arange(0, MP)[:, None]
    c = tl.arange(0, MP)[None, :]
    inverse = 1.0 / tl.load(tableau + k * MP + k)
    left = tl.load(tableau + k * MP + r)
    right = tl.load(tableau + k * MP + c)
    side = tl.where(enters, inverse, -inverse)
    values = tl.load(tableau + cells(MP)) - left * right * inverse
    values = tl.where(r == k, right * side, tl.where(c == k, left * side, values))
    values = tl.where((r == k) & (c == k), -inverse, values)
    tl.debug_barrier()
    tl.store(tableau + cells(MP), values)
    tl.debug_barrier()


@triton.jit
def pivot_on_all(matrix, tableau, free, M: tl.constexpr, MP: tl.constexpr):
    """Write the matrix's tableau for F = ``free``, from nothing."""
    copy_matrix(matrix, tableau, MP)
    for k in range(M):
        if tl.load(free + k) > 0.0:
            pivot(tableau, k, True, MP)


@triton.jit
def solve_free(matrix, tableau, free, wanted, solution, work, MP: tl.constexpr):
    """Write y with Q_FF y_F = b_F and y = 0 elsewhere, refined once, which leaves a residual at the level of rounding.

    Args:
        wanted: pointer to b.
        work: 3·MP float64.
    """
    i = tl.arange(0, MP)
    first = work
    residual = work + MP
    inside = tl.load(free + i)
    tl.store(residual + i, tl.load(wanted + i) * inside)
    tl.debug_barrier()
    tl.store(first + i, -times(tableau, residual, MP) * inside)
    tl.debug_barrier()
    rest = work + 2 * MP
    tl.store(rest + i, tl.load(residual + i) - times(matrix, first, MP) * inside)
    tl.debug_barrier()
    tl.store(solution + i, tl.load(first + i) - times(tableau, rest, MP) * inside)
    tl.debug_barrier()
