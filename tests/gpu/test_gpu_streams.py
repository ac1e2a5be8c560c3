"""How the GPU backend shares a device: streams, threads, other devices, no waiting, no allocation, the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import fastconfig as fc

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]

DEVICE = "cuda"
SHAPES = [(3, 1000), (3, 65_536), (17, 65_536)]
"""One program, many programs, matrix units: (m, n) float32, aligned, as the other files compile them."""
A_WHILE = 200_000_000
"""Cycles for which the device is kept busy: about a tenth of a second."""


def gradients(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@contextmanager
def synchronising_raises() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("m", "n"), [*SHAPES, (3, 3_000_000)])
def test_the_same_bits_every_time(m: int, n: int) -> None:
    """Also while another stream's work delays some programs and so changes which of them arrives last."""
    grads = gradients(m, n)
    first, first_gramian = fc.combine(grads), fc.gramian(grads)
    busy, other = torch.randn(1024, 1024, device=DEVICE), torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for i in range(20):
        if i % 2:
            with torch.cuda.stream(other):
                busy = (busy @ busy).clamp_(-1.0, 1.0)
        assert torch.equal(fc.combine(grads), first)
        assert torch.equal(fc.gramian(grads), first_gramian)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_same_bits_on_several_streams_at_once(m: int, n: int) -> None:
    grads = [gradients(m, n, seed) for seed in range(2)]
    wanted = [fc.combine(matrix) for matrix in grads]
    streams = [torch.cuda.Stream() for _ in grads]
    results: list[list[Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(fc.combine(grads[i]))
    torch.cuda.synchronize()
    for i, got in enumerate(results):
        assert all(torch.equal(one, wanted[i]) for one in got)


def test_a_monitor_waits_for_the_device_only_to_read_a_batch() -> None:
    model, inputs = torch.nn.Linear(64, 3, device=DEVICE), torch.randn(8, 64, device=DEVICE)
    buf = fc.GradientBuffer(model, num_losses=3)
    monitor = fc.ConflictMonitor(buf, modules_every=2)

    def step() -> None:
        buf.backward(list((model(inputs) - 1.0).square().mean(dim=0)))
        buf.combine()
        monitor.step()

    for _ in range(2):  # makes room, compiles
        step()
    with synchronising_raises():
        for _ in range(20):
            step()
    assert len(monitor.history) == 22
    assert (monitor.history.ranks == 3).all()
    assert sum(row.norm_share for row in monitor.by_module()) == pytest.approx(1.0)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_launches_go_to_the_current_stream(m: int, n: int) -> None:
    """The gradients come to be on that stream, late: launches on any other one would read zeros."""
    wanted = fc.combine(gradients(m, n))
    source, grads, out = gradients(m, n), torch.zeros(m, n, device=DEVICE), torch.empty(n, device=DEVICE)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(A_WHILE)
        grads.copy_(source)
        fc.combine(grads, out=out)
    stream.synchronize()
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("same_stream", [True, False], ids=["one stream", "two streams"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_two_threads_at_once(m: int, n: int, same_stream: bool) -> None:
    grads = [gradients(m, n, seed) for seed in range(2)]
    wanted = [fc.combine(matrix) for matrix in grads]
    streams = [torch.cuda.current_stream()] * 2 if same_stream else [torch.cuda.Stream() for _ in grads]
    torch.cuda.synchronize()

    def work(i: int) -> bool:
        with torch.cuda.stream(streams[i]):
            results = [fc.combine(grads[i]) for _ in range(100)]
            streams[i].synchronize()
            return all(torch.equal(result, wanted[i]) for result in results)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    grads = gradients(3, 65_536)
    elsewhere = grads.to("cuda:1")
    got = fc.combine(elsewhere)
    assert got.device == elsewhere.device
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(got.cpu(), fc.combine(grads).cpu())


METHODS = {
    "propagate": fc.ConFIG(),
    "drop": fc.ConFIG(nonfinite="drop"),
    "weighted": fc.ConFIG(weights=torch.tensor([1.0, 2.0, 0.5])),
}


@pytest.mark.parametrize(
    ("m", "n", "method"),
    [
        *[(m, n, "propagate") for m, n in (*SHAPES, (64, 65_540))],
        (3, 65_536, "drop"),
        (9, 65_536, "drop"),
        (3, 65_536, "weighted"),
    ],
)
def test_nothing_waits_for_the_device(m: int, n: int, method: str) -> None:
    """From the second call on: the first compiles, and copies direction weights to the device."""
    grads, out, rule = gradients(m, n), torch.empty(n, device=DEVICE), METHODS[method]

    def calls() -> None:
        fc.combine(grads, rule, out=out)
        fc.combine(grads, rule)
        fc.gramian(grads)

    calls()  # and makes PyTorch reserve the memory for the results, which may wait, too
    done = torch.cuda.Event()
    with synchronising_raises():
        torch.cuda._sleep(A_WHILE)
        done.record()
        calls()
        assert not done.query(), "a call returned only when the device had done what came before it"


def test_separate_vectors_do_not_wait_either() -> None:
    for m in (3, 9):
        rows = list(gradients(m, 65_536))
        wanted = fc.combine(rows)
        with synchronising_raises():
            got = fc.combine(rows)
        assert torch.equal(got, wanted)


def allocations_of(call: Callable[[], object], times: int = 20) -> int:
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(times):
        call()
    return torch.cuda.memory_stats()["allocation.all.allocated"] - before


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_steady_state_allocates_nothing(m: int, n: int) -> None:
    grads, out = gradients(m, n), torch.empty(n, device=DEVICE)
    assert allocations_of(lambda: fc.combine(grads, out=out)) == 0
    rows = list(grads)
    assert allocations_of(lambda: fc.combine(rows, out=out)) == 0


def test_a_result_is_all_the_memory_a_combination_takes() -> None:
    n = 1 << 22
    grads = gradients(3, n)
    fc.combine(grads)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fc.combine(grads)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 4 * n + (1 << 20)  # PyTorch may round a block up by that
