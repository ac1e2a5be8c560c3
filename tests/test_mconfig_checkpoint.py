"""state_dict and load_state_dict of MConFIG: going on with the same bits, and what cannot be loaded."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from mconfig_oracle import parameters_of, push, random_like
from torch import nn

import fastconfig as fc

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


def model_of(seed: int) -> nn.Module:
    """Three dtypes, memory in another order than indices, and a layer that only the last loss reaches."""
    torch.manual_seed(seed)
    model = nn.Module()
    model.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    model.body, model.wide, model.narrow = nn.Linear(3, 4), nn.Linear(4, 2).double(), nn.Linear(4, 2).bfloat16()
    model.last, model.never = nn.Linear(4, 1), nn.Linear(2, 2)
    return model


def loss_of(model: nn.Module, i: int, x: torch.Tensor) -> torch.Tensor:
    y = model.body(model.conv(x).mean(dim=(2, 3)).tanh())
    if i == 2:
        y = y * model.last(y)
    return (model.wide(y.double()) - i).square().mean() + (model.narrow(y.bfloat16()).float() + i).square().mean()


def optimizer_of(model: nn.Module, **options) -> fc.optim.MConFIG:
    groups = [
        {"params": [*model.conv.parameters(), *model.wide.parameters()], "lr": 0.02},
        {"params": [p for part in (model.body, model.narrow, model.last, model.never) for p in part.parameters()]},
    ]
    return fc.optim.MConFIG(groups, num_losses=3, lr=0.01, weight_decay=0.1, **options)


def train(model, optimizer, scheduler, data) -> None:
    for x in data:
        for i in optimizer.next_losses():
            with optimizer.record(i):
                loss_of(model, i, x).backward()
        optimizer.step()
        scheduler.step()


def scheduler_of(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.8)


def saved(value: object) -> object:
    """Through a file, as a checkpoint goes; nothing in it needs a pickle that runs code."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("selection", ["ordered", "random"])
@pytest.mark.parametrize(("k", "before"), [(1, 0), (1, 2), (1, 20), (2, 21)])
def test_resuming_gives_the_same_bits_as_never_stopping(backend, selection, k, before):
    """30 steps on, into a fresh model and optimizer; also from before the first update."""
    data = torch.randn(before + 30, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    options = {"losses_per_step": k, "selection": selection, "backend": backend}
    model = model_of(0)
    optimizer = optimizer_of(model, **options)
    scheduler = scheduler_of(optimizer)
    train(model, optimizer, scheduler, data[:before])
    checkpoint = saved([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    train(model, optimizer, scheduler, data[before:])

    resumed = model_of(1)
    other = optimizer_of(resumed, **options)
    their = scheduler_of(other)
    push(other, 0, random_like(list(resumed.conv.parameters()), torch.Generator()))  # what it held is forgotten
    other.step()
    resumed.load_state_dict(checkpoint[0])
    other.load_state_dict(checkpoint[1])
    their.load_state_dict(checkpoint[2])
    train(resumed, other, their, data[before:])
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert_same_state(other.state_dict(), optimizer.state_dict())
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.02


METHODS_WITH_A_STATE = {
    "GradVac": lambda: fc.GradVac(0.5, torch.Generator().manual_seed(3)),
    "CRMOGM": lambda: fc.CRMOGM(fc.PCGrad(generator=torch.Generator().manual_seed(3))),
    "NashMTL": lambda: fc.NashMTL(update_every=4),
}


@pytest.mark.parametrize("name", METHODS_WITH_A_STATE)
def test_a_methods_state_goes_with_the_optimizers(name):
    data = torch.randn(24, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    model = model_of(0)
    optimizer = optimizer_of(model, method=METHODS_WITH_A_STATE[name]())
    scheduler = scheduler_of(optimizer)
    train(model, optimizer, scheduler, data[:13])
    checkpoint = saved([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    train(model, optimizer, scheduler, data[13:])
    resumed = model_of(1)
    other = optimizer_of(resumed, method=METHODS_WITH_A_STATE[name]())
    their = scheduler_of(other)
    for part, state in zip((resumed, other, their), checkpoint, strict=True):
        part.load_state_dict(state)
    train(resumed, other, their, data[13:])
    for ours, wanted in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, wanted)
    with pytest.raises(ValueError, match="state_dict must have the keys"):
        optimizer_of(model, method=fc.SDMGrad()).load_state_dict({**checkpoint[1], "shared": of_another(checkpoint[1])})


def of_another(state: dict) -> dict:
    return {**state["shared"], "method": {"weights": None}}


def assert_same_state(found: object, wanted: object) -> None:
    """Equal, tensors to the bit."""
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_same_state(found[key], value)
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same_state(one, other)
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
    else:
        assert found == wanted


@pytest.mark.parametrize(("backend", "other"), [("cpu", "reference"), ("reference", "cpu")])
@pytest.mark.parametrize("k", [1, 3])
def test_resuming_on_another_backend(backend, other, k):
    """To 1e-6, over 30 steps; float32 parameters of about 1."""
    parameters, resumed = (parameters_of((6, 5), (7,), dtype=torch.float32) for _ in range(2))
    here = fc.optim.MConFIG(parameters, num_losses=3, losses_per_step=k, backend=backend)
    there = fc.optim.MConFIG(resumed, num_losses=3, losses_per_step=k, backend=other)
    generator = torch.Generator().manual_seed(0)
    for step in range(50):
        if step == 20:
            there.load_state_dict(saved(here.state_dict()))
            with torch.no_grad():
                for ours, theirs in zip(parameters, resumed, strict=True):
                    theirs.copy_(ours)
        for i in here.next_losses():
            given = random_like(parameters, generator)
            push(here, i, given)
            if step >= 20:
                push(there, i, dict(zip(resumed, given.values(), strict=True)))
        here.step()
        if step >= 20:
            there.step()
    for ours, theirs in zip(parameters, resumed, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0.0, atol=1e-6)


def trained(seed: int = 0, steps: int = 7, **options) -> fc.optim.MConFIG:
    parameters = parameters_of((3, 2), (4,), (5,), seed=seed)
    optimizer = fc.optim.MConFIG(parameters, lr=0.1, **{"num_losses": 2, "selection": "random", **options})
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        push(optimizer, optimizer.next_loss(), random_like(parameters[:2], generator))  # the third is never reached
        optimizer.step()
    return optimizer


def test_state_dict_is_as_of_torchs_optimizers():
    optimizer = trained()
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups", "shared"}
    assert state["param_groups"][0]["params"] == [0, 1, 2]
    assert state["state"].keys() == {0, 1}
    assert {name: value.shape for name, value in state["state"][0].items()} == {
        "exp_avgs": (2, 3, 2),
        "exp_avg_sq": (3, 2),
    }
    parameter = optimizer.param_groups[0]["params"][0]
    assert state["state"][0]["exp_avgs"] is optimizer.state[parameter]["exp_avgs"]
    copied = {name: value.clone() for name, value in state["shared"].items() if isinstance(value, torch.Tensor)}
    push(optimizer, 0, {parameter: torch.ones(3, 2)})
    optimizer.step()
    for name, value in copied.items():
        assert torch.equal(state["shared"][name], value), name


def test_loading_its_own_state_changes_nothing():
    """The state's tensors are the optimizer's own: they must not be cleared before they are read."""
    optimizer = trained()
    wanted = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same_state(optimizer.state_dict(), wanted)
    assert any(value.any() for value in optimizer.state_dict()["state"][0].values())


def test_going_back_to_an_earlier_state():
    """A layer that had been reached since is unreached again, and its averages are zero."""
    optimizer = trained()
    parameters = optimizer.param_groups[0]["params"]
    earlier = copy.deepcopy(optimizer.state_dict())
    for _ in range(4):
        push(optimizer, optimizer.next_loss(), random_like(parameters, torch.Generator()))
        optimizer.step()
    assert parameters[2] in optimizer.state
    optimizer.load_state_dict(earlier)
    assert_same_state(optimizer.state_dict(), earlier)
    other = trained(steps=1)
    other.load_state_dict(earlier)
    for ours in (optimizer, other):
        given = random_like(ours.param_groups[0]["params"], torch.Generator().manual_seed(3))
        push(ours, 0, given)
        ours.step()
    assert_same_state(optimizer.state_dict(), other.state_dict())


def test_a_loaded_state_is_a_copy():
    source, target = trained(), trained(seed=1)
    target.load_state_dict(source.state_dict())
    wanted = copy.deepcopy(source.state_dict())
    push(target, 0, random_like(target.param_groups[0]["params"], torch.Generator()))
    target.step()
    target.next_loss()
    assert_same_state(source.state_dict(), wanted)


def test_what_was_recorded_is_forgotten():
    optimizer = trained()
    push(optimizer, 0, random_like(optimizer.param_groups[0]["params"], torch.Generator()))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(RuntimeError, match="found no gradient"):
        optimizer.step()


def test_looking_at_the_state_before_it_begins_leaves_it_alone():
    """optimizer.state is a defaultdict: reading it makes an entry."""
    parameters = parameters_of((3,), (2,))
    optimizer = fc.optim.MConFIG(parameters, num_losses=1)
    assert all(not optimizer.state[parameter] for parameter in parameters)
    push(optimizer, 0, {parameters[0]: torch.ones(3)})
    optimizer.step()
    assert optimizer.state[parameters[0]]["exp_avgs"].any()
    state = copy.deepcopy(optimizer.state_dict())
    assert state["state"][0].keys() == {"exp_avgs", "exp_avg_sq"}
    other = fc.optim.MConFIG(parameters_of((3,), (2,)), num_losses=1)
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()["state"][0]["exp_avgs"], state["state"][0]["exp_avgs"])


def adam_state() -> dict:
    parameters = parameters_of((3, 2), (4,), (5,))
    optimizer = torch.optim.Adam(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def reshaped() -> dict:
    state = trained().state_dict()
    state["state"][1] = {**state["state"][1], "exp_avgs": torch.zeros(2, 5)}
    return state


def without_second() -> dict:
    state = trained().state_dict()
    return {**state, "state": {**state["state"], 1: {"exp_avgs": state["state"][1]["exp_avgs"]}}}


def on_meta() -> dict:
    state = trained().state_dict()
    return {**state, "state": {i: {k: v.to("meta") for k, v in s.items()} for i, s in state["state"].items()}}


def with_shared(**changed) -> dict:
    state = trained().state_dict()
    return {**state, "shared": {**state["shared"], **changed}}


def without_shared(name: str) -> dict:
    state = trained().state_dict()
    return {**state, "shared": {key: value for key, value in state["shared"].items() if key != name}}


def of_frozen() -> dict:
    """Holds averages of what the optimizer under test leaves out."""
    parameters = parameters_of((3, 2), (4,), (5,))
    optimizer = fc.optim.MConFIG(parameters, num_losses=2)
    push(optimizer, 0, random_like(parameters, torch.Generator()))
    optimizer.step()
    return optimizer.state_dict()


UNLOADABLE = {
    "of Adam": (adam_state, TypeError, "MConFIG.state_dict"),
    "no mapping": (lambda: [1, 2], TypeError, "MConFIG.state_dict"),
    "other losses": (lambda: trained(num_losses=3).state_dict(), ValueError, "num_losses=3.*of 2"),
    "other shapes": (reshaped, ValueError, r"exp_avgs of parameter 1.*\(2, 5\).*\(2, 4\)"),
    "no second moment": (without_second, TypeError, "parameter 1 must hold exp_avgs, exp_avg_sq"),
    "on meta": (on_meta, ValueError, "meta"),
    "fewer parameters": (
        lambda: fc.optim.MConFIG(parameters_of((3, 2), (4,)), num_losses=2).state_dict(),
        ValueError,
        r"\[2\].*\[3\]",
    ),
    "more groups": (
        lambda: fc.optim.MConFIG(
            [{"params": parameters_of((3, 2), (4,))}, {"params": parameters_of((5,))}], num_losses=2
        ).state_dict(),
        ValueError,
        r"\[2, 1\].*\[3\]",
    ),
    "no counts": (lambda: without_shared("counts"), TypeError, "shared.*counts"),
    "no selection": (lambda: without_shared("selection"), TypeError, "shared.*selection"),
    "other Gramian": (
        lambda: with_shared(gramian=torch.zeros(3, 3)),
        ValueError,
        r"gramian.*\(2, 2\).*\(3, 3\)",
    ),
    "Gramian on meta": (lambda: with_shared(gramian=torch.zeros(2, 2, device="meta")), ValueError, "gramian.*meta"),
}


@pytest.mark.parametrize(("make", "error", "message"), UNLOADABLE.values(), ids=UNLOADABLE)
def test_what_cannot_be_loaded_changes_nothing(make, error, message):
    optimizer = trained(seed=3)
    push(optimizer, 0, random_like(optimizer.param_groups[0]["params"][:1], torch.Generator()))
    wanted = copy.deepcopy(optimizer.state_dict())
    bad = make()
    if isinstance(bad, dict) and "param_groups" in bad:
        bad["param_groups"][0]["lr"] = 7.0
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(bad)
    assert_same_state(optimizer.state_dict(), wanted)
    optimizer.step()  # of what had been recorded


def test_averages_of_a_parameter_that_was_left_out():
    parameters = parameters_of((3, 2), (4,), (5,))
    parameters[1].requires_grad_(False)
    optimizer = fc.optim.MConFIG(parameters, num_losses=2)
    with pytest.raises(ValueError, match=r"parameter 1.*needed no gradient.*requires_grad_"):
        optimizer.load_state_dict(of_frozen())


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, pickle.dumps, lambda optimizer: torch.save(optimizer, io.BytesIO())]
)
def test_copies_are_refused(copied):
    with pytest.raises(TypeError, match="load_state_dict"):
        copied(trained())


def test_memory_is_m_plus_one_vectors():
    """All state tensors are views of them; and none of the sum that is f."""
    m, n = 5, 300_000
    parameters = parameters_of((n // 2,), (n // 4, 2), dtype=torch.bfloat16)
    optimizer = fc.optim.MConFIG(parameters, num_losses=m)
    for i in range(m):
        push(optimizer, i, random_like(parameters, torch.Generator()))
        optimizer.step()
    storages = {}
    for state in optimizer.state.values():
        for value in state.values():
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    assert len(storages) == 2
    assert sum(storages.values()) <= 4 * (m + 1) * (n + 32)
    numbers = [v for v in vars(optimizer).values() if isinstance(v, torch.Tensor)]
    assert all(value.numel() <= m * m for value in numbers)
    shared = optimizer.state_dict()["shared"]
    assert sum(value.numel() for value in shared.values() if isinstance(value, torch.Tensor)) == m * m + 2 * m + 2


def test_a_group_that_lacks_an_option_is_refused_and_a_schedulers_may_be_missing():
    model = model_of(0)
    optimizer = optimizer_of(model)
    plain = optimizer.state_dict()
    torch.optim.lr_scheduler.StepLR(optimizer, 3)  # it adds to the groups
    optimizer.load_state_dict(plain)
    lacking = copy.deepcopy(plain)
    del lacking["param_groups"][1]["eps"]
    with pytest.raises(ValueError, match="parameter group 1 lacks eps"):
        optimizer.load_state_dict(lacking)
