"""ConFIG's weights from the Gramian, in one program: the m×m part of ``fastconfig.backends.reference.config_weights``.

Source: ConFIG, arXiv 2408.11104, eq. 2 to 4, with U⁺ = Uᵀ(UUᵀ)⁺. Everything is float64, m padded to MP, a power of two;
the padding is an identity block that no row of the problem meets.

The steps hand vectors and matrices to each other through ``scratch``, 2·MP² + 6·MP float64 in the first-level cache,
with a barrier after every write: kept in registers, ten vectors and several 64×64 matrices spill.
"""

import triton
import triton.language as tl

from .jacobi import EPSILON, diagonalise
from .matrices import cells, copy_matrix, multiply
from .pivoting import swept

# The length models, in the order of the reference's names; TRACKED is the norm of one given loss.
PROJECTION = tl.constexpr(0)
MINIMUM = tl.constexpr(1)
MAXIMUM = tl.constexpr(2)
HARMONIC = tl.constexpr(3)
ARITHMETIC = tl.constexpr(4)
GEOMETRIC = tl.constexpr(5)
TRACKED = tl.constexpr(6)


@triton.jit
def store_unit_gramian(gramian, inverse_norms, unit, M: tl.constexpr, MP: tl.constexpr):
    """Write C = D K D (MP, MP), D = diag(inverse_norms): 1 on the diagonal and 0 in inactive rows and columns."""
    r = tl.arange(0, MP)[:, None]
    c = tl.arange(0, MP)[None, :]
    left = tl.load(inverse_norms + r)
    right = tl.load(inverse_norms + c)
    active = (left > 0.0) & (right > 0.0)
    products = tl.load(gramian + r * M + c, mask=active & (r < M) & (c < M), other=0.0)
    tl.store(unit + r * MP + c, tl.where((r == c) & active, 1.0, products * right * left))
    tl.debug_barrier()


@triton.jit
def invert_if_regular(unit, inverse, line, size, rtol, M: tl.constexpr, MP: tl.constexpr):
    """Write C⁻¹, by pivots on all rows. Returns whether it is certain that the contract truncates no eigenvalue of C.

    C has unit diagonal, so λ_max ≤ trace C = k, the number of active rows; and trace C⁻¹ ≥ 1/λ_min. Hence
    rtol·k·trace C⁻¹ < 1 implies λ_min > rtol·λ_max: nothing is truncated and C⁺ = C⁻¹. Every pivot of a positive
    definite matrix is at least λ_min, so none of them needs a search, and a small one says that there is none.

    Args:
        line: 2·MP float64, overwritten.
    """
    i = tl.arange(0, MP)
    values = tl.load(unit + cells(MP))
    values = tl.where((i[:, None] == i[None, :]) & (values == 0.0), 1.0, values)
    values, regular = swept(values, None, line, tl.maximum(rtol, EPSILON) * size, M, MP)
    tl.store(inverse + cells(MP), -values)
    tl.debug_barrier()
    trace = tl.sum(tl.where(i < M, tl.load(inverse + i * MP + i), 0.0)) - (M - size)
    tl.debug_barrier()  # all have read it before the solve of a singular matrix writes there
    return (size > 0) & regular & (rtol * size * trace < 1.0)


@triton.jit
def solve_truncated(unit, matrix, wanted, work, solution, rtol, M: tl.constexpr, MP: tl.constexpr):
    """Write a = C⁺ŵ, eigenvalues at or under rtol·λ_max counting as zero: the contract's definition. Returns λ_max."""
    i = tl.arange(0, MP)
    copy_matrix(unit, matrix, MP)
    diagonalise(matrix, M, MP)
    columns = tl.load(matrix + cells(MP))  # λ_k v_k
    squares = tl.sum(columns * columns, axis=0)
    along = tl.sum(columns * tl.load(wanted + i)[:, None], axis=0)
    largest = tl.sqrt(tl.max(squares))
    # A NaN is no small eigenvalue: it must show in the answer.
    dropped = squares <= (rtol * largest) * (rtol * largest)
    inside = tl.where(dropped, 0.0, along / tl.where(dropped, 1.0, squares * tl.sqrt(squares)))
    tl.store(work + i, inside)
    tl.debug_barrier()
    product = tl.sum(tl.load(matrix + cells(MP)) * tl.load(work + i)[None, :], axis=1)
    tl.store(solution + i, product)
    tl.debug_barrier()
    return largest


@triton.jit
def solve_regular(unit, inverse, wanted, residual, solution, MP: tl.constexpr):
    """Write a = C⁻¹ŵ, refined once, which leaves a residual at the level of rounding."""
    i = tl.arange(0, MP)
    multiply(inverse, wanted, solution, MP)
    multiply(unit, solution, residual, MP)
    difference = tl.load(wanted + i) - tl.load(residual + i)
    tl.debug_barrier()
    tl.store(residual + i, difference)
    first = tl.load(solution + i)
    tl.debug_barrier()
    multiply(inverse, residual, solution, MP)
    refined = first + tl.load(solution + i)
    tl.debug_barrier()
    tl.store(solution + i, refined)
    tl.debug_barrier()


@triton.jit
def solve_direction(unit, matrix, line, wanted, work, solution, size, rtol, M: tl.constexpr, MP: tl.constexpr):
    """Write ConFIG's direction C⁺ŵ/√(ŵᵀC⁺ŵ), zeros where the rows are opposed.

    Args:
        unit: C.
        matrix, line, work: (MP, MP), 2·MP and MP float64, overwritten.
        wanted: ŵ, 0 where not active.
        size: float64, the number of active rows.
    """
    i = tl.arange(0, MP)
    largest = size  # λ_max ≤ k; with full rank |d|²·λ_max ≥ |ŵ|², so the bound is harmless
    if invert_if_regular(unit, matrix, line, size, rtol, M, MP):
        solve_regular(unit, matrix, wanted, work, solution, MP)
    else:
        largest = solve_truncated(unit, matrix, wanted, work, solution, rtol, M, MP)
    preference = tl.load(wanted + i)
    found = tl.load(solution + i)
    square = tl.sum(found * preference)
    opposed = square * largest <= rtol * tl.sum(preference * preference)
    along = tl.where(opposed, 0.0, found * (1.0 / tl.sqrt(tl.where(opposed, 1.0, square))))
    tl.debug_barrier()
    tl.store(solution + i, along)
    tl.debug_barrier()


@triton.jit
def tracked_norm(norms, active, size, tracked, LENGTH: tl.constexpr, MP: tl.constexpr):
    """The norm that every gradient is rescaled to before its projection is taken (ConFIG paper, appendix A.3)."""
    if LENGTH == MINIMUM:
        return tl.where(size > 0, tl.min(tl.where(active, norms, float("inf"))), 0.0)
    elif LENGTH == MAXIMUM:
        return tl.max(norms)
    elif LENGTH == HARMONIC:
        total = tl.sum(tl.where(active, 1.0 / tl.where(active, norms, 1.0), 0.0))
        return tl.where(size > 0, size / tl.where(size > 0, total, 1.0), 0.0)
    elif LENGTH == ARITHMETIC:
        return tl.sum(norms) / tl.maximum(size, 1.0)
    elif LENGTH == GEOMETRIC:  # by logarithms: the product of many norms may leave float64's range
        total = tl.sum(tl.where(active, tl.log(tl.where(active, norms, 1.0)), 0.0))
        return tl.where(size > 0, tl.exp(total / tl.maximum(size, 1.0)), 0.0)
    else:
        return tl.sum(tl.where(tl.arange(0, MP) == tracked, norms, 0.0))


@triton.jit
def write_config_weights(
    gramian,
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
    """Write ConFIG's coefficients c, g = Σ c_i g_i.

    Args:
        gramian: (M, M) float64 contiguous, which this program can see.
        weights: (M,) float64, written.
        direction: (M,) float64, the direction weights ŵ, or None for equal ones.
        tracked: the loss whose norm LENGTH == TRACKED follows.
        rtol: float64, the cut on the eigenvalues of the unit rows' Gramian.
        scratch: 2·MP² + 6·MP float64 that no other program uses.
        LENGTH: the length model.
        DROP: leave non-finite rows out; else they make every weight NaN.
    """
    unit = scratch
    matrix = unit + MP * MP
    line = matrix + MP * MP
    wanted = line + 2 * MP
    solution = wanted + MP
    work = solution + MP
    inverse_norms = work + MP

    i = tl.arange(0, MP)
    _, active, norms = active_rows(gramian, M, MP)
    size = tl.sum(active.to(tl.float64))
    preference = tl.full([MP], 1.0, tl.float64)
    if direction is not None:
        preference = tl.load(direction + i, mask=i < M, other=0.0)
    tl.store(wanted + i, tl.where(active, preference, 0.0))
    tl.store(inverse_norms + i, tl.where(active, 1.0 / tl.where(active, norms, 1.0), 0.0))
    tl.debug_barrier()

    store_unit_gramian(gramian, inverse_norms, unit, M, MP)
    solve_direction(unit, matrix, line, wanted, work, solution, size, rtol, M, MP)

    # Read again what was known before: kept in registers all along, it would spill.
    finite, active, norms = active_rows(gramian, M, MP)
    along = tl.load(solution + i)
    multiply(unit, solution, work, MP)
    cosines = tl.load(work + i)
    if LENGTH == PROJECTION:
        length = tl.sum(norms * cosines)
    else:
        length = tracked_norm(norms, active, size, tracked, LENGTH, MP) * tl.sum(cosines)
    # An opposed pair's zero stays zero, whatever the length.
    coefficients = tl.where(along == 0.0, 0.0, along * tl.load(inverse_norms + i) * length)
    if not DROP:
        broken = tl.sum(tl.where(finite, 0, 1)) > 0
        coefficients = tl.where(broken, float("nan"), coefficients)
    tl.store(weights + i, coefficients, mask=i < M)


@triton.jit
def active_rows(gramian, M: tl.constexpr, MP: tl.constexpr):
    """[MP] each: which rows are finite, which are active (finite and not zero), and the norms of these."""
    i = tl.arange(0, MP)
    squares = tl.load(gramian + i * M + i, mask=i < M, other=0.0)
    finite = (squares == squares) & (squares < float("inf"))
    active = finite & (squares > 0.0)
    return finite, active, tl.sqrt(tl.where(active, squares, 0.0))
