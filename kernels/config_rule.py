"""ConFIG's weights from the Gramian, in one program: the m×m part of ``fastconfig.backends.reference.config_weights``.

Source: ConFIG, arXiv 2408.11104, eq. 2 to 4, with U⁺ = Uᵀ(UUᵀ)⁺. Everything is float64, m padded to MP, a power of two;
the padding is an identity block that no row of the problem meets.

The steps hand vectors and matrices to each other through ``scratch``, 3·MP² + 4·MP float64 in the first-level cache,
with a barrier after every write: kept in registers, ten vectors and three 64×64 matrices spill.
"""

import triton
import triton.language as tl

EPSILON = tl.constexpr(2.220446049250313e-16)
MAX_SWEEPS = tl.constexpr(20)  # up to 14 were seen, on random, dependent and repeated rows; the rest is margin

# The length models, in the order of the reference's names; TRACKED is the norm of one given loss.
PROJECTION = tl.constexpr(0)
MINIMUM = tl.constexpr(1)
MAXIMUM = tl.constexpr(2)
HARMONIC = tl.constexpr(3)
ARITHMETIC = tl.constexpr(4)
GEOMETRIC = tl.constexpr(5)
TRACKED = tl.constexpr(6)


@triton.jit
def cells(MP: tl.constexpr):
    """[MP, MP] offsets of the elements of a contiguous (MP, MP) matrix."""
    return tl.arange(0, MP)[:, None] * MP + tl.arange(0, MP)[None, :]


@triton.jit
def multiply(matrix, x, y, MP: tl.constexpr):
    """y = matrix @ x, all in memory: (MP, MP), (MP,) and (MP,) float64."""
    i = tl.arange(0, MP)
    product = tl.sum(tl.load(matrix + cells(MP)) * tl.load(x + i)[None, :], axis=1)
    tl.store(y + i, product)
    tl.debug_barrier()


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
def invert_if_regular(unit, inverse, size, rtol, M: tl.constexpr, MP: tl.constexpr):
    """Write C⁻¹, by Gauss-Jordan, and say whether C is certified to have no eigenvalue that the contract truncates.

    C has unit diagonal, so λ_max ≤ trace C = k, the number of active rows; and trace C⁻¹ ≥ 1/λ_min. Hence
    rtol·k·trace C⁻¹ < 1 implies λ_min > rtol·λ_max: nothing is truncated and C⁺ = C⁻¹. Every pivot of a positive
    definite matrix is at least λ_min, so none of them needs a search, and a small one ends the attempt.
    """
    i = tl.arange(0, MP)
    r = i[:, None]
    c = i[None, :]
    values = tl.load(unit + cells(MP))
    values = tl.where((r == c) & (values == 0.0), 1.0, values)
    smallest_pivot = tl.maximum(rtol, EPSILON) * size
    regular = size > 0
    for p in range(M):
        row = tl.sum(tl.where(r == p, values, 0.0), axis=0)
        column = tl.sum(tl.where(c == p, values, 0.0), axis=1)
        pivot = tl.sum(tl.where(i == p, row, 0.0))
        regular = regular & (pivot > smallest_pivot)
        row = tl.where(i == p, 1.0, row) * (1.0 / tl.where(pivot > smallest_pivot, pivot, 1.0))
        column = tl.where(i == p, -1.0, column)
        values = tl.where((r == p) | (c == p), 0.0, values) - column[:, None] * row[None, :]
    tl.store(inverse + cells(MP), values)
    tl.debug_barrier()
    trace = tl.sum(tl.load(inverse + i * MP + i)) - (MP - size)
    tl.debug_barrier()  # all have read it before the solve of a singular matrix writes there
    return regular & (rtol * size * trace < 1.0)


@triton.jit
def diagonalise(matrix, vectors, angles, MP: tl.constexpr):
    """Make ``matrix`` diagonal in place, and ``vectors`` V with V·matrix·Vᵀ its result: the cyclic Jacobi method.

    Golub & Van Loan, sec. 8.5. The MP rows meet in pairs as the players of a round-robin tournament do: in each of the
    MP - 1 turns of a sweep MP/2 disjoint pairs of rows, then of columns, are rotated at once. Both matrices lie in
    memory, that is in the first-level cache: the pairs of a turn are then two loads, and no register holds a matrix
    beside the streaming kernels' sums.

    Args:
        matrix: pointer to (MP, MP) float64, symmetric.
        vectors: pointer to (MP, MP) float64, overwritten; its rows are the eigenvectors.
        angles: pointer to MP float64, overwritten: a turn's tangents and cosines.
    """
    OTHERS: tl.constexpr = MP - 1
    i = tl.arange(0, MP)
    h = tl.arange(0, MP // 2)
    tl.store(vectors + cells(MP), tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(tl.float64))
    tl.debug_barrier()
    values = tl.load(matrix + cells(MP))
    total = tl.sum(values * values)
    off = total
    sweep = 0
    while (sweep < MAX_SWEEPS) & (off > EPSILON * EPSILON * total):
        for turn in range(OTHERS):
            one = (turn + h) % OTHERS
            other = tl.where(h == 0, OTHERS, (turn + OTHERS - h) % OTHERS)
            own = tl.load(matrix + one * MP + one)
            tangent = tangent_of(tl.load(matrix + other * MP + other) - own, tl.load(matrix + one * MP + other))
            tl.store(angles + h, tangent)
            tl.store(angles + MP // 2 + h, 1.0 / tl.sqrt(tangent * tangent + 1.0))
            tl.debug_barrier()
            upper = one[:, None] * MP + i[None, :]
            lower = other[:, None] * MP + i[None, :]
            tangent_of_row = tl.load(angles + h[:, None])
            cosine_of_row = tl.load(angles + MP // 2 + h[:, None])
            rotate(matrix + upper, matrix + lower, tangent_of_row, cosine_of_row)
            rotate(vectors + upper, vectors + lower, tangent_of_row, cosine_of_row)
            tl.debug_barrier()
            tangent_of_column = tl.load(angles + h[None, :])
            cosine_of_column = tl.load(angles + MP // 2 + h[None, :])
            left = i[:, None] * MP + one[None, :]
            right = i[:, None] * MP + other[None, :]
            rotate(matrix + left, matrix + right, tangent_of_column, cosine_of_column)
            tl.debug_barrier()
            # What the rotation made zero but for rounding: left there, it would be turned about for ever.
            tl.store(matrix + one * MP + other, tl.zeros([MP // 2], tl.float64))
            tl.store(matrix + other * MP + one, tl.zeros([MP // 2], tl.float64))
            tl.debug_barrier()
        values = tl.load(matrix + cells(MP))
        off = tl.sum(tl.where(i[:, None] == i[None, :], 0.0, values * values))
        sweep += 1


@triton.jit
def rotate(x_pointers, y_pointers, tangent, cosine):
    """Turn the pairs (x, y) in memory by angles given by tangent and cosine."""
    x = tl.load(x_pointers)
    y = tl.load(y_pointers)
    tl.store(x_pointers, cosine * (x - tangent * y))
    tl.store(y_pointers, cosine * (y + tangent * x))


@triton.jit
def tangent_of(difference, beside):
    """tan of the angle that makes [[own, beside], [beside, own + difference]] diagonal: the smaller root, |t| ≤ 1.

    Golub & Van Loan, sec. 8.5.2.
    """
    cotangent = difference / (2.0 * tl.where(beside == 0.0, 1.0, beside))
    cotangent = tl.minimum(tl.maximum(cotangent, -1e100), 1e100)  # its square stays finite; beyond, no angle is left
    tangent = tl.where(cotangent >= 0.0, 1.0, -1.0) / (tl.abs(cotangent) + tl.sqrt(cotangent * cotangent + 1.0))
    return tl.where(beside == 0.0, 0.0, tangent)


@triton.jit
def solve_truncated(unit, matrix, vectors, wanted, along, solution, rtol, MP: tl.constexpr):
    """Write a = C⁺ŵ, eigenvalues at or under rtol·λ_max counting as zero: the contract's definition. Returns λ_max."""
    i = tl.arange(0, MP)
    tl.store(matrix + cells(MP), tl.load(unit + cells(MP)))
    diagonalise(matrix, vectors, along, MP)
    multiply(vectors, wanted, along, MP)
    eigenvalues = tl.load(matrix + i * MP + i)
    largest = tl.max(eigenvalues)
    # A NaN is no small eigenvalue: it must show in the answer.
    dropped = eigenvalues <= tl.maximum(rtol * largest, 0.0)
    inside = tl.load(along + i) / tl.where(dropped, 1.0, eigenvalues)
    tl.debug_barrier()
    tl.store(along + i, tl.where(dropped, 0.0, inside))
    tl.debug_barrier()
    product = tl.sum(tl.load(vectors + cells(MP)) * tl.load(along + i)[:, None], axis=0)
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
def solve_direction(unit, matrix, vectors, wanted, work, solution, size, rtol, M: tl.constexpr, MP: tl.constexpr):
    """Write ConFIG's direction C⁺ŵ/√(ŵᵀC⁺ŵ), zeros where the rows are opposed.

    Args:
        unit: C.
        matrix, vectors, work: (MP, MP), (MP, MP) and MP float64, overwritten.
        wanted: ŵ, 0 where not active.
        size: float64, the number of active rows.
    """
    i = tl.arange(0, MP)
    largest = size  # λ_max ≤ k; with full rank |d|²·λ_max ≥ |ŵ|², so the bound is harmless
    if invert_if_regular(unit, matrix, size, rtol, M, MP):
        solve_regular(unit, matrix, wanted, work, solution, MP)
    else:
        largest = solve_truncated(unit, matrix, vectors, wanted, work, solution, rtol, MP)
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
        scratch: 3·MP² + 4·MP float64 that no other program uses.
        LENGTH: the length model.
        DROP: leave non-finite rows out; else they make every weight NaN.
    """
    unit = scratch
    matrix = unit + MP * MP
    vectors = matrix + MP * MP
    wanted = vectors + MP * MP
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
    solve_direction(unit, matrix, vectors, wanted, work, solution, size, rtol, M, MP)

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
