"""The Gramian K = G Gᵀ of m rows of n elements, summed in float64: each program streams tiles of columns.

Why float64: the product of two float32 or bfloat16 numbers needs their double exponent range, and on devices whose
float64 rate is half that of float32 the sums hide behind the loads. For others there is ``two_float``. Row norms are
the diagonal, so no pass of their own is needed.

Traffic: m·n elements read once; P·S float64 written and read again, P programs of S partial sums.
"""

import triton
import triton.language as tl

from . import geometry
from .averages import few_renewed, gradient_tile, is_recorded, table_address, table_renewed
from .rows import columns_of, row_pointer, row_pointers, tile_columns, tile_pointers, uniform, widened

BLOCK_ROWS = tl.constexpr(geometry.BLOCK_ROWS)


@triton.jit
def pair_products(
    sums,
    rows,
    stride,
    gradients,
    start,
    n,
    M: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the products of every pair of rows over one tile of columns to ``sums``, each a [THREADS] tensor.

    Pairs are ordered (0, 0), (1, 0), (1, 1), (2, 0) ... A thread keeps one sum a pair, which its VECTOR columns join by
    fused multiply-adds; all M loads are under way before the first product. With ``gradients`` the rows are averages
    that these enter first, see ``averages.few_gradients``.
    """
    tiles = ()
    for i in tl.static_range(M):
        pointers = tile_pointers(row_pointer(rows, stride, i), start, THREADS, VECTOR, ALIGNED)
        if MASKED:
            tile = tl.load(pointers, mask=tile_columns(THREADS, VECTOR) < n - start, other=0.0)
        else:
            tile = tl.load(pointers)
        tiles = tiles + (tile,)
    if gradients is not None:
        tiles = renewed_tiles(tiles, gradients, start, n, M, THREADS, VECTOR, ALIGNED, MASKED)
    x = ()
    for i in tl.static_range(M):
        x = x + (columns_of(tiles[i], THREADS, VECTOR),)
    added = ()
    for i in tl.static_range(M):
        for j in tl.static_range(i + 1):
            total = sums[i * (i + 1) // 2 + j]
            for v in tl.static_range(VECTOR):
                total = tl.fma(widened(x[i][v]), widened(x[j][v]), total)
            added = added + (total,)
    return added


@triton.jit
def renewed_tiles(
    tiles,
    gradients,
    start,
    n,
    M: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The rows' tiles with the gradients in them, which are all loaded before the first is used."""
    addresses, recorded, _, _, _ = gradients
    loaded = ()
    for i in tl.static_range(M):
        mask = uniform(is_recorded(recorded, i))
        if MASKED:
            mask = mask & (tile_columns(THREADS, VECTOR) < n - start)
        pointers = tile_pointers(addresses[i], start, THREADS, VECTOR, ALIGNED)
        loaded = loaded + (gradient_tile(pointers, mask),)
    new = ()
    for i in tl.static_range(M):
        tile = tiles[i]
        if is_recorded(recorded, i):
            tile = few_renewed(tile, loaded[i], gradients, i)
        new = new + (tile,)
    return new


@triton.jit
def pair_sums(
    rows,
    stride,
    gradients,
    n,
    program,
    programs,
    M: tl.constexpr,
    PAIRS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """[PAIRS] this program's share of the pairs' sums, PAIRS the power of two that holds M(M + 1)/2.

    Tiles are dealt out in turn, so the programs read neighbouring memory at any time. Only the last tile is masked: a
    mask would break the others' 16-byte loads.
    """
    TILE: tl.constexpr = THREADS * VECTOR
    sums = ()
    for _ in tl.static_range(M * (M + 1) // 2):
        sums = sums + (tl.zeros([THREADS], tl.float64),)
    size = tl.full([], TILE, tl.int64)
    steps = (n // (TILE * UNROLL)).to(tl.int32)
    for step in range(program, steps, programs):
        for u in tl.static_range(UNROLL):
            start = (step * UNROLL + u) * size
            sums = pair_products(sums, rows, stride, gradients, start, n, M, THREADS, VECTOR, ALIGNED, False)
    first = steps * UNROLL
    tiles = ((n + TILE - 1) // TILE).to(tl.int32)
    for tile in range(first + program, tiles, programs):
        sums = pair_products(sums, rows, stride, gradients, tile * size, n, M, THREADS, VECTOR, ALIGNED, True)
    for _ in tl.static_range(PAIRS - M * (M + 1) // 2):
        sums = sums + (tl.zeros([THREADS], tl.float64),)
    return tl.sum(side_by_side(sums, 0, PAIRS, THREADS), axis=0)


@triton.jit
def side_by_side(tensors, first: tl.constexpr, count: tl.constexpr, THREADS: tl.constexpr):
    """[THREADS, count] of ``count`` tensors [THREADS], so that one reduction sums them all; count is a power of two."""
    if count == 1:
        return tensors[first].reshape([THREADS, 1])
    else:
        left = side_by_side(tensors, first, count // 2, THREADS)
        right = side_by_side(tensors, first + count // 2, count // 2, THREADS)
        return tl.join(left, right).trans(0, 2, 1).reshape([THREADS, count])


@triton.jit
def matrix_of_pairs(pairs, M: tl.constexpr, MP: tl.constexpr, PAIRS: tl.constexpr):
    """[MP, MP] symmetric, of the sums of pairs in the order of ``pair_products``."""
    r = tl.arange(0, MP)[:, None]
    c = tl.arange(0, MP)[None, :]
    high = tl.maximum(r, c)
    index = tl.where(high < M, high * (high + 1) // 2 + tl.minimum(r, c), 0)
    matrix = tl.gather(pairs, index.reshape([MP * MP]), 0).reshape([MP, MP])
    return tl.where(high < M, matrix, 0.0)


@triton.jit
def pair_at(index, SIDE: tl.constexpr):
    """(i, j) of the pairs in the order (0, 0), (1, 0), (1, 1), (2, 0) ... by their number, i < SIDE."""
    i = index * 0
    for above in tl.static_range(1, SIDE):
        i = tl.where(index >= above * (above + 1) // 2, above, i)
    return i, index - i * (i + 1) // 2


@triton.jit
def block_pointers(rows, stride, block, M: tl.constexpr, DTYPE: tl.constexpr):
    """[1, BLOCK_ROWS, 1] pointers to the first columns of a block of rows; those past the last row are not read."""
    return row_pointers(rows, stride, block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), M, DTYPE)[None, :, None]


@triton.jit
def block_tile(
    rows,
    stride,
    block,
    start,
    columns,
    M: tl.constexpr,
    DTYPE: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPARSE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """[WARPS, BLOCK_ROWS, DEPTH] of a block of rows: a run of DEPTH columns a warp, from ``start`` on.

    ``columns`` is how many there are: all or none where WHOLE, which keeps the loads 16 bytes wide. The rest is zero,
    and so are, where SPARSE, the rows whose address in the table is 0.
    """
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :, None]
    column = tl.arange(0, WARPS)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    pointers = block_pointers(rows, stride, block, M, DTYPE) + start + column
    if ALIGNED:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, [1, 1, 16]), [1, 1, DEPTH])
    if SPARSE:
        there = tl.where(columns > 0, table_address(rows, row, row < M), 0) != 0
        return tl.load(pointers, mask=there if WHOLE else there & (column < columns), other=0.0)
    elif WHOLE:
        last = tl.where(columns > 0, M, 0)
        return tl.load(pointers, mask=row < last, other=0.0)
    else:
        return tl.load(pointers, mask=(row < M) & (column < columns), other=0.0)


@triton.jit
def block_tiles(
    rows,
    stride,
    first,
    start,
    columns,
    COUNT: tl.constexpr,
    M: tl.constexpr,
    DTYPE: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPARSE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A tuple of COUNT neighbouring blocks' tiles."""
    tiles = ()
    for b in tl.static_range(COUNT):
        tile = block_tile(rows, stride, first + b, start, columns, M, DTYPE, WARPS, DEPTH, ALIGNED, SPARSE, WHOLE)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def recorded_in(table, first, COUNT: tl.constexpr, M: tl.constexpr):
    """How many rows of each of COUNT neighbouring blocks have a gradient."""
    counts = ()
    for b in tl.static_range(COUNT):
        row = (first + b) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        counts = counts + (tl.sum((table_address(table, row, row < M) != 0).to(tl.int32)),)
    return counts


@triton.jit
def renewed_blocks(tiles, loaded, gradients, counts, first, COUNT: tl.constexpr, M: tl.constexpr):
    """A tuple of tiles of averages with the gradients in them; a block without any is left as it is."""
    new = ()
    for b in tl.static_range(COUNT):
        tile = tiles[b]
        wide = widened(tile)
        if counts[b] > 0:
            row = (first + b) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :, None]
            present = table_address(gradients[0], row, row < M) != 0
            wide = tl.where(present, widened(table_renewed(tile, loaded[b], gradients, row, present, M)), wide)
        new = new + (wide,)
    return new


@triton.jit
def block_sums(
    rows,
    stride,
    gradients,
    n,
    program,
    programs,
    left,
    right,
    M: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """This program's share of G Gᵀ over blocks of rows, as a tuple of [BLOCK_ROWS, BLOCK_ROWS], by matrix units.

    LEFT blocks from number ``left`` on meet RIGHT blocks from ``right`` on, in the order (0, 0), (0, 1) ...; with
    RIGHT == 0 they meet each other, each pair once: (0, 0), (1, 0), (1, 1), (2, 0) ...

    Each warp multiplies its own run of columns (a batch of the product), so no two warps repeat work, and the next tile
    is under way while one is multiplied. The masked rest of the columns is the tile before the first; that every tile
    is carried around the loop also keeps Triton 3.6, which cannot feed a float64 product from 16-bit loads directly,
    from seeing the load.

    Args:
        gradients: (table, scales, β₁) as in ``averages``, of gradients of dtype GRADIENT that enter the rows, which
            are averages, before they are multiplied; or None.
    """
    COLUMNS: tl.constexpr = WARPS * DEPTH
    PAIRS: tl.constexpr = LEFT * (LEFT + 1) // 2 if RIGHT == 0 else LEFT * RIGHT
    sums = ()
    for _ in tl.static_range(PAIRS):
        sums = sums + (tl.zeros([WARPS, BLOCK_ROWS, BLOCK_ROWS], tl.float64),)
    size = tl.full([], COLUMNS, tl.int64)
    whole = (n // COLUMNS).to(tl.int32)
    start = whole * size
    rest = tl.where(program == 0, n - start, 0)
    x_next = block_tiles(rows, stride, left, start, rest, LEFT, M, DTYPE, WARPS, DEPTH, ALIGNED, False, False)
    y_next = block_tiles(rows, stride, right, start, rest, RIGHT, M, DTYPE, WARPS, DEPTH, ALIGNED, False, False)
    if gradients is not None:
        table = gradients[0]
        u_next = block_tiles(table, 0, left, start, rest, LEFT, M, GRADIENT, WARPS, DEPTH, ALIGNED, True, False)
        v_next = block_tiles(table, 0, right, start, rest, RIGHT, M, GRADIENT, WARPS, DEPTH, ALIGNED, True, False)
        x_counts = recorded_in(table, left, LEFT, M)
        y_counts = recorded_in(table, right, RIGHT, M)
    for tile in range(program, whole + programs, programs):
        if gradients is not None:
            x = renewed_blocks(x_next, u_next, gradients, x_counts, left, LEFT, M)
            y = renewed_blocks(y_next, v_next, gradients, y_counts, right, RIGHT, M)
        else:
            x = widened_all(x_next, LEFT)
            y = widened_all(y_next, RIGHT)
        start = tile * size
        ahead = whole - tile
        x_next = block_tiles(rows, stride, left, start, ahead, LEFT, M, DTYPE, WARPS, DEPTH, ALIGNED, False, True)
        y_next = block_tiles(rows, stride, right, start, ahead, RIGHT, M, DTYPE, WARPS, DEPTH, ALIGNED, False, True)
        if gradients is not None:
            u_next = block_tiles(table, 0, left, start, ahead, LEFT, M, GRADIENT, WARPS, DEPTH, ALIGNED, True, True)
            v_next = block_tiles(table, 0, right, start, ahead, RIGHT, M, GRADIENT, WARPS, DEPTH, ALIGNED, True, True)
        added = ()
        for a in tl.static_range(LEFT):
            for b in tl.static_range(RIGHT if RIGHT else a + 1):
                other = y[b] if RIGHT else x[b]
                total = sums[a * RIGHT + b if RIGHT else a * (a + 1) // 2 + b]
                added = added + (tl.dot(x[a], other.trans(0, 2, 1), total, out_dtype=tl.float64),)
        sums = added
    shares = ()
    for p in tl.static_range(PAIRS):
        shares = shares + (tl.sum(sums[p], axis=0),)
    return shares


@triton.jit
def widened_all(tiles, COUNT: tl.constexpr):
    """A tuple of tiles in float64."""
    wide = ()
    for b in tl.static_range(COUNT):
        wide = wide + (widened(tiles[b]),)
    return wide


@triton.jit
def store_block(gramian, block, left, right, M: tl.constexpr):
    """Write a block of K, [BLOCK_ROWS, BLOCK_ROWS], and its mirror image; on the diagonal its lower triangle twice."""
    r = tl.arange(0, BLOCK_ROWS)[:, None]
    c = tl.arange(0, BLOCK_ROWS)[None, :]
    i = left * BLOCK_ROWS + r
    j = right * BLOCK_ROWS + c
    inside = (i < M) & (j < M) & (i >= j)
    tl.store(gramian + i * M + j, block, mask=inside)
    tl.store(gramian + j * M + i, block, mask=inside)
