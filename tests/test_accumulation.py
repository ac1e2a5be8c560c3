"""Micro-batches: rows and recorded gradients that add up, and end to add up where a step is taken."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastconfig as fc

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread", "way_of_landing")

PARTS = 4
DISCARDS = r"discards gradients of the call before.*accumulate=True"


def problem(dtypes=(torch.float64,)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtypes[0])
    if len(dtypes) > 1:
        model[2].to(dtypes[1])
    return model, torch.randn(PARTS * 5, 3, dtype=dtypes[0])


def losses_of(model, x):
    y = model[1](model[0](x)).to(model[2].weight.dtype)
    y = model[2](y)
    return [y[:, 0].square().mean(), (y[:, 1] - 1.0).square().mean(), y.sum(dim=1).mean()]


def rows_of(buf):
    return [segment.rows.clone() for segment in buf.segments]


@pytest.mark.parametrize("dtypes", [(torch.float64,), (torch.float32, torch.float64)], ids=["one", "two"])
@pytest.mark.parametrize("way", ["tensors", "callables", "record", "two passes a block"])
def test_rows_add_up_to_those_of_the_joined_batch(way, dtypes):
    model, x = problem(dtypes)
    whole, buf = fc.GradientBuffer(model, 3), fc.GradientBuffer(model, 3)
    for _ in range(3):  # combine ends the accumulation, so that True may stand in every call
        whole.backward(losses_of(model, x))
        for part in x.chunk(PARTS):
            if way == "tensors":
                buf.backward([loss / PARTS for loss in losses_of(model, part)], accumulate=True)
            elif way == "callables":
                given = [lambda i=i, part=part: losses_of(model, part)[i] / PARTS for i in range(3)]
                buf.backward(given, accumulate=True)
            else:
                for i in (2, 0, 1):
                    with buf.record(i, accumulate=True):
                        for _ in range(shares := 2 if way == "two passes a block" else 1):
                            (losses_of(model, part)[i] / PARTS / shares).backward()
        for ours, theirs in zip(rows_of(buf), rows_of(whole), strict=True):
            torch.testing.assert_close(ours, theirs)
        whole.combine()
        wanted = [parameter.grad.clone() for parameter in model.parameters()]
        buf.combine()
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_the_next_step_begins_anew_whatever_its_argument():
    weight = nn.Parameter(torch.ones(2))
    buf = fc.GradientBuffer([weight], 1)
    for accumulate in (True, None, False, True):
        buf.backward([weight.sum()], accumulate=accumulate)
        assert buf.rows.tolist() == [[1.0, 1.0]]
        buf.combine()
    buf.backward([weight.sum()])
    buf.zero()
    buf.backward([weight.sum()], accumulate=True)
    assert buf.rows.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("way", ["backward", "record"])
def test_without_accumulate_the_last_micro_batch_stays_and_it_is_said_once(way):
    weight = nn.Parameter(torch.ones(2))
    buf = fc.GradientBuffer([weight], 1)

    def backward(factor, **accumulate):
        if way == "backward":
            buf.backward([factor * weight.sum()], **accumulate)
        else:
            with buf.record(0, **accumulate):
                (factor * weight.sum()).backward()

    backward(1.0)
    backward(2.0, accumulate=False)  # meant
    with pytest.warns(UserWarning, match=DISCARDS) as caught:
        backward(3.0)
    assert caught[0].filename == __file__
    backward(4.0)
    assert buf.rows.tolist() == [[4.0, 4.0]]


def test_a_parameter_that_one_micro_batch_alone_reaches_has_a_gradient():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    buf = fc.GradientBuffer(weights, 1)
    for reached in ((0,), (1,)):
        with buf.record(0, accumulate=True):
            sum(weights[i] for i in reached).sum().backward()
    assert buf.rows.tolist() == [[1.0, 1.0, 0.0]]
    buf.combine()
    assert [weight.grad is not None for weight in weights] == [True, True, False]


def test_what_a_block_discards_or_clips_is_its_own_part_alone():
    weight = nn.Parameter(torch.ones(2))
    buf = fc.GradientBuffer([weight], 1)
    with buf.record(0, accumulate=True):
        weight.sum().backward()
    with buf.record(0, accumulate=True):
        (100 * weight.sum()).backward()
        assert weight.grad.tolist() == [100.0, 100.0]
        weight.grad.clamp_(max=2.0)
    with buf.record(0, accumulate=True):
        (7 * weight.sum()).backward()
        weight.grad = None
    assert buf.rows.tolist() == [[3.0, 3.0]]


def test_a_micro_batch_that_raises_ends_the_accumulation():
    weight = nn.Parameter(torch.ones(2))
    buf = fc.GradientBuffer([weight], 2)

    def fail():
        raise ArithmeticError

    buf.backward([weight.sum(), 2 * weight.sum()], accumulate=True)
    with pytest.raises(ArithmeticError):
        buf.backward([weight.sum(), fail], accumulate=True)
    assert not buf.rows.any()
    buf.backward([weight.sum(), 2 * weight.sum()], accumulate=True)
    assert buf.rows.tolist() == [[1.0, 1.0], [2.0, 2.0]]
    buf.combine()


def test_a_record_is_of_the_moment_at_which_its_block_is_entered():
    weight = nn.Parameter(torch.ones(2))
    buf = fc.GradientBuffer([weight], 1)
    block = buf.record(0, accumulate=True)
    for _ in range(2):
        for _ in range(3):
            with block:
                weight.sum().backward()
        assert buf.rows.tolist() == [[3.0, 3.0]]
        buf.combine()
    optimizer = fc.optim.MConFIG([weight], num_losses=2, losses_per_step=2)
    blocks = [optimizer.record(i) for i in range(2)]
    for i in (1, 0):
        with blocks[i]:
            ((i + 1) * weight.sum()).backward()
    optimizer.step()
    assert optimizer.combination.norms.tolist() == pytest.approx([2**0.5, 8**0.5])


def test_micro_batches_add_up_in_the_rows_themselves():
    """A micro-batch holds its own gradient, n elements, beside them: no operation makes as much as a set of rows."""
    weight = nn.Parameter(torch.ones(1000, 1000))
    buf = fc.GradientBuffer([weight], 3)
    address = buf.rows.data_ptr()
    largest = 0
    for _ in range(3):
        losses = [(i + 1) * weight.sum() for i in range(3)]
        with torch.profiler.profile(profile_memory=True) as profile:
            buf.backward(losses, accumulate=True)
        largest = max(largest, *(event.cpu_memory_usage for event in profile.events()))
    assert buf.rows.data_ptr() == address
    assert 4 * weight.numel() <= largest < 2 * 4 * weight.numel()
    assert weight.grad is None
    assert buf.rows[:, 0].tolist() == [3.0, 6.0, 9.0]


@pytest.mark.parametrize("k", [1, 2])
def test_an_optimizer_takes_the_sum_of_micro_batches(backend, k):
    model, x = problem()
    twin = copy.deepcopy(model)
    optimizers = [
        fc.optim.MConFIG(network, lr=0.1, num_losses=3, losses_per_step=k, backend=backend) for network in (model, twin)
    ]
    for _ in range(6):
        losses = optimizers[0].next_losses()
        for part in x.chunk(PARTS):
            for i in losses:
                with optimizers[0].record(i, accumulate=True):
                    (losses_of(model, part)[i] / PARTS).backward()
        for i in losses:
            with optimizers[1].record(i):
                losses_of(twin, x)[i].backward()
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_optimizer_says_how_to_add_up_and_forgets_a_step_that_broke():
    weight = nn.Parameter(torch.ones(2))
    optimizer = fc.optim.MConFIG([weight], num_losses=2, losses_per_step=2)
    with optimizer.record(0, accumulate=True):
        weight.sum().backward()
    with pytest.raises(ValueError, match=r"loss 0 was already recorded.*accumulate=True"):
        optimizer.record(0).__enter__()
    with optimizer.record(1, accumulate=True):
        weight.sum().backward()
    with pytest.raises(ArithmeticError), optimizer.record(0, accumulate=True):
        raise ArithmeticError
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        optimizer.step()
    for i in range(2):
        with optimizer.record(i, accumulate=True):
            weight.sum().backward()
    optimizer.step()
    assert optimizer.combination.norms.tolist() == pytest.approx([2**0.5] * 2)


def test_a_scaler_hears_of_an_overflow_in_any_micro_batch(backend):
    """Of either loss, whichever was recorded last."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = fc.optim.MConFIG([weight], num_losses=2, losses_per_step=2, backend=backend)
    for overflows in (0, 1):
        for i, j in ((0, 0), (1, 1), (0, 2), (1, 3)):
            with optimizer.record(i, accumulate=True):
                (weight.sum() * (float("inf") if j == overflows + 1 else 1.0)).backward()
        assert not weight.grad.isfinite().all()
        optimizer.step()
    assert optimizer.steps_left_out == 2
