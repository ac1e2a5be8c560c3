"""Sweeps over parameters: the core's do what those in Python say, whatever a parameter is and whatever fails."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from torch import nn

from fastconfig.gradients import sweep

SWEEPS = [sweep.PlainSweep, sweep.Sweep]

pytestmark = pytest.mark.skipif(sweep.Sweep is sweep.PlainSweep, reason="the compiled core is missing")


def parameters():
    return tuple(nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (), (0, 4), (5,)))


@pytest.mark.parametrize("kind", SWEEPS)
def test_take_and_give(kind):
    given = parameters()
    made = kind(given)
    grads = [torch.zeros(2, 3), None, torch.zeros(0, 4), None]
    for are_none in (False, True):
        made.give(grads, are_none)
        assert [parameter.grad for parameter in given] == grads
        taken, flags = made.take()
        assert all(a is b for a, b in zip(taken, grads, strict=True))
        assert flags == (True, False, True, False)
        assert all(type(flag) is bool for flag in flags)
        assert all(parameter.grad is None for parameter in given)
    given[1].grad = torch.ones(())
    made.give([None] * 4, True)
    assert given[1].grad is not None
    made.give([None] * 4, False)
    assert given[1].grad is None


@pytest.mark.parametrize("kind", SWEEPS)
def test_changes(kind):
    for change in (
        lambda p: setattr(p, "data", p.data.clone()),
        lambda p: setattr(p, "data", p.data.view(3, 2)),
        lambda p: setattr(p, "data", p.data.double()),
    ):
        given = parameters()
        made = kind(given)
        given[0].data.add_(1.0)
        assert made.is_unchanged()
        assert made.lies_where_it_did()
        address = given[0].data_ptr()
        change(given[0])
        assert not made.is_unchanged()
        assert made.lies_where_it_did() == (given[0].data_ptr() == address)


@pytest.mark.parametrize("kind", SWEEPS)
@pytest.mark.parametrize("hides", [True, False])
def test_show(kind, hides):
    given = parameters()
    made = kind(given)
    views = [torch.zeros_like(parameter) for parameter in given]
    aliases, addresses = [view.detach() for view in views], [view.data_ptr() for view in views]
    given[3].grad = old = torch.ones(5)
    aliases[2].requires_grad_()
    flags = (True, True, True, False)
    assert made.show(aliases, addresses, flags, hides, 0) == 2
    assert given[0].grad is aliases[0]
    assert given[1].grad is aliases[1]
    aliases[2] = views[2].detach()
    assert made.show(aliases, addresses, flags, hides, 2) == -1
    assert given[2].grad is aliases[2]
    assert given[3].grad is (None if hides else old)
    aliases[0].data = torch.ones(2, 3)
    assert made.show(aliases, addresses, flags, hides, 0) == 0


def test_copies_take_what_they_can_and_name_the_rest():
    target = torch.full((20,), -1.0)
    places = [(i, target[5 * k :].data_ptr(), 16) for k, i in enumerate((0, 2, 3, 4))]
    copies = sweep.Copies(places, torch.float32, torch.strided)
    grads = [
        torch.arange(4.0),
        None,
        torch.arange(8.0)[::2],  # not contiguous
        torch.ones(4, dtype=torch.float64),
        torch.ones(4).to_sparse(),
    ]
    assert copies.copy(grads) == [2, 3, 4]
    assert target.tolist() == [0.0, 1.0, 2.0, 3.0, *[-1.0] * 16]


@pytest.mark.parametrize("kind", SWEEPS)
def test_an_error_of_a_parameter_comes_through(kind):
    given = parameters()
    made = kind(given)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        made.give([torch.ones(7), None, None, None], False)
    with pytest.raises(AttributeError):
        kind((object(),))


@pytest.mark.parametrize("kind", SWEEPS)
def test_nothing_is_kept_or_lost(kind):
    given = parameters()
    grad = torch.zeros(2, 3)
    before = sys.getrefcount(grad), sys.getrefcount(given[0])
    made = kind(given)
    for _ in range(100):
        made.give([grad, None, None, None], False)
        made.take()
        made.is_unchanged()
        made.show([grad] * 4, [grad.data_ptr()] * 4, (True, False, False, False), True, 0)
        made.take()
    del made
    gc.collect()
    assert (sys.getrefcount(grad), sys.getrefcount(given[0])) == before
