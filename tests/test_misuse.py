"""Loops that are easily got wrong, and are noticed: steps without combine, steps that raised."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import fastconfig as fc

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

NOT_COMBINED = r"optimizer.step\(\) was called after new rows.*combine\(\)"


def problem():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    return model, lambda: list(model(torch.ones(3, 4)).square().mean(dim=0))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_without_combine_is_told_once(optimizer):
    model, losses_of = problem()
    buf, optimizer = fc.GradientBuffer(model, 2), optimizer(model.parameters(), lr=0.1)
    buf.backward(losses_of())
    buf.combine()
    optimizer.step()
    buf.backward(losses_of())
    with pytest.warns(UserWarning, match=NOT_COMBINED) as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    optimizer.step()


def test_a_step_over_other_parameters_is_no_concern():
    model, losses_of = problem()
    other = nn.Linear(2, 2)
    buf = fc.GradientBuffer(model, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    buf.backward(losses_of())
    other(torch.ones(2)).sum().backward()
    optimizer.step()
    buf.zero()  # the rows were only looked at
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_a_buffer_that_is_gone_asks_nothing():
    model, losses_of = problem()
    buf = fc.GradientBuffer(model, 2)
    buf.backward(losses_of())
    del buf
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of a part of torch that dynamo imports
def test_a_compiled_step_is_not_disturbed():
    model, losses_of = problem()
    buf, optimizer = fc.GradientBuffer(model, 2), torch.optim.SGD(model.parameters(), lr=0.1)
    buf.backward(losses_of())
    buf.combine()
    wanted = [p.detach() - 0.1 * p.grad for p in model.parameters()]
    torch.compile(optimizer.step, backend="eager")()
    for parameter, value in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


# M-ConFIG after a step that raised


class Failing:
    """A method that fails when told to."""

    fails = False

    def weights(self, gramian):
        if self.fails:
            raise ArithmeticError("no answer")
        return torch.ones_like(gramian[0])


def test_after_a_step_that_raised_it_goes_on_with_the_next_batch_or_tries_again(backend):
    model, losses_of = problem()
    method = Failing()
    optimizer = fc.optim.MConFIG(model, lr=0.1, num_losses=2, method=method, backend=backend)

    def record(i):
        with optimizer.record(i):
            losses_of()[i].backward()

    record(0)
    optimizer.step()
    method.fails = True
    record(1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    method.fails = False
    record(0)  # the next batch; what was recorded is forgotten
    optimizer.step()
    assert optimizer.state_dict()["shared"]["counts"].tolist() == [2.0, 0.0]
    method.fails = True
    record(1)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    method.fails = False
    optimizer.step()  # the same gradients once more
    assert optimizer.state_dict()["shared"]["counts"].tolist() == [2.0, 1.0]
    assert not any(map(torch.equal, model.parameters(), before))


def test_a_step_that_can_be_mended_is_tried_again_with_the_same_gradients(backend):
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = fc.optim.MConFIG([{"params": [w]} for w in weights], lr=0.1, num_losses=1, backend=backend)
    with optimizer.record(0):
        (weights[0].sum() + weights[1].sum()).backward()
    optimizer.param_groups[1]["betas"] = (0.5, 0.999)
    with pytest.raises(ValueError, match="all groups must share betas"):
        optimizer.step()
    optimizer.param_groups[1]["betas"] = optimizer.param_groups[0]["betas"]
    optimizer.step()
    assert all(bool((w < 1.0).all()) for w in weights)


def test_a_closure_that_raises_leaves_the_next_step_free(backend):
    model, losses_of = problem()
    optimizer = fc.optim.MConFIG(model, lr=0.1, num_losses=2, losses_per_step=2, backend=backend)

    def closure(fails):
        for i in range(2):
            with optimizer.record(i):
                losses_of()[i].backward()
        if fails:
            raise ArithmeticError
        return 1.5

    with pytest.raises(ArithmeticError):
        optimizer.step(lambda: closure(True))
    assert optimizer.step(lambda: closure(False)) == 1.5
    assert optimizer.combination.norms.all()


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events at the end of each cycle:UserWarning")
def test_hooks_and_profiler_see_an_optimizers_step(backend):
    model, losses_of = problem()
    optimizer = fc.optim.MConFIG(model, lr=0.1, num_losses=2, backend=backend)
    seen = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
    ]

    def step():
        with optimizer.record(optimizer.next_loss()):
            losses_of()[0].backward()
        optimizer.step()

    step()
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    assert any(event.key == "Optimizer.step#MConFIG.step" for event in profile.key_averages())
    assert seen == ["before", "after"]


class Counting(fc.optim.MConFIG):
    """A subclass with a step of its own, which torch wraps."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        return super().step(closure)


def test_hooks_of_a_subclass_run_once(backend):
    model, losses_of = problem()
    optimizer = Counting(model, lr=0.1, num_losses=1, backend=backend)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    with optimizer.record(0):
        losses_of()[0].backward()
    optimizer.step()
    assert seen == ["before"]
    assert optimizer.calls == 1


def test_gradients_that_are_not_finite_are_forgotten(backend):
    model, losses_of = problem()
    optimizer = fc.optim.MConFIG(
        model, lr=0.1, num_losses=2, method=fc.ConFIG(nonfinite="raise"), backend=backend, losses_per_step=2
    )
    for _ in range(2):
        with optimizer.record(0):
            (losses_of()[0] * math.nan).backward()
        with pytest.raises(FloatingPointError):
            optimizer.step()
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="nothing was recorded"):
        optimizer.step()


# What loops forget of a GradScaler and of micro-batches


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True)])
def test_a_scaler_that_combine_was_not_told_of_is_told_once(optimizer):
    model, losses_of = problem()
    buf, optimizer = fc.GradientBuffer(model, 2), optimizer(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps the optimizer's step
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def step(**told):
        buf.backward(scaler.scale(losses_of()))
        buf.combine("nashmtl", **told)
        scaler.step(optimizer)
        scaler.update()

    step(scaler=scaler)
    with pytest.warns(UserWarning, match=r"was not told of the scaler.*combine\(..., scaler=scaler\)") as caught:
        step()
    assert caught[0].filename == __file__
    step()


def test_a_scaler_that_is_off_or_steps_something_else_is_no_concern():
    model, losses_of = problem()
    other = nn.Linear(2, 2)
    buf, optimizer = fc.GradientBuffer(model, 2), torch.optim.SGD(model.parameters(), lr=0.1)
    off, on = torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu")
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(2):
        buf.backward(losses_of())
        buf.combine()
        off.step(optimizer)
        on.scale(other(torch.ones(2)).sum()).backward()
        on.step(elsewhere)
        on.update()


@pytest.mark.parametrize("way", ["backward", "record"])
def test_a_combination_of_each_micro_batch_is_told_once(way):
    model, losses_of = problem()
    buf, optimizer = fc.GradientBuffer(model, 2), torch.optim.SGD(model.parameters(), lr=0.1)

    def accumulate():
        if way == "backward":
            buf.backward(losses_of(), accumulate=True)
            return
        for i in range(2):
            with buf.record(i, accumulate=True):
                losses_of()[i].backward()

    for _ in range(3):  # as it should be
        for _ in range(2):
            accumulate()
        buf.combine()
        optimizer.step()
    accumulate()
    buf.combine()
    with pytest.warns(UserWarning, match=r"begins anew.*combine\(\) after all micro-batches") as caught:
        accumulate()
    assert caught[0].filename == __file__
    buf.combine()
    accumulate()


def test_combinations_without_a_step_are_no_concern_elsewhere():
    """Nobody steps by an optimizer of torch's; a scaler leaves a step out; nothing is accumulated."""
    model, losses_of = problem()
    buf, optimizer = fc.GradientBuffer(model, 2), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        buf.backward(losses_of(), accumulate=True)
        buf.combine()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(3):
        buf.backward(scaler.scale(losses_of()), accumulate=True)
        buf.combine(scaler=scaler)
    for _ in range(3):
        buf.backward(losses_of())
        buf.combine()
