"""Losses without labels in a batch, and rows that are older than others."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fastconfig as fc

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

NAMES = ["pde", "boundary", "data"]
STALE = r"combine takes loss .* as recorded before the last combine"


def problem():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x = torch.randn(6, 4)
    return model, lambda: list((model(x) - 1.0).square().mean(dim=0))


def without(losses, *absent):
    return [None if i in absent else loss for i, loss in enumerate(losses)]


@pytest.mark.parametrize("callables", [False, True])
def test_an_absent_loss_takes_no_part(callables):
    model, losses_of = problem()
    buf, pair = fc.GradientBuffer(model, NAMES), fc.GradientBuffer(model, 2)
    buf.backward(losses_of())
    assert buf.combine().absent == ()
    losses = losses_of()
    buf.backward(without([lambda i=i: losses_of()[i] for i in range(3)] if callables else losses, 1))
    assert not buf.rows[1].any()
    info = buf.combine()
    assert info.absent == (1,)
    assert info.weights[1] == 0.0
    assert "absent" in repr(info)
    ours = buf.grad.clone()
    losses = losses_of()
    pair.backward([losses[0], losses[2]])
    pair.combine()
    torch.testing.assert_close(ours, pair.grad)
    buf.backward(losses_of())
    assert buf.combine().absent == ()


def test_losses_by_name_and_by_number():
    model, losses_of = problem()
    buf = fc.GradientBuffer(model, NAMES)
    buf.backward(losses_of())
    rows = buf.rows.clone()
    buf.combine()
    for keys in (NAMES, range(3)):
        given = dict(zip(keys, losses_of(), strict=True))
        buf.backward(dict(reversed(given.items())))
        assert torch.equal(buf.rows, rows)
        buf.combine()
    buf.backward({"pde": losses_of()[0], "boundary": None, "data": losses_of()[2]})
    assert buf.combine().absent == (1,)
    before = buf.rows.clone()
    with pytest.raises(ValueError, match=r"losses .* lacks 'boundary'; give None"):
        buf.backward({"pde": losses_of()[0], "data": losses_of()[2]})
    with pytest.raises(IndexError, match="'edge'"):
        buf.backward({**given, "edge": losses_of()[0]})
    assert torch.equal(buf.rows, before)


def test_all_absent_is_an_error_that_says_so():
    model, losses_of = problem()
    buf = fc.GradientBuffer(model, 3)
    buf.backward(losses_of())
    buf.combine()
    before = buf.rows.clone()
    with pytest.raises(ValueError, match="every loss is None"):
        buf.backward([None] * 3)
    assert torch.equal(buf.rows, before)
    buf.backward([None] * 3, accumulate=True)  # one micro-batch of several
    with pytest.raises(RuntimeError, match="every loss was absent"):
        buf.combine()
    buf.backward(losses_of(), accumulate=True)
    assert buf.combine().absent == ()


def test_a_loss_is_absent_where_every_micro_batch_lacks_it():
    model, losses_of = problem()
    buf = fc.GradientBuffer(model, 3)
    for _ in range(2):
        for absent in ((0, 1), (1, 2), (1,)):
            buf.backward(without(losses_of(), *absent), accumulate=True)
        assert buf.combine().absent == (1,)
    buf.backward(losses_of())
    once = buf.rows.clone()
    buf.combine()
    buf.backward(without(losses_of(), 0), accumulate=True)
    buf.backward(without(losses_of(), 1), accumulate=True)
    torch.testing.assert_close(buf.rows, once * torch.tensor([[1.0], [1.0], [2.0]]))
    assert buf.combine().absent == ()


def test_a_parameter_that_only_an_absent_loss_reaches_has_no_gradient():
    heads = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    buf = fc.GradientBuffer(heads, 2)
    buf.backward([head.sum() for head in heads])
    buf.combine()
    buf.backward([heads[0].sum(), None])
    buf.combine()
    assert heads[0].grad is not None
    assert heads[1].grad is None


# Rows of several steps


def test_a_row_of_an_older_step_is_told_once():
    model, losses_of = problem()
    buf = fc.GradientBuffer(model, NAMES)
    buf.backward(losses_of())
    buf.combine()
    buf.combine("mgda")  # the same rows again: nothing is older than anything else

    def record(*rows):
        for i in rows:
            with buf.record(i):
                losses_of()[i].backward()

    record(0, 2)
    with pytest.warns(UserWarning, match="loss 'boundary' as recorded before") as caught:
        buf.combine()
    assert caught[0].filename == __file__
    record(0)
    buf.combine()  # said already
    record(0)
    with pytest.raises(RuntimeError, match="loss 'boundary', loss 'data' as recorded"):
        buf.combine(stale="error")
    with pytest.raises(ValueError, match=r"stale must be .*'ask'"):
        buf.combine(stale="ask")


def test_what_is_no_mistake_is_not_told():
    model, losses_of = problem()
    buf = fc.GradientBuffer(model, 3)
    for _ in range(3):  # rows in turns, as is meant
        for i in range(3):
            with buf.record(i):
                losses_of()[i].backward()
            buf.combine(stale="use")
    buf.zero()
    with buf.record(1):
        losses_of()[1].backward()
    buf.combine(stale="error")  # the others are zero
    method = fc.CAGrad(fast=2, generator=torch.Generator().manual_seed(0))
    many = fc.GradientBuffer(model, 3)
    for _ in range(4):
        for row, loss in method.reduced([lambda i=i: losses_of()[i] for i in range(3)]):
            with many.record(row):
                loss().backward()
        many.combine(method, stale="error")  # it looks at no other row


# M-ConFIG


@pytest.mark.parametrize("way", ["not recorded", "recorded without a backward pass"])
def test_an_absent_loss_keeps_its_average_and_its_counters(backend, way):
    model, losses_of = problem()
    optimizer = fc.optim.MConFIG(model, lr=0.1, num_losses=3, losses_per_step=3, backend=backend)

    def step(*present):
        for i in range(3):
            if i in present:
                with optimizer.record(i):
                    losses_of()[i].backward()
            elif way != "not recorded":
                with optimizer.record(i):
                    pass
        optimizer.step()

    step(0, 1, 2)
    before = optimizer.state_dict()
    averages = optimizer.state[model.weight]["exp_avgs"].clone()
    step(0, 2)
    assert torch.equal(optimizer.state[model.weight]["exp_avgs"][1], averages[1])
    assert not torch.equal(optimizer.state[model.weight]["exp_avgs"][0], averages[0])
    counts = optimizer.state_dict()["shared"]["counts"] - before["shared"]["counts"]
    assert counts.tolist() == [1.0, 0.0, 1.0]
    if way != "not recorded":
        with pytest.raises(RuntimeError, match="reached a parameter, for loss 0, loss 1, loss 2"):
            step()
    step(0, 1, 2)


def test_the_next_loss_among_those_present():
    model, _ = problem()
    optimizer = fc.optim.MConFIG(model, num_losses=NAMES)
    assert [optimizer.next_loss() for _ in range(2)] == ["pde", "boundary"]
    assert optimizer.next_loss(present=["pde", 1]) == "pde"  # data's turn, which has no labels
    assert optimizer.next_loss() == "boundary"
    with pytest.raises(ValueError, match=r"present must hold a loss .*\[\]"):
        optimizer.next_loss(present=[])
    with pytest.raises(IndexError, match="'edge'"):
        optimizer.next_loss(present=["edge"])
    pairs = fc.optim.MConFIG(model, num_losses=3, losses_per_step=2, selection="random")
    for _ in range(20):
        assert {pairs.next_loss(present=[0, 2]) for _ in range(2)} == {0, 2}
    pairs.next_loss(present=[1])
    with pytest.raises(ValueError, match="not yet drawn for this step"):
        pairs.next_loss(present=[1])


def test_absent_losses_are_gaps_in_a_monitor():
    model, losses_of = problem()
    buf = fc.GradientBuffer(model, NAMES)
    with warnings.catch_warnings(), fc.ConflictMonitor(buf) as monitor:
        for step in range(4):
            buf.backward(without(losses_of(), 1) if step % 2 else losses_of())
            buf.combine()
            monitor.step()
    history = monitor.history
    for values in (history.norms, history.weights, history.decreases):
        assert torch.tensor(values[:, 1]).isnan().tolist() == [False, True, False, True]
        assert not torch.tensor(values[:, [0, 2]]).isnan().any()
