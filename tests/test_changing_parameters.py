"""Parameters that come, go or move after a buffer or an optimizer was made over them."""

from __future__ import annotations

import copy
import re
import sys

import pytest
import torch
from torch import nn

import fastconfig as fc

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def losses_of(model):
    y = model(torch.linspace(-1.0, 1.0, 15).view(5, 3))
    return [y[:, 0].square().mean(), (y[:, 1] - 1.0).square().mean()]


def backward(buf, model, **options):
    buf.backward(losses_of(model), **options)


def flat(grads):
    return torch.cat([grad.flatten() for grad in grads])


# A parameter that needs a gradient only later

GIVEN = {
    "module": lambda model: model,
    "parameters": lambda model: model.parameters(),
    "pairs": lambda model: model.named_parameters(),
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_buffer_notices_an_unfrozen_layer_and_takes_it_in(given):
    model = network()
    model[2].requires_grad_(False)
    buf = fc.GradientBuffer(GIVEN[given](model), 2)
    backward(buf, model)
    buf.combine()
    model[2].requires_grad_(True)
    backward(buf, model)
    name = r"parameters\[2\]" if given == "parameters" else "parameter '2.weight'"
    before = buf.grad.clone()
    with pytest.raises(RuntimeError, match=rf"combine: {name}.*requires a gradient now.*refresh\(\)"):
        buf.combine()
    assert torch.equal(buf.grad, before)
    kept = buf.rows.clone()
    buf.refresh()
    assert torch.equal(buf.rows[:, : kept.shape[1]], kept)
    assert not buf.rows[:, kept.shape[1] :].any()
    backward(buf, model, accumulate=False)
    buf.combine()
    other = fc.GradientBuffer(copy.deepcopy(model), 2)
    backward(other, other._source.module)
    other.combine()
    assert torch.equal(buf.rows, other.rows)
    assert torch.equal(flat(p.grad for p in model.parameters()), other.grad)


@pytest.mark.parametrize("given", ["module", "parameters"])
def test_an_optimizer_notices_an_unfrozen_layer_and_takes_it_in(backend, given):
    model = network()
    model[2].requires_grad_(False)
    optimizer = fc.optim.MConFIG(GIVEN[given](model), lr=0.1, num_losses=2, backend=backend)

    def record(i):
        with optimizer.record(i):
            losses_of(model)[i].backward()

    for step in range(4):
        record(step % 2)
        optimizer.step()
    kept = {name: value.clone() for name, value in optimizer.state[model[0].weight].items()}
    shared = optimizer.state_dict()["shared"]
    model[2].requires_grad_(True)
    record(0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match=r"step: parameter.*requires a gradient now.*refresh\(\)"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.refresh()
    assert all(torch.equal(optimizer.state[model[0].weight][name], value) for name, value in kept.items())
    after = optimizer.state_dict()["shared"]
    torch.testing.assert_close(after["gramian"], shared["gramian"])
    assert torch.equal(after["counts"], shared["counts"])
    for step in range(4):
        record(step % 2)
        optimizer.step()
    assert not any(map(torch.equal, model.parameters(), before))
    # From a checkpoint of before, it goes on as one made over all from the start, which is reached as late.
    twin = copy.deepcopy(model)
    resumed = fc.optim.MConFIG(twin, lr=0.1, num_losses=2, backend=backend)
    resumed.load_state_dict(optimizer.state_dict())
    with optimizer.record(0), resumed.record(0):
        losses_of(model)[0].backward()
        losses_of(twin)[0].backward()
    optimizer.step()
    resumed.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_layer_reached_late_is_as_one_taken_in_late(backend):
    models = [network() for _ in range(2)]
    models[1][2].requires_grad_(False)
    optimizers = [fc.optim.MConFIG(model, lr=0.1, num_losses=2, backend=backend) for model in models]
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        if step == 4:
            models[1][2].requires_grad_(True)
            optimizers[1].refresh()
        given = [torch.randn(p.shape, generator=generator) for p in models[0].parameters()]
        for model, optimizer in zip(models, optimizers, strict=True):
            with optimizer.record(step % 2):
                for i, (parameter, gradient) in enumerate(zip(model.parameters(), given, strict=True)):
                    if i < 2 or step >= 4:
                        parameter.grad = gradient.clone()
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("make", [fc.GradientBuffer, lambda p, m: fc.optim.MConFIG(p, num_losses=m)])
def test_two_adapters_of_which_one_trains_at_a_time(make):
    """As peft's set_adapter toggles them: taken in once, both may rest and come back."""
    base, adapters = nn.Linear(3, 2).requires_grad_(False), [nn.Linear(3, 2) for _ in range(2)]
    model = nn.ModuleList([base, *adapters])

    def select(chosen):
        for i, adapter in enumerate(adapters):
            adapter.requires_grad_(i == chosen)

    def step(chosen):
        y = base(torch.ones(1, 3)) + adapters[chosen](torch.ones(1, 3))
        if isinstance(owner, fc.GradientBuffer):
            owner.backward([y[0, 0].square(), y[0, 1].square()])
            owner.combine()
        else:
            with owner.record(0):
                y.square().sum().backward()
            owner.step()

    select(0)
    owner = make(model, 2)
    step(0)
    select(1)
    with pytest.raises(RuntimeError, match=r"parameter '2.weight'.*refresh\(\)"):
        step(1)
    owner.refresh()
    for chosen in (1, 0, 1):
        select(chosen)
        model.zero_grad()
        owner.zero_grad() if isinstance(owner, fc.optim.MConFIG) else owner.zero()
        step(chosen)
        if isinstance(owner, fc.GradientBuffer):
            assert adapters[chosen].weight.grad.any()
            assert adapters[1 - chosen].weight.grad is None


# Layers that are replaced, added, or gone


@pytest.mark.parametrize("change", ["layer", "layer at the same place", "parameter", "added"])
def test_a_replaced_layer_is_noticed(change):
    model = network()
    buf, optimizer = fc.GradientBuffer(model, 2), fc.optim.MConFIG(model, num_losses=2)
    backward(buf, model)
    buf.combine()
    if change == "layer":
        model[2] = nn.Linear(4, 2)
    elif change == "layer at the same place":  # in memory, as may be
        del model[2]
        model.append(nn.Linear(4, 2))
    elif change == "parameter":
        model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    else:
        model.append(nn.Linear(2, 2))
    what = "is new in the module" if change == "added" else "was replaced"
    name = "3.weight" if change == "added" else "2.weight"
    backward(buf, model)
    for _ in range(2):  # and again, as long as it is so
        with pytest.raises(RuntimeError, match=rf"combine: parameter '{name}'.*{what}.*refresh\(\)"):
            buf.combine()
    with optimizer.record(0):
        losses_of(model)[0].backward()
    with pytest.raises(RuntimeError, match=rf"step: parameter '{name}'.*{what}.*refresh\(\)"):
        optimizer.step()
    buf.refresh()
    optimizer.refresh()
    backward(buf, model, accumulate=False)
    buf.combine()
    assert buf.rows.shape[1] == sum(p.numel() for p in model.parameters())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for i in range(2):
        with optimizer.record(i):
            losses_of(model)[i].backward()
        optimizer.step()
    assert not any(map(torch.equal, model.parameters(), before))
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_what_changes_no_parameter_is_no_concern():
    model = network().append(nn.Linear(2, 2))
    buf = fc.GradientBuffer(model, 2)
    model[1] = nn.Sequential(nn.Tanh(), nn.Dropout(0.0))
    model.append(nn.Linear(2, 2).requires_grad_(False))
    backward(buf, model)
    buf.combine()
    del model[3]
    backward(buf, model)
    buf.combine()
    assert not buf.rows[:, -6:].any()  # what is gone from the model
    model[3].requires_grad_(True)  # one that came later, and is watched, too
    backward(buf, model)
    with pytest.raises(RuntimeError, match=r"'3\.weight'"):
        buf.combine()
    buf.refresh()
    assert buf.rows.shape[1] == sum(p.numel() for p in model.parameters())


def test_a_refresh_after_the_parameters_moved():
    """What had to be a new buffer may be a refreshed one: of the same shape it keeps its rows, in the new dtype."""
    model = network()
    buf = fc.GradientBuffer(model, 2)
    backward(buf, model)
    before = buf.rows.clone()
    model.double()
    model[2].bias.data = torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="storage replaced"):
        buf.combine()
    buf.refresh()
    assert buf.rows.dtype == torch.float64
    assert torch.equal(buf.rows[:, :-2], before[:, :-2].double())
    assert not buf.rows[:, -2:].any()


def test_a_refresh_that_cannot_be_changes_nothing():
    model = network()
    buf, optimizer = fc.GradientBuffer(model, 2), fc.optim.MConFIG(model, num_losses=2)
    model.append(nn.Linear(2, 2, device="meta"))
    for owner in (buf, optimizer):
        with pytest.raises(ValueError, match=r"parameters\[4\].*meta device.*to_empty"):
            owner.refresh()
    del model[3]
    backward(buf, model)
    buf.combine()
    with optimizer.record(0):
        losses_of(model)[0].backward()
    optimizer.step()
    with buf.record(0), pytest.raises(RuntimeError, match=r"refresh was called inside record\(0\)"):
        buf.refresh()
    with optimizer.record(0), pytest.raises(RuntimeError, match=r"refresh was called inside record\(0\)"):
        optimizer.refresh()


# Parameters that cannot be


@pytest.mark.parametrize("make", [fc.GradientBuffer, lambda p, m: fc.optim.MConFIG(p, num_losses=m)])
def test_meta_parameters_are_refused_and_it_is_said_when_they_can_be_taken(make):
    with pytest.raises(
        ValueError, match=r"parameters\[0\], shape \(2, 3\), is on the meta device.*after model.to_empty"
    ):
        make(nn.Linear(3, 2, device="meta").parameters(), 2)


@pytest.mark.parametrize("named", [True, False])
def test_the_odd_one_is_blamed(named):
    model, nu = network(), nn.Parameter(torch.ones(1))
    given = [*model.named_parameters(), nu] if named else [*model.parameters(), ("nu", nu)]
    with pytest.raises(TypeError, match=r"parameters\[4\] is a (Parameter among \(name|tuple among tensors)"):
        fc.GradientBuffer(given, 2)


CHANGES = {
    "dtype": (lambda p: p.data.double(), "dtype was torch.float32, is torch.float64"),
    "shape": (lambda p: p.data.view(6), r"shape was (2, 3), is (6,)"),
    "memory": (lambda p: p.data.clone(), "its memory lies elsewhere, torch.float32 on cpu as before"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_replaced_storage_is_told_by_what_changed(change):
    weight = nn.Linear(3, 2).weight
    buf = fc.GradientBuffer([weight], 1)
    new, words = CHANGES[change]
    weight.data = new(weight)
    with pytest.raises(RuntimeError, match=re.escape(words)):
        buf.record(0).__enter__()


# Sparse gradients


@pytest.mark.parametrize("make", [fc.GradientBuffer, lambda p, m: fc.optim.MConFIG(p, num_losses=m)])
def test_a_large_table_with_sparse_gradients_is_told_once_with_its_memory(make):
    table = nn.Embedding(2**20, 4, sparse=True)
    owner = make(table.parameters(), 2)
    kept = "3 × 16 MiB" if isinstance(owner, fc.GradientBuffer) else "4 × 16 MiB"  # and a second moment
    told = pytest.warns(UserWarning, match=f"parameter 0 of the .*sparse gradients.* kept of it is dense: {kept}")
    with told, owner.record(0):
        table(torch.tensor([1, 2, 2])).sum().backward()
    with owner.record(0, accumulate=True):
        table(torch.tensor([1, 2, 2])).sum().backward()


# What is left behind


def test_no_reference_keeps_a_buffer_or_its_hooks_alive():
    weight = nn.Parameter(torch.ones(600, 600))  # large enough for a hook
    buf = fc.GradientBuffer([weight], 1)
    buf.backward([weight.sum()])
    buf.combine()
    assert sys.getrefcount(buf) == 2
    del buf
    assert not weight._post_accumulate_grad_hooks
