"""MConFIG as a torch optimizer: what it shows, what it takes, and what it refuses with which words."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mconfig_oracle import parameters_of, push
from torch import nn
from versions import since

import fastconfig as fc

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


def optimizer_of(*shapes: tuple[int, ...], m: int = 2, **options) -> tuple[fc.optim.MConFIG, list[torch.Tensor]]:
    parameters = parameters_of(*(shapes or ((3,), (4,))))
    return fc.optim.MConFIG(parameters, **{"lr": 0.1, "num_losses": m, **options}), parameters


def ones(parameters: list[torch.Tensor], value: float = 1.0) -> dict[torch.Tensor, torch.Tensor]:
    return {parameter: torch.full_like(parameter, value) for parameter in parameters}


class Spoiled(dict):
    """Raises when half of its gradients have been backpropagated."""

    def items(self):
        (parameter, gradient), *_ = super().items()
        (parameter * gradient).sum().backward()
        raise ValueError("a block's own")


def averages_of(optimizer: fc.optim.MConFIG) -> list[torch.Tensor]:
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


def assert_untouched(optimizer, parameters, before, averages) -> None:
    for found, wanted in zip([*parameters, *averages_of(optimizer)], [*before, *averages], strict=True):
        assert torch.equal(found, wanted)


# Gradients as they show


def test_gradients_show_and_changing_them_in_place_counts(backend):
    optimizer, parameters = optimizer_of(backend=backend)
    theirs, others = optimizer_of(backend=backend)
    for step in range(6):
        push(optimizer, step % 2, ones(parameters))
        for parameter in parameters:
            assert (parameter.grad == 1).all()
            parameter.grad.mul_(step - 2.5)
        optimizer.step()
        assert all((parameter.grad == step - 2.5).all() for parameter in parameters)
        push(theirs, step % 2, ones(others, step - 2.5))
        theirs.step()
        for ours, wanted in zip(parameters, others, strict=True):
            assert torch.equal(ours, wanted)


def test_torchs_clipping_by_value_and_norm_counts(backend):
    optimizer, parameters = optimizer_of((4,), m=1, lr=0.0, betas=(0.5, 0.9), backend=backend)
    push(optimizer, 0, {parameters[0]: torch.tensor([3.0, -4.0, 0.0, 0.0])})
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    assert norm == 5.0
    optimizer.step()
    wanted = 0.5 * torch.tensor([[0.6, -0.8, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(optimizer.state[parameters[0]]["exp_avgs"], wanted, rtol=1e-6, atol=0.0)
    push(optimizer, 0, {parameters[0]: torch.tensor([3.0, -4.0, 0.0, 0.0])})
    torch.nn.utils.clip_grad_value_(parameters, 2.0)
    assert parameters[0].grad.tolist() == [2.0, -2.0, 0.0, 0.0]


def test_several_records_show_the_last_that_reached_each_parameter(backend):
    optimizer, (first, second) = optimizer_of(losses_per_step=2, backend=backend)
    push(optimizer, 1, {first: torch.full((3,), 5.0), second: torch.full((4,), 6.0)})
    push(optimizer, 0, {second: torch.full((4,), 7.0)})
    assert (first.grad == 5).all()
    assert (second.grad == 7).all()
    optimizer.step()
    averages = optimizer.state[second]["exp_avgs"]
    torch.testing.assert_close(averages[:, 0], torch.tensor([0.7, 0.6], dtype=torch.float64))
    torch.testing.assert_close(optimizer.state[first]["exp_avgs"][:, 0], torch.tensor([0.0, 0.5], dtype=torch.float64))
    push(optimizer, 0, {second: torch.full((4,), 8.0)})
    assert first.grad is None
    assert (second.grad == 8).all()


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_forgets_what_was_recorded(backend, to_none):
    optimizer, parameters = optimizer_of(backend=backend)
    push(optimizer, 0, ones(parameters))
    optimizer.zero_grad(set_to_none=to_none)
    for parameter in parameters:
        assert (parameter.grad is None) == to_none
        assert to_none or not parameter.grad.any()
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        optimizer.step()
    push(optimizer, 0, ones(parameters))
    optimizer.step()
    assert optimizer.state_dict()["shared"]["counts"].tolist() == [1.0, 0.0]


def test_the_usual_loop_with_zero_grad_trains(backend):
    """zero_grad, loss, backward, step: and what is outside the optimizer accumulates as ever."""
    torch.manual_seed(0)
    model, outside = nn.Linear(4, 2), nn.Linear(2, 2)
    optimizer = fc.optim.MConFIG(model.parameters(), lr=0.05, num_losses=2, backend=backend)
    x = torch.randn(16, 4)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        i = optimizer.next_loss()
        with optimizer.record(i):
            loss = (outside(model(x))[:, i] - 1).square().mean()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    assert outside.weight.grad.any()


def test_closure(backend):
    """It records, under autograd whatever the caller's mode, and what it returns is returned."""
    optimizer, parameters = optimizer_of(m=1, backend=backend)
    before = parameters[0].detach().clone()

    def closure():
        optimizer.zero_grad()
        push(optimizer, 0, ones(parameters))
        return 3.5

    with torch.no_grad():
        assert optimizer.step(closure) == 3.5
    torch.testing.assert_close(parameters[0].detach(), before - 0.1)
    push(optimizer, 0, ones(parameters))
    assert optimizer.step() is None


def test_autograd_notices_that_parameters_changed(backend):
    """A graph that saved a parameter before the step must not be differentiated with the one after it."""
    optimizer, (parameter, _) = optimizer_of(m=1, backend=backend)
    saved = (parameter * parameter.exp()).sum()
    push(optimizer, 0, {parameter: torch.ones(3)})
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_parameters_stay_leaves_and_hooks_of_torch_run(backend):
    optimizer, parameters = optimizer_of(m=1, backend=backend)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    push(optimizer, 0, ones(parameters))
    optimizer.step()
    assert calls == ["before", "after"]
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in parameters)
    assert "lr: 0.1" in repr(optimizer)


def test_combination_before_and_after_the_first_update(backend):
    optimizer, parameters = optimizer_of((2,), backend=backend)
    assert optimizer.num_losses == 2
    assert optimizer.combination.weights.tolist() == [0.0, 0.0]
    assert optimizer.combination.rank == 0
    push(optimizer, 0, {parameters[0]: torch.tensor([3.0, 0.0])})
    optimizer.step()
    assert optimizer.combination.norms.tolist() == pytest.approx([3.0, 0.0])
    push(optimizer, 1, {parameters[0]: torch.tensor([0.0, 4.0])})
    optimizer.step()
    info = optimizer.combination
    assert info.norms.tolist() == pytest.approx([3.0, 4.0])
    assert info.cosines.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    # Of length 3/√2 + 4/√2 halfway between: 3.5 along either.
    assert info.weights.tolist() == pytest.approx([3.5 / 3, 3.5 / 4])


def test_combination_is_of_the_step_that_was_taken(backend):
    """Whatever a scheduler has made of β₁ since."""
    optimizer, parameters = optimizer_of((2,), backend=backend)
    push(optimizer, 0, {parameters[0]: torch.tensor([3.0, 0.0])})
    optimizer.step()
    push(optimizer, 1, {parameters[0]: torch.tensor([0.0, 4.0])})
    optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.5, 0.999)
    assert optimizer.combination.norms.tolist() == pytest.approx([3.0, 4.0])
    assert optimizer.combination.weights.tolist() == pytest.approx([3.5 / 3, 3.5 / 4])


# Groups


def test_a_group_may_join_before_the_first_record(backend):
    optimizer, parameters = optimizer_of(m=1, backend=backend)
    (joined,) = parameters_of((5,), seed=9)
    befores = [p.detach().clone() for p in (*parameters, joined)]
    optimizer.add_param_group({"params": [joined], "lr": 0.5, "weight_decay": 0.2})
    push(optimizer, 0, ones([*parameters, joined]))
    optimizer.step()
    for parameter, before in zip(parameters, befores, strict=False):
        torch.testing.assert_close(parameter.detach(), before - 0.1)
    torch.testing.assert_close(joined.detach(), befores[2] * 0.9 - 0.5)


@pytest.mark.parametrize("when", ["recorded", "stepped", "loaded"])
def test_a_group_may_not_join_later(when):
    optimizer, parameters = optimizer_of(m=1)
    push(optimizer, 0, ones(parameters))
    if when != "recorded":
        optimizer.step()
    if when == "loaded":
        state = optimizer.state_dict()
        optimizer, _ = optimizer_of(m=1)
        optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"add_param_group.*new MConFIG"):
        optimizer.add_param_group({"params": parameters_of((5,))})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("group", "error"),
    [
        ({"lr": -1.0}, ValueError),
        ({"eps": math.nan}, ValueError),
        ({"betas": (0.9, 1.0)}, ValueError),
        ({"weight_decay": "much"}, TypeError),
        ({"params": [torch.nn.Parameter(torch.ones(4, 4)[:, :2])]}, ValueError),
    ],
)
def test_a_group_that_cannot_be_is_not_added(backend, group, error):
    optimizer, parameters = optimizer_of(m=1, backend=backend)
    before = parameters[0].detach().clone()
    with pytest.raises(error, match=r"lr|eps|betas|weight_decay|strides"):
        optimizer.add_param_group({"params": parameters_of((5,)), **group})
    assert len(optimizer.param_groups) == 1
    push(optimizer, 0, ones(parameters))
    optimizer.step()
    torch.testing.assert_close(parameters[0].detach(), before - 0.1)


def test_groups_of_different_betas_are_refused_when_it_matters(backend):
    optimizer, parameters = optimizer_of(m=1, backend=backend)
    (other,) = parameters_of((2,))
    optimizer.add_param_group({"params": [other], "betas": (0.8, 0.999)})
    push(optimizer, 0, ones(parameters))
    with pytest.raises(ValueError, match=r"share betas.*\(0\.9, 0\.999\).*\(0\.8, 0\.999\)"):
        optimizer.step()
    optimizer.param_groups[1]["betas"] = [0.9, 0.999]  # as from a file of options
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"max_update_norm": 1.0}, {"selection": "random"}], ids=str)
def test_the_default_device_is_nobodys_concern(backend, options):
    """torch.set_default_device says where a model is made, not where losses are drawn and averages lie."""
    optimizer, parameters = optimizer_of(backend=backend, **options)
    gradients = ones(parameters)
    before = parameters[0].detach().clone()
    with torch.device("meta"):
        other = fc.optim.MConFIG(parameters, num_losses=2, selection="random")
        assert sorted(other.next_loss() for _ in range(2)) == [0, 1]
        for _ in range(3):
            push(optimizer, optimizer.next_loss(), gradients)
            optimizer.step()
    assert optimizer.combination.weights.sum() > 0
    assert not torch.equal(parameters[0], before)


@since(2, 6, "an optimizer takes no named parameters")
def test_named_parameters_and_parameters_given_twice():
    model = nn.Linear(3, 2)
    optimizer = fc.optim.MConFIG(model.named_parameters(), num_losses=1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    with pytest.raises(ValueError, match="more than one"):
        fc.optim.MConFIG([{"params": [model.weight]}, {"params": [model.weight]}], num_losses=1)


# What record and step refuse


@pytest.mark.parametrize(
    ("loss", "error"),
    [(2, IndexError), (-1, IndexError), (True, TypeError), (1.0, TypeError), ("1", TypeError), (None, TypeError)],
)
def test_no_such_loss(loss, error):
    optimizer, parameters = optimizer_of()
    with pytest.raises(error, match="loss must be"), optimizer.record(loss):
        pytest.fail("the block must not run")
    push(optimizer, 0, ones(parameters))  # goes on


def test_a_loss_twice_or_too_many_losses_in_a_step():
    optimizer, parameters = optimizer_of(m=3, losses_per_step=2)
    push(optimizer, 1, ones(parameters))
    with pytest.raises(ValueError, match=r"loss 1 was already recorded"):
        push(optimizer, 1, ones(parameters, 9.0))
    push(optimizer, 0, ones(parameters, 2.0))
    with pytest.raises(ValueError, match=r"record\(2\).*losses_per_step=2"):
        push(optimizer, 2, ones(parameters, 9.0))
    optimizer.step()
    wanted = torch.tensor([0.2, 0.1, 0.0], dtype=torch.float64)
    torch.testing.assert_close(optimizer.state[parameters[0]]["exp_avgs"][:, 0], wanted)


def test_fewer_losses_than_a_step_may_take(backend):
    optimizer, parameters = optimizer_of(m=3, losses_per_step=2, backend=backend)
    push(optimizer, 2, ones(parameters))
    optimizer.step()
    assert optimizer.state_dict()["shared"]["counts"].tolist() == [0.0, 0.0, 1.0]


def test_a_block_that_raises_recorded_nothing(backend):
    """What was recorded before it stays, and shows."""
    optimizer, parameters = optimizer_of(losses_per_step=2, backend=backend)
    push(optimizer, 1, ones(parameters, 5.0))
    with pytest.raises(ValueError, match="a block's own"):
        push(optimizer, 0, Spoiled(ones(parameters, 7.0)))
    assert all((p.grad == 5).all() for p in parameters)
    optimizer.step()
    assert optimizer.state_dict()["shared"]["counts"].tolist() == [0.0, 1.0]
    wanted = torch.tensor([0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(optimizer.state[parameters[0]]["exp_avgs"][:, 0], wanted)


CALLS = {
    "step": lambda optimizer: optimizer.step(),
    "zero_grad": lambda optimizer: optimizer.zero_grad(),
    "record": lambda optimizer: optimizer.record(1).__enter__(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "add_param_group": lambda optimizer: optimizer.add_param_group({"params": parameters_of((2,))}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_inside_record(call):
    optimizer, parameters = optimizer_of()
    with pytest.raises(RuntimeError, match=r"inside record\(0\)"), optimizer.record(0):
        call(optimizer)
    push(optimizer, 0, ones(parameters))
    optimizer.step()
    assert len(optimizer.param_groups) == 1


def test_two_optimizers_do_not_record_the_same_parameters_at_once():
    optimizer, parameters = optimizer_of()
    other = fc.optim.MConFIG(parameters, num_losses=1)
    with optimizer.record(0), pytest.raises(RuntimeError, match="another buffer or optimizer"), other.record(0):
        pass


@pytest.mark.parametrize("change", ["dtype", "data", "shape"])
@pytest.mark.parametrize("when", ["before record", "before step"])
def test_parameters_that_were_replaced(backend, change, when):
    """.to(), .data: the averages were shaped for what is no longer there."""
    model = nn.Linear(3, 2)
    optimizer = fc.optim.MConFIG(model.parameters(), num_losses=1, backend=backend)
    if when == "before step":
        push(optimizer, 0, ones(list(model.parameters())))
    model.weight.grad = None
    if change == "dtype":
        model.double()
    elif change == "data":
        model.weight.data = model.weight.data.clone()
    else:
        model.weight.data = torch.ones(4, 3)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 0 of the MConFIG.*make a new MConFIG"):
        optimizer.step() if when == "before step" else push(optimizer, 0, ones([model.bias]))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_losses": 0}, ValueError, "num_losses.*0"),
        ({"num_losses": True}, TypeError, "num_losses.*True"),
        ({"num_losses": 2.0}, TypeError, "num_losses.*2.0"),
        ({"losses_per_step": 3}, ValueError, "losses_per_step.*num_losses=2.*3"),
        ({"losses_per_step": 0}, ValueError, "losses_per_step.*0"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\].*1.0"),
        ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\].*-0.1"),
        ({"betas": (0.9, math.nan)}, ValueError, r"betas\[1\].*nan"),
        ({"betas": 0.9}, TypeError, "betas.*0.9"),
        ({"betas": (0.9, 0.99, 0.999)}, TypeError, "betas"),
        ({"betas": ("0.9", 0.9)}, TypeError, r"betas\[0\]"),
        ({"lr": -0.1}, ValueError, "lr.*-0.1"),
        ({"lr": math.inf}, ValueError, "lr.*inf"),
        ({"lr": "fast"}, TypeError, "lr.*fast"),
        ({"lr": torch.ones(2)}, ValueError, r"lr.*\(2,\)"),
        ({"eps": -1e-8}, ValueError, "eps"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"max_norm": 0.0}, ValueError, "max_norm.*0.0"),
        ({"max_update_norm": math.nan}, ValueError, "max_update_norm.*nan"),
        ({"state_dtype": torch.bfloat16}, ValueError, "state_dtype.*bfloat16"),
        ({"state_dtype": torch.float32}, ValueError, "state_dtype.*float64.*float32"),
        ({"differentiable": True}, ValueError, "differentiable"),
        ({"backend": "abacus"}, ValueError, "backend.*abacus"),
    ],
)
def test_arguments_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        fc.optim.MConFIG(parameters_of((3,)), **{"num_losses": 2, **options})


@pytest.mark.parametrize("method", [fc.ConFIG, object(), 3])
def test_a_method_that_is_none_is_refused(method):
    with pytest.raises(TypeError, match=r"method must have weights\(gramian\)"):
        fc.optim.MConFIG(parameters_of((3,)), num_losses=2, method=method)


@pytest.mark.parametrize(
    "method", [fc.ConFIG(weights=[1.0, 2.0, 3.0]), fc.ConFIG(length=2), fc.UPGrad([1, 2, 3]), fc.Priority([2, 0, 1])]
)
def test_a_method_that_does_not_fit_the_losses_is_refused_at_once(method):
    with pytest.raises(ValueError, match=r"3 entries for 2 losses|length=2"):
        fc.optim.MConFIG(parameters_of((3,)), num_losses=2, method=method)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (list, ValueError, "empty"),
        (lambda: torch.ones(3), TypeError, "params"),
        (lambda: [torch.ones(3)], ValueError, "requires a gradient"),
        (lambda: [nn.Parameter(torch.ones(3, device="meta"))], ValueError, "meta.*to_empty"),
        (lambda: [nn.Parameter(torch.ones(4, 4)[:, :2])], ValueError, "strides.*contiguous"),
        (lambda: [nn.Parameter(torch.ones(1).expand(3))], ValueError, "strides"),
        (lambda: nn.LazyLinear(3).parameters(), ValueError, "not initialised"),
    ],
    ids=["none", "a tensor", "frozen", "meta", "gaps", "expanded", "lazy"],
)
def test_parameters_that_cannot_be(make, error, message):
    with pytest.raises(error, match=message):
        fc.optim.MConFIG(make(), num_losses=2)


def test_betas_of_zero_keep_no_past(backend):
    """f is then the last ĝ, q is ĝ, and the update its sign."""
    optimizer, parameters = optimizer_of((4,), m=1, betas=(0.0, 0.0), backend=backend)
    before = parameters[0].detach().clone()
    gradient = torch.tensor([3.0, -2.0, 1e-3, -5.0], dtype=torch.float64)
    for step in range(1, 4):
        push(optimizer, 0, {parameters[0]: gradient * step})
        optimizer.step()
        torch.testing.assert_close(parameters[0].detach(), before - 0.1 * step * gradient.sign(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grads", [[[1.0, 2.0], [-1.0, -2.0]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]])
def test_opposed_and_zero_gradients_never_give_nan(backend, grads):
    optimizer, parameters = optimizer_of((2,), backend=backend)
    before = parameters[0].detach().clone()
    for step in range(6):
        push(optimizer, step % 2, {parameters[0]: torch.tensor(grads[step % 2])})
        optimizer.step()
    assert parameters[0].isfinite().all()
    assert torch.equal(parameters[0], before) == (grads[0] != [1.0, 1.0])
    assert optimizer.steps_left_out == 0


def test_many_elements_of_many_parameters_agree_between_backends():
    """Layers of a size at which the core's blocks and pieces do not coincide."""
    shapes = [(130, 129), (129,), (1,), (257, 3), (40, 40), (7,)]
    ours, theirs = parameters_of(*shapes, dtype=torch.float32), parameters_of(*shapes, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    optimizers = [
        fc.optim.MConFIG(
            [{"params": p[::2], "weight_decay": 0.3}, {"params": p[1::2], "maximize": True}],
            num_losses=3,
            losses_per_step=2,
            backend=backend,
        )
        for p, backend in ((ours, "cpu"), (theirs, "reference"))
    ]
    for _ in range(6):
        losses = optimizers[0].next_losses()
        for i in losses:
            given = [torch.randn(p.shape, generator=generator) for p in ours]
            for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
                push(optimizer, i, dict(zip(parameters, given, strict=True)))
        for optimizer in optimizers:
            optimizer.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=2**-22, atol=1e-3 * 20 * 2**-24)
    assert np.isfinite([p.detach().sum().item() for p in ours]).all()


@pytest.mark.parametrize("recorded", [(0,), (0, 1)])
def test_a_step_that_no_backward_pass_reached_is_refused(backend, recorded):
    optimizer, parameters = optimizer_of(losses_per_step=2, backend=backend)
    for loss in recorded:
        with optimizer.record(loss):
            pass
    with pytest.raises(RuntimeError, match="no backward pass inside record reached a parameter"):
        optimizer.step()
    optimizer.zero_grad()
    for loss in (0, 1):  # one that reaches nothing beside one that does is absent, and takes no part
        with optimizer.record(loss):
            if loss:
                parameters[0].sum().backward()
    optimizer.step()
    assert optimizer.combination.norms.tolist() == [0.0, 3**0.5]
    assert optimizer.state_dict()["shared"]["counts"].tolist() == [0.0, 1.0]


class OwnConFIG(fc.ConFIG):
    """Goes the way of any method, not that of the fused step."""


@pytest.mark.parametrize("method", [fc.ConFIG, OwnConFIG])
def test_a_method_that_raises_leaves_the_next_step_free(backend, method):
    optimizer, parameters = optimizer_of(method=method(nonfinite="raise"), backend=backend)
    push(optimizer, 0, ones(parameters))
    optimizer.step()
    push(optimizer, 1, ones(parameters, math.inf))
    with pytest.raises(FloatingPointError, match="gradient of loss 1"):
        optimizer.step()
    before = [parameter.detach().clone() for parameter in parameters]
    assert optimizer.steps_left_out == 0
    push(optimizer, 1, ones(parameters))
    optimizer.step()
    assert not any(map(torch.equal, parameters, before))


def test_losses_are_integers_of_any_kind():
    optimizer, parameters = optimizer_of()
    for loss in np.arange(2):
        push(optimizer, loss, ones(parameters))
        optimizer.step()
    assert optimizer.combination.norms.all()


def test_a_step_that_was_left_out_reached_nothing(backend):
    optimizer, (first, second) = optimizer_of(weight_decay=0.5, backend=backend)
    for loss in (0, 1):
        push(optimizer, loss, {first: torch.ones_like(first)})
        optimizer.step()
    push(optimizer, 0, {first: torch.ones_like(first), second: torch.full_like(second, math.inf)})
    optimizer.step()
    assert optimizer.steps_left_out == 1
    assert second not in optimizer.state
    before = second.detach().clone()
    push(optimizer, 1, {first: torch.ones_like(first)})
    optimizer.step()
    assert torch.equal(second, before)  # no decay either
    push(optimizer, 0, {first: torch.ones_like(first), second: torch.ones_like(second)})
    optimizer.step()
    assert second in optimizer.state
    assert not torch.equal(second, before)


def test_a_step_that_raised_reached_nothing(backend):
    optimizer, (first, second) = optimizer_of(method=fc.ConFIG(nonfinite="raise"), backend=backend)
    push(optimizer, 0, {first: torch.ones_like(first)})
    optimizer.step()
    push(optimizer, 1, {second: torch.full_like(second, math.nan)})
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert second not in optimizer.state
    assert first in optimizer.state
