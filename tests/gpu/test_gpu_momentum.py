"""M-ConFIG's step on a device: compiled kernels against the reference, graphs, streams, no waiting, the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import fastconfig as fc
from fastconfig.backends import triton as gpu
from fastconfig.backends.moments import HEAD, Decision, Group, Ledger, Moments, Piece, Recorded, StepRule
from fastconfig.backends.momentum import reference, triton

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]

DEVICE = "cuda"
METHOD = fc.ConFIG().rule
GROUPS = (Group(0.01, 0.1, 1e-8, False), Group(0.02, 0.0, 1e-6, True), Group(0.5, 0.0, 1e-7, False, assign=True))
RULE = StepRule(0.9, 0.999, GROUPS)
SHAPES = [(3, 1000), (3, 300_001), (20, 70_001)]
"""One program, many programs, matrix units."""


class Training:
    """A segment with parameters of odd lengths and a ledger; averages lie between rows of NaN."""

    def __init__(
        self, module: object, m: int, n: int, state: torch.dtype = torch.float32, dtype: torch.dtype | None = None
    ) -> None:
        padded = n + -n % 32
        self.block = torch.full((m + 3, padded), math.nan, dtype=state, device=DEVICE)
        first, second = self.block[1 : m + 1, :n], self.block[m + 1, :n]
        first.zero_()
        second.zero_()
        generator = torch.Generator().manual_seed(n)
        pieces, at = [], 0
        for index, share in enumerate((1, n // 3, 7, 1, n // 2)):
            length = min(share, n - at)
            values = torch.randn(length + 4, generator=generator).to(DEVICE, dtype or state)[index % 4 :][:length]
            pieces.append(Piece(values, at, index % len(GROUPS)))
            at += length
        self.segment = module.Segment(Moments(first, second), pieces)
        self.ledger = Ledger.zeros(m, torch.device(DEVICE))

    def step(self, recorded: Recorded, found_inf: Tensor | None = None, rule: StepRule = RULE) -> None:
        scales = torch.ones(len(recorded.losses), dtype=torch.float64, device=DEVICE)
        self.segment.step(self.ledger, recorded, rule, METHOD, scales, found_inf)

    def written(self) -> list[Tensor]:
        return [self.block, *(piece.values for piece in self.segment.pieces), *self.ledger]

    def snapshot(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.written()]


def gradients(losses: Sequence[int], n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Recorded:
    generator = torch.Generator().manual_seed(seed)
    block = torch.full((len(losses) + 2, n + -n % 32), math.nan, dtype=dtype, device=DEVICE)
    rows = block[1:-1, :n]
    rows.copy_(torch.randn(len(losses), n, generator=generator))
    return Recorded(tuple(losses), tuple(rows))


def in_turn(m: int, n: int, dtype: torch.dtype = torch.float32, steps: int = 4) -> list[Recorded]:
    """All losses, and then one after the other."""
    every = gradients(range(m), n, dtype)
    return [every, *(gradients([step % m], n, dtype, seed=step + 1) for step in range(steps))]


def assert_same(ours: Training, theirs: Training, units: float = 64.0) -> None:
    """Averages to the bit, the rest to roundings of what it is stored in."""
    m = len(ours.ledger.weights)
    assert torch.equal(ours.block[1 : m + 1].nan_to_num(), theirs.block[1 : m + 1].nan_to_num())
    for got, wanted in zip(ours.written(), theirs.written(), strict=True):
        assert torch.equal(got.isnan(), wanted.isnan())
        got, wanted, eps = got.double().nan_to_num(), wanted.double().nan_to_num(), torch.finfo(got.dtype).eps
        eps = max(eps, 1e-12)  # of the solve
        assert ((got - wanted).abs() <= units * eps * (wanted.abs() + 0.01 * wanted.abs().max())).all()


def assert_equal(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("m", [*range(1, 9), 9, 16, 17, 40, 64, 65])
def test_steps_equal_the_reference(m: int) -> None:
    for n in (1, 33, 4099, 100_003):
        ours, theirs = Training(triton, m, n), Training(reference, m, n)
        for recorded in in_turn(m, n):
            ours.step(recorded)
            theirs.step(recorded)
        assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("state", "dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
    ],
)
@pytest.mark.parametrize("m", [3, 8, 20])
def test_other_dtypes(m: int, state: torch.dtype, dtype: torch.dtype) -> None:
    for n in (1000, 100_003):
        ours, theirs = Training(triton, m, n, state, dtype), Training(reference, m, n, state, dtype)
        for recorded in in_turn(m, n, dtype):
            ours.step(recorded)
            theirs.step(recorded)
        assert_same(ours, theirs)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_parts_equal_the_reference(m: int, n: int) -> None:
    ours, theirs = Training(triton, m, n), Training(reference, m, n)
    for training in (ours, theirs):
        training.step(gradients(range(m), n))
    recorded = gradients([2, 0], n, seed=1)
    scales = torch.tensor([0.5, 2.0], dtype=torch.float64, device=DEVICE)
    products = [training.segment.products(recorded, scales, 0.9) for training in (ours, theirs)]
    torch.testing.assert_close(*products, rtol=1e-12, atol=1e-12 * float(products[1].abs().max()))
    decision, after = reference.decide(
        ours.ledger, recorded.losses, products[1], scales, RULE, lambda k: reference.config_weights(k, METHOD)
    )
    ours.ledger.become(after)
    squares = [training.segment.update_square(recorded, RULE, decision) for training in (ours, theirs)]
    torch.testing.assert_close(*squares, rtol=1e-5, atol=0.0)
    assert torch.equal(squares[0], ours.segment.update_square(recorded, RULE, decision))
    decision.clip.fill_(0.5)
    for training in (ours, theirs):
        training.segment.update(recorded, RULE, decision)
    theirs.ledger = ours.ledger
    assert_same(ours, theirs)


@pytest.mark.parametrize("bad", ["nan", "inf", "found_inf"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_step_that_is_left_out_changes_nothing(m: int, n: int, bad: str) -> None:
    """But the count of such steps, and what takes the update itself."""
    training = Training(triton, m, n)
    training.step(gradients(range(m), n))
    before = training.snapshot()
    recorded = gradients([1], n, seed=1)
    if bad != "found_inf":
        recorded.rows[0][n - 1] = float(bad)
    training.step(recorded, torch.full((1,), float(bad == "found_inf"), device=DEVICE))
    assert training.ledger.totals.tolist() == [1.0, 1.0]
    training.ledger.totals[1] = 0
    for index, piece in enumerate(training.segment.pieces):
        if GROUPS[piece.group].assign:
            assert piece.values.isnan().all()
            piece.values.copy_(before[1 + index])
    assert_equal(training.written(), before)


@pytest.mark.parametrize(("m", "n"), [*SHAPES, (3, 3_000_000)])
def test_the_same_bits_every_time(m: int, n: int) -> None:
    """Also while another stream's work delays some programs and so changes which of them arrives last."""
    steps = in_turn(m, n)
    busy, other = torch.randn(1024, 1024, device=DEVICE), torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    first: list[Tensor] = []
    for turn in range(6):
        training = Training(triton, m, n)
        for recorded in steps:
            if turn % 2:
                with torch.cuda.stream(other):
                    busy = (busy @ busy).clamp_(-1.0, 1.0)
            training.step(recorded)
        first = first or training.snapshot()
        assert_equal(training.written(), first)


@contextmanager
def synchronising_raises() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_nothing_waits_for_the_device(m: int, n: int) -> None:
    training, found = Training(triton, m, n), torch.zeros(1, device=DEVICE)
    steps = in_turn(m, n)
    scales = torch.ones(1, dtype=torch.float64, device=DEVICE)
    decision = Decision.of(torch.zeros(HEAD + 2 * m + 1, dtype=torch.float64, device=DEVICE), m)
    rate = torch.tensor(0.01, device=DEVICE)
    rules = [RULE, StepRule(0.9, 0.999, (Group(rate, 0.0, 1e-8, False),) * 3)]

    def calls() -> None:
        for recorded in steps:
            training.step(recorded)
            training.step(recorded, found, rules[1])
        training.segment.products(steps[1], scales, 0.9)
        training.segment.update_square(steps[1], RULE, decision)
        training.segment.update(steps[1], RULE, decision)

    calls()
    ones = [torch.ones(len(recorded.losses), dtype=torch.float64, device=DEVICE) for recorded in steps]
    done = torch.cuda.Event()
    with synchronising_raises():
        torch.cuda._sleep(200_000_000)
        done.record()
        for recorded, scales in zip(steps, ones, strict=True):
            training.segment.step(training.ledger, recorded, RULE, METHOD, scales, found)
        calls()
        assert not done.query(), "a call returned only when the device had done what came before it"


def test_no_step_compiles_anything_that_the_first_ones_have_not() -> None:
    """Whichever losses have a gradient, and with other numbers of groups."""
    from fastconfig.kernels import launched_momentum as launched

    def compiled() -> int:
        kernels = (launched.moments_of_few, launched.moments_of_many, launched.momentum_update)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    for m, n in SHAPES:
        training = Training(triton, m, n)
        training.step(gradients(range(m), n))
        before = compiled()
        for step in range(m):
            training.step(gradients([step], n, seed=step), None, RULE._replace(beta1=0.5 + step / 100))
        assert compiled() == before


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_captured_step_follows_new_data(m: int, n: int) -> None:
    """And eager steps with other losses and other learning rates come between its replays."""
    ours, theirs = Training(triton, m, n), Training(reference, m, n)
    recorded, between = gradients(range(m), n), gradients([1], n, seed=50)
    scales = torch.ones(m, dtype=torch.float64, device=DEVICE)
    graph = captured(lambda: ours.segment.step(ours.ledger, recorded, RULE, METHOD, scales))
    other = RULE._replace(groups=tuple(group._replace(lr=0.001) for group in GROUPS))
    for _ in range(3):
        theirs.step(recorded)
    for seed in range(1, 4):
        for row, new in zip(recorded.rows, gradients(range(m), n, seed=seed).rows, strict=True):
            row.copy_(new)
        graph.replay()
        theirs.step(recorded)
        for training in (ours, theirs):
            training.step(between, None, other)
        assert_same(ours, theirs)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_several_streams_at_once(m: int, n: int) -> None:
    steps = [in_turn(m, n), in_turn(m, n)[::-1]]
    wanted = []
    for some in steps:
        training = Training(triton, m, n)
        for recorded in some:
            training.step(recorded)
        wanted.append(training.snapshot())
    streams = [torch.cuda.Stream() for _ in steps]
    for _ in range(5):
        trainings = [Training(triton, m, n) for _ in steps]
        torch.cuda.synchronize()
        for turn in range(len(steps[0])):
            for training, some, stream in zip(trainings, steps, streams, strict=True):
                with torch.cuda.stream(stream):
                    training.step(some[turn])
        torch.cuda.synchronize()
        for training, right in zip(trainings, wanted, strict=True):
            assert_equal(training.written(), right)


def test_a_steady_state_allocates_nothing() -> None:
    for m, n in SHAPES:
        training, recorded = Training(triton, m, n), gradients(range(m), n)
        scales = torch.ones(m, dtype=torch.float64, device=DEVICE)
        for _ in range(2):
            training.segment.step(training.ledger, recorded, RULE, METHOD, scales)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for _ in range(10):
            training.segment.step(training.ledger, recorded, RULE, METHOD, scales)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_the_kernels_are_what_ran() -> None:
    assert gpu.available() is None
    assert Training(triton, 3, 100).segment._has_kernels
