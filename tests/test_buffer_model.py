"""A buffer through long random sequences of calls, beside a model of it that is a dictionary of float64 gradients."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from torch import nn

import fastconfig as fc
from fastconfig.gradients import landing

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

M = 3


class Parts(nn.Module):
    """Parameters of two dtypes and several shapes, each of which a loss may or may not reach."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(4, 3), (5,), (), (2, 2, 2), (70, 70)]
        self.parts = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.turned = nn.Parameter(torch.randn(3, 4).T.contiguous().T)


class Expected:
    """What rows and ``.grad`` are to be."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.rows: list[dict[int, torch.Tensor]] = [{} for _ in range(M)]
        self.new = [False] * M

    def record(self, row: int, gradients: dict[int, torch.Tensor], accumulate: bool) -> None:
        if not (accumulate and self.new[row]):
            self.rows[row] = {}
        for i, gradient in gradients.items():
            self.rows[row][i] = self.rows[row].get(i, 0.0) + gradient.double()
        self.new[row] = True

    def row(self, row: int, i: int) -> torch.Tensor:
        return self.rows[row].get(i, torch.zeros(self.parameters[i].shape, dtype=torch.float64))


def gradients_of(rng: random.Random, expected: Expected) -> tuple[dict[int, torch.Tensor], object]:
    """Small integers, which add up exactly, for some of the parameters that train; and a loss that has them."""
    trained = [i for i, parameter in enumerate(expected.parameters) if parameter.requires_grad]
    reached = rng.sample(trained, rng.randint(1, len(trained)))
    gradients = {
        i: torch.randint(-4, 5, expected.parameters[i].shape).to(expected.parameters[i].dtype) for i in reached
    }
    return gradients, lambda: sum((gradients[i] * expected.parameters[i]).sum().double() for i in reached)


def record(buf: fc.GradientBuffer, rng: random.Random, expected: Expected) -> None:
    row, accumulate = rng.randrange(M), rng.random() < 0.5
    with buf.record(row, accumulate=accumulate):
        parts: dict[int, torch.Tensor] = {}
        for _ in range(rng.randint(1, 2)):
            gradients, loss = gradients_of(rng, expected)
            by_hand = rng.random() < 0.3
            for i, gradient in gradients.items():
                parts[i] = parts.get(i, 0.0) + gradient.double()
                if by_hand:
                    parameter = expected.parameters[i]
                    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
            if not by_hand:
                loss().backward()
    expected.record(row, parts, accumulate)


def backward(buf: fc.GradientBuffer, rng: random.Random, expected: Expected) -> None:
    accumulate = rng.random() < 0.5
    given = [None if rng.random() < 0.2 else gradients_of(rng, expected) for _ in range(M)]
    if all(pair is None for pair in given):
        return
    losses = [None if pair is None else pair[1] if rng.random() < 0.5 else pair[1]() for pair in given]
    buf.backward(losses, accumulate=accumulate)
    for row, pair in enumerate(given):
        if pair is not None or not (accumulate and expected.new[row]):
            expected.record(row, {} if pair is None else pair[0], accumulate)


def combine(buf: fc.GradientBuffer, rng: random.Random, expected: Expected) -> None:
    if not any(expected.rows):
        return
    method = rng.choice(["config", "mgda", "sum"])
    info = buf.combine(method, stale="use")
    flat = [torch.cat([expected.row(row, i).flatten() for i in range(len(expected.parameters))]) for row in range(M)]
    torch.testing.assert_close(info.gramian, fc.gramian(flat))
    for i, parameter in enumerate(expected.parameters):
        if any(i in row for row in expected.rows):
            wanted = sum(weight * expected.row(row, i) for row, weight in enumerate(info.weights.tolist()))
            torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-5, atol=1e-5)
        else:
            assert parameter.grad is None
    expected.new = [False] * M


def freeze(buf: fc.GradientBuffer, rng: random.Random, expected: Expected) -> None:
    """Only what the buffer has; and not everything."""
    parameter = rng.choice(expected.parameters)
    parameter.requires_grad_(not parameter.requires_grad)
    if not any(p.requires_grad for p in expected.parameters):
        parameter.requires_grad_()


def refresh(buf: fc.GradientBuffer, rng: random.Random, expected: Expected) -> None:
    buf.refresh()


def zero(buf: fc.GradientBuffer, rng: random.Random, expected: Expected) -> None:
    buf.zero()
    expected.rows = [{} for _ in range(M)]
    expected.new = [False] * M


def check(buf: fc.GradientBuffer, expected: Expected) -> None:
    places = {id(p): (s, v) for s in buf.segments for v, p in enumerate(s.parameters)}
    for row in range(M):
        for i, parameter in enumerate(expected.parameters):
            segment, position = places[id(parameter)]
            assert torch.equal(segment.views(segment.rows[row])[position].double(), expected.row(row, i)), (row, i)


@pytest.mark.parametrize("hooked_bytes", [0, 1 << 12, 1 << 60])
@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_calls(monkeypatch, seed, hooked_bytes):
    monkeypatch.setattr(landing, "HOOKED_BYTES", hooked_bytes)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = Parts()
    buf, expected = fc.GradientBuffer(model, M), Expected(list(model.parameters()))
    calls = [record] * 6 + [backward] * 6 + [combine] * 4 + [freeze, refresh, zero]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "grad and param do not obey")  # of a gradient assigned by hand
        for _ in range(120):
            rng.choice(calls)(buf, rng, expected)
            check(buf, expected)
