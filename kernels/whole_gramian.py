"""The whole Gramian in one launch: every program streams its share of the columns, the last to arrive adds them up.

Both functions say which program that was: the one that can see the Gramian and goes on with it. With gradients the
rows are moving averages which these enter in registers, see ``averages``: the Gramian is that of the new averages.
"""

import triton
import triton.language as tl

from .arrival import add_up, arrived_last, sum_of_partials
from .gramian import BLOCK_ROWS, block_sums, matrix_of_pairs, pair_at, pair_sums, store_block
from .pairs import block_row_pointers, sums_of_pairs


@triton.jit
def store_square(gramian, matrix, M: tl.constexpr, MP: tl.constexpr):
    """Write the (M, M) part of [MP, MP], for this program to read."""
    r = tl.arange(0, MP)[:, None]
    c = tl.arange(0, MP)[None, :]
    tl.store(gramian + r * M + c, matrix, mask=(r < M) & (c < M))
    tl.debug_barrier()


@triton.jit
def gramian_of_few(
    rows,
    stride,
    gradients,
    n,
    partials,
    tickets,
    gramian,
    program,
    programs,
    M: tl.constexpr,
    MP: tl.constexpr,
    PAIRS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    FENCE: tl.constexpr,
    RUN: tl.constexpr,
):
    """Write the Gramian of up to 8 rows. Returns whether this program is the last.

    Args:
        rows, stride, n, partials, tickets, gramian, UNROLL, ALIGNED, FENCE, RUN: as ``launched.config_of_few``.
        gradients: as ``averages.few_gradients``, or None, as with RUN.
    """
    if RUN:
        x_rows = block_row_pointers(rows, stride, 0, M, M, None)
        sums = partials + program * PAIRS
        scratch = sums + (programs + tl.cdiv(programs, GROUP)) * PAIRS
        pairs = sums_of_pairs(
            sums, scratch, x_rows, (), n, program, programs, M, 0, PAIRS, THREADS, VECTOR, RUN, ALIGNED, True
        )
    else:
        pairs = pair_sums(rows, stride, gradients, n, program, programs, M, PAIRS, THREADS, VECTOR, UNROLL, ALIGNED)
    last = program >= 0
    if tickets is not None:
        last, pairs = add_up(pairs, partials, tickets, program, programs, PAIRS, GROUP, FENCE)
    if last:
        store_square(gramian, matrix_of_pairs(pairs, M, MP, PAIRS), M, MP)
    return last


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


@triton.jit
def gramian_of_many(
    rows,
    stride,
    gradients,
    n,
    partials,
    tickets,
    gramian,
    M: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    FENCE: tl.constexpr,
    SOLVED: tl.constexpr,
):
    """Write the Gramian of any number of rows by blocks of 16; with SOLVED, returns whether this program is the last.

    Args:
        rows, stride, n, partials, tickets, gramian, LEFT, RIGHT, WARPS, ALIGNED, FENCE: as
            ``launched.config_of_many``.
        gradients: (table, scales, β₁), as ``gramian.block_sums`` takes them, of dtype GRADIENT; or None.
    """
    BLOCKS: tl.constexpr = (M + BLOCK_ROWS - 1) // BLOCK_ROWS
    STRIPS: tl.constexpr = (BLOCKS + LEFT - 1) // LEFT
    STRIP_PAIRS: tl.constexpr = STRIPS * (STRIPS + 1) // 2
    SQUARE: tl.constexpr = BLOCK_ROWS * BLOCK_ROWS
    SHARES: tl.constexpr = LEFT * RIGHT if RIGHT else LEFT * (LEFT + 1) // 2
    SIZE: tl.constexpr = SHARES * SQUARE

    pair = tl.program_id(0) % STRIP_PAIRS
    program = tl.program_id(0) // STRIP_PAIRS
    programs = tl.num_programs(0) // STRIP_PAIRS
    left, right = pair_at(pair, STRIPS)
    left, right = left * LEFT, right * LEFT
    shares = block_sums(
        rows,
        stride,
        gradients,
        n,
        program,
        programs,
        left,
        right,
        M,
        LEFT,
        RIGHT,
        DTYPE,
        GRADIENT,
        WARPS,
        DEPTH,
        ALIGNED,
    )

    groups = tl.cdiv(programs, GROUP)
    own = partials + pair.to(tl.int64) * (programs + groups) * SIZE
    cells = tl.arange(0, BLOCK_ROWS)[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    for p in tl.static_range(SHARES):
        tl.store(own + program * SIZE + p * SQUARE + cells, shares[p])
    group = program // GROUP
    first = group * GROUP
    size = tl.minimum(programs - first, GROUP)
    last = arrived_last(tickets + 1 + STRIP_PAIRS + pair * groups + group, size, FENCE)
    if last:
        flat = tl.arange(0, SQUARE)
        for p in tl.static_range(SHARES):
            share = sum_of_partials(own, first, size, p * SQUARE, SIZE, GROUP, SQUARE)
            tl.store(own + (programs + group) * SIZE + p * SQUARE + flat, share)
        last = arrived_last(tickets + 1 + pair, groups, FENCE)
        if last:
            for a in tl.static_range(LEFT):
                for b in tl.static_range(RIGHT if RIGHT else a + 1):
                    add_up_block(gramian, own, programs, groups, left, right, a, b, RIGHT, SIZE, GROUP, M)
            if SOLVED:
                last = arrived_last(tickets, STRIP_PAIRS, FENCE)
    return last
