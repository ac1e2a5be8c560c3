"""How one launch ends in one program: the last to arrive adds up the others' partial sums, in the order of programs.

Two levels, so that no program reads more than a few hundred partial sums by itself: the last of each group of programs
adds up the group's, the last of these adds up the groups'. Which program that is varies; the order of the sums does
not, so a device gives the same bits every time.
"""

import triton
import triton.language as tl


@triton.jit
def arrived_last(ticket, count, FENCE: tl.constexpr):
    """Whether this program is the last of ``count`` to arrive here; what the others stored before is then visible.

    The barrier makes all of this program's stores happen before its ticket: the atomic orders one thread's alone. The
    last to arrive leaves the ticket at zero for the next launch, so that no launch has to clear it.

    Args:
        FENCE: 0 where a barrier orders the memory of all its threads for the whole device, as NVIDIA's does. AMD's
            lets a wavefront pass whose stores are still under way, and the ticket's wavefront then waits for its own
            alone: there FENCE is the program's threads, and one thread of each wavefront at least adds nothing to
            the ticket, which makes it wait for its stores.
    """
    if FENCE > 0:
        thread = tl.arange(0, FENCE)
        tl.atomic_add(ticket + thread * 0, 0, mask=thread % 32 == 0, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == count - 1
    tl.store(ticket, 0, mask=last)
    return last


@triton.jit
def sum_of_partials(partials, first, count, offset, SIZE: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """[WIDTH] Σ over ``count`` ≤ STEP partial sums from number ``first`` on, of their elements from ``offset`` on.

    Args:
        partials: SIZE float64 a program, one after the other.
    """
    program = tl.arange(0, STEP)[:, None]
    where = (first + program) * SIZE + offset + tl.arange(0, WIDTH)[None, :]
    # Past the L1 cache, which other programs' stores do not update.
    values = tl.load(partials + where, mask=program < count, other=0.0, cache_modifier=".cg")
    return tl.sum(values, axis=0)


@triton.jit
def add_up(
    values,
    partials,
    tickets,
    program,
    programs,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    FENCE: tl.constexpr,
):
    """(whether this program is the last, Σ over all programs of ``values`` [WIDTH]), the sum for the last one alone.

    Args:
        partials: float64, WIDTH a program and WIDTH a group of GROUP programs.
        tickets: int32 zeros, one and one a group; zeros again in the end.
    """
    slots = tl.arange(0, WIDTH)
    tl.store(partials + program * WIDTH + slots, values)
    group = program // GROUP
    groups = tl.cdiv(programs, GROUP)
    first = group * GROUP
    size = tl.minimum(programs - first, GROUP)
    last = arrived_last(tickets + 1 + group, size, FENCE)
    if last:
        values = sum_of_partials(partials, first, size, 0, WIDTH, GROUP, WIDTH)
        tl.store(partials + (programs + group) * WIDTH + slots, values)
        last = arrived_last(tickets, groups, FENCE)
        if last:
            values = sum_of_partials(partials, programs, groups, 0, WIDTH, GROUP, WIDTH)
    return last, values
