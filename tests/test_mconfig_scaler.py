"""MConFIG under a GradScaler, and steps whose gradient is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mconfig_oracle import Oracle, assert_near, joined, parameters_of, push, random_like
from torch.amp import GradScaler

import fastconfig as fc

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

BAD = [math.inf, -math.inf, math.nan]


def snapshot(optimizer: fc.optim.MConFIG) -> list[torch.Tensor]:
    """Copies of parameters, averages, second moments and the m×m numbers, but for the steps that were left out."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shared = optimizer.state_dict()["shared"]
    state = [value.clone() for p in parameters for value in optimizer.state.get(p, {}).values()]
    numbers = [shared[name] for name in ("gramian", "weights", "counts")]
    return [*(p.detach().clone() for p in parameters), *state, *numbers, shared["totals"][:1].clone()]


def assert_same(optimizer: fc.optim.MConFIG, before: list[torch.Tensor]) -> None:
    for found, wanted in zip(snapshot(optimizer), before, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_are_unscaled_before_they_enter_the_average(backend, k, dtype):
    """The scale moves on the way; scales being powers of two, the bits are those without a scaler."""
    plain, ours = parameters_of((3,), (4,), dtype=dtype), parameters_of((3,), (4,), dtype=dtype)
    arguments = {"lr": 0.1, "num_losses": 3, "losses_per_step": k, "backend": backend}
    wanted, optimizer = fc.optim.MConFIG(plain, **arguments), fc.optim.MConFIG(ours, **arguments)
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        for i in wanted.next_losses():
            given = random_like(plain, generator)
            push(wanted, i, given)
            push(optimizer, i, {p: given[q] for p, q in zip(ours, plain, strict=True)}, scaler)
        wanted.step()
        scaler.step(optimizer)
        scaler.update()
        for p, q in zip(ours, plain, strict=True):
            assert torch.equal(p, q)
    assert scaler.get_scale() == 1024.0 * 2**6
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("k", "where"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1)], ids=["one", "first", "second", "first of 3", "mid of 3"]
)
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16, torch.float32]], ids=["one", "two segments"])
def test_a_step_with_inf_changes_nothing_and_the_scale_backs_off(backend, k, where, bad, dtypes):
    parameters = [parameters_of((5,), dtype=dtype)[0] for dtype in dtypes]
    optimizer = fc.optim.MConFIG(parameters, lr=0.1, weight_decay=0.1, num_losses=3, losses_per_step=k, backend=backend)
    scaler = GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        spoiled = step in (0, 5, 6)
        before = snapshot(optimizer) if step else None
        for slot, i in enumerate(optimizer.next_losses()):
            given = random_like(parameters, generator)
            if spoiled and slot == where:
                given[parameters[0]][2] = bad
            push(optimizer, i, given, scaler)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale * (0.5 if spoiled else 1.0)
        if before is not None and spoiled:
            assert_same(optimizer, before)
    assert optimizer.steps_left_out == 3
    assert optimizer.state_dict()["shared"]["totals"].tolist()[1] == 3.0
    assert all(p.isfinite().all() for p in parameters)


def test_the_scaler_hears_of_a_gradient_that_two_later_ones_hide():
    """The one between reaches nothing of that dtype, so it neither shows nor carries what was not finite."""
    half, single = parameters_of((3,), dtype=torch.bfloat16) + parameters_of((3,), dtype=torch.float32)
    optimizer = fc.optim.MConFIG([half, single], num_losses=3, losses_per_step=3)
    scaler = GradScaler("cpu", init_scale=64.0)
    push(optimizer, 0, {half: torch.tensor([1.0, math.inf, 1.0])}, scaler)
    push(optimizer, 1, {single: torch.ones(3)})
    push(optimizer, 2, {half: torch.ones(3), single: torch.ones(3)})
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32.0
    assert optimizer.steps_left_out == 1


def test_a_parameter_of_no_element_does_not_stand_in_for_others():
    """What was not finite is shown by an element of a parameter that has one."""
    weight, empty = parameters_of((3,), (0,))
    optimizer = fc.optim.MConFIG([weight, empty], num_losses=2, losses_per_step=2)
    push(optimizer, 0, {weight: torch.tensor([1.0, math.inf, 1.0]), empty: torch.ones(0)})
    push(optimizer, 1, {empty: torch.ones(0)})
    assert weight.grad.isinf().any()
    optimizer.step()
    assert optimizer.steps_left_out == 1


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("method", ["ConFIG", "callable length", "max_norm", "max_update_norm", "two segments"])
def test_without_a_scaler_a_step_is_left_out_all_the_same(backend, method, bad):
    """Whatever path it takes."""
    parameters = parameters_of((5,), (3,), dtype=torch.float32)
    if method == "two segments":
        parameters += parameters_of((4,))
    options = {
        "callable length": {"method": fc.ConFIG(length=lambda norms, cosines: norms.sum())},
        "max_norm": {"max_norm": 1.0},
        "max_update_norm": {"max_update_norm": 1.0},
    }
    optimizer = fc.optim.MConFIG(parameters, lr=0.1, num_losses=2, backend=backend, **options.get(method, {}))
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        given = random_like(parameters, generator)
        spoiled = step % 4 == 3
        if spoiled:
            given[parameters[-1]][1] = bad
        before = snapshot(optimizer)
        push(optimizer, optimizer.next_loss(), given)
        optimizer.step()
        if spoiled:
            assert_same(optimizer, before)
        elif step > 1:
            assert not torch.equal(parameters[0], before[0])
    assert optimizer.steps_left_out == 3


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_norm_out_of_range_leaves_the_step_out_be_it_clipped_or_not(backend, max_norm):
    """float64 elements of 1e200, whose squares overflow: clipping must not make a zero of them that counts."""
    parameters = parameters_of((3,))
    optimizer = fc.optim.MConFIG(parameters, num_losses=1, max_norm=max_norm, backend=backend)
    before = snapshot(optimizer)[-3:]
    push(optimizer, 0, {parameters[0]: torch.full((3,), 1e200, dtype=torch.float64)})
    optimizer.step()
    assert optimizer.steps_left_out == 1
    for found, wanted in zip(snapshot(optimizer)[-3:], before, strict=True):
        assert torch.equal(found, wanted)


def test_steps_that_were_left_out_leave_no_trace(backend):
    """Training with them is training without."""
    plain, ours = parameters_of((5,)), parameters_of((5,))
    wanted, optimizer = (fc.optim.MConFIG(p, lr=0.1, num_losses=2, backend=backend) for p in (plain, ours))
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        (given,) = random_like(plain, generator).values()
        push(wanted, step % 2, {plain[0]: given})
        wanted.step()
        if step % 3 == 0:
            push(optimizer, (step + 1) % 2, {ours[0]: given * math.nan})
            optimizer.step()
        push(optimizer, step % 2, {ours[0]: given})
        optimizer.step()
        assert torch.equal(ours[0], plain[0])


@pytest.mark.parametrize("method", [fc.ConFIG(nonfinite="raise")])
@pytest.mark.parametrize("segments", [1, 2])
def test_a_method_that_raises(backend, method, segments):
    """Nothing was written, and what was recorded is still there, until zero_grad."""
    parameters = parameters_of((4,), dtype=torch.float32) + parameters_of((3,)) * (segments - 1)
    optimizer = fc.optim.MConFIG(parameters, lr=0.1, num_losses=2, method=method, backend=backend)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        push(optimizer, optimizer.next_loss(), random_like(parameters, generator))
        optimizer.step()
    before = snapshot(optimizer)
    given = random_like(parameters, generator)
    given[parameters[-1]][0] = math.nan
    push(optimizer, 1, given)
    with pytest.raises(FloatingPointError, match="loss 1"):
        optimizer.step()
    assert_same(optimizer, before)
    assert optimizer.steps_left_out == 0
    optimizer.zero_grad()
    push(optimizer, 1, random_like(parameters, generator))
    optimizer.step()
    assert not torch.equal(parameters[0], before[0])


def test_a_step_that_raised_under_a_scaler_leaves_no_scale_behind(backend):
    """GradScaler removes what it set only where step returns, and multiplies by what it finds."""
    plain, ours = parameters_of((4,)), parameters_of((4,))
    method = fc.ConFIG(nonfinite="raise")
    wanted, optimizer = (
        fc.optim.MConFIG(p, lr=0.1, num_losses=1, method=method, backend=backend) for p in (plain, ours)
    )
    scaler = GradScaler("cpu", init_scale=64.0)
    push(optimizer, 0, {ours[0]: torch.full((4,), math.inf)}, scaler)
    with pytest.raises(FloatingPointError):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert scaler.get_scale() == 32.0
    gradient = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step in range(4):
        push(wanted, 0, {plain[0]: gradient})
        wanted.step()
        if step % 2:  # without the scaler, too
            push(optimizer, 0, {ours[0]: gradient})
            optimizer.step()
        else:
            push(optimizer, 0, {ours[0]: gradient}, scaler)
            scaler.step(optimizer)
            scaler.update()
        assert torch.equal(plain[0], ours[0])


class Counting:
    """A method that knows how often it was asked."""

    asked = 0

    def weights(self, gramian):
        self.asked += 1
        return torch.ones(len(gramian))


@pytest.mark.parametrize("path", ["fused", "two segments", "method"])
def test_what_the_scaler_found_counts_though_it_was_mended(backend, path):
    """inf before ``unscale_``, cleaned up after it: torch's optimizers leave such a step out, and so is this."""
    parameters = parameters_of((3,), dtype=torch.float32) + (parameters_of((2,)) if path == "two segments" else [])
    method = Counting() if path == "method" else None
    optimizer = fc.optim.MConFIG(parameters, lr=0.1, num_losses=1, method=method, backend=backend)
    scaler = GradScaler("cpu", init_scale=64.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        given = random_like(parameters, generator)
        if step == 3:
            given[parameters[0]][0] = math.inf
        push(optimizer, 0, given, scaler)
        scaler.unscale_(optimizer)
        for parameter in parameters:
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        before = snapshot(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 3:
            assert_same(optimizer, before)
        else:
            assert not torch.equal(parameters[0], before[0])
    assert optimizer.steps_left_out == 1
    assert method is None or method.asked == 5


@pytest.mark.parametrize("k", [1, 2])
def test_unscale_then_clip_by_torch(backend, k):
    """With one loss a step, though k may be more: what ``p.grad`` shows is what enters the average."""
    parameters = parameters_of((3,), (4,))
    optimizer = fc.optim.MConFIG(parameters, lr=0.1, num_losses=2, losses_per_step=k, backend=backend)
    scaler = GradScaler("cpu", init_scale=256.0)
    generator = torch.Generator().manual_seed(0)
    theta, rule = joined(parameters), Oracle(2, 7, max_norm=1.5)
    for step in range(20):
        given = random_like(parameters, generator)
        before = snapshot(optimizer)
        spoiled = step == 10
        if spoiled:
            given[parameters[1]][0] = math.inf
        push(optimizer, step % 2, given, scaler)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.5)
        scaler.step(optimizer)
        scaler.update()
        if spoiled:
            assert_same(optimizer, before)
        else:
            theta = rule.step(theta, {step % 2: joined(list(given.values()))}, 0.1)
            assert_near(parameters, theta, 1e-6)  # torch divides by the norm plus 1e-6
    assert scaler.get_scale() == 128.0
    assert optimizer.steps_left_out == 1


def test_unscale_of_several_gradients_is_refused(backend):
    """It reaches the last one only. Nothing was written; zero_grad goes on."""
    parameters = parameters_of((3,))
    optimizer = fc.optim.MConFIG(parameters, num_losses=2, losses_per_step=2, backend=backend)
    scaler = GradScaler("cpu", init_scale=256.0)
    before = snapshot(optimizer)
    push(optimizer, 0, {parameters[0]: torch.ones(3)}, scaler)
    push(optimizer, 1, {parameters[0]: torch.ones(3)}, scaler)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_.*max_norm"):
        scaler.step(optimizer)
    scaler.update()
    assert not optimizer.state or all(not value.any() for value in optimizer.state[parameters[0]].values())
    assert torch.equal(parameters[0], before[0])
    optimizer.zero_grad()
    push(optimizer, 0, {parameters[0]: torch.ones(3)})
    push(optimizer, 1, {parameters[0]: torch.ones(3)})
    optimizer.step()
    assert not torch.equal(parameters[0], before[0])


def test_clipping_looks_at_unscaled_gradients(backend):
    parameters = parameters_of((6,))
    optimizer = fc.optim.MConFIG(parameters, lr=0.1, num_losses=2, max_norm=1.0, backend=backend)
    scaler = GradScaler("cpu", init_scale=2.0**20)
    generator = torch.Generator().manual_seed(0)
    theta, rule = joined(parameters), Oracle(2, 6, max_norm=1.0)
    clipped = 0
    for step in range(20):
        given = random_like(parameters, generator, scale=0.4)
        gradient = joined(list(given.values()))
        clipped += np.linalg.norm(gradient) > 1.0
        push(optimizer, step % 2, given, scaler)
        scaler.step(optimizer)
        scaler.update()
        theta = rule.step(theta, {step % 2: gradient}, 0.1)
        assert_near(parameters, theta, 1e-9)
    assert 0 < clipped < 20


def test_half_precision_gradients_are_unscaled_where_there_is_room(backend):
    """A float16 gradient of 2⁻³⁰ only exists as 2⁻¹⁴ under a scale of 2¹⁶; its average is float32."""
    (parameter,) = parameters_of((4,), dtype=torch.float16)
    optimizer = fc.optim.MConFIG([parameter], lr=0.0, num_losses=1, backend=backend)
    scaler = GradScaler("cpu", init_scale=2.0**16)
    with optimizer.record(0):
        scaler.scale(parameter.float().sum() * 2.0**-30).backward()
    assert (parameter.grad == 2.0**-14).all()
    scaler.step(optimizer)
    average = optimizer.state[parameter]["exp_avgs"]
    assert torch.equal(average, torch.full((1, 4), (1 - 0.9) * 2.0**-30, dtype=torch.float64).float())


def test_a_disabled_scaler_changes_nothing(backend):
    parameters = parameters_of((4,))
    optimizer = fc.optim.MConFIG(parameters, lr=0.1, num_losses=1, backend=backend)
    before = parameters[0].clone()
    scaler = GradScaler("cpu", enabled=False)
    push(optimizer, 0, {parameters[0]: torch.ones(4)})
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(parameters[0], before - 0.1)


def test_a_gradient_is_carried_on_by_one_norm_a_record(monkeypatch):
    """Each row shows what was so of those before it, so that only the last of them is looked at."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = fc.optim.MConFIG([weight], num_losses=5, losses_per_step=5)
    norm, calls = torch.linalg.vector_norm, []
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *args, **kwargs: calls.append(1) or norm(*args, **kwargs))
    for loss in (0, 1, 2, 3, 4, 0):
        with optimizer.record(loss, accumulate=True):
            (weight.sum() * (math.inf if loss == 1 else 1.0)).backward()
    assert len(calls) == 5
    assert weight.grad.isnan().any()
    optimizer.step()
    assert optimizer.steps_left_out == 1
