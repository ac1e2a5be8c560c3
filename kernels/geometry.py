"""How the kernels are launched: warps, tiles and programs by number of losses, dtype and size, with the reasons.

Plain numbers; nothing here is found by trying at a user's first step. ``FASTCONFIG_AUTOTUNE=1`` asks for that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

FEW = 8
"""Up to here every pair of losses is summed in a thread's registers: 36 float64 sums are 72 registers. Above, the pairs
outgrow them and the matrix units take over."""

PAIRED = 6
"""Rows of a block, at most, whose pairs with another's a thread holds: 36 of 2 registers, with 24 for the rows'
addresses and 48 for a vector of each. Seven spill."""

DROPPED_TOGETHER = 4
"""Rows of GradDrop whose loads are under way together: of 16-bit ones the sums by sign leave no registers for more."""

SOLVED = 64
"""Up to here one program solves the m×m problem, a matrix at a time in its registers: 16 numbers a thread."""

BLOCK_ROWS = 16
"""Rows of one operand of a matrix product of tiles, the least that the matrix units take."""

VECTOR_BYTES = 16
"""The widest load of a thread."""

ONE_LAUNCH_BYTES = 128 << 10
"""Up to this many bytes of gradients one program does everything: three losses on a network of 10,000 parameters.
It reads at what one multiprocessor can, about 50 GB/s, so that more bytes are sooner read by all of them and a second
launch. The figure is computed, not measured; ``bench/gpu.py`` times both sides of it."""

ONE_LAUNCH_BYTES_OF_FEW_UNITS = 16 << 10
"""The same on devices with few float64 units, in which one program combines: of 16 KiB in 1.6 µs."""

RUN_COLUMNS = 128
"""Columns that a thread sums by ``two_float`` at most before the sum joins those in float64: its error's bound grows
with them, while adding up the sums of a program's threads takes as long as 9 columns a thread do."""

PIECE_COLUMNS = 512
"""Columns of a segment between entries of the table that says which parameters meet them: a tile of four warps."""

PIECE_WORDS = 4
GROUP_WORDS = 8
"""64-bit words of an entry of the tables of parameters and of groups; see ``parameters``."""

RULE_VECTORS = 16
"""Vectors that a method's rule has room for."""

REGISTERS = 65536
"""32-bit registers of an NVIDIA multiprocessor, the same on every architecture since 2014."""


@cache
def registers(warps: int, programs: int) -> int:
    """At most how many registers a thread may have for ``programs`` of ``warps`` to run at once (NVIDIA).

    Told to the compiler, which else spills a few to reach an occupancy that nobody asked for.
    """
    return min(255, REGISTERS // (32 * warps * programs) // 8 * 8)


@dataclass(frozen=True)
class Few:
    """``config_of_few``: up to 8 losses."""

    warps: int
    unroll: int
    programs: int
    """At most how many a multiprocessor."""
    group: int = 32
    """Programs whose partial sums the first level of the reduction adds up; two levels hold its square."""


@dataclass(frozen=True)
class Many:
    """``config_of_many``: from 9 losses on."""

    left: int
    right: int
    """Blocks of 16 rows in a program; right = 0 where all of them are, see the kernel."""
    depth: int
    """Columns of a tile a warp."""
    warps: int = 8
    """Each warp sums for itself; eight hold a matrix of 64 losses in 32 registers a thread when the last one solves."""
    programs: int = 1
    group: int = 16

    def strip_pairs(self, m: int) -> int:
        """How many pairs of strips, each with programs of its own, the rows make."""
        strips = -(-m // (BLOCK_ROWS * self.left))
        return strips * (strips + 1) // 2

    def partial_elements(self) -> int:
        """Numbers of one program's partial sums."""
        blocks = self.left * self.right if self.right else self.left * (self.left + 1) // 2
        return blocks * BLOCK_ROWS * BLOCK_ROWS


@dataclass(frozen=True)
class Blocks:
    """``config_of_blocks``: from 9 losses on, where there are no matrix units for float64 or few units at all."""

    block: int
    """Rows of a block."""
    warps: int = 8
    programs: int = 1
    """At most how many a multiprocessor."""
    group: int = 32

    def block_pairs(self, m: int) -> int:
        """How many pairs of blocks, each with programs of its own, the rows make."""
        blocks = -(-m // self.block)
        return blocks * (blocks + 1) // 2

    def most(self, m: int, multiprocessors: int) -> int:
        """At most how many programs a pair of blocks, so that the last wave of them all is nearly full, too.

        One wave would leave half of 128 multiprocessors idle at 64 losses, whose pairs of blocks are 66. Programs wait
        for no other, so there may be several waves; the fewest that fill nine tenths, or else those that fill most.
        """
        pairs, at_once = self.block_pairs(m), self.programs * multiprocessors

        def filled(waves: int) -> float:
            return waves * at_once // pairs * pairs / (waves * at_once)

        waves = next((waves for waves in range(1, 9) if filled(waves) >= 0.9), max(range(1, 9), key=filled))
        return max(1, waves * at_once // pairs)


@dataclass(frozen=True)
class Combination:
    """``combination`` and ``graddrop``, for any number of losses."""

    programs: int
    warps: int = 4


@cache
def few(m: int) -> tuple[Few, ...]:
    """Launches of the Gramian of up to 8 losses over many programs, the one to take first.

    A multiprocessor needs about 32 KiB of loads under way to keep its share of the memory busy. A thread has m·unroll
    loads of 16 bytes: with 896 threads (7 programs of 4 warps, 72 registers a thread) and m·unroll ≥ 3 that is 42 KiB.
    From 5 losses on the sums need more registers, so fewer threads run, with as many bytes under way.
    """
    if m <= 4:
        unroll = 2 if m <= 2 else 1
        return (
            Few(warps=4, unroll=unroll, programs=7),
            Few(warps=4, unroll=2 * unroll, programs=5),
            Few(warps=8, unroll=unroll, programs=3),
        )
    return Few(warps=4, unroll=1, programs=4 if m <= 6 else 3), Few(warps=8, unroll=1, programs=2 if m <= 6 else 1)


@cache
def one(m: int) -> Few:
    """The launch of the whole problem by one program: 8 warps, whose two tiles under way hide the latency."""
    return Few(warps=8, unroll=2 if m <= 4 else 1, programs=1)


@cache
def many(m: int, itemsize: int, lanes: int) -> tuple[Many, ...]:
    """Launches of the Gramian of 9 and more losses, the one to take first.

    Up to 48 losses a program forms all pairs of up to three blocks, 6 sums of 256 over 8 warps: 96 registers a thread.
    Beyond, strips of two blocks a program, 4 sums. A warp takes as many columns as give each of its lanes 16 bytes of a
    block of 16 rows, and 16 at least, the depth of NVIDIA's largest product; of one block alone twice as many, for
    more loads under way.
    """
    blocks = -(-m // BLOCK_ROWS)
    depth = max(16, VECTOR_BYTES * lanes // (BLOCK_ROWS * itemsize))
    if blocks == 1 and itemsize < 8:
        return Many(left=1, right=0, depth=32, programs=2), Many(left=1, right=0, depth=depth, programs=2)
    if blocks == 1:
        return (Many(left=1, right=0, depth=depth, programs=2),)
    if blocks <= 3:
        return (Many(left=blocks, right=0, depth=depth),)
    return (Many(left=2, right=2, depth=depth),)


@cache
def few_in_two_floats(m: int) -> Few:
    """The launch of the Gramian of up to 8 losses by ``two_float``.

    A thread holds two numbers a pair, and of each row a vector and the largest element; the memory of a consumer card
    is kept busy by fewer loads under way, as it gives a multiprocessor a seventh of what an H100's does.
    """
    return Few(warps=4, unroll=1, programs=6 if m <= 3 else 4 if m <= 5 else 3 if m <= 6 else 2)


@cache
def blocks(m: int) -> Blocks:
    """The launch of the Gramian of 9 and more losses by pairs of blocks: as few as hold them.

    Smaller blocks would read the rows more often, from the cache; of 40 losses these read them 8 times for 1008
    products a column, where 820 are wanted.
    """
    return Blocks(block=-(-m // -(-m // PAIRED)))


@cache
def combination(m: int) -> tuple[Combination, ...]:
    """Launches of the combination: bound by memory alone, so as many threads as their registers allow."""
    if m > FEW:
        return Combination(programs=6), Combination(warps=8, programs=3)
    return Combination(programs=8), Combination(programs=12), Combination(warps=8, programs=4)


@cache
def graddrop(m: int, itemsize: int, split: bool) -> Combination:
    """The launch of GradDrop: a thread has up to four float64 sums a column in its registers, and draws.

    That is half as many threads as the combination has, with 128 registers each. Where each column draws by itself
    (``split``), and of 16-bit rows, of which a thread takes eight columns, 168 hold up to four rows, 255 any number.
    """
    if itemsize > 2 and not split:
        return Combination(programs=4)
    programs = 3 if m <= DROPPED_TOGETHER else 2
    return Combination(programs=programs)


@cache
def look(m: int) -> Few:
    """The launch of the Gramian of up to 8 averages with gradients in them.

    As ``few``, with at least one more load a thread under way, and the averages in registers as long as the gradients
    are: so fewer programs. It is not tuned by trying: a step that is taken twice is another step.
    """
    return Few(warps=4, unroll=1, programs=5 if m <= 3 else 4 if m <= 4 else 3 if m <= 6 else 2)


@cache
def look_many(m: int, itemsize: int, lanes: int) -> Many:
    """The launch of the Gramian of more than 8 averages with gradients in them.

    As ``many``; but of float64 averages, beside which their gradients lie in registers until they are used, a program
    takes one block and another, and not all of them or pairs of two. Triton 3.6 has no tiles of fewer columns.
    """
    launch = many(m, itemsize, lanes)[0]
    return replace(launch, left=1, right=1) if itemsize == 8 and m > BLOCK_ROWS else launch


@cache
def write(m: int) -> Combination:
    """The launch that writes averages, second moment and parameters; nor is this tuned.

    A thread has m + k + 2 loads of 16 bytes under way, and its new averages in registers until they are written.
    """
    return Combination(programs=4 if m <= 2 else 3)


def pairs(m: int) -> int:
    """The power of two that holds the pairs of m rows, a row with itself included."""
    return power_of_two(m * (m + 1) // 2)


def solve_warps(m: int, parts: int = 0) -> int:
    """Warps of a program that turns a given Gramian into weights, or one of several parts of them.

    It takes many short steps, each ended by barriers and sums over all warps, which one warp does without; from 9
    losses on the steps are long enough for four, and beyond 32 eight have the registers for a matrix beside what is
    made of it. More would share the arithmetic, of which there is little, and pay for it at every sum. Of several
    parts, two warps at least: the barrier of a lone one, which orders its stores before its ticket, AMD's compiler
    leaves out.
    """
    return max(1 if m <= 8 else 4 if m <= 32 else 8, 2 if parts else 1)


def programs(n: int, tile: int, most: int, group: int | None = None, wave: int = 1) -> int:
    """How many programs: a tile each at least, no more than run at once, nor than two levels of groups add up.

    Where the groups are the limit, as on 304 multiprocessors, it is a multiple of ``wave``, the multiprocessors: else
    some would have a program more than the others, and all wait for these.
    """
    limit = most if group is None else min(most, group * group)
    if wave < limit < most:
        limit -= limit % wave
    return max(1, min(-(-n // tile), limit))


@cache
def scratch_elements(m: int) -> int:
    """float64 numbers that the solve works in: two matrices and six vectors."""
    padded = power_of_two(m)
    return 2 * padded * padded + 6 * padded


@cache
def rule_elements(m: int, parts: int) -> int:
    """float64 numbers that a method's rule works in: vectors and four matrices.

    Where it is solved in ``parts``, not 0, vectors and three matrices each, and a vector for its result.
    """
    padded = power_of_two(m)
    if parts == 0:
        return RULE_VECTORS * padded + 4 * padded * padded
    return parts * (RULE_VECTORS * padded + 3 * padded * padded + padded)


@cache
def power_of_two(count: int) -> int:
    """The least power of two from 2 on that holds ``count``."""
    return max(2, 1 << (count - 1).bit_length())
