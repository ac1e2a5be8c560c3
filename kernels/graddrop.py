"""GradDrop: of every column only the elements of one sign, drawn by its share of the column's magnitude.

Traffic: m·n elements read and n written, once. Sums in float64, in the order of the rows, rounded once to their dtype.
The order of operations is that of ``fastconfig.backends.reference.graddrop``, so that the same elements are kept.
"""

import triton
import triton.language as tl

from . import geometry
from .rows import rounded, row_pointer, row_pointers, tile_columns, tile_pointers, widened

TOGETHER = tl.constexpr(geometry.DROPPED_TOGETHER)
"""Rows whose loads are under way together; more go by the address of each, this many at a time."""


@triton.jit
def row_elements(pointers, mask):
    """Elements of a row in its own dtype, 0 where masked out."""
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def by_sign(x):
    """max(0, x) and min(0, x) in float64, both NaN of NaN. What is compared is narrow, as the GPU is quicker there."""
    narrow = x if tl.constexpr(x.dtype == tl.float64) else x.to(tl.float32)
    wide = widened(x)
    return tl.where(narrow < 0, 0.0, wide), tl.where(narrow > 0, 0.0, wide)


@triton.jit
def uniform_tile(seed, first, THREADS: tl.constexpr, VECTOR: tl.constexpr, SPLIT: tl.constexpr):
    """[THREADS, VECTOR] numbers in [0, 1) of the columns from number ``first`` on.

    A counter, a quarter of the column's number, gives four neighbours theirs. With SPLIT, ``first`` is no multiple of
    four: each column draws all four and takes its own.
    """
    if SPLIT:
        column = first + tile_columns(THREADS, VECTOR)
        u0, u1, u2, u3 = tl.rand4x(seed, column >> 2)
        which = (column & 3).to(tl.int32)
        return tl.where(which < 2, tl.where(which == 0, u0, u1), tl.where(which == 2, u2, u3))
    elif VECTOR == 2:
        pair = (first >> 1) + tl.arange(0, THREADS)[:, None]
        u0, u1, u2, u3 = tl.rand4x(seed, pair >> 1)
        second = (pair & 1) != 0
        return tl.join(tl.where(second, u2, u0), tl.where(second, u3, u1)).reshape([THREADS, VECTOR])
    else:
        u0, u1, u2, u3 = tl.rand4x(seed, (first >> 2) + tile_columns(THREADS, VECTOR // 4))
        return tl.join(tl.join(u0, u2), tl.join(u1, u3)).reshape([THREADS, VECTOR])


@triton.jit
def drop_tile(
    rows,
    stride,
    n,
    leak,
    seed,
    column,
    out,
    start,
    M: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write one tile of columns."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    inside = tile_columns(THREADS, VECTOR) < n - start if MASKED else None
    positive = tl.zeros([THREADS, VECTOR], tl.float64)
    negative = tl.zeros([THREADS, VECTOR], tl.float64)
    leaked_positive = tl.zeros([THREADS, VECTOR], tl.float64)
    leaked_negative = tl.zeros([THREADS, VECTOR], tl.float64)
    one = tl.zeros([1, 1], tl.int32)  # as in combine_tile
    if M <= TOGETHER:
        for i in tl.static_range(M):
            pointers = tile_pointers(row_pointer(rows, stride, i), start, THREADS, VECTOR, ALIGNED)
            up, down = by_sign(row_elements(pointers, inside))
            positive += up
            negative -= down
            if leak is not None:
                share = tl.load(leak + i + one)
                leaked_positive += share * up
                leaked_negative -= share * down
    else:
        for first in range(0, M, TOGETHER):
            for u in tl.static_range(TOGETHER):
                i = tl.cast(first + u, tl.int32)
                there = i + one < M
                row = row_pointers(rows, stride, i, M, DTYPE)
                pointers = tile_pointers(row, start, THREADS, VECTOR, ALIGNED)
                up, down = by_sign(row_elements(pointers, there if inside is None else there & inside))
                positive += up
                negative -= down
                if leak is not None:
                    share = tl.load(leak + i + one, mask=there, other=0.0)
                    leaked_positive += share * up
                    leaked_negative -= share * down
    magnitude = positive + negative
    uniform = uniform_tile(seed, column + start, THREADS, VECTOR, SPLIT).to(tl.float64)
    picked = tl.where(positive > uniform * magnitude, positive - leaked_negative, leaked_positive - negative)
    picked += magnitude - magnitude  # inf - inf is NaN, and everything finite leaves 0
    pointers = tile_pointers(out, start, THREADS, VECTOR, ALIGNED)
    tl.store(pointers, rounded(picked, DTYPE), mask=inside)


@triton.jit
def drop_tiles(
    rows,
    stride,
    n,
    leak,
    seed,
    column,
    out,
    program,
    programs,
    M: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Write this program's tiles, last ones first: what the Gramian read last is still in the cache."""
    TILE: tl.constexpr = THREADS * VECTOR
    size = tl.full([], TILE, tl.int64)
    whole = (n // TILE).to(tl.int32)
    tiles = ((n + TILE - 1) // TILE).to(tl.int32)
    for tile in range(whole + program, tiles, programs):
        drop_tile(rows, stride, n, leak, seed, column, out, tile * size, M, THREADS, VECTOR, ALIGNED, SPLIT, True)
    for back in range(program, whole, programs):
        start = (whole - 1 - back) * size
        drop_tile(rows, stride, n, leak, seed, column, out, start, M, THREADS, VECTOR, ALIGNED, SPLIT, False)
