"""A GradScaler beside a buffer: weights of the true gradients, a scaled result, overflows that are heard."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import fastconfig as fc

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

SCALE = 65536.0

METHODS = {
    "ConFIG": fc.ConFIG,
    "ConFIG of a length": lambda: fc.ConFIG(length="harmonic"),
    "ConFIG of a length of one's own": lambda: fc.ConFIG(length=lambda norms, cosines: norms.clamp(max=0.5) @ cosines),
    "NashMTL": fc.NashMTL,
    "FairGrad": fc.FairGrad,
    "InverseNorm": fc.InverseNorm,
    "SDMGrad": fc.SDMGrad,
    "MGDA": fc.MGDA,
    "CAGrad": fc.CAGrad,
    "GradVac": lambda: fc.GradVac(generator=torch.Generator().manual_seed(0)),
    "GradDrop": lambda: fc.GradDrop(generator=torch.Generator().manual_seed(0)),
}


class Saturating:
    """A rule of a user's, that is not homogeneous at all."""

    def weights(self, gramian):
        return 1.0 / (1.0 + gramian.diagonal())


METHODS["a user's"] = Saturating


def problem(dtypes):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(5, 3).to(dtype)) for dtype in dtypes]
    factors = [[torch.randn(5, 3).to(dtype) for dtype in dtypes] for _ in range(3)]
    return parameters, lambda: [
        sum((f * p).double().sum() for f, p in zip(factor, parameters, strict=True)) for factor in factors
    ]


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float64)], ids=["one segment", "two"])
@pytest.mark.parametrize("name", METHODS)
def test_weights_are_of_the_true_gradients_and_the_result_is_scaled(name, dtypes):
    parameters, losses_of = problem(dtypes)
    plain, scaled = (fc.GradientBuffer(parameters, 3) for _ in range(2))
    scaler = GradScaler("cpu", init_scale=SCALE)
    methods = METHODS[name](), METHODS[name]()
    for _ in range(2):  # methods that remember
        plain.backward(losses_of())
        wanted = plain.combine(methods[0])
        grads = [segment.grad.clone() for segment in plain.segments]
        scaled.backward(scaler.scale(losses_of()))
        info = scaled.combine(methods[1], scaler=scaler)
        torch.testing.assert_close(info.gramian, wanted.gramian)
        torch.testing.assert_close(info.norms, wanted.norms)
        torch.testing.assert_close(info.weights, wanted.weights, equal_nan=True)
        for segment, grad in zip(scaled.segments, grads, strict=True):
            torch.testing.assert_close(segment.grad / SCALE, grad)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    before = [parameter.detach().clone() for parameter in parameters]
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    for parameter, start, grad in zip(parameters, before, grads, strict=True):
        torch.testing.assert_close(start - parameter, grad.view_as(parameter))


def test_without_the_scaler_nash_is_another_problem():
    """The trap: its answer has length 1 whatever the gradients', so that the scale divides the update."""
    parameters, losses_of = problem((torch.float32,))
    buf, scaler = fc.GradientBuffer(parameters, 3), GradScaler("cpu", init_scale=SCALE)
    norms = []
    for given in (scaler, None):
        buf.backward(scaler.scale(losses_of()))
        buf.combine(fc.NashMTL(), scaler=given)
        norms.append(float(buf.grad.norm()) / SCALE)
    assert norms[0] == pytest.approx(1.0, rel=1e-5)
    assert norms[1] == pytest.approx(1.0 / SCALE, rel=1e-5)


@pytest.mark.parametrize("nonfinite", ["drop", "propagate"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_overflow_is_found_be_it_dropped_or_not(nonfinite, bad):
    parameters, losses_of = problem((torch.float32, torch.float64))
    unreached = nn.Parameter(torch.ones(2))
    buf, scaler = fc.GradientBuffer([unreached, *parameters], 3), GradScaler("cpu", init_scale=SCALE)
    optimizer = torch.optim.SGD([unreached, *parameters], lr=1.0)
    before = [parameter.detach().clone() for parameter in parameters]
    losses = losses_of()
    losses[1] = losses[1] * bad
    buf.backward(scaler.scale(losses))
    info = buf.combine(fc.ConFIG(nonfinite=nonfinite), scaler=scaler)
    if nonfinite == "drop":
        assert info.weights[1] == 0.0
        assert info.weights.isfinite().all()
    assert unreached.grad is None
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    assert scaler.get_scale() == SCALE / 2
    buf.backward(scaler.scale(losses_of()))
    buf.combine(fc.ConFIG(nonfinite=nonfinite), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert not any(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    assert scaler.get_scale() == SCALE / 2


def test_a_scaler_that_is_off_changes_nothing():
    parameters, losses_of = problem((torch.float32,))
    buf, scaler = fc.GradientBuffer(parameters, 3), GradScaler("cpu", enabled=False)
    buf.backward(losses_of())
    buf.combine(fc.NashMTL())
    wanted = buf.grad.clone()
    buf.backward(scaler.scale(losses_of()))
    info = buf.combine(fc.NashMTL(), scaler=scaler)
    torch.testing.assert_close(buf.grad, wanted)
    assert info.norms.isfinite().all()


def test_nonfinite_raise_names_the_loss_and_writes_nothing():
    parameters, losses_of = problem((torch.float32,))
    buf, scaler = fc.GradientBuffer(parameters, ["a", "b", "c"]), GradScaler("cpu", init_scale=SCALE)
    losses = losses_of()
    losses[1] = losses[1] * math.inf
    buf.backward(scaler.scale(losses))
    kept = buf.grad.clone()
    with pytest.raises(FloatingPointError, match="gradient of loss 'b'"):
        buf.combine(fc.ConFIG(nonfinite="raise"), scaler=scaler)
    assert torch.equal(buf.grad, kept)


def test_training_in_bfloat16_autocast_with_a_scaler_is_that_without():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(32, 4), torch.randn(32, 3)
    twins = [model, copy.deepcopy(model)]
    trained = []
    for network, enabled in zip(twins, (True, False), strict=True):
        buf, scaler = fc.GradientBuffer(network, 3), GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                errors = (network(x).float() - y).square().mean(dim=0)
            buf.backward([scaler.scale(error) for error in errors])
            buf.combine("nashmtl", scaler=scaler)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        trained.append(nn.utils.parameters_to_vector(network.parameters()).detach())
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-4)
