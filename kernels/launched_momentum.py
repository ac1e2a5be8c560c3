"""The kernels of M-ConFIG's step that are launched: one that looks and decides, one that writes; or both in one.

Every launch has one axis of programs. Which losses have a gradient, and how many, is data: no step compiles anything.
"""

import triton
import triton.language as tl

from .arrival import add_up
from .averages import few_gradients
from .decision import HEAD, write_decision
from .whole_gramian import gramian_of_few, gramian_of_many
from .writing import write_tiles

# As ``launched.UNSPECIALIZED``, of which the arguments of the same names are here, too.
UNSPECIALIZED = [
    "averages",
    "stride",
    "n",
    *(f"address{u}" for u in range(8)),
    "slots",
    "recorded",
    "scales",
    "count",
    "table",
    "beta1",
    "beta2",
    "partials",
    "tickets",
    "gramian",
    "ledger_gramian",
    "ledger_weights",
    "ledger_counts",
    "ledger_totals",
    "numbers",
    "found_inf",
    "weights",
    "direction",
    "tracked",
    "rtol",
    "second",
    "pieces",
    "ranges",
    "groups",
    "measured",
]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def moments_of_few(
    averages,
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
    slots: tl.int64,
    recorded: tl.int64,
    scales,
    count: tl.int32,
    beta1: tl.float64,
    beta2: tl.float64,
    partials,
    tickets,
    gramian,
    ledger_gramian,
    ledger_weights,
    ledger_counts,
    ledger_totals,
    numbers,
    found_inf,
    weights,
    direction,
    tracked: tl.int32,
    rtol: tl.float64,
    scratch,
    second,
    pieces,
    ranges,
    groups,
    GRADIENT: tl.constexpr,
    PARAMETER: tl.constexpr,
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
    """Gramian of up to 8 new averages; with ``numbers`` the decision, too; by one program with ``second``, the step.

    Args:
        averages, stride: as ``writing.write_tiles``.
        n: columns.
        address0 to address7, slots, recorded: as ``averages.few_gradients``.
        scales: (count,) float64, what each gradient is multiplied by.
        partials, tickets, FENCE: as ``launched.config_of_few``.
        gramian: (M, M) float64, written; with ``numbers`` it ends as that of the unbiased averages.
        ledger_gramian ... scratch, LENGTH, DROP: as ``decision.write_decision``, with ``numbers``; None for the
            Gramian alone.
        second, pieces, ranges, groups, PARAMETER: as ``writing.write_tiles``; None where another launch writes.
        ALIGNED: as ``writing.write_tiles``.

    Traffic: (M + k)·n elements read; with ``second`` then what ``writing`` says.
    """
    stride = tl.cast(stride, tl.int64)  # for the interpreter, which takes no notice of annotations
    addresses = (address0, address1, address2, address3, address4, address5, address6, address7)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    last = gramian_of_few(
        averages,
        stride,
        few_gradients(addresses, slots, recorded, scales, beta1, M, GRADIENT),
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
        0,
    )
    if numbers is not None:
        if last:
            write_decision(
                gramian,
                ledger_gramian,
                ledger_weights,
                ledger_counts,
                ledger_totals,
                numbers,
                recorded,
                scales,
                count,
                beta1,
                beta2,
                found_inf,
                weights,
                direction,
                tracked,
                rtol,
                scratch,
                M,
                MP,
                LENGTH,
                DROP,
            )
            if second is not None:
                tl.debug_barrier()
                write_tiles(
                    averages,
                    stride,
                    few_gradients(addresses, slots, recorded, scales, beta1, M, GRADIENT),
                    second,
                    pieces,
                    ranges,
                    groups,
                    numbers,
                    beta2,
                    n,
                    program,
                    programs,
                    M,
                    GRADIENT,
                    PARAMETER,
                    THREADS,
                    VECTOR,
                    ALIGNED,
                    True,
                )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def moments_of_many(
    averages,
    stride: tl.int64,
    n: tl.int64,
    table,
    recorded: tl.int64,
    scales,
    count: tl.int32,
    beta1: tl.float64,
    beta2: tl.float64,
    partials,
    tickets,
    gramian,
    ledger_gramian,
    ledger_weights,
    ledger_counts,
    ledger_totals,
    numbers,
    found_inf,
    weights,
    direction,
    tracked: tl.int32,
    rtol: tl.float64,
    scratch,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
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
    """Gramian of any number of new averages by blocks of 16; with ``numbers`` the decision of up to 64 losses, too.

    Args:
        table: (2·M,) int64, where each loss's gradient begins, 0 where it has none, and the places of their scales.
        partials, tickets, LEFT, RIGHT, WARPS, DEPTH, FENCE: as ``launched.config_of_many``.
        The rest: as ``moments_of_few``; ``averages`` are of DTYPE.

    Traffic: as ``launched.config_of_many``, and the gradients as often as the averages.
    """
    last = gramian_of_many(
        averages,
        tl.cast(stride, tl.int64),  # as above
        (table, scales, beta1),
        n,
        partials,
        tickets,
        gramian,
        M,
        LEFT,
        RIGHT,
        DTYPE,
        GRADIENT,
        WARPS,
        DEPTH,
        ALIGNED,
        GROUP,
        FENCE,
        numbers is not None,
    )
    if numbers is not None:
        if last:
            write_decision(
                gramian,
                ledger_gramian,
                ledger_weights,
                ledger_counts,
                ledger_totals,
                numbers,
                recorded,
                scales,
                count,
                beta1,
                beta2,
                found_inf,
                weights,
                direction,
                tracked,
                rtol,
                scratch,
                M,
                MP,
                LENGTH,
                DROP,
            )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def momentum_update(
    averages,
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
    slots: tl.int64,
    recorded: tl.int64,
    table,
    numbers,
    beta1: tl.float64,
    beta2: tl.float64,
    second,
    pieces,
    ranges,
    groups,
    partials,
    tickets,
    measured,
    GRADIENT: tl.constexpr,
    PARAMETER: tl.constexpr,
    M: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    FENCE: tl.constexpr,
):
    """Write new averages, second moment and parameters; with ``measured`` find |update|² and write nothing else.

    Args:
        averages ... recorded: as ``moments_of_few``; more than 8 averages have a ``table``, as ``moments_of_many``.
        second, pieces, ranges, groups, numbers, beta2, ALIGNED: as ``writing.write_tiles``.
        partials, tickets: as ``arrival.add_up``, of one number a program, with ``measured``.
        measured: one float64, written; or None.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    scales = numbers + HEAD + 2 * M
    if table is None:
        addresses = (address0, address1, address2, address3, address4, address5, address6, address7)
        gradients = few_gradients(addresses, slots, recorded, scales, beta1, M, GRADIENT)
    else:
        gradients = (table, scales, beta1)
    share = write_tiles(
        averages,
        tl.cast(stride, tl.int64),  # as above
        gradients,
        second,
        pieces,
        ranges,
        groups,
        numbers,
        beta2,
        n,
        program,
        programs,
        M,
        GRADIENT,
        PARAMETER,
        THREADS,
        VECTOR,
        ALIGNED,
        measured is None,
    )
    if measured is not None:
        last, total = add_up(tl.zeros([1], tl.float64) + share, partials, tickets, program, programs, 1, GROUP, FENCE)
        if last:
            tl.store(measured + tl.arange(0, 1), total)
