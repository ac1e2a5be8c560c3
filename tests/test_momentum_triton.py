"""M-ConFIG's kernels against the reference: compiled where there is a GPU, else by Triton's interpreter on the CPU.

The interpreter takes a tenth of a second a launch and more: hence few columns, and many things in one problem.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from fastconfig.kernels import geometry, launched_momentum, launched_tables
from torch import Tensor

import fastconfig as fc
from fastconfig.backends import triton as gpu
from fastconfig.backends.momentum import reference, triton
from fastconfig.moments import HEAD, Decision, Group, Ledger, Moments, Piece, Recorded, StepRule

DEVICE = "cpu" if gpu.INTERPRETED else "cuda"
GUARD = -7.0
"""What lies around everything that is written."""
DEFAULT = fc.ConFIG().rule

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory", "one_thread"),
    # The interpreter is numpy, which speaks of inf·0.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered"),
]


@pytest.fixture(autouse=True)
def fresh_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test begins with workspaces of its own, whose memory holds NaN (see ``poisoned_memory``)."""
    monkeypatch.setattr(gpu, "_WORKSPACES", {})


@pytest.fixture
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 128 columns and groups of two programs, so that few columns take both levels of the reduction."""
    monkeypatch.setattr(geometry, "ONE_LAUNCH_BYTES", 0)
    monkeypatch.setattr(geometry, "look", lambda m: geometry.Few(warps=1, unroll=1, programs=4, group=2))
    look_many = geometry.look_many

    def few_programs(m: int, itemsize: int, lanes: int) -> geometry.Many:
        first = look_many(m, itemsize, lanes)
        return geometry.Many(first.left, first.right, first.depth, warps=1, programs=4, group=2)

    monkeypatch.setattr(geometry, "look_many", few_programs)
    monkeypatch.setattr(geometry, "write", lambda m: geometry.Combination(programs=2, warps=1))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched, in order."""
    names: list[str] = []

    class Counted:
        def __init__(self, name: str, kernel: object) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]):
            names.append(self.name)
            return self.kernel[grid]

    for module, kernels in (
        (launched_momentum, ("moments_of_few", "moments_of_many", "momentum_update")),
        (launched_tables, ("table_of_gradients", "table_of_group")),
    ):
        for name in kernels:
            monkeypatch.setattr(module, name, Counted(name, getattr(module, name)))
    return names


def guarded(count: int, dtype: torch.dtype, offset: int = 0) -> tuple[Tensor, Tensor]:
    """A block of GUARD and a vector of ``count`` zeros in its midst, ``offset`` elements from where it may begin."""
    block = torch.full((count + 16 + offset,), GUARD, dtype=dtype, device=DEVICE)
    vector = block[8 + offset : 8 + offset + count]
    vector.zero_()
    return block, vector


GROUPS = (
    Group(lr=0.01, weight_decay=0.1, eps=1e-8, maximize=False),
    Group(lr=0.02, weight_decay=0.0, eps=1e-6, maximize=True),
    Group(lr=0.5, weight_decay=0.3, eps=1e-7, maximize=False, assign=True),
)


def lengths(n: int) -> list[int]:
    """Odd and tiny runs of columns that leave out some in between and at the end: (length, gap) one after the other."""
    found, at = [], 0
    for length, gap in itertools.cycle(((1, 0), (7, 0), (1, 2), (130, 0), (61, 3), (0, 0))):
        length = min(length, n - at)
        found.append((at, length))
        at += length + gap
        if at >= n:
            return found


@dataclass
class Training:
    """A segment and its ledger, in memory whose neighbours are guarded."""

    segment: reference.Segment | triton.Segment
    ledger: Ledger
    blocks: list[Tensor]
    """All memory that is written, with its guards."""

    @classmethod
    def of(
        cls,
        module: object,
        m: int,
        n: int,
        state: torch.dtype = torch.float32,
        parameters: torch.dtype = torch.float32,
        stride: int | None = None,
        groups: int = len(GROUPS),
    ) -> Training:
        generator = torch.Generator().manual_seed(n)
        stride = n + 3 if stride is None else stride
        averages = torch.full((m * stride + 16,), GUARD, dtype=state, device=DEVICE)
        first = averages[8:].as_strided((m, n), (stride, 1))
        first.zero_()
        block, second = guarded(n, state)
        blocks, pieces = [averages, block], []
        for index, (at, length) in enumerate(lengths(n)):
            block, values = guarded(length, parameters, index % 3)
            group = index % groups
            values.copy_(torch.randn(length, generator=generator))
            if GROUPS[group].assign:
                values.fill_(math.nan)  # which is not read
            blocks.append(block)
            pieces.append(Piece(values, at, group))
        ledger = Ledger.zeros(m, torch.device(DEVICE))
        return cls(module.Segment(Moments(first, second), pieces[::-1]), ledger, blocks)

    def snapshot(self) -> list[Tensor]:
        return [tensor.clone() for tensor in (*self.blocks, *self.ledger)]

    def step(self, recorded: Recorded, rule: StepRule, method=DEFAULT, scales=None, found_inf=None) -> None:
        if scales is None:
            scales = torch.ones(len(recorded.losses), dtype=torch.float64, device=DEVICE)
        self.segment.step(self.ledger, recorded, rule, method, scales, found_inf)


def pair(m: int, n: int, **kwargs) -> tuple[Training, Training]:
    """The kernels' and the reference's."""
    return Training.of(triton, m, n, **kwargs), Training.of(reference, m, n, **kwargs)


def gradients(losses: Sequence[int], n: int, dtype: torch.dtype, seed: int, offset: int = 0) -> Recorded:
    """Rows of one block at scales from 0.1 to 10, whose every neighbour is NaN."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.full((len(losses) + 2, n + 5), math.nan, dtype=dtype, device=DEVICE)
    rows = block[1:-1, offset : offset + n]
    scales = torch.logspace(-1, 1, len(losses), dtype=torch.float64).unsqueeze(1)
    rows.copy_(torch.randn(len(losses), n, generator=generator, dtype=torch.float64) * scales)
    return Recorded(tuple(losses), tuple(rows))


def assert_same(ours: Training, theirs: Training, steps: int = 1) -> None:
    """Averages to the bit, the ledger to float64's rounding, the rest to roundings of what it is stored in.

    Of float64 it is the solve's rounding that shows: q is the difference of two of its answers, over 1 - β₁.
    """
    got, wanted = ours.segment, theirs.segment
    assert torch.equal(ours.blocks[0], theirs.blocks[0])
    for mine, right in zip(ours.blocks[1:], theirs.blocks[1:], strict=True):
        assert_near(mine, right, steps, {torch.float32: 8, torch.float64: 2000}.get(mine.dtype, 1))
    for mine, right in zip(ours.ledger, theirs.ledger, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-10 * float(right.abs().max()))
    assert torch.equal(got.moments.first, wanted.moments.first)


def assert_near(got: Tensor, wanted: Tensor, steps: int, units: float) -> None:
    """Within so many units in the last place a step, of the values or of the largest: what updates are made of."""
    assert torch.equal(got.isnan(), wanted.isnan())
    got, wanted, eps = got.double().nan_to_num(), wanted.double().nan_to_num(), torch.finfo(got.dtype).eps
    assert ((got - wanted).abs() <= steps * units * eps * (wanted.abs() + 0.01 * wanted.abs().max())).all()


RULE = StepRule(0.9, 0.999, GROUPS)
TYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
]
ROUNDS = [
    # m, n, k: as many steps as it takes until every loss has had a gradient, and one more
    *[(1, n, 1) for n in (1, 2, 31)],
    *[(2, n, k) for n, k in ((33, 1), (1000, 2))],
    *[(3, n, k) for n, k in ((1, 1), (33, 2), (1000, 3), (4099, 1))],
    (5, 301, 4),
    (8, 257, 3),
    (8, 33, 8),
    (9, 31, 4),
    (17, 301, 9),
    (40, 130, 20),
]


@pytest.mark.parametrize(("m", "n", "k"), ROUNDS)
def test_steps_equal_the_reference(m: int, n: int, k: int) -> None:
    """Every dtype in turn, gradients in orders of their own, where alignment is by chance."""
    which = TYPES if m == 3 and n == 1000 else [TYPES[(m + n + k) % len(TYPES)]]
    for state, dtype in which:
        ours, theirs = pair(m, n, state=state, parameters=dtype)
        for step in range(-(-m // k) + 1):
            losses = [(step * k + j) % m for j in range(k)][::-1]
            recorded = gradients(losses, n, dtype, seed=step)
            scales = torch.linspace(0.5, 1.5, k, dtype=torch.float64, device=DEVICE)
            for training in (ours, theirs):
                training.step(recorded, RULE, scales=scales)
            assert_same(ours, theirs, step + 1)
