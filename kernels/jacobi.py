"""The eigen-decomposition of a small symmetric matrix by one program: the one-sided cyclic Jacobi method.

Source: Hestenes 1958; Golub & Van Loan, sec. 8.6.3; Demmel & Veselić 1992 for its accuracy. The columns of A = VΛVᵀ
are rotated in pairs until each is orthogonal to all others: they are then those of VΛ. So one matrix is all there is,
and a rotation needs nothing but its two columns. They meet as the players of a round-robin tournament do, a pair a
lane, so that most of a sum over a column is a thread's own.
"""

import triton
import triton.language as tl

from .matrices import cells

EPSILON = tl.constexpr(2.220446049250313e-16)
MAX_SWEEPS = tl.constexpr(60)  # 14 were seen on random and repeated rows, 26 at condition 1e16; the rest is margin
ORTHOGONAL = tl.constexpr(1e-14)
"""The cosine of two columns that counts as none: m·ε and less."""


@triton.jit
def diagonalise(matrix, M: tl.constexpr, MP: tl.constexpr):
    """Turn the columns of ``matrix`` in place into λ_k v_k, v_k its orthonormal eigenvectors, λ_k ≥ 0 its eigenvalues.

    It lies in memory, that is in the first-level cache. Every thread reads what it rotates before any thread writes.
    Of eigenvalues under ε times the largest, columns of rounding are left.

    Args:
        matrix: pointer to (MP, MP) float64, symmetric, positive semidefinite, its largest element about 1; 0 past row
            M.
    """
    values = tl.load(matrix + cells(MP))
    nothing = EPSILON * EPSILON * tl.sum(tl.sum(values * values, axis=0))
    sweep = 0
    rotating = nothing > 0.0
    while rotating & (sweep < MAX_SWEEPS):
        rotated = tl.arange(0, MP // 2)[None, :] < 0
        for turn in range(M + M % 2 - 1):
            rotated = rotated | rotate(matrix, turn, nothing, M, MP)
        rotating = tl.max(tl.max(tl.where(rotated, 1, 0), axis=0)) > 0
        sweep += 1


@triton.jit
def add_three(a, b, c, x, y, z):
    """What sums three tensors at once."""
    return a + x, b + y, c + z


@triton.jit
def rotate(matrix, turn, nothing, M: tl.constexpr, MP: tl.constexpr):
    """Make the columns of each of a turn's pairs orthogonal. Returns [1, MP/2] which pairs were not."""
    OTHERS: tl.constexpr = M + M % 2 - 1
    pair = tl.arange(0, MP // 2)[None, :]
    row = tl.arange(0, MP)[:, None]
    held = (pair < (M + M % 2) // 2) & (row < M)
    one = tl.where(turn + pair < OTHERS, turn + pair, turn + pair - OTHERS)
    other = tl.where(turn >= pair, turn - pair, turn - pair + OTHERS)
    other = tl.where(pair == 0, OTHERS, other)  # the last player stays where it is
    x = tl.load(matrix + row * MP + one, mask=held, other=0.0)
    y = tl.load(matrix + row * MP + other, mask=held, other=0.0)
    x_square, y_square, product = tl.reduce((x * x, y * y, x * y), 0, add_three, keep_dims=True)
    rotates = product * product > ORTHOGONAL * ORTHOGONAL * x_square * y_square
    rotates = rotates & (tl.minimum(x_square, y_square) > nothing)
    tangent, cosine = angle_of(y_square - x_square, tl.where(rotates, product, 0.0))
    tl.debug_barrier()
    tl.store(matrix + row * MP + one, cosine * (x - tangent * y), mask=held & rotates)
    tl.store(matrix + row * MP + other, cosine * (y + tangent * x), mask=held & rotates)
    tl.debug_barrier()
    return rotates


@triton.jit
def angle_of(difference, beside):
    """(tan, cos) of the angle that makes [[own, beside], [beside, own + difference]] diagonal: the smaller, |t| ≤ 1.

    Golub & Van Loan, sec. 8.5.2. The tangent need not be exact, for what it leaves the next sweeps take: it is found in
    float32. The cosine has to belong to it, or the rotation would not be one: 1/√(1 + t²) by two of Newton's steps from
    float32, in a third of the time of a square root and a division.
    """
    # Into the range of float32, by a power of two of the larger of both.
    scale = tl.maximum(tl.abs(difference), tl.abs(beside))
    exponent = scale.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    exponent = tl.minimum(tl.maximum(exponent, 1 << 52), 2045 << 52)
    unscaled = ((2046 << 52) - exponent).to(tl.float64, bitcast=True)
    d = (difference * unscaled).to(tl.float32)
    b = (beside * unscaled).to(tl.float32)
    twice = tl.where(d >= 0.0, 2.0, -2.0) * b
    long = tl.abs(d) + tl.sqrt(d * d + twice * twice)
    tangent = (twice / tl.where(long > 0.0, long, 1.0)).to(tl.float64)
    square = 1.0 + tangent * tangent
    cosine = tl.rsqrt(square.to(tl.float32)).to(tl.float64)
    cosine = cosine * (1.5 - 0.5 * square * cosine * cosine)
    cosine = cosine * (1.5 - 0.5 * square * cosine * cosine)
    return tangent, cosine
