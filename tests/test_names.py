"""Losses by their names: where a name stands for an index, and which errors, records and tables call a loss by it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastconfig as fc
from fastconfig.methods.catalogue import CATALOGUE

NAMES = ["pde", "boundary", "initial"]

pytestmark = pytest.mark.usefixtures("one_thread")


def buffer_of(num_losses, dtypes=(torch.float32,)):
    parameters = [nn.Parameter(torch.arange(1.0, 4.0, dtype=dtype)) for dtype in dtypes]
    return fc.GradientBuffer(parameters, num_losses), parameters


def losses_of(parameters):
    return [sum(p.double().pow(k).sum() for p in parameters) for k in (1, 2, 3)]


def optimizer_of(num_losses, dtypes=(torch.float32,), **options):
    parameters = [nn.Parameter(torch.arange(1.0, 4.0, dtype=dtype)) for dtype in dtypes]
    return fc.optim.MConFIG(parameters, num_losses=num_losses, **options), parameters


@pytest.mark.parametrize("names", [NAMES, tuple(NAMES)])
def test_names_stand_wherever_a_number_does(names):
    buf, parameters = buffer_of(names)
    assert buf.names == tuple(NAMES)
    assert buf.num_losses == 3
    for name in reversed(NAMES):
        with buf.record(name):
            losses_of(parameters)[NAMES.index(name)].backward()
    rows = buf.rows.clone()
    with buf.record(1, accumulate=False):
        losses_of(parameters)[1].backward()
    assert torch.equal(buf.rows, rows)
    info = buf.combine()
    assert buf.combination is info
    assert info.names == tuple(NAMES)
    assert "losses=['pde', 'boundary', 'initial']" in repr(info)
    assert "num_losses=['pde', 'boundary', 'initial']" in repr(buf)

    optimizer, parameters = optimizer_of(names)
    assert optimizer.names == optimizer.combination.names == tuple(NAMES)
    for name in NAMES:
        assert optimizer.next_loss() == name
        with optimizer.record(name):
            losses_of(parameters)[NAMES.index(name)].backward()
        optimizer.step()
    assert optimizer.combination.weights.all()


def test_without_names_losses_are_called_by_their_numbers():
    buf, parameters = buffer_of(3)
    buf.backward(losses_of(parameters))
    info = buf.combine()
    assert buf.names == info.names == optimizer_of(3)[0].names == ("0", "1", "2")
    assert "losses" not in repr(info)
    with pytest.raises(TypeError, match=r"loss must be the index .* no names, got '1'"), buf.record("1"):
        pytest.fail("the block was entered")


@pytest.mark.parametrize(
    ("num_losses", "error", "message"),
    [
        ("pde", TypeError, "num_losses must be an int or a list of the losses' names, got 'pde'"),
        (True, TypeError, "num_losses.*True"),
        ({"pde", "boundary"}, TypeError, "num_losses.*list"),
        ([], ValueError, r"num_losses must be at least 1, got \[\]"),
        (["pde", 2], TypeError, r"num_losses\[1\] must be a str.*got 2"),
        (["pde", " "], ValueError, r"num_losses\[1\] must not be empty"),
        (["pde", "boundary", "pde"], ValueError, "each loss once, got 'pde' twice"),
    ],
)
@pytest.mark.parametrize("make", [buffer_of, optimizer_of])
def test_bad_names(make, num_losses, error, message):
    with pytest.raises(error, match=message):
        make(num_losses)


@pytest.mark.parametrize("make", [buffer_of, optimizer_of])
def test_errors_call_a_loss_by_its_name(make):
    target, _ = make(NAMES)
    with pytest.raises(IndexError, match="'pde', 'boundary', 'initial', got 'bundary'"), target.record("bundary"):
        pytest.fail("the block was entered")
    with pytest.raises(IndexError, match="0 to 2, got 3"), target.record(3):
        pytest.fail("the block was entered")
    with (
        target.record(1),
        pytest.raises(RuntimeError, match=r"record\('pde'\) was called inside record\('boundary'\)"),
        target.record("pde"),
    ):
        pytest.fail("the block was entered")


def test_errors_of_backward_call_a_loss_by_its_name():
    buf, parameters = buffer_of(NAMES)
    good = losses_of(parameters)
    with pytest.raises(ValueError, match=r"losses\[2\] \('initial'\) does not require grad"):
        buf.backward([*good[:2], good[2].detach()])
    with pytest.raises(TypeError, match=r"losses\[0\] \('pde'\) must be a tensor"):
        buf.backward([1.0, *good[1:]])
    with pytest.raises(ValueError, match=r"losses\[1\] \('boundary'\) must have one element"):
        buf.backward([good[0], lambda: parameters[0] * 1.0, good[2]])


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float64)], ids=["fused", "segments"])
@pytest.mark.parametrize("names", [NAMES, 3])
def test_a_gradient_that_is_not_finite_is_named(names, dtypes):
    label = "loss 'boundary'" if names is NAMES else "loss 1"
    message = f"gradient of {label} is inf or NaN; .*nonfinite='drop'"
    method = fc.ConFIG(nonfinite="raise")
    buf, parameters = buffer_of(names, dtypes)
    buf.backward(losses_of(parameters))
    buf.segments[-1].rows[1, 0] = math.inf
    with pytest.raises(FloatingPointError, match=message):
        buf.combine(method)
    assert buf.combination is None

    optimizer, parameters = optimizer_of(names, dtypes, method=method)
    with optimizer.record(1):
        (losses_of(parameters)[1] * math.inf).backward()
    with pytest.raises(FloatingPointError, match=message):
        optimizer.step()


def test_errors_of_an_optimizer_call_a_loss_by_its_name():
    optimizer, parameters = optimizer_of(NAMES)
    with optimizer.record("boundary"):
        losses_of(parameters)[1].backward()
    with pytest.raises(ValueError, match="loss 'boundary' was already recorded"), optimizer.record(1):
        pytest.fail("the block was entered")
    with pytest.raises(ValueError, match=r"record\('pde'\) would make 2 losses"), optimizer.record("pde"):
        pytest.fail("the block was entered")
    optimizer.step()
    with optimizer.record("initial"):
        pass
    with pytest.raises(RuntimeError, match="reached a parameter, for loss 'initial'; if"):
        optimizer.step()


# Methods by name


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_a_method_by_its_name_is_that_of_the_catalogue(name):
    torch.manual_seed(0)
    grads = torch.randn(3, 50)
    entry = CATALOGUE[name]
    spelled = entry.kind.__name__
    torch.manual_seed(1)
    wanted = fc.combine(grads, entry.make(3))
    buf = fc.GradientBuffer([weight := nn.Parameter(torch.zeros(50))], 3)
    buf.backward([(row * weight).sum() for row in grads])
    torch.manual_seed(1)
    buf.combine(spelled)
    assert torch.equal(buf.grad, wanted)
    if entry.remembers:
        with pytest.raises(ValueError, match=rf"remembers.*make it once, method = fc.{spelled}\("):
            fc.combine(grads, spelled)
    else:
        for given in (name, spelled, name.upper()):
            torch.manual_seed(1)
            assert torch.equal(fc.combine(grads, given), wanted)


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_what_is_said_to_remember_does_and_nothing_else(name):
    method = CATALOGUE[name].make(3)
    for _ in range(2):
        if hasattr(method, "weights"):
            method.weights(torch.eye(3, dtype=torch.float64))
    state = method.state_dict().get("state") if hasattr(method, "state_dict") else None
    assert CATALOGUE[name].remembers == (state is not None)


def test_a_buffer_and_an_optimizer_keep_what_a_method_by_name_remembers():
    torch.manual_seed(0)
    factors = torch.randn(4, 3, 50)
    answers = []
    for given in (fc.CRMOGM(fc.MGDA()), "crmogm"):
        buf = fc.GradientBuffer([weight := nn.Parameter(torch.zeros(50))], 3)
        for rows in factors:
            buf.backward([(row * weight).sum() for row in rows])
            buf.combine(given)
        answers.append(buf.grad.clone())
        optimizer = fc.optim.MConFIG([weight], num_losses=3, method=given)
        for i, rows in enumerate(factors):
            with optimizer.record(i % 3):
                (rows[0] * weight).sum().backward()
            optimizer.step()
        answers.append(weight.detach().clone())
    assert torch.equal(answers[0], answers[2])


def test_a_name_that_is_none_is_told_with_those_spelled_alike():
    grads = torch.ones(2, 3)
    buf = fc.GradientBuffer([weight := nn.Parameter(torch.zeros(3))], 2)
    buf.backward([weight.sum(), weight.sum()])
    for call in (
        lambda: fc.combine(grads, "pcgard"),
        lambda: buf.combine("pcgard"),
        lambda: fc.optim.MConFIG([weight], num_losses=2, method="pcgard"),
    ):
        with pytest.raises(ValueError, match=r"method must be one that .*got 'pcgard'; is it 'pcgrad'"):
            call()
