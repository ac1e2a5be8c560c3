"""ConflictAwareLR: its rule, that it composes with every scheduler in every order, and that it waits for nothing."""

from __future__ import annotations

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import fastconfig as fc
from fastconfig.conflict import learning_rate as conflict_lr


def cosines(*upper: float) -> torch.Tensor:
    """(m, m) of the m(m-1)/2 cosines above the diagonal."""
    m = round((1 + math.sqrt(1 + 8 * len(upper))) / 2)
    matrix = torch.eye(m, dtype=torch.float64)
    for (i, j), value in zip(itertools.combinations(range(m), 2), upper, strict=True):
        matrix[i, j] = matrix[j, i] = value
    return matrix


class Script:
    """A buffer that combines what it is told to."""

    def __init__(self, worst: float | None = None) -> None:
        self.combination = None
        if worst is not None:
            self.show(worst)

    def show(self, *upper: float) -> None:
        self.combination = SimpleNamespace(cosines=cosines(*upper))


@pytest.fixture(params=["float", "tensor"])
def kind(request, monkeypatch):
    """The factor a float, or a tensor as on an accelerator."""
    if request.param == "tensor":
        monkeypatch.setattr(conflict_lr, "_unit_factor", lambda optimizer: torch.ones((), dtype=torch.float64))
    return request.param


def descent(lr: float | torch.Tensor = 0.1) -> tuple[nn.Parameter, torch.optim.SGD]:
    """A parameter that falls by the learning rate at each step."""
    theta = nn.Parameter(torch.zeros((), dtype=torch.float64))
    theta.grad = torch.ones_like(theta)
    return theta, torch.optim.SGD([theta], lr=lr)


def taken(theta: nn.Parameter, optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the step that this takes."""
    before = theta.item()
    optimizer.step()
    return before - theta.item()


WORST = [-0.9, -0.9, 0.2, 0.3, -0.4, -0.9, -0.9, -0.9, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def factors(worst: list[float], threshold: float, shrink: float, grow: float, least: float) -> list[float]:
    """The factor before each step, and after the last."""
    values = [1.0]
    for cosine in worst:
        changed = max(values[-1] * shrink, least) if cosine < threshold else min(values[-1] * grow, 1.0)
        values.append(changed)
    return values


# The rule


def test_the_factor_shrinks_in_conflict_and_grows_back(kind):
    theta, optimizer = descent()
    buffer = Script()
    scheduler = fc.ConflictAwareLR(optimizer, buffer, -0.5, 0.5, 1.5, min_factor=0.2)
    expected = factors(WORST, -0.5, 0.5, 1.5, 0.2)
    assert min(expected) == 0.2
    assert expected[-1] == 1.0
    for worst, now, later in zip(WORST, expected[:-1], expected[1:], strict=True):
        assert taken(theta, optimizer) == pytest.approx(0.1 * now)
        buffer.show(0.7, worst, 0.9)
        scheduler.step()
        assert float(scheduler.factor) == pytest.approx(later)
        assert float(scheduler.get_last_lr()[0]) == pytest.approx(0.1 * later)
        assert optimizer.param_groups[0]["lr"] == 0.1
    assert isinstance(scheduler.factor, float if kind == "float" else torch.Tensor)


def test_a_cosine_of_the_threshold_is_no_conflict():
    _, optimizer = descent()
    scheduler = fc.ConflictAwareLR(optimizer, Script(-0.25), threshold=-0.25, shrink=0.5)
    optimizer.step()
    scheduler.step()
    assert scheduler.factor == 1.0


def no_direction(m: int, *zero: int) -> torch.Tensor:
    matrix = cosines(*[-1.0] * (m * (m - 1) // 2))
    for i in zero:
        matrix[i] = matrix[:, i] = 0.0
    return matrix


@pytest.mark.parametrize(
    ("matrix", "changes"),
    [
        (torch.ones(1, 1), False),
        (torch.zeros(1, 1), False),
        (no_direction(2, 0), False),
        (no_direction(3, 0, 2), False),
        (no_direction(3, 0), True),
        (torch.full((2, 2), math.nan), False),
    ],
    ids=["one loss", "one zero", "a pair with a zero", "one of three left", "two of three left", "NaN"],
)
def test_without_a_pair_to_compare_the_factor_stays(matrix, changes, kind):
    _, optimizer = descent()
    buffer = Script(-0.9)
    scheduler = fc.ConflictAwareLR(optimizer, buffer, threshold=0.5, shrink=0.5)
    optimizer.step()
    scheduler.step()
    buffer.combination = SimpleNamespace(cosines=matrix)
    scheduler.step()
    assert scheduler.factor == (0.25 if changes else 0.5)


# With other schedulers


def sequential(optimizer):
    return lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[5],
    )


SCHEDULERS = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 3, gamma=0.5),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=0.02),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=30),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step)),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4),
    "SequentialLR": sequential,
}


def keeps_a_tensor(name):
    """Whether the scheduler by itself writes into a rate that is a tensor; some of PyTorch 2.4 put another there."""
    lr = torch.tensor(0.1, dtype=torch.float64)
    _, optimizer = descent(lr)
    scheduler = SCHEDULERS[name](optimizer)
    optimizer.step()
    scheduler.step()
    return optimizer.param_groups[0]["lr"] is lr


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # which PyTorch's SequentialLR once passed
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["", "lr a tensor"])
@pytest.mark.parametrize("stepped_first", [False, True], ids=["ours last", "ours first"])
@pytest.mark.parametrize("made_first", [False, True], ids=["made last", "made first"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_it_multiplies_what_any_scheduler_sets(name, made_first, stepped_first, tensor_lr, kind):
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
    plain_theta, plain = descent(0.1)
    alone = SCHEDULERS[name](plain)
    theta, optimizer = descent(lr)
    buffer = Script()
    if made_first:
        ours = fc.ConflictAwareLR(optimizer, buffer, -0.5, 0.5, 1.2)
        other = SCHEDULERS[name](optimizer)
    else:
        other = SCHEDULERS[name](optimizer)
        ours = fc.ConflictAwareLR(optimizer, buffer, -0.5, 0.5, 1.2)
    for worst, factor in zip(WORST, factors(WORST, -0.5, 0.5, 1.2, 0.01)[:-1], strict=True):
        assert float(ours.get_last_lr()[0]) == pytest.approx(factor * plain.param_groups[0]["lr"])
        assert taken(theta, optimizer) == pytest.approx(factor * taken(plain_theta, plain))
        buffer.show(worst)
        for scheduler in (ours, other) if stepped_first else (other, ours):
            scheduler.step()
        alone.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(plain.param_groups[0]["lr"])
    if tensor_lr and keeps_a_tensor(name):
        assert optimizer.param_groups[0]["lr"] is lr  # a captured step reads it


def test_chained_and_plateau_and_groups():
    first, second = (nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    optimizer = torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 10.0}])
    ours = fc.ConflictAwareLR(optimizer, Script(-1.0), -0.5, 0.5)
    chained = lr_scheduler.ChainedScheduler([ours, lr_scheduler.ExponentialLR(optimizer, 0.5)])
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    for _ in range(2):
        optimizer.step()
        chained.step()
        plateau.step(1.0)  # the second time it is one
    optimizer.step()
    expected = 1.0 + 0.5 * 0.5 + 0.25 * 0.25 * 0.1
    assert first.item() == pytest.approx(-expected)
    assert second.item() == pytest.approx(-10 * expected)


def test_a_checkpoint_has_the_factor_once(kind):
    def build(worst):
        theta, optimizer = descent()
        other = lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0.01)
        buffer = Script(worst)
        return theta, optimizer, other, buffer, fc.ConflictAwareLR(optimizer, buffer, -0.5, 0.5, 1.3)

    def go_on(theta, optimizer, other, buffer, ours, worst):
        steps = []
        for cosine in worst:
            steps.append(taken(theta, optimizer))
            buffer.show(cosine)
            ours.step()
            other.step()
        return steps

    parts = build(0.0)
    go_on(*parts, WORST[:6])
    state = copy.deepcopy([part.state_dict() for part in (parts[1], parts[2], parts[4])])
    assert not any(value is parts[3] for value in state[2].values())
    expected = go_on(*parts, WORST[6:])
    resumed = build(0.0)
    for part, saved in zip((resumed[1], resumed[2], resumed[4]), state, strict=True):
        part.load_state_dict(saved)
    assert go_on(*resumed, WORST[6:]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="state_dict must be that of a ConflictAwareLR"):
        resumed[4].load_state_dict(resumed[2].state_dict())


def test_a_step_that_raises_leaves_the_learning_rate():
    theta, optimizer = descent()
    ours = fc.ConflictAwareLR(optimizer, Script(-1.0), shrink=0.25)
    optimizer.step()
    ours.step()

    def closure():
        assert optimizer.param_groups[0]["lr"] == 0.025
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert taken(theta, optimizer) == pytest.approx(0.025)


def test_without_the_scheduler_steps_are_plain_again():
    theta, optimizer = descent()
    ours = fc.ConflictAwareLR(optimizer, Script(-1.0))
    optimizer.step()
    ours.step()
    assert taken(theta, optimizer) == pytest.approx(0.05)
    del ours
    assert taken(theta, optimizer) == pytest.approx(0.1)


def test_grad_scaler_steps_are_scaled():
    theta, optimizer = descent()
    ours = fc.ConflictAwareLR(optimizer, Script(-1.0), shrink=0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for expected in (0.1, 0.025):
        theta.grad, before = None, theta.item()
        scaler.scale(theta).backward()
        scaler.step(optimizer)
        scaler.update()
        ours.step()
        assert before - theta.item() == pytest.approx(expected)


# With what it is for


def test_with_a_gradient_buffer():
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    buf = fc.GradientBuffer(model.parameters(), num_losses=2)
    scheduler = fc.ConflictAwareLR(optimizer, buf, shrink=0.5, grow=1.5)
    assert buf.combination is None
    seen = []
    for sign in (1.0, -1.0, -1.0, 1.0):
        output = model(torch.tensor([1.0, 2.0])).sum()
        buf.backward([output, sign * 3 * output])
        info = buf.combine()
        assert buf.combination is info
        optimizer.step()
        scheduler.step()
        seen.append(scheduler.factor)
    assert seen == [1.0, 0.5, 0.25, 0.375]


def test_with_mconfig():
    theta = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = fc.optim.MConFIG([theta], lr=0.1, num_losses=2)
    scheduler = fc.ConflictAwareLR(optimizer, optimizer, shrink=0.5)
    for _ in range(3):
        loss = optimizer.next_loss()
        with optimizer.record(loss):
            ((theta * torch.tensor([1.0, 0.1])).sum() * (-1) ** loss + 0.01 * theta[1]).backward()
        optimizer.step()
        scheduler.step()
    assert optimizer.combination.cosines[0, 1] < -0.9
    assert scheduler.factor == 0.25  # in the first step there was one gradient only


# On an accelerator


def test_nothing_waits_for_an_accelerator():
    """Tensors on the meta device have no values to ask for."""
    theta = nn.Parameter(torch.zeros(3, device="meta"))
    with pytest.warns(UserWarning, match="will wait for meta .* group 0.* fused=True or capturable=True"):
        fc.ConflictAwareLR(torch.optim.SGD([theta], lr=0.1), Script())
    optimizer = torch.optim.Adam([theta], lr=0.1)
    optimizer.param_groups[0]["capturable"] = True  # refused for meta by the constructor
    buffer = SimpleNamespace(combination=SimpleNamespace(cosines=torch.eye(2, device="meta", dtype=torch.float64)))
    scheduler = fc.ConflictAwareLR(optimizer, buffer)
    memory = scheduler._factor
    optimizer.step()
    scheduler.step()
    assert scheduler._factor is memory  # a captured step reads it
    assert memory.is_meta
    assert memory.dtype == torch.float32  # which fused optimizers ask for
    with scheduler._applied():
        assert optimizer.param_groups[0]["lr"].is_meta
    assert optimizer.param_groups[0]["lr"] == 0.1


# What cannot be


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": -1.5}, ValueError, r"threshold must lie in \[-1, 1\], got -1.5"),
        ({"threshold": math.nan}, ValueError, r"threshold must lie in \[-1, 1\], got nan"),
        ({"threshold": "0"}, TypeError, "threshold must be a number, got '0'"),
        ({"shrink": 1.0}, ValueError, r"shrink must lie in \(0, 1\), got 1.0"),
        ({"shrink": 0.0}, ValueError, r"shrink must lie in \(0, 1\), got 0.0"),
        ({"grow": 0.9}, ValueError, "grow must be finite and at least 1, got 0.9"),
        ({"grow": math.inf}, ValueError, "grow must be finite and at least 1, got inf"),
        ({"min_factor": 2}, ValueError, r"min_factor must lie in \[0, 1\], got 2"),
        ({"optimizer": 3}, TypeError, "optimizer must be a torch.optim.Optimizer, got int"),
        ({"buffer": 3}, TypeError, "buffer must have a combination.* got int"),
    ],
)
def test_arguments_that_cannot_be(options, error, message):
    _, optimizer = descent()
    with pytest.raises(error, match=message):
        fc.ConflictAwareLR(**{"optimizer": optimizer, "buffer": Script(), **options})
    assert optimizer.step.__name__ == "step"
    assert "initial_lr" not in optimizer.param_groups[0]


def test_repr_is_a_line():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = fc.ConflictAwareLR(optimizer, Script(), threshold=-0.25)
    assert repr(scheduler) == "ConflictAwareLR(factor=1, threshold=-0.25, shrink=0.5, grow=1.1, min_factor=0.01)"
