"""The Gramian without matrix units: a thread holds the sums of all pairs of a few rows, or of two blocks of them.

That is for devices which have no such units for float64, or for which Triton does not use them, and for devices with
few float64 units of any kind, such as cards for games. A program sums over runs of columns. Within a run a thread keeps
a sum a pair, in float64 or in two float32 numbers (``two_float``); the threads' sums of a run are added up and join the
program's in float64.
"""

import triton
import triton.language as tl

from .arrival import add_up, arrived_last
from .gramian import pair_at, side_by_side
from .rows import columns_of, row_pointer, tile_pointers, widened
from .two_float import UNSCALE, add_product, fits, normalised, scaled, sum_of_two

REDUCED_TOGETHER = tl.constexpr(16)
"""Pairs whose sums the threads add up at a time."""


@triton.jit
def block_row_pointers(rows, stride, first, COUNT: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr):
    """A tuple of pointers to COUNT rows from number ``first`` on; the last row stands for those past it.

    ``rows`` and ``stride`` are as ``rows.row_pointer`` has them, where ``first`` is 0, or as ``rows.row_pointers``.
    """
    pointers = ()
    for i in tl.static_range(COUNT):
        if stride is None:
            pointers = pointers + (row_pointer(rows, stride, i),)
        else:
            row = tl.minimum(first + i, M - 1)
            if tl.constexpr(rows.dtype.element_ty == tl.int64):
                pointers = pointers + (tl.load(rows + row).to(tl.pointer_type(DTYPE)),)
            else:
                pointers = pointers + (rows + row * stride,)
    return pointers


@triton.jit
def row_tiles(
    pointers, start, n, COUNT: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr
):
    """A tuple of tiles [THREADS, VECTOR] of COUNT rows; threads that lack one of their columns read zeros.

    The mask is the same for a thread's columns, which keeps its loads 16 bytes wide.
    """
    last = tl.arange(0, THREADS)[:, None] * VECTOR + (VECTOR - 1) + tl.zeros([1, VECTOR], tl.int32)
    there = last < n - start
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (tl.load(tile_pointers(pointers[i], start, THREADS, VECTOR, ALIGNED), mask=there, other=0.0),)
    return tiles


@triton.jit
def elements_of(tiles, COUNT: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, TWO_FLOAT: tl.constexpr):
    """A tuple of COUNT tuples of VECTOR tensors [THREADS]: the tiles' columns in the arithmetic's dtype."""
    rows = ()
    for i in tl.static_range(COUNT):
        columns = ()
        for v in tl.static_range(VECTOR):
            x = columns_of(tiles[i], THREADS, VECTOR)[v]
            columns = columns + (scaled(x) if TWO_FLOAT else widened(x),)
        rows = rows + (columns,)
    return rows


@triton.jit
def with_largest(largest, rows, COUNT: tl.constexpr, VECTOR: tl.constexpr):
    """The tuple ``largest`` of COUNT tensors [THREADS], with the rows' absolute values in it; NaN are left out."""
    new = ()
    for i in tl.static_range(COUNT):
        most = largest[i]
        for v in tl.static_range(VECTOR):
            most = tl.maximum(most, tl.abs(rows[i][v]))
        new = new + (most,)
    return new


@triton.jit
def with_products(
    highs,
    lows,
    x,
    y,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    VECTOR: tl.constexpr,
    TWO_FLOAT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """(highs, lows) with the products of all pairs of rows over a tile; in float64 ``lows`` are left as they are."""
    new_highs = ()
    new_lows = ()
    for i in tl.static_range(LEFT):
        for j in tl.static_range(RIGHT if RIGHT else i + 1):
            other = y[j] if RIGHT else x[j]
            high = highs[i * RIGHT + j if RIGHT else i * (i + 1) // 2 + j]
            low = lows[i * RIGHT + j if RIGHT else i * (i + 1) // 2 + j]
            for v in tl.static_range(VECTOR):
                if TWO_FLOAT:
                    high, low = add_product(high, low, x[i][v], other[v], EXACT)
                else:
                    high = tl.fma(x[i][v], other[v], high)
            if TWO_FLOAT:
                high, low = normalised(high, low)
            new_highs = new_highs + (high,)
            new_lows = new_lows + (low,)
    return new_highs, new_lows


@triton.jit
def zeros_of(COUNT: tl.constexpr, THREADS: tl.constexpr, DTYPE: tl.constexpr):
    """A tuple of COUNT tensors [THREADS]."""
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([THREADS], DTYPE),)
    return zeros


@triton.jit
def add_run(
    sums,
    scratch,
    x_rows,
    y_rows,
    n,
    first,
    stop,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PAIRS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    TWO_FLOAT: tl.constexpr,
):
    """Add the products over the tiles from number ``first`` to before ``stop`` to ``sums``.

    These are in memory, and the threads' sums are added up a few pairs at a time, as all that a thread has of registers
    is taken by the products.

    Args:
        sums, scratch: as ``sums_of_pairs``.
    """
    COUNT: tl.constexpr = LEFT * RIGHT if RIGHT else LEFT * (LEFT + 1) // 2
    TOGETHER: tl.constexpr = min(PAIRS, REDUCED_TOGETHER)
    SUMS: tl.constexpr = tl.float32 if TWO_FLOAT else tl.float64
    EXACT: tl.constexpr = x_rows[0].dtype.element_ty.primitive_bitwidth == 16
    highs = zeros_of(COUNT, THREADS, SUMS)
    lows = zeros_of(COUNT, THREADS, SUMS)
    x_largest = zeros_of(LEFT, THREADS, SUMS)
    y_largest = zeros_of(RIGHT, THREADS, SUMS)
    size = tl.full([], THREADS * VECTOR, tl.int64)
    for tile in range(first, stop):
        start = tile * size
        x_tiles = row_tiles(x_rows, start, n, LEFT, THREADS, VECTOR, ALIGNED)
        y_tiles = row_tiles(y_rows, start, n, RIGHT, THREADS, VECTOR, ALIGNED)
        x = elements_of(x_tiles, LEFT, THREADS, VECTOR, TWO_FLOAT)
        y = elements_of(y_tiles, RIGHT, THREADS, VECTOR, TWO_FLOAT)
        if TWO_FLOAT:
            x_largest = with_largest(x_largest, x, LEFT, VECTOR)
            y_largest = with_largest(y_largest, y, RIGHT, VECTOR)
        highs, lows = with_products(highs, lows, x, y, LEFT, RIGHT, VECTOR, TWO_FLOAT, EXACT)
    fitting = True
    if TWO_FLOAT:
        fitting = all_fit(x_largest, LEFT, THREADS) & all_fit(y_largest, RIGHT, THREADS)
    padded_highs = highs + zeros_of(PAIRS - COUNT, THREADS, SUMS)
    padded_lows = lows + zeros_of(PAIRS - COUNT, THREADS, SUMS)
    slots = tl.arange(0, PAIRS)
    if fitting:
        # By way of memory each number gets to one thread; else all of them would go on with it, in float64.
        parts = tl.cast(scratch, tl.pointer_type(SUMS), bitcast=True)
        for some in tl.static_range(0, COUNT, TOGETHER):
            high = side_by_side(padded_highs, some, TOGETHER, THREADS)
            place = parts + some + tl.arange(0, TOGETHER)
            if TWO_FLOAT:
                low = side_by_side(padded_lows, some, TOGETHER, THREADS)
                high, low = tl.reduce((high, low), 0, sum_of_two)
                tl.store(place + PAIRS, low)
            else:
                high = tl.sum(high, axis=0)
            tl.store(place, high)
        tl.debug_barrier()
        there = slots < COUNT
        total = tl.load(parts + slots, mask=there, other=0.0).to(tl.float64)
        if TWO_FLOAT:
            total = (total + tl.load(parts + PAIRS + slots, mask=there, other=0.0).to(tl.float64)) * UNSCALE
    else:
        end = tl.minimum(stop * size, n // VECTOR * VECTOR)
        total = wide_sums(x_rows, y_rows, first * size, end, LEFT, RIGHT, PAIRS)
    before = tl.load(sums + slots)
    tl.debug_barrier()  # several threads read a number that one writes
    tl.store(sums + slots, before + total)
    tl.debug_barrier()


@triton.jit
def all_fit(largest, COUNT: tl.constexpr, THREADS: tl.constexpr):
    """Whether the rows with these largest elements, a tuple of COUNT tensors [THREADS], can be summed in two floats."""
    fitting = THREADS > 0
    for i in tl.static_range(COUNT):
        fitting = fitting & fits(tl.max(largest[i], axis=0))
    return fitting


@triton.jit
def pointers_at(pointers, index, COUNT: tl.constexpr):
    """Those of the tuple of COUNT pointers that the tensor ``index`` names."""
    chosen = index.to(tl.int64) * 0 + pointers[0].to(tl.int64)
    for i in tl.static_range(1, COUNT):
        chosen = tl.where(index == i, pointers[i].to(tl.int64), chosen)
    return chosen.to(pointers[0].dtype)


@triton.jit
def wide_sums(x_rows, y_rows, start, stop, LEFT: tl.constexpr, RIGHT: tl.constexpr, PAIRS: tl.constexpr):
    """[PAIRS] sums in float64 over the columns from ``start`` to before ``stop``, whatever their elements are.

    Every pair reads its two rows by itself.
    """
    COLUMNS: tl.constexpr = 8
    pair = tl.arange(0, PAIRS)
    if RIGHT:
        x = pointers_at(x_rows, pair // RIGHT, LEFT)[:, None]
        y = pointers_at(y_rows, pair % RIGHT, RIGHT)[:, None]
        valid = pair < LEFT * RIGHT
    else:
        i, j = pair_at(pair, LEFT)
        x = pointers_at(x_rows, i, LEFT)[:, None]
        y = pointers_at(x_rows, j, LEFT)[:, None]
        valid = pair < LEFT * (LEFT + 1) // 2
    sums = tl.zeros([PAIRS, COLUMNS], tl.float64)
    size = tl.full([], COLUMNS, tl.int64)
    steps = tl.cdiv(stop - start, COLUMNS).to(tl.int32)
    for step in range(steps):
        column = start + step * size + tl.arange(0, COLUMNS)[None, :]
        there = valid[:, None] & (column < stop)
        a = widened(tl.load(x + column, mask=there, other=0.0))
        b = widened(tl.load(y + column, mask=there, other=0.0))
        sums = tl.fma(a, b, sums)
    return tl.sum(sums, axis=1)


@triton.jit
def sums_of_pairs(
    sums,
    scratch,
    x_rows,
    y_rows,
    n,
    program,
    programs,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PAIRS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    RUN: tl.constexpr,
    ALIGNED: tl.constexpr,
    TWO_FLOAT: tl.constexpr,
):
    """[PAIRS] float64: this program's share of the products of LEFT rows with RIGHT others, (0, 0), (0, 1) ...

    With RIGHT == 0 of those rows with each other, each pair once: (0, 0), (1, 0), (1, 1) ... PAIRS is the power of two
    that holds the pairs.

    Args:
        sums, scratch: float64, PAIRS each, in memory that no other program uses meanwhile.
        x_rows, y_rows: tuples of LEFT and RIGHT pointers.
        RUN: tiles that are summed at most before the sums join those in float64.
    """
    VECTORS: tl.constexpr = THREADS * VECTOR
    tiles = tl.cdiv(n // VECTOR * VECTOR, VECTORS).to(tl.int32)
    # Runs of one length, and as many of them for each program: else all would wait for those with one more.
    rounds = tl.maximum(1, tl.cdiv(tiles, programs * RUN))
    length = tl.maximum(1, tl.cdiv(tiles, programs * rounds))
    slots = tl.arange(0, PAIRS)
    tl.store(sums + slots, tl.zeros([PAIRS], tl.float64))
    tl.debug_barrier()
    for run in range(program, tl.cdiv(tiles, length), programs):
        first = run * length
        stop = tl.minimum(first + length, tiles)
        add_run(sums, scratch, x_rows, y_rows, n, first, stop, LEFT, RIGHT, PAIRS, THREADS, VECTOR, ALIGNED, TWO_FLOAT)
    total = tl.load(sums + slots)
    tl.debug_barrier()  # as above: the caller writes them again
    if program == 0:  # the columns that fill no thread's vector
        total += wide_sums(x_rows, y_rows, n // VECTOR * VECTOR, n, LEFT, RIGHT, PAIRS)
    return total


@triton.jit
def gramian_by_blocks(
    rows,
    stride,
    n,
    partials,
    tickets,
    gramian,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    RUN: tl.constexpr,
    ALIGNED: tl.constexpr,
    TWO_FLOAT: tl.constexpr,
    GROUP: tl.constexpr,
    FENCE: tl.constexpr,
    SOLVED: tl.constexpr,
):
    """Write the Gramian of any number of rows, by blocks; with SOLVED, returns whether this program is the last.

    Neighbouring programs form the pairs of blocks (0, 0), (1, 0), (1, 1), (2, 0) ... over the same columns, which they
    so find in the cache. A block meets itself as it meets the others: half of its products are formed twice.

    Args:
        rows, stride, n, partials, tickets, gramian, ALIGNED, FENCE: as ``launched.config_of_blocks``.
    """
    BLOCKS: tl.constexpr = (M + BLOCK - 1) // BLOCK
    BLOCK_PAIRS: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    pair = tl.program_id(0) % BLOCK_PAIRS
    program = tl.program_id(0) // BLOCK_PAIRS
    programs = tl.num_programs(0) // BLOCK_PAIRS
    left, right = pair_at(pair, BLOCKS)
    x_rows = block_row_pointers(rows, stride, left * BLOCK, BLOCK, M, DTYPE)
    y_rows = block_row_pointers(rows, stride, right * BLOCK, BLOCK, M, DTYPE)
    groups = tl.cdiv(programs, GROUP)
    own = partials + pair.to(tl.int64) * (2 * programs + groups) * PAIRS
    sums = sums_of_pairs(
        own + program * PAIRS,
        own + (programs + groups + program) * PAIRS,
        x_rows,
        y_rows,
        n,
        program,
        programs,
        BLOCK,
        BLOCK,
        PAIRS,
        THREADS,
        VECTOR,
        RUN,
        ALIGNED,
        TWO_FLOAT,
    )
    own_tickets = tickets + 1 + pair * (1 + groups)
    last, sums = add_up(sums, own, own_tickets, program, programs, PAIRS, GROUP, FENCE)
    if last:
        p = tl.arange(0, PAIRS)
        i = left * BLOCK + p // BLOCK
        j = right * BLOCK + p % BLOCK
        inside = (p < BLOCK * BLOCK) & (i < M) & (j < M) & (i >= j)
        tl.store(gramian + i * M + j, sums, mask=inside)
        tl.store(gramian + j * M + i, sums, mask=inside)
        if SOLVED:
            last = arrived_last(tickets, BLOCK_PAIRS, FENCE)
    return last
