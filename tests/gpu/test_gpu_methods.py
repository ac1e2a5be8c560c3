"""Every method on a device: against the reference, without waiting, in a graph, on its stream, the same bits.

That the rules are right is shown in test_triton_rules.py, which `make gpu` runs on the device, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

import fastconfig as fc
from fastconfig.backends import reference
from fastconfig.backends import triton as backend
from fastconfig.backends.rules import GramianRule
from fastconfig.methods.catalogue import CATALOGUE

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]

DEVICE = "cuda"
RULES = [name for name, entry in CATALOGUE.items() if hasattr(entry.kind, "weights")]
"""Methods that are rules on the Gramian: all but GradDrop."""
DRAWN = ("randomweights", "pcgrad", "gradvac")
"""Methods that draw, on a device other numbers than on the host."""
SOLVED = ("mgda", "cagrad", "upgrad", "nash", "aligned")
NUMBERS: dict[str, tuple[float, ...]] = {"cagrad": (0.5, 0.0), "nash": (0.0,), "aligned": (0.0,)}


def gradients(m: int, n: int, seed: int = 0) -> Tensor:
    """Rows that conflict, at scales 1 : 100 : 0.01."""
    rows = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    return (rows * torch.tensor([1.0, 100.0, 0.01]).repeat(m)[:m, None]).to(DEVICE)


def gramian_of(m: int, seed: int = 0) -> Tensor:
    rows = gradients(m, 2 * m, seed).double()
    return rows @ rows.T


def rule_of(kind: str) -> GramianRule:
    return GramianRule(kind, NUMBERS.get(kind, ()), None, "propagate")


@contextmanager
def synchronising_raises() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [name for name in RULES if name not in DRAWN])
@pytest.mark.parametrize(("m", "n"), [(3, 5000), (17, 5000)])
def test_combines_as_the_reference(m: int, n: int, name: str) -> None:
    grads = gradients(m, n)
    ours, theirs = CATALOGUE[name].make(m), CATALOGUE[name].make(m)
    for _ in range(2):  # the second with what a method remembers of the first
        got = fc.combine(grads, ours)
        wanted = fc.combine(grads.cpu(), theirs, backend="reference")
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", SOLVED)
@pytest.mark.parametrize("m", [40, 64])
def test_many_losses_as_the_reference(m: int, kind: str) -> None:
    gramian = gramian_of(m)
    got = backend.rule_weights(gramian, rule_of(kind), None).cpu().numpy()
    wanted = reference.rule_weights(gramian.cpu(), rule_of(kind), None).numpy()
    difference = got - wanted
    k = gramian.cpu().numpy()
    scale = np.abs(wanted * np.sqrt(np.diagonal(k))).max()
    assert np.sqrt(max(difference @ k @ difference, 0.0)) <= 1e-8 * scale


@pytest.mark.parametrize("m", [3, 17])
def test_nothing_waits_for_the_device(m: int) -> None:
    """From the second combination on: the first compiles, and copies preferences to the device."""
    grads, out = gradients(m, 65_536), torch.empty(65_536, device=DEVICE)
    methods = [CATALOGUE[name].make(m) for name in RULES]

    def calls() -> None:
        for method in methods:
            fc.combine(grads, method, out=out)

    for _ in range(2):
        calls()
    done = torch.cuda.Event()
    with synchronising_raises():
        torch.cuda._sleep(400_000_000)
        done.record()
        calls()
        assert not done.query(), "a call returned only when the device had done what came before it"


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.parametrize("name", [name for name in RULES if name not in DRAWN])
def test_a_captured_combination_follows_new_data(name: str) -> None:
    """And others by the same method come between its replays, as a graph has memory of its own."""
    grads, out = gradients(3, 5000), torch.empty(5000, device=DEVICE)
    ours, between, theirs = (CATALOGUE[name].make(3) for _ in range(3))
    graph = captured(lambda: fc.combine(grads, ours, out=out))
    for _ in range(2):
        fc.combine(grads, theirs)
    for seed in range(1, 4):
        grads.copy_(gradients(3, 5000, seed))
        graph.replay()
        fc.combine(gradients(3, 5000, 50), between)
        wanted = fc.combine(grads, theirs)
        torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


def test_the_same_bits_every_time() -> None:
    """UPGrad's programs, one a row, also while another stream's work changes which of them arrives last."""
    gramian = gramian_of(17)
    first = backend.rule_weights(gramian, rule_of("upgrad"), None)
    busy, other = torch.randn(1024, 1024, device=DEVICE), torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for i in range(20):
        if i % 2:
            with torch.cuda.stream(other):
                busy = (busy @ busy).clamp_(-1.0, 1.0)
        assert torch.equal(backend.rule_weights(gramian, rule_of("upgrad"), None), first)


def test_other_numbers_compile_nothing() -> None:
    from fastconfig.kernels import launched_rules

    def compiled() -> int:
        return sum(len(cache[0]) for cache in launched_rules.rule_of_gramian.device_caches.values())

    gramian = gramian_of(3)

    def calls(number: float, preference: float) -> None:
        for kind in ("cagrad", "fairgrad", "inverse_norm"):
            numbers = (number, 0.0) if kind == "cagrad" else (number,)
            backend.rule_weights(gramian, GramianRule(kind, numbers, (preference, 1.0, 1.0), "propagate"), None)

    calls(0.25, 1.0)
    before = compiled()
    for number in (0.5, 1.0, 2.0, 3.0):
        calls(number, number)
    assert compiled() == before


def test_a_steady_state_takes_no_memory_beside_what_it_returns() -> None:
    gramian = gramian_of(17)
    for kind in SOLVED:
        backend.rule_weights(gramian, rule_of(kind), None)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    kept = [backend.rule_weights(gramian, rule_of(kind), None) for kind in SOLVED]
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == len(kept)
