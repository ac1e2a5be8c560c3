"""How the kernels address m rows of n elements and read tiles of them in 16-byte loads."""

import triton
import triton.language as tl


@triton.jit
def row_pointer(rows, stride, i: tl.constexpr):
    """Where row i begins: ``rows`` points to the first of m rows ``stride`` apart, or is a tuple of m, stride None."""
    if stride is None:
        return rows[i]
    else:
        return rows + i * stride


@triton.jit
def vectors_at(addresses, rows, M: tl.constexpr):
    """A tuple of pointers to M vectors of the dtype that ``rows`` points to."""
    DTYPE: tl.constexpr = rows.dtype.element_ty
    pointers = ()
    for i in tl.static_range(M):
        pointers = pointers + (tl.cast(addresses[i], tl.int64).to(tl.pointer_type(DTYPE)),)
    return pointers


@triton.jit
def row_pointers(rows, stride, i, M: tl.constexpr, DTYPE: tl.constexpr):
    """Where rows ``i``, a tensor of indices, begin: as ``row_pointer``, or ``rows`` is a table of m int64 addresses.

    Rows past the last get a pointer that must not be read.
    """
    if tl.constexpr(rows.dtype.element_ty == tl.int64):
        return tl.load(rows + i, mask=i < M, other=0).to(tl.pointer_type(DTYPE))
    else:
        return rows + i * stride


@triton.jit
def tile_pointers(row, start, THREADS: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """[THREADS, VECTOR] pointers to the columns from ``start`` on: VECTOR neighbours a thread, 16 bytes of them."""
    first = row + start
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return first + tile_columns(THREADS, VECTOR)


@triton.jit
def tile_columns(THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """[THREADS, VECTOR] columns of a tile: 0, 1, 2 ... in row-major order."""
    return tl.arange(0, THREADS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def uniform(flag):
    """A flag as a mask [1, 1], the same for a whole tile: loads stay 16 bytes wide."""
    return (tl.zeros([1, 1], tl.int32) + flag.to(tl.int32)) != 0


@triton.jit
def widened(x):
    """Elements of any float dtype in float64, exactly."""
    if tl.constexpr(x.dtype == tl.float64):
        return x
    else:
        return x.to(tl.float32).to(tl.float64)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float64 as the rows' dtype, 16-bit ones by way of float32 as PyTorch does."""
    if tl.constexpr(DTYPE == tl.float64):
        return x
    else:
        return x.to(tl.float32).to(DTYPE)


@triton.jit
def columns_of(tile, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """A [THREADS, VECTOR] tile as a tuple of VECTOR tensors [THREADS], which moves nothing between threads."""
    if VECTOR == 1:
        return (tile.reshape([THREADS]),)
    else:
        even, odd = tile.reshape([THREADS, VECTOR // 2, 2]).split()
        return columns_of(even, THREADS, VECTOR // 2) + columns_of(odd, THREADS, VECTOR // 2)
