"""The problems that are measured: how many losses, how many parameters, in which type, and in which order."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """A problem: m losses, n parameters."""

    m: int
    n: int
    dtype: torch.dtype = torch.float32

    @property
    def dtype_name(self) -> str:
        return str(self.dtype)[6:]

    @property
    def labels(self) -> dict[str, object]:
        return {"m": self.m, "n": self.n, "dtype": self.dtype_name}

    @property
    def floor_bytes(self) -> int:
        return (2 * self.m * self.n + self.n) * self.dtype.itemsize

    def __str__(self) -> str:
        return name_of(self.labels)


def name_of(labels: dict) -> str:
    return f"({labels['m']}, {labels['n']:.3g}) {labels['dtype']}"


LARGE_MODEL = 171_798_203
SIZES = [
    (3, 10_000),
    (3, 100_000_000),
    (8, 50_000_000),
    (40, 10_000_000),
    (3, 1_000_000),
    (3, LARGE_MODEL),
    (64, 1_000_000),
    (2, 100_000_000),
    (3, 10_000_000),
    (3, 100_000),
    (2, 10_000),
    (2, 100_000),
    (2, 1_000_000),
    (2, 10_000_000),
]
"""The most telling first: what comes last is what a short run leaves out."""
SHAPES = [Shape(m, n, dtype) for dtype in (torch.float32, torch.bfloat16) for m, n in SIZES]
SMALL = [Shape(m, n) for m, n in ((3, 1_000), (3, 10_000), (3, 100_000), (3, 1_000_000), (8, 10_000), (40, 10_000))]
COMPILED = [Shape(3, 10_000), Shape(3, 100_000_000), Shape(8, 50_000_000), Shape(40, 10_000_000), Shape(3, 1_000_000)]
ONE_LAUNCH = [Shape(m, n) for m in (3, 2, 8) for n in (1_000, 3_000, 10_000, 30_000, 100_000)]
TUNED = [
    Shape(3, 100_000_000),
    Shape(3, 100_000_000, torch.bfloat16),
    Shape(8, 50_000_000),
    Shape(40, 10_000_000),
    Shape(2, 100_000_000),
    Shape(16, 20_000_000),
    Shape(64, 5_000_000),
    Shape(5, 50_000_000),
]
