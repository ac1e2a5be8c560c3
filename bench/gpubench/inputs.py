"""Gradients to combine, in as many copies as the second-level cache asks for, and the calls that combine them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpubench.results import Run
from gpubench.shapes import Shape
from gpubench.timing import Call


def copies_needed(shape: Shape, cache_bytes: int, memory_bytes: int) -> int:
    """How many sets of buffers exceed the cache three times over, as far as a third of the memory holds them."""
    each = (shape.m + 1) * shape.n * shape.dtype.itemsize
    return max(1, min(math.ceil(3 * cache_bytes / each), memory_bytes // 3 // each, 1024))


def gradients(shape: Shape, run: Run, copies: int | None = None, row_bytes: int = 1) -> Tensor:
    """(copies, m, n): independent normal rows at scales 1 : 100 : 0.01, repeated, a multiple of row_bytes apart."""
    if copies is None:
        memory = torch.cuda.mem_get_info()[0] if run.on_gpu else 1 << 28
        copies = copies_needed(shape, run.cache_bytes, memory)
    elements = math.lcm(row_bytes, shape.dtype.itemsize) // shape.dtype.itemsize
    padded = -(-shape.n // elements) * elements
    generator = torch.Generator(run.device).manual_seed(shape.m)
    block = torch.empty(copies, shape.m, padded, dtype=shape.dtype, device=run.device)[:, :, : shape.n]
    for one in block:
        for i, row in enumerate(one):
            row.normal_(generator=generator).mul_((1.0, 100.0, 0.01)[i % 3])
    return block


def combinations(block: Tensor) -> list[Call]:
    """fc.combine of each set of gradients into an output of its own."""
    import fastconfig as fc

    outs = torch.empty(len(block), block.shape[2], dtype=block.dtype, device=block.device)
    return [lambda grads=grads, out=out: fc.combine(grads, out=out) for grads, out in zip(block, outs, strict=True)]
