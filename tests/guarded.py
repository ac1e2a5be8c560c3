"""Gradients and outputs whose every neighbour in memory would show in the answer, and how near an answer must come."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastconfig.backends.rows import Rows


def rows_in_poison(
    m: int, n: int, dtype: torch.dtype, layout: str, seed: int = 0, device: str = "cpu"
) -> Tensor | list[Tensor]:
    """m gradients of mixed scales whose every neighbour in memory is NaN, so that one element read too far shows."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, m, dtype=torch.float64).unsqueeze(1)
    values = (torch.randn(m, n, generator=generator, dtype=torch.float64) * scales).to(dtype)
    if layout == "vectors":
        separate = [
            torch.full((n + 2 * (i % 5 + 1),), math.nan, dtype=dtype, device=device)[i % 5 + 1 :][:n] for i in range(m)
        ]
        for vector, value in zip(separate, values, strict=True):
            vector.copy_(value)
        return separate
    padding = {"contiguous": 0, "padded": 3, "aligned": -n % 64 + 64, "far": 4097}[layout]
    block = torch.full((m + 2, n + padding), math.nan, dtype=dtype, device=device)
    matrix = block[1:-1, :n]
    matrix.copy_(values)
    return matrix


def poisoned(n: int, dtype: torch.dtype, offset: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A (n,) output of NaN inside a guarded block of -1."""
    block = torch.full((n + 16 + offset,), -1.0, dtype=dtype, device=device)
    out = block[8 + offset : 8 + offset + n]
    out.fill_(math.nan)
    return block, out


def assert_close_in_units(got: Tensor, wanted: Tensor, dtype: torch.dtype, scale: Tensor) -> None:
    """Both are rounded once from nearly equal float64 values: they differ by one unit in the last place, no more."""
    assert torch.isfinite(got).all()
    got, wanted = got.to(torch.float64), wanted.to(torch.float64)
    unit = torch.finfo(dtype).eps * wanted.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (got - wanted).abs().le(unit + 1e-13 * scale).all()


def row_of(rows: Rows, i: int) -> Tensor:
    return (rows.vectors[i] if rows.matrix is None else rows.matrix[i]).to(torch.float64)
