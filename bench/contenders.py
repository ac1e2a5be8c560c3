"""What is timed: one ConFIG combination of (m, n) gradients, by every library that has it, and the floor below all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from conflictfree.grad_operator import ConFIG_update
from torch import Tensor
from torchjd.aggregation import ConFIG as TorchJDConFIG

import fastconfig as fc

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """A problem: m losses, n parameters, and what is measured on it."""

    m: int
    n: int
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"{self.m}-{self.n}-{str(self.dtype)[6:]}"

    def gradients(self) -> Tensor:
        """Independent normal rows at scales 1 : 100 : 0.01, repeated."""
        generator = torch.Generator().manual_seed(self.m)
        scales = torch.tensor([1.0, 100.0, 0.01]).repeat(self.m)[: self.m].unsqueeze(1)
        return torch.randn(self.m, self.n, generator=generator).mul_(scales).to(self.dtype)


SHAPES = [
    Shape(3, 10_000),
    Shape(3, 1_000_000),
    Shape(3, 10_000_000),
    Shape(3, 10_000_000, torch.bfloat16),
    Shape(10, 1_000_000),
    Shape(40, 1_000_000),
]


def fastconfig_into(grads: Tensor) -> Call:
    """fc.combine with ``out=``: the steady state of a GradientBuffer, which owns its result."""
    out = torch.empty(grads.shape[1], dtype=grads.dtype)
    return lambda: fc.combine(grads, out=out)


def fastconfig_new(grads: Tensor) -> Call:
    """fc.combine that allocates its result: a large one is mapped and faulted in by every call."""
    return lambda: fc.combine(grads)


def plain_torch(grads: Tensor) -> Call:
    """The best three lines of PyTorch: Gramian, solve, combination, all in the gradients' dtype."""
    ones = torch.ones(len(grads), dtype=grads.dtype)

    def call() -> Tensor:
        gramian = grads @ grads.T
        inverse = gramian.diagonal().rsqrt()
        solution = torch.linalg.solve(gramian * inverse * inverse.unsqueeze(1), ones)
        coefficients = solution * inverse / (solution @ ones).sqrt()
        return (coefficients * (gramian @ coefficients).sum()) @ grads

    return call


def conflictfree_lstsq(grads: Tensor) -> Call:
    """conflictfree 0.1.8 as it comes."""
    return lambda: ConFIG_update(grads)


def conflictfree_pinv(grads: Tensor) -> Call:
    """conflictfree 0.1.8 with use_least_square=False."""
    return lambda: ConFIG_update(grads, use_least_square=False)


def torchjd(grads: Tensor) -> Call:
    """torchjd's ConFIG aggregator."""
    aggregator = TorchJDConFIG()
    return lambda: aggregator(grads)


def floor(grads: Tensor) -> Call:
    """A copy that moves as many bytes as 2mn + n elements: two reads of the matrix and one write of the result."""
    m, n = grads.shape
    source = torch.ones((2 * m * n + n) // 2, dtype=grads.dtype)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


CONTENDERS: dict[str, Callable[[Tensor], Call]] = {
    "floor": floor,
    "fastconfig": fastconfig_into,
    "fastconfig, new result": fastconfig_new,
    "plain PyTorch": plain_torch,
    "conflictfree lstsq": conflictfree_lstsq,
    "conflictfree pinv": conflictfree_pinv,
    "torchjd": torchjd,
}
FLOAT32_ONLY = {"plain PyTorch", "conflictfree lstsq", "conflictfree pinv", "torchjd"}
"""Need a LAPACK solve or an SVD, which PyTorch has for float32 and float64 alone."""


@dataclass(frozen=True)
class Quality:
    """How right an answer is: relative error against float64, and the least cosine with any gradient."""

    error: float
    least_cosine: float


def quality(answer: Tensor, grads: Tensor) -> Quality:
    """Measured in float64 by a QR-based least-squares solve that shares no code with any contender."""
    rows = grads.to(torch.float64)
    units = rows / rows.norm(dim=1, keepdim=True)
    q, r = torch.linalg.qr(units.T)
    direction = q @ torch.linalg.solve_triangular(r.T, torch.ones(len(rows), 1, dtype=torch.float64), upper=False)
    direction = direction.squeeze(1) / direction.norm()
    wanted = (rows @ direction).sum() * direction
    answer = answer.to(torch.float64)
    cosines = units @ answer / answer.norm()
    return Quality(float((answer - wanted).norm() / wanted.norm()), float(cosines.min()))
