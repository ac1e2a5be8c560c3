"""Where a segment's parameters lie, and what their groups step by: tables in memory, read by address.

A table of pieces has four int64 a piece, by columns: address, first column, column behind the last, group. ``ranges``
says for every PIECE_COLUMNS columns of the segment which pieces meet them: the first, and the one behind the last,
int32. A table of groups has eight words of 64 bits a group: learning rate, weight decay, ε and ±1 as float64; the
address of a learning rate on the device, or 0, whether that is float64, and whether the update itself is wanted.
"""

import triton
import triton.language as tl

from . import geometry
from .rows import tile_columns, uniform

COLUMNS = tl.constexpr(geometry.PIECE_COLUMNS)
PIECE = tl.constexpr(geometry.PIECE_WORDS)
GROUP = tl.constexpr(geometry.GROUP_WORDS)


@triton.jit
def pieces_in(ranges, start, count: tl.constexpr, n):
    """The pieces that meet the columns from ``start`` on, ``count`` or up to n: the first, and the one behind them."""
    end = tl.minimum(start + count, n)
    return tl.load(ranges + start // COLUMNS * 2), tl.load(ranges + (end - 1) // COLUMNS * 2 + 1)


@triton.jit
def piece_columns(pieces, piece, last, start, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """[THREADS, VECTOR] which columns of the tile are the piece's; none from piece ``last`` on."""
    there = piece < last
    first = within(tl.load(pieces + piece * PIECE + 1, mask=there, other=0) - start, THREADS * VECTOR)
    end = within(tl.load(pieces + piece * PIECE + 2, mask=there, other=0) - start, THREADS * VECTOR)
    columns = tile_columns(THREADS, VECTOR)
    return (columns >= first) & (columns < end)


@triton.jit
def within(column, COUNT: tl.constexpr):
    """A column, or the nearest one of a tile of COUNT or its end: a number of 32 bits, which takes fewer registers."""
    return tl.minimum(tl.maximum(column, 0), COUNT).to(tl.int32)


@triton.jit
def parameter_pointers(pieces, piece, last, start, DTYPE: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """[THREADS, VECTOR] where the tile's columns would lie in the piece's memory."""
    there = piece < last
    address = tl.load(pieces + piece * PIECE, mask=there, other=0)
    first = tl.load(pieces + piece * PIECE + 1, mask=there, other=0)
    return address.to(tl.pointer_type(DTYPE)) + (start - first) + tile_columns(THREADS, VECTOR)


@triton.jit
def takes_update(pieces, groups, piece, last):
    """Not 0 if a piece's memory is for the update itself, and so not to be read."""
    there = piece < last
    group = tl.load(pieces + piece * PIECE + 3, mask=there, other=0)
    return tl.load(groups + group * GROUP + 6, mask=there, other=0)


@triton.jit
def parameter_values(
    pieces, groups, piece, last, start, update, DTYPE: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr
):
    """[THREADS, VECTOR] the piece's values; zero, and not read, elsewhere and where none are wanted."""
    mask = piece_columns(pieces, piece, last, start, THREADS, VECTOR)
    mask = mask & uniform(update & (takes_update(pieces, groups, piece, last) == 0))
    return tl.load(parameter_pointers(pieces, piece, last, start, DTYPE, THREADS, VECTOR), mask=mask, other=0.0)


@triton.jit
def group_numbers(pieces, groups, piece):
    """(learning rate, weight decay, ε, ±1, whether the update itself is wanted) of a piece's group."""
    words = groups + tl.load(pieces + piece * PIECE + 3) * GROUP
    numbers = words.to(tl.pointer_type(tl.float64))
    address = tl.load(words + 4)
    is_double = tl.load(words + 5) != 0
    there = address != 0
    rate = tl.load(numbers)
    single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=there & ~is_double, other=0.0).to(tl.float64)
    double = tl.load(address.to(tl.pointer_type(tl.float64)), mask=there & is_double, other=0.0)
    rate = tl.where(there, tl.where(is_double, double, single), rate)
    return rate, tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3), tl.load(words + 6) != 0
