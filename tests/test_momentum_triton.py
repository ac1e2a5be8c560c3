"""M-ConFIG's kernels against the reference: compiled where there is a GPU, else by Triton's interpreter on the CPU.

The interpreter takes a tenth of a second a launch and more: hence few columns, and many things in one problem.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from fastconfig.kernels import geometry, launched_momentum, launched_tables
from torch import Tensor

import fastconfig as fc
from fastconfig.backends import triton as gpu
from fastconfig.backends.moments import HEAD, Decision, Group, Ledger, Moments, Piece, Recorded, StepRule
from fastconfig.backends.momentum import reference, triton

DEVICE = "cpu" if gpu.INTERPRETED else "cuda"
GUARD = -7.0
"""What lies around everything that is written."""
DEFAULT = fc.ConFIG().rule

pytestmark = [
    pytest.mark.usefixtures("interpreter", "poisoned_memory", "one_thread"),
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


def runs(n: int) -> list[tuple[int, int]]:
    """Odd and tiny runs of columns, (first, length), that leave out some in between and at the end."""
    found, at = [], 0
    for length, gap in itertools.cycle(((1, 0), (7, 0), (1, 2), (130, 0), (61, 3), (0, 0))):
        if at >= n:
            break
        found.append((at, min(length, n - at)))
        at += length + gap
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
        for index, (at, length) in enumerate(runs(n)):
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
    *[(3, n, k) for n, k in ((1, 1), (33, 2), (1000, 3), (4099, 3))],
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


@pytest.mark.emulated
@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 700, 1), (3, 1400, 2), (6, 515, 1), (9, 301, 3), (17, 260, 5), (40, 150, 1)]
)
def test_many_programs_in_two_launches(m: int, n: int, k: int, launches: list[str]) -> None:
    ours, theirs = pair(m, n)
    for training in (ours, theirs):  # so that the first step already updates
        training.step(gradients(range(m), n, torch.float32, seed=1), RULE)
    launches.clear()
    for step in range(2):
        recorded = gradients([(3 * step + 2 * j) % m for j in range(k)], n, torch.float32, seed=2)
        for training in (ours, theirs):
            training.step(recorded, RULE)
    assert_same(ours, theirs, 3)
    two = ["moments_of_few" if m <= 8 else "moments_of_many", "momentum_update"]
    assert [name for name in launches if not name.startswith("table")] == two * 2


@pytest.mark.emulated
def test_a_small_problem_is_one_launch(launches: list[str]) -> None:
    """From the second step on, and with a learning rate on the device whatever it is."""
    n, rate = 600, torch.tensor(0.01, device=DEVICE)
    groups = (Group(rate, 0.1, 1e-8, False), GROUPS[1], GROUPS[2])
    rule = StepRule(0.9, 0.999, groups)
    ours, theirs = pair(3, n)
    for step in range(3):
        rate.fill_(0.01 / (step + 1))
        recorded = gradients([step], n, torch.float32, seed=step)
        for training in (ours, theirs):
            training.step(recorded, rule)
    assert launches == ["table_of_group"] * 3 + ["moments_of_few"] * 3
    assert_same(ours, theirs, 3)


def test_tables_are_written_where_they_are_new(launches: list[str]) -> None:
    """Of more than 8 losses' gradients, wherever they lie, and of groups whose numbers change."""
    m, n = 20, 40
    ours, theirs = pair(m, n)
    recorded = [gradients(range(m), n, torch.float32, seed=1), gradients([3], n, torch.float32, seed=2)]
    for rates, wanted in (((0.1, 0.1), [3 + 3, 1]), ((0.1, 0.2), [0, 3]), ((0.2, 0.2), [0, 0])):
        for rate, some, tables in zip(rates, recorded, wanted, strict=True):
            launches.clear()
            rule = StepRule(0.9, 0.999, (GROUPS[0]._replace(lr=rate), *GROUPS[1:]))
            for training in (ours, theirs):
                training.step(some, rule)
            assert len([name for name in launches if name.startswith("table")]) == tables
    assert_same(ours, theirs, 6)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16, "cpu"])
def test_learning_rates_as_tensors(kind: torch.dtype | str) -> None:
    rate = torch.tensor(
        [0.125], dtype=torch.float32 if kind == "cpu" else kind, device="cpu" if kind == "cpu" else DEVICE
    )
    rule = StepRule(0.9, 0.999, (Group(rate, 0.5, 1e-8, False), Group(rate, 0.0, 1e-8, True), GROUPS[2]))
    ours, theirs = pair(2, 100, state=torch.float64, parameters=torch.float64)
    for training in (ours, theirs):
        training.step(gradients([1, 0], 100, torch.float64, seed=0), rule)
    assert_same(ours, theirs)


SPOILED = {
    "nan": lambda recorded: recorded.rows[0][-1:].fill_(math.nan),
    "inf": lambda recorded: recorded.rows[-1][:1].fill_(math.inf),
    "huge": lambda recorded: recorded.rows[0][:2].fill_(1e300),
    "found_inf": lambda recorded: None,
}


@pytest.mark.parametrize("what", SPOILED)
@pytest.mark.parametrize(("m", "n", "k"), [(3, 200, 1), (3, 200, 3), (10, 70, 2)])
def test_a_step_that_is_left_out_changes_nothing(m: int, n: int, k: int, what: str) -> None:
    """But the count of such steps, and what takes the update itself, which is NaN."""
    training = Training.of(triton, m, n, state=torch.float64, parameters=torch.float64)
    training.step(gradients(range(m), n, torch.float64, seed=0), RULE)
    before = training.snapshot()
    recorded = gradients(range(1, k + 1) if k < m else range(m), n, torch.float64, seed=1)
    SPOILED[what](recorded)
    found = torch.ones(1, device=DEVICE) if what == "found_inf" else torch.zeros((), device=DEVICE)
    training.step(recorded, RULE, found_inf=found)
    assert int(training.ledger.totals[1]) == 1
    training.ledger.totals[1] = 0
    for piece in training.segment.pieces:
        if GROUPS[piece.group].assign:
            assert piece.values.isnan().all()
            piece.values.fill_(1.0)
    for index, piece in enumerate(training.segment.pieces[::-1]):
        if GROUPS[piece.group].assign:
            offset = 8 + index % 3
            before[2 + index][offset : offset + len(piece.values)] = 1.0
    assert all(torch.equal(now, then) for now, then in zip(training.snapshot(), before, strict=True))


@pytest.mark.parametrize("m", [3, 10])
def test_until_every_loss_was_seen_averages_alone_are_written(m: int) -> None:
    n = 150
    training = Training.of(triton, m, n)
    parameters = [piece.values.clone() for piece in training.segment.pieces]
    training.step(gradients(range(m - 1), n, torch.float32, seed=0), RULE)
    assert training.segment.moments.first[:-1].all()
    assert not training.segment.moments.first[-1].any()
    assert not training.segment.moments.second.any()
    for piece, old in zip(training.segment.pieces, parameters, strict=True):
        assert torch.equal(piece.values, torch.zeros_like(old) if GROUPS[piece.group].assign else old)
    assert training.ledger.totals.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("m", [3, 9])
def test_a_row_of_no_weight_and_without_a_gradient_is_not_read(m: int) -> None:
    n = 90
    training = Training.of(triton, m, n)
    training.step(gradients(range(m), n, torch.float32, seed=0), RULE)
    training.segment.moments.first[1] = math.nan
    numbers = torch.ones(HEAD + 2 * m + 1, dtype=torch.float64, device=DEVICE)
    decision = Decision.of(numbers, m)
    decision.forward[1] = decision.backward[1] = 0.0
    training.segment.update(gradients([0], n, torch.float32, seed=1), RULE, decision)
    assert all(piece.values.isfinite().all() for piece in training.segment.pieces)
    assert training.segment.moments.second.isfinite().all()


@pytest.mark.emulated
@pytest.mark.parametrize(("m", "n"), [(3, 1000), (9, 200), (66, 40)])
def test_the_parts_equal_the_reference(m: int, n: int, small_programs: None) -> None:
    """Products, a decision with a limit on the update's norm, and the update, as several segments ask for them."""
    ours, theirs = pair(m, n)
    for training in (ours, theirs):
        training.step(gradients(range(m), n, torch.float32, seed=0), RULE)
    recorded = gradients([2, 0], n, torch.float32, seed=1)
    scales = torch.tensor([0.5, 2.0], dtype=torch.float64, device=DEVICE)
    products = [training.segment.products(recorded, scales, 0.9) for training in (ours, theirs)]
    torch.testing.assert_close(*products, rtol=1e-12, atol=1e-12 * float(products[1].abs().max()))

    def weights_of(gramian):
        return reference.config_weights(gramian, DEFAULT)

    decision, after = reference.decide(ours.ledger, recorded.losses, products[1], scales, RULE, weights_of)
    ours.ledger.become(after)
    squares = [training.segment.update_square(recorded, RULE, decision) for training in (ours, theirs)]
    torch.testing.assert_close(*squares, rtol=1e-5, atol=0.0)
    assert torch.equal(squares[0], ours.segment.update_square(recorded, RULE, decision))
    decision.clip.copy_(0.25 / squares[1].sqrt())
    for training in (ours, theirs):
        training.segment.update(recorded, RULE, decision)
    theirs.ledger = ours.ledger
    assert_same(ours, theirs, 2)


def test_a_whole_gramian_comes_as_it_is(launches: list[str]) -> None:
    training = Training.of(triton, 3, 100)
    rows = gradients(range(3), 100, torch.float32, seed=0)
    scales = torch.ones(3, dtype=torch.float64, device=DEVICE)
    products = training.segment.products(rows, scales, 0.9)
    assert torch.equal(products, products.T)
    training.segment.update_square(
        rows, RULE, Decision.of(torch.zeros(HEAD + 9, dtype=torch.float64, device=DEVICE), 3)
    )
    assert sorted(launches) == ["moments_of_few", "momentum_update"] + ["table_of_group"] * 3


def test_twenty_steps_and_the_same_bits_again() -> None:
    """Losses in turn, one, two or all of them, one step of twenty left out."""
    m, n, done = 3, 120, []
    for module in (triton, triton, reference):
        training = Training.of(module, m, n)
        for step in range(20):
            losses = [step % m] if step % 5 else ([2, 0] if step % 2 else [0, 1, 2])
            recorded = gradients(losses, n, torch.float32, seed=step)
            if step == 11:
                recorded.rows[0][5] = math.inf
            training.step(recorded, RULE)
        done.append(training)
    first, again, theirs = done
    assert all(torch.equal(a, b) for a, b in zip(first.blocks, again.blocks, strict=True))
    assert_same(first, theirs, 20)
    (workspace,) = gpu._WORKSPACES.values()
    assert not workspace.tickets.any()


@pytest.mark.parametrize(
    "rule", [fc.ConFIG(nonfinite="raise").rule, fc.ConFIG(weights=[1, 2, 3], length="minimum").rule]
)
def test_other_rules(rule) -> None:
    ours, theirs = pair(3, 100)
    for seed in range(2):
        recorded = gradients([2, 0, 1], 100, torch.float32, seed=seed)
        for training in (ours, theirs):
            training.step(recorded, RULE, rule)
    assert_same(ours, theirs, 2)
    if rule.nonfinite == "raise":
        before = ours.snapshot()
        recorded.rows[1][3] = math.nan
        with pytest.raises(FloatingPointError, match="loss 0"):
            ours.step(recorded, RULE, rule)
        assert all(torch.equal(now, then) for now, then in zip(ours.snapshot(), before, strict=True))


@pytest.mark.parametrize("m", [9, 65])
def test_where_there_are_no_kernels_the_reference_steps(
    m: int, monkeypatch: pytest.MonkeyPatch, launches: list[str]
) -> None:
    if m == 9:
        monkeypatch.setattr(gpu, "device_of", lambda device: gpu.Device(2, 32, False, True, False, True))
    ours, theirs = pair(m, 40)
    for training in (ours, theirs):
        training.step(gradients(range(m), 40, torch.float32, seed=0), RULE)
    assert_same(ours, theirs)
    assert ("moments_of_many" in launches) == (m == 65)


def test_gradients_of_several_dtypes_go_to_the_reference(launches: list[str]) -> None:
    ours, theirs = pair(2, 50)
    rows = (*gradients([0], 50, torch.float32, 0).rows, *gradients([1], 50, torch.bfloat16, 1).rows)
    for training in (ours, theirs):
        training.step(Recorded((0, 1), rows), RULE)
    assert_same(ours, theirs)
    assert launches == []


@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize("m", [3, 10])
def test_offsets_past_two_to_the_31(m: int) -> None:
    """By the rows' distance, not by memory: what lies between them is never touched, and so never mapped."""
    n, stride = 200, 2**31 // (m - 1) + 64
    torch.use_deterministic_algorithms(False)  # or PyTorch would fill, and so map, all of it
    block = torch.empty((m - 1) * stride + n, dtype=torch.float32, device=DEVICE)
    first, second = block.as_strided((m, n), (stride, 1)), torch.zeros(n, device=DEVICE)
    first.zero_()
    near = torch.zeros(m, n, device=DEVICE)
    trainings = [
        Training(module.Segment(Moments(averages, second.clone()), []), Ledger.zeros(m, torch.device(DEVICE)), [])
        for module, averages in ((triton, first), (reference, near))
    ]
    for training in trainings:
        training.step(gradients(range(m), n, torch.float32, seed=0), RULE)
    assert torch.equal(first, near)


@pytest.mark.usefixtures("small_programs")
@pytest.mark.parametrize("m", [3, 20])
def test_where_a_barrier_does_not_order_all_stores(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on AMD, with wavefronts of 64; the interpreter shows no race, but that the fence counts for nothing."""
    monkeypatch.setattr(gpu, "device_of", lambda device: gpu.Device(2, 64, True, True, False, False))
    ours, theirs = pair(m, 600 if m == 3 else 300)
    recorded = gradients(range(m), ours.segment.moments.first.shape[1], torch.float32, seed=0)
    for training in (ours, theirs):
        training.step(recorded, RULE)
    assert_same(ours, theirs)


def test_averages_that_begin_at_any_address_and_no_columns_at_all() -> None:
    ours, theirs = pair(3, 90, stride=93, state=torch.float64, parameters=torch.bfloat16)
    for training in (ours, theirs):
        training.step(gradients([0, 1, 2], 90, torch.bfloat16, seed=0, offset=1), RULE)
    assert_same(ours, theirs)
    training = Training.of(triton, 2, 0)
    training.step(gradients([0, 1], 0, torch.float32, seed=0), RULE)
    assert training.ledger.totals.tolist() == [1.0, 0.0]
