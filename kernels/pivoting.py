"""Linear systems of any principal block of a positive semidefinite matrix, by principal pivots (the sweep operator).

Source: Golub & Van Loan, sec. 4.2, for the Schur complements; Beaton's sweep operator in the symmetric form. A tableau
begins as Q. Pivots on the rows of a set F, in any order, turn it into

    [ -Q_FF⁻¹        Q_FF⁻¹ Q_FN                ]
    [ Q_NF Q_FF⁻¹    Q_NN - Q_NF Q_FF⁻¹ Q_FN    ]

and a pivot on a row of F takes it out again. A pivot is one pass over the matrix, all of its elements at once. The
diagonal of the last block says how much of a row is independent of F. The tableau stays symmetric.

Matrices are MP × MP and vectors MP long, float64, in memory, with a barrier after every write; sets are vectors of 1
and 0.
"""

import triton
import triton.language as tl

from .matrices import cells, times


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
def swept(values, free, line, least, M: tl.constexpr, MP: tl.constexpr):
    """([MP, MP] the tableau of a matrix for F = ``free``, whether the diagonal was over ``least`` where they met it).

    The matrix stays in registers. A pivot's row, which is its column, too, passes through memory: one row of the two
    is written while the other is read, so that one barrier a pivot is enough. The tableau is worth nothing where a
    pivot was not positive.

    Args:
        values: [MP, MP], symmetric.
        free: pointer to the set, or None for all of the first M rows.
        line: 2·MP float64, overwritten.
    """
    r = tl.arange(0, MP)[:, None]
    c = tl.arange(0, MP)[None, :]
    regular = M > 0
    tl.store(line + c + r * 0, values, mask=r == 0)
    tl.debug_barrier()
    for k in range(M):
        here = line + (k % 2) * MP
        row = tl.load(here + c)
        column = tl.load(here + r)
        own = tl.load(here + k)
        inverse = 1.0 / own
        crossed = (r == k) | (c == k)
        if free is not None:
            enters = (
                tl.load(free + k + c * 0) > 0.0
            )  # not a number: the interpreter takes no comparison of one for a mask
            inverse = tl.where(enters, inverse, 0.0)
            crossed = crossed & enters
        regular = regular & (own > least)
        row = tl.where(c == k, -1.0, row) * inverse
        column = tl.where(r == k, 1.0, -column)
        values = tl.fma(column, row, tl.where(crossed, 0.0, values))
        tl.store(line + ((k + 1) % 2) * MP + c + r * 0, values, mask=r == k + 1)
        tl.debug_barrier()
    return values, regular


@triton.jit
def pivot_on_all(matrix, tableau, free, line, M: tl.constexpr, MP: tl.constexpr):
    """Write the matrix's tableau for F = ``free``, from nothing. ``line`` is 2·MP float64, overwritten."""
    values, _ = swept(tl.load(matrix + cells(MP)), free, line, 0.0, M, MP)
    tl.store(tableau + cells(MP), values)
    tl.debug_barrier()


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
