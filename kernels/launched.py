"""The kernels that are launched: Gramian and ConFIG's weights in one launch, the combination in another, or all in one.

Every launch has one axis of programs. Shapes that end in P (MP, PAIRS) are powers of two that hold the real ones.
"""

import triton
import triton.language as tl

from .combination import combine_tiles
from .config_rule import write_config_weights
from .graddrop import drop_tiles
from .pairs import gramian_by_blocks
from .rows import vectors_at
from .whole_gramian import gramian_of_few, gramian_of_many

# No compilation depends on the value of a number or on where a tensor lies: ALIGNED alone tells of the latter. Separate
# vectors come as addresses, as Triton takes no notice of this for the tensors of a tuple. The scratch alone is
# always an allocation of its own, and that it begins at 16 bytes makes the m×m part's loads and stores half as many.
UNSPECIALIZED = [
    "rows",
    "stride",
    "n",
    *(f"address{u}" for u in range(16)),
    "partials",
    "tickets",
    "gramian",
    "weights",
    "out",
    "direction",
    "tracked",
    "rtol",
    "table",
    "first",
    "count",
    "leak",
    "seed",
    "column",
]


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
    stride: tl.int64,
    n: tl.int64,
    address0: tl.int64,
    address1: tl.int64,
    address2: tl.int64,
    address3: tl.int64,
    address4: tl.int64,
    address5: tl.int64,
    address6: tl.int64,
    address7: tl.int64,
    partials,
    tickets,
    gramian,
    weights,
    out,
    direction,
    tracked: tl.int32,
    rtol: tl.float64,
    scratch,
    SEPARATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    LENGTH: tl.constexpr,
    DROP: tl.constexpr,
    PAIRS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    GROUP: tl.constexpr,
    FENCE: tl.constexpr,
    RUN: tl.constexpr,
):
    """Gramian of up to 8 rows; with ``weights`` ConFIG's weights, too; by one program with ``out``, all of it.

    Args:
        rows, stride: a pointer to the first row, and elements from one to the next.
        n: columns.
        address0 to address7, SEPARATE: with SEPARATE the rows begin at these addresses, and ``rows`` says only of
            which dtype they are.
        partials: float64, PAIRS a program and PAIRS a group of GROUP programs, with RUN another PAIRS a program; None
            for one program without RUN.
        tickets: int32 zeros, one and one a group of programs; zeros again when the launch ends; None for one program.
        gramian: (M, M) float64, written.
        weights: (M,) float64, written; None for the Gramian alone.
        out: (n,) of the rows' dtype, written by the one program; None with several.
        direction, tracked, rtol, scratch, LENGTH, DROP: as ``config_rule.write_config_weights``.
        FENCE: as ``arrival.arrived_last``.
        UNROLL: tiles a step.
        RUN: 0 for sums in float64, else how many tiles of rows of at most 32 bits are summed by ``two_float`` at most.
        ALIGNED: every row, and ``out``, begins at a multiple of 16 bytes.

    Traffic: M·n elements read, and with ``out`` again from the cache and n written.
    """
    stride = tl.cast(stride, tl.int64)  # for the interpreter, which takes no notice of annotations
    if SEPARATE:
        addresses = (address0, address1, address2, address3, address4, address5, address6, address7)
        rows = vectors_at(addresses, rows, M)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    apart = None if SEPARATE else stride
    last = gramian_of_few(
        rows,
        apart,
        None,
        n,
        partials,
        tickets,
        gramian,
        program,
        programs,
        M,
        MP,
        PAIRS,
        THREADS,
        VECTOR,
        UNROLL,
        ALIGNED,
        GROUP,
        FENCE,
        RUN,
    )
    if weights is not None:
        if last:
            write_config_weights(gramian, weights, direction, tracked, rtol, scratch, M, MP, LENGTH, DROP)
            if out is not None:
                tl.debug_barrier()
                combine_tiles(rows, apart, n, weights, out, program, programs, M, THREADS, VECTOR, ALIGNED)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def config_of_many(
    rows,
    stride: tl.int64,
    n: tl.int64,
    partials,
    tickets,
    gramian,
    weights,
    direction,
    tracked: tl.int32,
    rtol: tl.float64,
    scratch,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    LENGTH: tl.constexpr,
    DROP: tl.constexpr,
    DTYPE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    FENCE: tl.constexpr,
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
    last = gramian_of_many(
        rows,
        tl.cast(stride, tl.int64),  # as above
        None,
        n,
        partials,
        tickets,
        gramian,
        M,
        LEFT,
        RIGHT,
        DTYPE,
        None,
        WARPS,
        DEPTH,
        ALIGNED,
        GROUP,
        FENCE,
        weights is not None,
    )
    if weights is not None:
        if last:
            write_config_weights(gramian, weights, direction, tracked, rtol, scratch, M, MP, LENGTH, DROP)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def config_of_blocks(
    rows,
    stride: tl.int64,
    n: tl.int64,
    partials,
    tickets,
    gramian,
    weights,
    direction,
    tracked: tl.int32,
    rtol: tl.float64,
    scratch,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    LENGTH: tl.constexpr,
    DROP: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    RUN: tl.constexpr,
    TWO_FLOAT: tl.constexpr,
    GROUP: tl.constexpr,
    FENCE: tl.constexpr,
):
    """As ``config_of_many`` without matrix units: by blocks of BLOCK rows, whose pairs a thread's registers hold.

    Args:
        rows, stride, n, gramian, weights, direction, tracked, rtol, scratch, LENGTH, DROP, FENCE, ALIGNED: as
            ``config_of_many``.
        partials: float64, 2·PAIRS a program and PAIRS a group of GROUP programs of a pair of blocks.
        tickets: int32 zeros, one, and for each pair of blocks one and one a group; zeros again when the launch ends.
        RUN: how many tiles are summed at most before their sums join those in float64.
        TWO_FLOAT: whether these are by ``two_float``, of rows of at most 32 bits, or in float64 themselves.

    Traffic: M·n elements read, of B blocks B + 1 times, all but the first from the cache.
    """
    last = gramian_by_blocks(
        rows,
        tl.cast(stride, tl.int64),  # as above
        n,
        partials,
        tickets,
        gramian,
        M,
        BLOCK,
        DTYPE,
        PAIRS,
        THREADS,
        VECTOR,
        RUN,
        ALIGNED,
        TWO_FLOAT,
        GROUP,
        FENCE,
        weights is not None,
    )
    if weights is not None:
        if last:
            write_config_weights(gramian, weights, direction, tracked, rtol, scratch, M, MP, LENGTH, DROP)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def combination(
    rows,
    stride: tl.int64,
    n: tl.int64,
    address0: tl.int64,
    address1: tl.int64,
    address2: tl.int64,
    address3: tl.int64,
    address4: tl.int64,
    address5: tl.int64,
    address6: tl.int64,
    address7: tl.int64,
    weights,
    out,
    SEPARATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Σ c_i g_i into ``out``.

    Args:
        rows, stride: as ``config_of_few``; of more than 8 separate rows, as ``rows.row_pointers`` has them.
        n: columns.
        address0 to address7, SEPARATE: as ``config_of_few``.
        weights: (M,) float64.
        out: (n,) of the rows' dtype, written.
        ALIGNED: every row, and ``out``, begins at a multiple of 16 bytes.

    Traffic: (k + 1)·n elements, k the number of non-zero weights.
    """
    stride = tl.cast(stride, tl.int64)  # as above
    if SEPARATE:
        addresses = (address0, address1, address2, address3, address4, address5, address6, address7)
        rows = vectors_at(addresses, rows, M)
    apart = None if SEPARATE else stride
    combine_tiles(rows, apart, n, weights, out, tl.program_id(0), tl.num_programs(0), M, THREADS, VECTOR, ALIGNED)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def graddrop(
    rows,
    stride: tl.int64,
    n: tl.int64,
    address0: tl.int64,
    address1: tl.int64,
    address2: tl.int64,
    address3: tl.int64,
    leak,
    seed,
    column: tl.int64,
    out,
    SEPARATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    M: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """GradDrop's combination into ``out``.

    Args:
        rows, stride: as ``config_of_few``; of more than 4 separate rows, as ``rows.row_pointers`` has them.
        n: columns.
        address0 to address3, SEPARATE: as ``config_of_few``.
        leak: (M,) float64; None for zeros.
        seed: one int64 in memory.
        column: the number of the first column.
        out: (n,) of the rows' dtype, written.
        ALIGNED: every row, and ``out``, begins at a multiple of 16 bytes.
        SPLIT: ``column`` is no multiple of four.

    Traffic: (M + 1)·n elements.
    """
    stride = tl.cast(stride, tl.int64)  # as above
    if SEPARATE:
        rows = vectors_at((address0, address1, address2, address3), rows, M)
    program, programs = tl.program_id(0), tl.num_programs(0)
    key = tl.load(seed)
    apart = None if SEPARATE else stride
    drop_tiles(rows, apart, n, leak, key, column, out, program, programs, M, THREADS, VECTOR, ALIGNED, SPLIT)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def table_of_addresses(
    table,
    first: tl.int32,
    count: tl.int32,
    address0: tl.int64,
    address1: tl.int64,
    address2: tl.int64,
    address3: tl.int64,
    address4: tl.int64,
    address5: tl.int64,
    address6: tl.int64,
    address7: tl.int64,
    address8: tl.int64,
    address9: tl.int64,
    address10: tl.int64,
    address11: tl.int64,
    address12: tl.int64,
    address13: tl.int64,
    address14: tl.int64,
    address15: tl.int64,
):
    """Write up to 16 addresses into a table of int64, from place ``first`` on, without the host's memory."""
    low = (address0, address1, address2, address3, address4, address5, address6, address7)
    high = (address8, address9, address10, address11, address12, address13, address14, address15)
    for u in tl.static_range(8):
        tl.store(table + first + u, low[u], mask=u < count)
        tl.store(table + first + 8 + u, high[u], mask=8 + u < count)
