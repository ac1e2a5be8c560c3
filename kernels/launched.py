"""The kernels that are launched: Gramian and ConFIG's weights in one launch, the combination in another, or all in one.

Every launch has one axis of programs. Shapes that end in P (MP, PAIRS) are powers of two that hold the real ones.
"""

import triton
import triton.language as tl

from .arrival import arrived_last, sum_of_partials
from .combination import combine_tiles
from .config_rule import write_config_weights
from .gramian import BLOCK_ROWS, block_sums, matrix_of_pairs, pair_sums, store_block

# No compilation depends on the value of a number or on where a tensor lies: ALIGNED alone tells of the latter. Triton
# takes no notice of this for the tensors of a tuple, nor of which stride needs more than 32 bits.
UNSPECIALIZED = [
    "rows",
    "stride",
    "n",
    "partials",
    "tickets",
    "gramian",
    "weights",
    "out",
    "direction",
    "tracked",
    "rtol",
    "scratch",
    "table",
    "vectors",
]


@triton.jit
def store_square(gramian, matrix, M: tl.constexpr, MP: tl.constexpr):
    """Write the (M, M) part of [MP, MP], for this program to read."""
    r = tl.arange(0, MP)[:, None]
    c = tl.arange(0, MP)[None, :]
    tl.store(gramian + r * M + c, matrix, mask=(r < M) & (c < M))
    tl.debug_barrier()


@triton.jit(do_not_specialize=UNSPECIALIZED)
def config_of_gramian(
    gramian,
    weights,
    direction,
    tracked: tl.int32,
    rtol: tl.float64,
    scratch,
    M: tl.constexpr,
    MP: tl.constexpr,
    LENGTH: tl.constexpr,
    DROP: tl.constexpr,
):
    """ConFIG's weights of a Gramian in memory, by one program.

    Args:
        gramian: (M, M) float64 contiguous.
        weights: (M,) float64, written.
        direction, tracked, rtol, scratch, LENGTH, DROP: as ``config_rule.write_config_weights``.
    """
    write_config_weights(gramian, weights, direction, tracked, rtol, scratch, M, MP, LENGTH, DROP)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def config_of_few(
    rows,
    stride,
    n: tl.int64,
    partials,
    tickets,
    gramian,
    weights,
    out,
    direction,
    tracked: tl.int32,
    rtol: tl.float64,
    scratch,
    M: tl.constexpr,
    MP: tl.constexpr,
    PAIRS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    FENCE: tl.constexpr,
    LENGTH: tl.constexpr,
    DROP: tl.constexpr,
):
    """Gramian of up to 8 rows; with ``weights`` ConFIG's weights, too; by one program with ``out``, all of it.

    Args:
        rows, stride: as ``rows.row_pointer``: a pointer to the first row, or a tuple of M.
        n: columns.
        partials: float64, PAIRS a program and PAIRS a group of GROUP programs; None says that one program is launched.
        tickets: int32 zeros, one and one a group of programs; zeros again when the launch ends.
        gramian: (M, M) float64, written.
        weights: (M,) float64, written; None for the Gramian alone.
        out: (n,) of the rows' dtype, written by the one program; None with several.
        direction, tracked, rtol, scratch, LENGTH, DROP: as ``config_rule.write_config_weights``.
        FENCE: as ``arrival.arrived_last``.
        UNROLL: tiles a step.
        ALIGNED: every row, and ``out``, begins at a multiple of 16 bytes.

    Traffic: M·n elements read, and with ``out`` again from the cache and n written.
    """
    if stride is not None:
        stride = tl.cast(stride, tl.int64)  # not annotated, which would make a number of None
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    pairs = pair_sums(rows, stride, n, program, programs, M, PAIRS, THREADS, VECTOR, UNROLL, ALIGNED)
    if partials is None:
        matrix = matrix_of_pairs(pairs, M, MP, PAIRS)
        store_square(gramian, matrix, M, MP)
        if weights is not None:
            write_config_weights(gramian, weights, direction, tracked, rtol, scratch, M, MP, LENGTH, DROP)
            if out is not None:
                tl.debug_barrier()
                combine_tiles(rows, stride, n, weights, out, program, programs, M, THREADS, VECTOR, ALIGNED)
    else:
        slots = tl.arange(0, PAIRS)
        tl.store(partials + program * PAIRS + slots, pairs)
        group = program // GROUP
        groups = tl.cdiv(programs, GROUP)
        first = group * GROUP
        size = tl.minimum(programs - first, GROUP)
        if arrived_last(tickets + 1 + group, size, FENCE):
            pairs = sum_of_partials(partials, first, size, 0, PAIRS, GROUP, PAIRS)
            tl.store(partials + (programs + group) * PAIRS + slots, pairs)
            if arrived_last(tickets, groups, FENCE):
                pairs = sum_of_partials(partials, programs, groups, 0, PAIRS, GROUP, PAIRS)
                matrix = matrix_of_pairs(pairs, M, MP, PAIRS)
                store_square(gramian, matrix, M, MP)
                if weights is not None:
                    write_config_weights(gramian, weights, direction, tracked, rtol, scratch, M, MP, LENGTH, DROP)


@triton.jit
def add_up_block(
    gramian,
    partials,
    first,
    count,
    left,
    right,
    a: tl.constexpr,
    b: tl.constexpr,
    RIGHT: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
):
    """Write block (a, b) of those from blocks left, right on: the sum of its ``count`` partial sums."""
    SQUARE: tl.constexpr = BLOCK_ROWS * BLOCK_ROWS
    INDEX: tl.constexpr = a * RIGHT + b if RIGHT else a * (a + 1) // 2 + b
    block = sum_of_partials(partials, first, count, INDEX * SQUARE, SIZE, GROUP, SQUARE)
    store_block(gramian, block.reshape([BLOCK_ROWS, BLOCK_ROWS]), left + a, right + b, M)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def config_of_many(
    rows,
    stride,
    n: tl.int64,
    partials,
    tickets,
    gramian,
    weights,
    direction,
    tracked: tl.int32,
    rtol: tl.float64,
    scratch,
    DTYPE: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    FENCE: tl.constexpr,
    LENGTH: tl.constexpr,
    DROP: tl.constexpr,
):
    """Gramian of any number of rows by blocks of 16, and, where ``weights`` is given, ConFIG's weights of up to 64.

    With RIGHT == 0 every program forms all pairs of LEFT blocks. Else LEFT == RIGHT, the blocks come in strips of
    LEFT, and neighbouring programs form the pairs of strips (0, 0), (1, 0), (1, 1), (2, 0) ... over the same columns,
    which they so find in the cache.

    Args:
        rows, stride: as ``rows.row_pointers``: a pointer to the first row, or to a table of M addresses.
        n: columns.
        partials: float64, one share of the sums a program and one a group of GROUP programs of a pair of strips.
        tickets: int32 zeros, one, one a pair of strips, and one a group; zeros again when the launch ends.
        gramian: (M, M) float64, written.
        weights: (M,) float64, written; None for the Gramian alone.
        direction, tracked, rtol, scratch, LENGTH, DROP: as ``config_rule.write_config_weights``.
        FENCE: as ``arrival.arrived_last``.
        WARPS: as launched; each takes DEPTH columns of a tile.
        ALIGNED: every row begins at a multiple of 16 bytes.

    Traffic: M·n elements read once with RIGHT == 0; with S strips, S + 1 times, all but the first from the cache.
    """
    BLOCKS: tl.constexpr = (M + BLOCK_ROWS - 1) // BLOCK_ROWS
    STRIPS: tl.constexpr = (BLOCKS + LEFT - 1) // LEFT
    STRIP_PAIRS: tl.constexpr = STRIPS * (STRIPS + 1) // 2
    SQUARE: tl.constexpr = BLOCK_ROWS * BLOCK_ROWS
    SHARES: tl.constexpr = LEFT * RIGHT if RIGHT else LEFT * (LEFT + 1) // 2
    SIZE: tl.constexpr = SHARES * SQUARE

    stride = tl.cast(stride, tl.int64)  # as above
    pair = tl.program_id(0) % STRIP_PAIRS
    program = tl.program_id(0) // STRIP_PAIRS
    programs = tl.num_programs(0) // STRIP_PAIRS
    left = 0
    for strip in tl.static_range(1, STRIPS):
        left = tl.where(pair >= strip * (strip + 1) // 2, strip, left)
    right = pair - left * (left + 1) // 2
    left, right = left * LEFT, right * LEFT
    shares = block_sums(rows, stride, n, program, programs, left, right, M, LEFT, RIGHT, DTYPE, WARPS, DEPTH, ALIGNED)

    groups = tl.cdiv(programs, GROUP)
    own = partials + pair.to(tl.int64) * (programs + groups) * SIZE
    cells = tl.arange(0, BLOCK_ROWS)[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    for p in tl.static_range(SHARES):
        tl.store(own + program * SIZE + p * SQUARE + cells, shares[p])
    group = program // GROUP
    first = group * GROUP
    size = tl.minimum(programs - first, GROUP)
    if arrived_last(tickets + 1 + STRIP_PAIRS + pair * groups + group, size, FENCE):
        flat = tl.arange(0, SQUARE)
        for p in tl.static_range(SHARES):
            share = sum_of_partials(own, first, size, p * SQUARE, SIZE, GROUP, SQUARE)
            tl.store(own + (programs + group) * SIZE + p * SQUARE + flat, share)
        if arrived_last(tickets + 1 + pair, groups, FENCE):
            for a in tl.static_range(LEFT):
                for b in tl.static_range(RIGHT if RIGHT else a + 1):
                    add_up_block(gramian, own, programs, groups, left, right, a, b, RIGHT, SIZE, GROUP, M)
            if weights is not None:
                if arrived_last(tickets, STRIP_PAIRS, FENCE):
                    write_config_weights(gramian, weights, direction, tracked, rtol, scratch, M, MP, LENGTH, DROP)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def combination(
    rows,
    stride,
    n: tl.int64,
    weights,
    out,
    M: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Σ c_i g_i into ``out``.

    Args:
        rows, stride: as ``rows.row_pointer`` up to 8 rows, as ``rows.row_pointers`` above.
        n: columns.
        weights: (M,) float64.
        out: (n,) of the rows' dtype, written.
        ALIGNED: every row, and ``out``, begins at a multiple of 16 bytes.

    Traffic: (k + 1)·n elements, k the number of non-zero weights.
    """
    if stride is not None:
        stride = tl.cast(stride, tl.int64)  # as above
    combine_tiles(rows, stride, n, weights, out, tl.program_id(0), tl.num_programs(0), M, THREADS, VECTOR, ALIGNED)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def table_of_addresses(table, vectors, COUNT: tl.constexpr):
    """Write the addresses of COUNT vectors, a tuple, into ``table`` (COUNT,) int64, without the host's memory."""
    for i in tl.static_range(COUNT):
        tl.store(table + i, vectors[i].to(tl.int64))
