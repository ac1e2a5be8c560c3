"""M-ConFIG's segments as the tests of its backends need them: equal twins, every vector alone among NaN."""

from __future__ import annotations

import math
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from fastconfig.backends.moments import HEAD, Decision, Group, Ledger, Moments, Piece, Recorded, StepRule
from fastconfig.backends.momentum import cpu, reference

SEGMENTS = {"cpu": cpu.Segment, "reference": reference.Segment}
GAP = -1
PLAIN, ASCENDING, ASSIGNING = range(3)
GROUPS = (
    Group(0.01, 0.1, 1e-8, maximize=False),
    Group(torch.tensor([0.03], dtype=torch.float64), 0.0, 1e-3, maximize=True),
    Group(0.0, 0.0, 1e-5, maximize=False, assign=True),
)
BETA1 = 0.875
"""A dyadic number: float32's averages are then formed without rounding in float64, and so rounded alike everywhere."""
RULE = StepRule(BETA1, 0.99, GROUPS)


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that NaN equals itself and -0 does not equal 0."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


class Arena:
    """Vectors and matrices in memory that is NaN all around them, and stays as it was."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # block, its bits at first, where it may change

    def place(self, values: Tensor, before: int, after: int, *, changes: bool = True) -> Tensor:
        """A copy of (count,) or (m, count) values, ``before`` elements in front of and ``after`` behind each row."""
        rows = values.reshape(-1, values.shape[-1])
        block = torch.full((len(rows), before + rows.shape[1] + after), math.nan, dtype=values.dtype)
        inside = block[:, before : before + rows.shape[1]]
        inside.copy_(rows)
        free = torch.zeros(block.shape, dtype=torch.bool)
        free[:, before : before + rows.shape[1]] = changes
        self._kept.append((block, bits(block).clone(), free))
        return inside if values.dim() > 1 else inside[0]

    def assert_rest_untouched(self) -> None:
        for block, before, free in self._kept:
            assert torch.equal(bits(block).masked_fill(free, 0), before.masked_fill(free, 0))


class Built(NamedTuple):
    segment: cpu.Segment | reference.Segment
    moments: Moments
    pieces: tuple[Piece, ...]
    recorded: Recorded
    arena: Arena

    def written(self) -> list[Tensor]:
        """All that a step may write."""
        return [self.moments.first, self.moments.second, *(piece.values for piece in self.pieces)]

    def snapshot(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.written()]

    def take_over(self, other: Built) -> None:
        """Go on from the other's state, so that what is compared next is one step's rounding and no more."""
        for ours, theirs in zip(self.written(), other.written(), strict=True):
            ours.copy_(theirs)


class Case:
    """The numbers of one segment, from which equal twins are built."""

    def __init__(self, m: int, n: int, state: torch.dtype, dtype: torch.dtype, seed: int = 0) -> None:
        self.m, self.n, self.state, self.dtype = m, n, state, dtype
        self._generator = torch.Generator().manual_seed(1000 * m + n + seed)
        self._random = Random(1000 * m + n + seed)
        self.layout = self._layout()
        self.first = self.normal(m, n).mul(torch.logspace(-1, 1, m, dtype=torch.float64).unsqueeze(1)).to(state)
        self.second = self.normal(n).square().to(state)
        for first, count, group in self.layout:
            if group == GAP:
                self.second[first : first + count] = math.nan  # neither read nor written
        self.values = [self.normal(count).to(dtype) for _, count, _ in self.layout]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def _layout(self) -> list[tuple[int, int, int]]:
        """(first column, count, group) of runs that fill the columns, gaps among them."""
        runs, first = [], 0
        while first < self.n:
            count = min(self._random.choice([1, 1, 2, 5, 16, 33, 200, 700]), self.n - first)
            runs.append((first, count, self._random.choice([GAP, PLAIN, PLAIN, ASCENDING, ASSIGNING])))
            first += count
        if self.n > 2 or runs[0][2] == GAP:
            runs[-1] = (*runs[-1][:2], PLAIN)
        return runs

    def gradients(self, k: int) -> list[Tensor]:
        return list(self.normal(k, self.n).mul(3.0).to(self.dtype))

    def build(self, backend: str, losses: tuple[int, ...], gradients: list[Tensor]) -> Built:
        arena = Arena()
        step = 64 // self.state.itemsize
        first = arena.place(self.first, step, step - self.n % step)
        second = arena.place(self.second, 3, 5)
        pieces = [
            Piece(arena.place(values, 1 + i % 4, 9), start, group)
            for i, ((start, _, group), values) in enumerate(zip(self.layout, self.values, strict=True))
            if group != GAP
        ]
        pieces.append(Piece(torch.empty(0, dtype=self.dtype), self.n // 2, PLAIN))  # a parameter of no element
        pieces = tuple(self._random.sample(pieces, len(pieces)) if backend == "cpu" else pieces)
        rows = tuple(arena.place(row, 1 + i % 3, 8, changes=False) for i, row in enumerate(gradients))
        moments = Moments(first, second)
        segment = SEGMENTS[backend](moments, pieces)
        ordered = tuple(sorted(pieces, key=lambda piece: (piece.first, len(piece.values))))
        return Built(segment, moments, ordered, Recorded(losses, rows), arena)

    def twins(self, losses: tuple[int, ...]) -> tuple[Built, Built]:
        """By the compiled core and by the reference."""
        gradients = self.gradients(len(losses))
        return self.build("cpu", losses, gradients), self.build("reference", losses, gradients)

    def losses(self, k: int) -> tuple[int, ...]:
        return tuple(self._random.sample(range(self.m), k))

    def ledger(self) -> Ledger:
        """As after some steps, all losses seen."""
        first = self.first.double()
        weights = self.normal(self.m) * 0.3
        counts = torch.tensor([float(1 + i % 5) for i in range(self.m)], dtype=torch.float64)
        gramian = first @ first.T
        return Ledger((gramian + gramian.T) / 2, weights, counts, torch.tensor([7.0, 2.0], dtype=torch.float64))

    def decision(self, scales: Tensor) -> Decision:
        """Any weights at all: some rows out of f_t, of f_{t-1}, of both."""
        decision = Decision.of(torch.zeros(HEAD + 2 * self.m + len(scales), dtype=torch.float64), self.m)
        decision.numbers[:HEAD] = torch.tensor([1.0, 1.0, 1.7, 20.0, 0.5], dtype=torch.float64)
        decision.forward.copy_(self.normal(self.m))
        decision.backward.copy_(self.normal(self.m))
        decision.scales.copy_(scales)
        if self.m > 2:
            decision.forward[[1, self.m - 1]] = 0.0
            decision.backward[[0, self.m - 1]] = 0.0
        return decision


def scales_of(k: int) -> Tensor:
    """Powers of two, for what BETA1 is dyadic."""
    return torch.tensor([2.0 ** (i % 3 - 1) for i in range(k)], dtype=torch.float64)


def copy_of(ledger: Ledger) -> Ledger:
    return Ledger(*(tensor.clone() for tensor in ledger))


def unit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of ``dtype`` at most, by which two roundings of nearly one number may differ."""
    info = torch.finfo(dtype)
    return info.eps * values.abs() + info.smallest_normal * info.eps
