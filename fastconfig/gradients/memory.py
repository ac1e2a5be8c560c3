"""The large blocks that the library allocates itself: results, rows and averages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastconfig.backends import cpu
from fastconfig.ops import is_traced

ROW_BYTES = 128
"""Rows lie multiples of this apart, a GPU's cache line: unaligned ones cannot be read 16 bytes at a time."""

HUGE_BYTES = 1 << 22
"""From this size on a block on the CPU asks for huge pages: to map 40 MB page by page takes longer than to fill it."""


def fresh(shape: Sequence[int] | int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory without a value, as ``torch.empty``; a large block on the CPU is mapped in huge pages where there are.

    Measured in bench/README.md, "Fresh memory".
    """
    block = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and not is_traced(block):
        _ask_for_huge_pages(block)
    return block


def aligned_rows(count: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, (count, n), contiguous rows a multiple of ``ROW_BYTES`` apart."""
    return aligned_block(count, n, dtype, device)[:, :n]


def aligned_block(count: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The memory of ``aligned_rows``: zeros, (count, n and what pads it), contiguous.

    Raises:
        RuntimeError: PyTorch's own, with what was asked for.
    """
    with torch.inference_mode(False):  # autograd must be able to accumulate into the rows
        padded = n + -n % (ROW_BYTES // dtype.itemsize)
        try:
            return fresh((count, padded), dtype, device).zero_()
        except RuntimeError as error:  # torch.OutOfMemoryError among them, which stays one
            asked = f"{count} rows of {padded:,} elements of {dtype}, {count * padded * dtype.itemsize:,} bytes"
            raise type(error)(f"fastconfig could not allocate {asked} on {device}: {error}") from error


def _ask_for_huge_pages(block: Tensor) -> None:
    size = block.numel() * block.element_size()
    if size >= HUGE_BYTES and cpu.available() is None:
        cpu.advise_huge_pages(block.data_ptr(), size)
