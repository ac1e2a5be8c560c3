"""The pass of M-ConFIG's step that writes: new averages, second moment and parameters, or only how long the update is.

Traffic: the averages of weight and those that take a gradient are read, the k gradients, second moment and parameters;
k averages, second moment and parameters are written: (m + k + 2)·n elements read and (k + 2)·n written at most.

Tiles lie on the segment's own columns, so that its rows are read and written by 16 bytes. Parameters lie anywhere, and
a tile may meet many of them: theirs alone are narrower loads, those of the tile's first under way with the rows'.
"""

import triton
import triton.language as tl

from . import geometry
from .averages import few_renewed, gradient_tile, is_recorded, table_address, table_renewed
from .decision import HEAD
from .parameters import group_numbers, parameter_pointers, parameter_values, piece_columns, pieces_in
from .rows import rounded, tile_columns, tile_pointers, uniform, widened

FEW = tl.constexpr(geometry.FEW)
TOGETHER = tl.constexpr(4)
"""At most how many rows' loads are under way together: old averages, gradients and new averages fill registers."""


@triton.jit
def gradient_of(gradients, i, M: tl.constexpr, GRADIENT: tl.constexpr):
    """Where loss i's gradient begins, and whether there is one."""
    if M <= FEW:
        address = gradients[0][0].to(tl.int64)
        for u in tl.static_range(1, M):
            address = tl.where(i == u, gradients[0][u].to(tl.int64), address)
        return address.to(tl.pointer_type(GRADIENT)), is_recorded(gradients[1], i)
    else:
        address = table_address(gradients[0], i, i < M)
        return address.to(tl.pointer_type(GRADIENT)), address != 0


@triton.jit
def weights_of(numbers, i, update, M: tl.constexpr):
    """The forward and the backward weight of row i; zeros where averages alone are written."""
    there = update & (i < M)
    forward = tl.load(numbers + HEAD + i, mask=there, other=0.0)
    return forward, tl.load(numbers + HEAD + M + i, mask=there, other=0.0)


@triton.jit
def state_tile(pointers, mask):
    """Elements of an average or of the second moment."""
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def add_rows(
    f,
    before,
    averages,
    stride,
    gradients,
    numbers,
    take,
    update,
    first,
    start,
    inside,
    M: tl.constexpr,
    COUNT: tl.constexpr,
    GRADIENT: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    WRITES: tl.constexpr,
):
    """Add COUNT rows' share to f_t and β₁ f_{t-1}, and write those that have a gradient.

    All loads come before the first use and all stores after the last load, as the compiler keeps loads and stores in
    order. A row that is neither of weight nor to be written is not read.
    """
    rows = ()
    for u in tl.static_range(COUNT):
        i = first + u
        row, recorded = gradient_of(gradients, i, M, GRADIENT)
        recorded = recorded & take
        forward, backward = weights_of(numbers, i, update, M)
        used = (forward != 0.0) | (backward != 0.0)
        read, entering = uniform(used | recorded), uniform(recorded)
        if inside is not None:
            read, entering = read & inside, entering & inside
        pointers = tile_pointers(averages + i * stride, start, THREADS, VECTOR, ALIGNED)
        old = state_tile(pointers, read)
        gradient = gradient_tile(tile_pointers(row, start, THREADS, VECTOR, ALIGNED), entering)
        rows = rows + ((pointers, entering, old, gradient, recorded, forward, backward),)
    written = ()
    for u in tl.static_range(COUNT):
        _, _, old, gradient, recorded, forward, backward = rows[u]
        new = old
        if recorded:
            if M <= FEW:
                new = few_renewed(old, gradient, gradients, first + u)
            else:
                new = table_renewed(old, gradient, gradients, first + u, recorded, M)
        f = tl.fma(widened(new), forward, f)
        before = tl.fma(widened(old), backward, before)
        written = written + (new,)
    if WRITES:
        for u in tl.static_range(COUNT):
            tl.store(rows[u][0], written[u], mask=rows[u][1])
    return f, before


@triton.jit
def second_of(old, change, beta1, beta2):
    """v ← β₂ v + (1 - β₂) q², q = change/(1 - β₁), in float64, rounded once to the dtype it is stored in."""
    q = change * (1.0 / (1.0 - beta1))
    return rounded(widened(old) * beta2 + q * q * (1.0 - beta2), old.dtype)


@triton.jit
def update_of(f, v, gradient, second, eps):
    """ĝ/(√v̂ + ε), in float64 of float64 averages; else root and quotient are float32's, each rounded correctly.

    The root is that of v, not of v̂, which may leave float32's range; an infinite one makes zero of any ĝ.
    """
    if tl.constexpr(v.dtype == tl.float64):
        return f * gradient / (tl.sqrt(v * second) + eps)
    else:
        below = tl.sqrt_rn(v) * tl.sqrt(second).to(tl.float32) + eps.to(tl.float32)
        quotient = tl.div_rn((f * gradient).to(tl.float32), below)
        return tl.where(below == float("inf"), 0.0, quotient).to(tl.float64)


@triton.jit
def write_tile(
    measured,
    averages,
    stride,
    gradients,
    second,
    pieces,
    ranges,
    groups,
    numbers,
    beta2,
    n,
    start,
    M: tl.constexpr,
    GRADIENT: tl.constexpr,
    PARAMETER: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    WRITES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write one tile of columns; or add its update's squares to ``measured`` [THREADS, VECTOR]."""
    CHUNKS: tl.constexpr = (M + TOGETHER - 1) // TOGETHER
    COUNT: tl.constexpr = (M + CHUNKS - 1) // CHUNKS
    inside = tile_columns(THREADS, VECTOR) < n - start if MASKED else None
    take = tl.load(numbers) != 0.0
    update = tl.load(numbers + 1) != 0.0
    ahead, last = pieces_in(ranges, start, THREADS * VECTOR, n)
    if WRITES:
        values = parameter_values(pieces, groups, ahead, last, start, update, PARAMETER, THREADS, VECTOR)
    pointers = tile_pointers(second, start, THREADS, VECTOR, ALIGNED)
    reads = uniform(update) if inside is None else uniform(update) & inside
    old = state_tile(pointers, reads)

    f = tl.zeros([THREADS, VECTOR], tl.float64)
    before = tl.zeros([THREADS, VECTOR], tl.float64)
    for first in range(0, M, COUNT):
        f, before = add_rows(
            f, before, averages, stride, gradients, numbers, take, update, first, start, inside,
            M, COUNT, GRADIENT, THREADS, VECTOR, ALIGNED, WRITES,
        )  # fmt: skip
    v = second_of(old, f - before, gradients[2] if M > FEW else gradients[4], beta2)

    kept = old
    for piece in range(ahead, last):
        here = piece_columns(pieces, piece, last, start, THREADS, VECTOR)
        rate, weight_decay, eps, along, assign = group_numbers(pieces, groups, piece)
        step = update_of(f, v, tl.load(numbers + 2), tl.load(numbers + 3), eps)
        if WRITES:
            kept = tl.where(here, v, kept)
            step = step * tl.load(numbers + 4)
            theta = widened(values)
            stepped = theta - rate * weight_decay * theta + along * rate * step
            assigned = tl.where(take, tl.where(update, step, 0.0), float("nan"))
            result = rounded(tl.where(assign, assigned, stepped), PARAMETER)
            where = parameter_pointers(pieces, piece, last, start, PARAMETER, THREADS, VECTOR)
            tl.store(where, result, mask=here & uniform(update | assign))
            values = parameter_values(pieces, groups, piece + 1, last, start, update, PARAMETER, THREADS, VECTOR)
        else:
            measured = tl.where(here & uniform(update), tl.fma(step, step, measured), measured)
    if WRITES:
        tl.store(pointers, kept, mask=reads)
    return measured


@triton.jit
def write_tiles(
    averages,
    stride,
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
    M: tl.constexpr,
    GRADIENT: tl.constexpr,
    PARAMETER: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    WRITES: tl.constexpr,
):
    """Write this program's tiles, last ones first: what was looked at last is still in the cache.

    Args:
        averages, stride: (M, n), row i ``stride`` elements after the one before.
        gradients: as ``averages.few_gradients`` up to 8 rows, else (table, scales, β₁); of dtype GRADIENT.
        second: (n,) of the averages' dtype.
        pieces, ranges, groups: the tables of ``parameters``; the parameters' dtype is PARAMETER.
        numbers: the ``Decision``.
        beta2: float64.
        ALIGNED: averages, gradients and second moment begin at multiples of 16 bytes.
        WRITES: else nothing is written.

    Returns:
        This program's share of |update|², the limit on its norm left out; zero with WRITES.
    """
    TILE: tl.constexpr = THREADS * VECTOR
    size = tl.full([], TILE, tl.int64)
    whole = (n // TILE).to(tl.int32)
    tiles = ((n + TILE - 1) // TILE).to(tl.int32)
    measured = tl.zeros([THREADS, VECTOR], tl.float64)
    for tile in range(whole + program, tiles, programs):
        measured = write_tile(
            measured, averages, stride, gradients, second, pieces, ranges, groups, numbers, beta2, n, tile * size,
            M, GRADIENT, PARAMETER, THREADS, VECTOR, ALIGNED, WRITES, True,
        )  # fmt: skip
    for back in range(program, whole, programs):
        start = (whole - 1 - back) * size
        measured = write_tile(
            measured, averages, stride, gradients, second, pieces, ranges, groups, numbers, beta2, n, start,
            M, GRADIENT, PARAMETER, THREADS, VECTOR, ALIGNED, WRITES, False,
        )  # fmt: skip
    return tl.sum(tl.sum(measured, axis=1), axis=0)
