"""The combination g = Σ c_i g_i, summed in float64 and rounded once to the rows' dtype.

Traffic: k·n elements read, k the number of rows of non-zero weight, and n written, once.
"""

import triton
import triton.language as tl

from . import geometry
from .rows import rounded, row_pointer, row_pointers, tile_columns, tile_pointers, widened

FEW = tl.constexpr(geometry.FEW)
"""Rows whose loads are under way together; more go by the address of each, this many at a time."""


@triton.jit
def used_elements(pointers, weight, inside):
    """Elements of a row in float64. A row of weight 0 is not read: selected by a mask, never multiplied by 0."""
    mask = weight != 0.0
    if inside is not None:
        mask = mask & inside
    return widened(tl.load(pointers, mask=mask, other=0.0))


@triton.jit
def combine_tile(
    rows,
    stride,
    n,
    weights,
    out,
    start,
    M: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write one tile of columns."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    inside = tile_columns(THREADS, VECTOR) < n - start if MASKED else None
    total = tl.zeros([THREADS, VECTOR], tl.float64)
    one = tl.zeros([1, 1], tl.int32)  # a weight is a tensor of one element, whose mask keeps loads 16 bytes wide
    if M <= FEW:
        for i in tl.static_range(M):
            weight = tl.load(weights + i + one)
            pointers = tile_pointers(row_pointer(rows, stride, i), start, THREADS, VECTOR, ALIGNED)
            total = tl.fma(used_elements(pointers, weight, inside), weight, total)
    else:
        for first in range(0, M, FEW):
            for u in tl.static_range(FEW):
                i = tl.cast(first + u, tl.int32)
                weight = tl.load(weights + i + one, mask=i + one < M, other=0.0)
                row = row_pointers(rows, stride, i, M, DTYPE)
                pointers = tile_pointers(row, start, THREADS, VECTOR, ALIGNED)
                total = tl.fma(used_elements(pointers, weight, inside), weight, total)
    pointers = tile_pointers(out, start, THREADS, VECTOR, ALIGNED)
    tl.store(pointers, rounded(total, DTYPE), mask=inside)


@triton.jit
def combine_tiles(
    rows,
    stride,
    n,
    weights,
    out,
    program,
    programs,
    M: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write this program's tiles, last ones first: what the Gramian read last is still in the cache."""
    TILE: tl.constexpr = THREADS * VECTOR
    size = tl.full([], TILE, tl.int64)
    whole = (n // TILE).to(tl.int32)
    tiles = ((n + TILE - 1) // TILE).to(tl.int32)
    for tile in range(whole + program, tiles, programs):
        combine_tile(rows, stride, n, weights, out, tile * size, M, THREADS, VECTOR, ALIGNED, True)
    for back in range(program, whole, programs):
        start = (whole - 1 - back) * size
        combine_tile(rows, stride, n, weights, out, start, M, THREADS, VECTOR, ALIGNED, False)
