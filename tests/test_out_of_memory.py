"""Where PyTorch cannot allocate, nothing is half-done, and the same call does afterwards what it would have done.

The core's own allocations fail one by one in tests/core.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import fastconfig as fc
from fastconfig.gradients.memory import aligned_rows

pytestmark = pytest.mark.usefixtures("one_thread")

ALLOCATING = [
    (torch, name) for name in ("empty", "zeros", "ones", "full", "tensor", "empty_like", "zeros_like", "stack", "cat")
] + [(torch.Tensor, name) for name in ("clone", "contiguous", "to", "double", "new_empty", "new_zeros", "new_full")]
REFUSAL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes"
METHODS = {
    "config": fc.ConFIG,
    "gradvac": fc.GradVac,
    "sdmgrad": fc.SDMGrad,
    "nashmtl": lambda: fc.NashMTL(update_every=2),
    "pcgrad": lambda: fc.PCGrad(order="fixed"),
    "graddrop": lambda: fc.GradDrop(generator=torch.Generator().manual_seed(1)),
}

REMEMBERING = ("gradvac", "sdmgrad", "nashmtl")
"""Where the core does not do all of a step, what they remember goes on with each attempt."""


@contextmanager
def failing(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The allocation of this number, counted from 0, is refused. What it yields counts on."""
    made = [0]

    def counting(function: Callable) -> Callable:
        @functools.wraps(function)
        def counted(*args, **kwargs):
            result = function(*args, **kwargs)
            if args and result is args[0]:  # as of .to() where there is nothing to convert
                return result
            made[0] += 1
            if made[0] == number + 1:
                raise RuntimeError(REFUSAL)
            return result

        return counted

    with monkeypatch.context() as patch:
        for owner, name in ALLOCATING:
            patch.setattr(owner, name, counting(getattr(owner, name)))
        yield made


def with_every_allocation_failing(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], object], after: Callable[[], None]
) -> int:
    """Call again and again until no allocation is left that could fail. How many there are."""
    for number in range(1000):
        torch.manual_seed(0)  # whoever draws draws anew
        with failing(number, monkeypatch) as made:
            try:
                call()
            except RuntimeError as error:
                assert REFUSAL in str(error)  # noqa: PT017
            else:
                assert made[0] <= number
                return number
        after()
    raise AssertionError("it does not end")


def rows(m: int = 4, n: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vectors", [False, True], ids=["matrix", "vectors"])
@pytest.mark.parametrize("name", METHODS)
def test_combine(backend, monkeypatch, name, vectors):
    method, undisturbed = METHODS[name](), METHODS[name]()
    for step in range(3):
        grads = list(rows(seed=step)) if vectors else rows(seed=step)
        out = torch.full((50,), -7.0)

        def untouched(out=out) -> None:
            assert (out == -7.0).all()

        with_every_allocation_failing(
            monkeypatch, lambda grads=grads, out=out: fc.combine(grads, method, out=out, backend=backend), untouched
        )
        if backend == "reference" and name in REMEMBERING:
            continue
        torch.manual_seed(0)
        assert torch.equal(out, fc.combine(grads, undisturbed, backend=backend))


def test_rows_that_do_not_fit_say_what_was_asked_for():
    with pytest.raises(
        RuntimeError, match=r"could not allocate 3 rows of 100,000,000,000,000 elements of torch.float32"
    ):
        aligned_rows(3, 10**14, torch.float32, torch.device("cpu"))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 2).double())


def losses_of(network: nn.Module, seed: int) -> list[torch.Tensor]:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
    out = network[3](network[2](network[1](network[0](x))).double())
    return [out[:, 0].square().mean(), (out[:, 1] - 1).square().mean(), (out.sum(dim=1) + 1).square().mean()]


@pytest.mark.parametrize("name", METHODS)
def test_a_buffers_combination(monkeypatch, name):
    method, undisturbed, networks = METHODS[name](), METHODS[name](), (model(), model())
    buffers = [fc.GradientBuffer(network, 3) for network in networks]
    for step in range(3):
        for buf, network in zip(buffers, networks, strict=True):
            buf.backward(losses_of(network, step))
        before = [None if p.grad is None else (p.grad, p.grad.clone()) for p in networks[0].parameters()]

        def untouched(before=before) -> None:
            for p, was in zip(networks[0].parameters(), before, strict=True):
                assert p.grad is None if was is None else p.grad is was[0] and torch.equal(p.grad, was[1])

        count = with_every_allocation_failing(monkeypatch, lambda: buffers[0].combine(method), untouched)
        assert count > 0
        torch.manual_seed(0)
        buffers[1].combine(undisturbed)
        for ours, theirs in zip(*(network.parameters() for network in networks), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        torch.testing.assert_close(*(buf.combination.weights for buf in buffers), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "graddrop"])  # which is no rule on a Gramian
def test_a_step_of_momentum(monkeypatch, name):
    networks = (model(), model())
    optimizers = [fc.optim.MConFIG(network, lr=0.1, num_losses=3, method=METHODS[name]()) for network in networks]
    for step in range(5):
        for optimizer, network in zip(optimizers, networks, strict=True):
            with optimizer.record(loss := optimizer.next_loss()):
                losses_of(network, step)[loss].backward()
        before = [p.detach().clone() for p in networks[0].parameters()]

        def untouched(before=before) -> None:
            assert all(map(torch.equal, networks[0].parameters(), before))

        assert with_every_allocation_failing(monkeypatch, optimizers[0].step, untouched) > 0
        torch.manual_seed(0)
        optimizers[1].step()
        if name in REMEMBERING:
            continue
        for ours, theirs in zip(*(network.parameters() for network in networks), strict=True):
            assert torch.equal(ours, theirs)
