"""Small symmetric matrices, MP × MP float64 in memory, and vectors of MP: how one program reads and multiplies them."""

import triton
import triton.language as tl


@triton.jit
def cells(MP: tl.constexpr):
    """[MP, MP] offsets of the elements of a contiguous (MP, MP) matrix."""
    return tl.arange(0, MP)[:, None] * MP + tl.arange(0, MP)[None, :]


@triton.jit
def times(matrix, x, MP: tl.constexpr):
    """[MP] matrix @ x, both in memory, of a symmetric matrix.

    It is summed down the columns, which a thread does for its own without a shuffle; along the rows, whose elements
    neighbouring threads hold, each of the rows would take five.
    """
    return tl.sum(tl.load(matrix + cells(MP)) * tl.load(x + tl.arange(0, MP))[:, None], axis=0)


@triton.jit
def sums(matrix, x, MP: tl.constexpr):
    """([MP] matrix @ x, [MP] |matrix| @ |x|: what it is the sum of), of a symmetric matrix."""
    terms = tl.load(matrix + cells(MP)) * tl.load(x + tl.arange(0, MP))[:, None]
    return tl.sum(terms, axis=0), tl.sum(tl.abs(terms), axis=0)


@triton.jit
def multiply(matrix, x, y, MP: tl.constexpr):
    """y = matrix @ x, of a symmetric matrix, all in memory."""
    tl.store(y + tl.arange(0, MP), times(matrix, x, MP))
    tl.debug_barrier()


@triton.jit
def copy_matrix(source, target, MP: tl.constexpr):
    """target = source."""
    tl.store(target + cells(MP), tl.load(source + cells(MP)))
    tl.debug_barrier()
