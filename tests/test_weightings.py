"""Weightings of losses: torchjd's or the paper's formulas as oracles, and the protocol that all of them keep."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torchjd.scalarization
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastconfig as fc
from fastconfig import weightings


def relobralo(num_losses, **options):
    return weightings.ReLoBRaLo(num_losses, generator=torch.Generator().manual_seed(3), **options)


WEIGHTINGS = {
    "uncertainty": weightings.UncertaintyWeighting,
    "average": weightings.DynamicWeightAverage,
    "relobralo": relobralo,
    "softadapt": weightings.SoftAdapt,
    "softadapt, all": lambda m: weightings.SoftAdapt(m, normalized=True, loss_weighted=True, accuracy=2),
    "annealing": weightings.LearningRateAnnealing,
    "gradnorm": weightings.GradNorm,
    "famo": weightings.FAMO,
    "geometric": weightings.GeometricMean,
}
every = pytest.mark.parametrize("name", WEIGHTINGS)


def positive(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).add(0.1).to(dtype)


class Problem:
    """m quadratic losses over a vector, whose gradients are known: L_i = s_i/2 |θ - t_i|²."""

    def __init__(self, m: int, dtype: torch.dtype = torch.float64) -> None:
        self.parameters = [nn.Parameter(positive(2, 2, dtype=dtype)), nn.Parameter(positive(3, seed=1, dtype=dtype))]
        self.targets = positive(m, 7, seed=2, dtype=dtype)
        self.scales = torch.logspace(-1, 1, m, dtype=dtype)

    def losses(self) -> torch.Tensor:
        theta = torch.cat([parameter.flatten() for parameter in self.parameters])
        return 0.5 * self.scales * (theta - self.targets).square().sum(1)

    def gradients(self) -> np.ndarray:
        theta = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        return (self.scales[:, None] * (theta - self.targets)).numpy()


def train(weighting, problem: Problem, steps: int) -> None:
    """Steps of plain gradient descent, with everything that the weightings ask for in their loops."""
    parameters = [*problem.parameters, *weighting.parameters()]
    for step in range(steps):
        losses = problem.losses()
        if isinstance(weighting, (weightings.GradNorm, weightings.LearningRateAnnealing)):
            weighting.update(losses, problem.parameters)
        gradients = torch.autograd.grad(weighting(losses), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.01 * gradient
        if isinstance(weighting, weightings.FAMO):
            weighting.update(problem.losses().detach())
        if isinstance(weighting, weightings.DynamicWeightAverage) and step % 2:
            weighting.step()


# The protocol


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_weights_are_the_derivatives_of_the_total(name, dtype):
    weighting = WEIGHTINGS[name](3)
    train(weighting, Problem(3), 6)
    twin = copy.deepcopy(weighting)
    values = positive(3, seed=9, dtype=dtype).requires_grad_()
    total = weighting(values)
    assert total.shape == ()
    assert total.dtype == dtype
    (derivatives,) = torch.autograd.grad(total, values)
    assert weighting.weights.shape == (3,)
    assert not weighting.weights.requires_grad
    torch.testing.assert_close(derivatives, weighting.weights.to(dtype))
    assert len(set(weighting.weights.tolist())) == 3  # it has learned something
    one_by_one = [values[0], values[1].reshape(1), values[2].reshape(1, 1)]
    assert torch.equal(twin(one_by_one), total)


@every
@pytest.mark.parametrize("steps", [0, 5])
def test_a_checkpoint_resumes_with_the_same_bits(name, steps, tmp_path):
    weighting, problem = WEIGHTINGS[name](3), Problem(3)
    train(weighting, problem, steps)
    torch.save(weighting.state_dict(), tmp_path / "state.pt")
    theta = copy.deepcopy(problem.parameters)
    train(weighting, problem, 6)
    other, problem.parameters = WEIGHTINGS[name](3), theta
    train(other, Problem(3), 2)  # what it has seen before must not matter
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(other, problem, 6)
    for key, value in weighting.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@every
def test_losses_that_are_not_finite_leave_the_state(name):
    build = (lambda m: relobralo(m, expected_rho=0.0)) if name == "relobralo" else WEIGHTINGS[name]
    weighting, clean = build(3), build(3)
    for bad in (math.nan, math.inf, -math.inf):
        for each in (weighting, clean):
            train(each, Problem(3), 3)
        problem = Problem(3)
        losses = problem.losses() * torch.tensor([1.0, bad, 1.0])
        if hasattr(weighting, "update") and name != "famo":
            weighting.update(losses, problem.parameters)
        assert not weighting(losses).isfinite()
        if name == "famo":
            weighting.update(positive(3))  # after a call that cannot be compared with
            weighting(positive(3))
            weighting.update(losses.detach())
    for each in (weighting, clean):
        train(each, Problem(3), 3)
    for key, value in clean.state_dict().items():
        if name == "annealing":  # decides by loss: the others' ratios are known
            assert weighting.state_dict()[key].isfinite().all(), key
        elif key != "_extra_state":  # ρ was drawn all the same
            assert torch.equal(weighting.state_dict()[key], value), key


@every
def test_a_model_of_sixteen_bits_does_not_take_the_state_along(name):
    model = nn.ModuleList([WEIGHTINGS[name](3), nn.Linear(1, 1)]).to(torch.bfloat16)
    assert model[1].weight.dtype == torch.bfloat16
    train(model[0], Problem(3), 4)
    expected = WEIGHTINGS[name](3)
    train(expected, Problem(3), 4)
    if name != "uncertainty":  # whose parameters are the model's
        assert torch.equal(model[0].weights, expected.weights)


@every
def test_evaluation_leaves_the_state(name):
    weighting = WEIGHTINGS[name](3)
    train(weighting, Problem(3), 5)
    before = copy.deepcopy(weighting.state_dict())
    weighting.eval()
    with torch.no_grad():
        weighting(positive(3, seed=7))
    for key, value in before.items():
        if key != "weights" or name not in ("uncertainty", "famo", "geometric"):  # those of the call
            assert torch.equal(weighting.state_dict()[key], value), key


@every
def test_nothing_asks_a_tensor_for_its_value(name):
    """Tensors on the meta device have none, and an accelerator would have to be waited for."""
    weighting, problem = WEIGHTINGS[name](3).to("meta"), Problem(3)
    problem.parameters = [nn.Parameter(parameter.to("meta")) for parameter in problem.parameters]
    problem.targets, problem.scales = problem.targets.to("meta"), problem.scales.to("meta")
    train(weighting, problem, 3)
    assert weighting.weights.is_meta


@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if name != "relobralo"])
def test_a_call_is_one_graph(name):
    torch._dynamo.reset()
    eager, compiled = WEIGHTINGS[name](3), WEIGHTINGS[name](3)
    call = torch.compile(lambda losses: compiled(losses), backend="aot_eager", fullgraph=True)
    for step in range(3):
        ours, wanted = (positive(3, seed=step).requires_grad_() for _ in range(2))
        call(ours).backward()
        eager(wanted).backward()
        torch.testing.assert_close(ours.grad, wanted.grad)
    torch.testing.assert_close(compiled.weights, eager.weights)


@every
def test_a_single_loss(name):
    weighting, problem = WEIGHTINGS[name](1), Problem(1)
    weight = 1.0
    for _ in range(4):
        train(weighting, problem, 1)
        if name == "uncertainty":
            weight = 0.5 * math.exp(-weighting.log_variances.item())
        before = problem.losses()
        total = weighting(before)
        if name not in ("uncertainty", "famo"):
            torch.testing.assert_close(total, before[0])
        torch.testing.assert_close(weighting.weights.item(), weight)


@every
def test_several_calls_before_one_backward_pass(name):
    weighting, problem = WEIGHTINGS[name](3), Problem(3)
    train(weighting, problem, 4)
    totals, expected = [], []
    for factor in (1.0, 2.0, 5.0):
        losses = factor * problem.losses()
        totals.append(weighting(losses))
        by_hand = (weighting.weights.clone() * losses).sum()
        expected.append(torch.autograd.grad(by_hand, problem.parameters[0], retain_graph=True)[0])
    (gradient,) = torch.autograd.grad(sum(totals), problem.parameters[0])
    torch.testing.assert_close(gradient, sum(expected))


def test_names_stand_in_errors():
    weighting = weightings.FAMO(["pde", "boundary"])
    assert weighting.names == ("pde", "boundary")
    assert repr(weighting) == "FAMO(['pde', 'boundary'])"
    assert repr(weightings.FAMO(2)) == "FAMO(2)"
    with pytest.raises(ValueError, match=r"loss boundary must have one element, got shape \(2,\)"):
        weighting([torch.ones(()), torch.ones(2)])
    annealing = weightings.LearningRateAnnealing(["data", "pde"], reference="pde")
    assert annealing.reference == 1
    with pytest.raises(IndexError, match="loss must be one of 'data', 'pde', got 'residual'"):
        weightings.LearningRateAnnealing(["data", "pde"], reference="residual")


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (torch.ones(2), ValueError, r"losses must have shape \(3,\), got \(2,\)"),
        ([torch.ones(())] * 2, ValueError, "losses must hold 3 losses, 0, 1, 2, got 2"),
        (1.0, TypeError, "losses must be an .* tensor or a sequence of tensors, got float"),
        ([torch.ones(()), 2.0, torch.ones(())], TypeError, "loss 1 must be a floating-point tensor, got float"),
        (torch.ones(3, dtype=torch.int64), TypeError, "loss 0 must be a floating-point tensor, got torch.int64"),
        (torch.ones(3, device="meta"), ValueError, r"loss 0 is on meta but this weighting on cpu.*weighting.to"),
    ],
)
def test_losses_that_cannot_be(losses, error, message):
    with pytest.raises(error, match=message):
        weightings.GeometricMean(3)(losses)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: weightings.FAMO(0), ValueError, "num_losses must be at least 1, got 0"),
        (lambda: weightings.FAMO(True), TypeError, "num_losses must be an int or a list"),
        (lambda: weightings.FAMO("pde"), TypeError, "num_losses must be an int or a list"),
        (lambda: weightings.FAMO(["a", "a"]), ValueError, "num_losses must name each loss once, got 'a'"),
        (lambda: weightings.FAMO(["a", 1]), TypeError, r"num_losses\[1\] must be a str"),
        (lambda: weightings.FAMO(2, lower_bounds=[0.0]), ValueError, "lower_bounds must hold 2 numbers"),
        (lambda: weightings.FAMO(2, lower_bounds=[0.0, math.nan]), ValueError, r"lower_bounds\[1\] must be finite"),
        (lambda: weightings.FAMO(2, lr=-1), ValueError, "lr must be finite and at least 0, got -1"),
        (lambda: weightings.GradNorm(2, alpha=-1), ValueError, "alpha must be finite and at least 0"),
        (lambda: weightings.DynamicWeightAverage(2, 0.0), ValueError, "temperature must be finite and above 0"),
        (lambda: weightings.SoftAdapt(2, accuracy=9), ValueError, r"accuracy must lie in \[1, 8\], got 9"),
        (lambda: weightings.SoftAdapt(2, accuracy=1.5), TypeError, "accuracy must be an int"),
        (lambda: weightings.SoftAdapt(2, beta="1"), TypeError, "beta must be a number, got '1'"),
        (lambda: weightings.ReLoBRaLo(2, alpha=1.1), ValueError, r"alpha must lie in \[0, 1\], got 1.1"),
        (lambda: weightings.ReLoBRaLo(2, generator=3), TypeError, "generator must be a torch.Generator, got 3"),
        (lambda: weightings.LearningRateAnnealing(2, reference=2), IndexError, "loss must be 0 to 1, got 2"),
    ],
)
def test_arguments_that_cannot_be(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("build", [weightings.GradNorm, weightings.LearningRateAnnealing])
def test_updates_that_cannot_be(build):
    weighting, problem = build(["a", "b"]), Problem(2)
    with pytest.raises(ValueError, match="loss a does not require grad"):
        weighting.update(problem.losses().detach(), problem.parameters)
    with pytest.raises(ValueError, match="parameter"):
        weighting.update(problem.losses(), [parameter.detach() for parameter in problem.parameters])
    assert torch.equal(weighting.weights, torch.ones(2, dtype=torch.float64))


# Each against its oracle


def test_uncertainty_is_torchjds():
    ours, theirs = weightings.UncertaintyWeighting(3), torchjd.scalarization.UW(3)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.1) for each in (ours, theirs)]
    for step in range(20):
        losses = positive(3, seed=step, dtype=torch.float32)
        totals = [ours(losses), theirs(losses)]
        torch.testing.assert_close(*totals)
        for total, optimizer in zip(totals, optimizers, strict=True):
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    torch.testing.assert_close(ours.log_variances, theirs.log_var)


def test_uncertainty_of_a_loss_that_is_not_finite_is_left_alone():
    weighting = weightings.UncertaintyWeighting(3)
    weighting(torch.tensor([1.0, math.nan, 2.0])).backward()
    torch.testing.assert_close(weighting.log_variances.grad, torch.tensor([0.0, 0.0, -0.5]))


@given(st.lists(st.lists(st.floats(0.01, 100.0), min_size=3, max_size=3), min_size=8, max_size=12))
def test_dynamic_weight_average_is_torchjds(batches):
    ours, theirs = weightings.DynamicWeightAverage(3, 1.5), torchjd.scalarization.DWA(1.5)
    for i, values in enumerate(batches):
        losses = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(ours(losses), theirs(losses))
        if i % 3 != 1:  # epochs of two lengths
            ours.step()
            theirs.step()


def test_dynamic_weight_average_of_epochs_without_a_value():
    weighting = weightings.DynamicWeightAverage(2)
    weighting.step()
    weighting(torch.tensor([0.0, 1.0]))
    weighting.step()
    weighting(torch.tensor([math.nan, 1.0]))
    weighting.step()
    weighting(torch.tensor([4.0, 1.0]))
    weighting.step()
    assert weighting.epochs == 2
    torch.testing.assert_close(weighting.weights, torch.ones(2, dtype=torch.float64))  # 4/0 counts as 1/1


@pytest.mark.parametrize("bounds", [None, [-1.0, 0.05, 0.0]], ids=["", "bounds"])
def test_famo_is_torchjds(bounds):
    theirs_bounds = None if bounds is None else torch.tensor(bounds, dtype=torch.float64)
    ours = weightings.FAMO(3, bounds, lr=0.05, weight_decay=0.01)
    theirs = torchjd.scalarization.FAMO(3, theirs_bounds, lr=0.05, weight_decay=0.01).double()
    for step in range(25):
        before, after = positive(2, 3, seed=step)
        torch.testing.assert_close(ours(before), theirs(before))
        torch.testing.assert_close(ours.weights.sum().item(), 1.0)
        ours.update(after)
        theirs.update(after)
    torch.testing.assert_close(ours.logits, theirs._w.data)


def test_famo_before_its_first_call_has_nothing_to_compare():
    weighting = weightings.FAMO(2)
    weighting.update(torch.ones(2))
    assert weighting.updates == 0
    assert not weighting.logits.any()


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=6))
def test_geometric_mean_is_torchjds(values):
    losses = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(
        weightings.GeometricMean(len(values))(losses), torchjd.scalarization.GeometricMean()(losses)
    )


def test_geometric_mean_of_a_loss_that_is_zero_or_negative():
    weighting, losses = weightings.GeometricMean(2), torch.tensor([0.0, 4.0], requires_grad=True)
    total = weighting(losses)
    total.backward()
    assert total == 0.0
    assert torch.equal(losses.grad, torch.zeros(2))
    assert not weighting.weights.any()
    assert weighting(torch.tensor([0.0, -1.0])).isnan()


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def test_relobralo_is_the_papers():
    """Bischof & Kraus 2021, with the authors' first two calls."""
    alpha, temperature, expected = 0.8, 0.7, 0.6
    weighting = relobralo(3, alpha=alpha, temperature=temperature, expected_rho=expected)
    draws = torch.rand(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
    history = positive(40, 3, seed=5).numpy()
    lookbacks = 0
    for t, values in enumerate(history):
        weighting(torch.from_numpy(values))
        rho = float(draws[t] < expected)
        since_first = 3 * softmax(values / (temperature * history[0]))
        since_last = 3 * softmax(values / (temperature * history[t - 1]))
        if t == 0:
            wanted = np.ones(3)
        elif t == 1:
            wanted = since_last
        else:
            lookbacks += rho == 0.0
            wanted = alpha * (rho * wanted + (1 - rho) * since_first) + (1 - alpha) * since_last
        np.testing.assert_allclose(weighting.weights.numpy(), wanted, rtol=1e-12)
    assert 5 < lookbacks < 33


def test_relobralo_of_losses_that_begin_at_zero():
    weighting = relobralo(2)
    for values in ([0.0, 0.0], [0.0, 1.0], [2.0, 1.0]):
        weighting(torch.tensor(values))
        assert weighting.weights.isfinite().all()
        torch.testing.assert_close(weighting.weights.sum().item(), 2.0)


@pytest.mark.parametrize("accuracy", [1, 2, 5])
@pytest.mark.parametrize("loss_weighted", [False, True], ids=["", "loss-weighted"])
@pytest.mark.parametrize("normalized", [False, True], ids=["", "normalized"])
def test_softadapt_is_the_papers(normalized, loss_weighted, accuracy):
    """Heydari et al. 2019, section 3.1: the difference formula is the one that is exact for polynomials."""
    weighting = weightings.SoftAdapt(3, 0.4, normalized=normalized, loss_weighted=loss_weighted, accuracy=accuracy)
    history = positive(12, 3, seed=4).numpy()
    powers = np.arange(accuracy + 1)
    points = -powers.astype(float)
    difference = np.linalg.solve(points[None] ** powers[:, None], (powers == 1).astype(float))
    for t in range(12):
        weighting(torch.from_numpy(history[t]))
        if t < accuracy:
            np.testing.assert_allclose(weighting.weights.numpy(), 1 / 3)
            continue
        last = history[t - accuracy : t + 1][::-1]
        rates = difference @ last
        if normalized:
            rates = rates / np.abs(rates).sum()
        wanted = np.exp(0.4 * rates) * (last.mean(0) if loss_weighted else 1.0)
        np.testing.assert_allclose(weighting.weights.numpy(), wanted / wanted.sum(), rtol=1e-9)


def test_softadapt_of_losses_that_stand_still_at_zero():
    for options in ({}, {"normalized": True}, {"loss_weighted": True}):
        weighting = weightings.SoftAdapt(2, **options)
        for _ in range(3):
            weighting(torch.zeros(2))
        torch.testing.assert_close(weighting.weights, torch.full((2,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_learning_rate_annealing_is_the_papers(dtype):
    """Wang, Teng & Perdikaris 2021, algorithm 1."""
    weighting, problem, wanted = weightings.LearningRateAnnealing(4, reference=2, alpha=0.3), Problem(4), np.ones(4)
    exact = dtype == torch.float64
    for _ in range(5):
        sizes = np.abs(problem.gradients())
        ratios = sizes[2].max() / sizes.mean(1)
        wanted = np.where(np.arange(4) == 2, 1.0, 0.7 * wanted + 0.3 * ratios)
        narrow = Problem(4, dtype)
        for ours, theta in zip(narrow.parameters, problem.parameters, strict=True):
            ours.data.copy_(theta.data)
        weighting.update(narrow.losses(), iter(narrow.parameters))
        np.testing.assert_allclose(weighting.weights.numpy(), wanted, rtol=1e-12 if exact else 0.03)
        problem.parameters[0].data -= 0.05


def test_learning_rate_annealing_leaves_losses_without_a_gradient():
    weighting, problem = weightings.LearningRateAnnealing(3), Problem(2)
    losses = [*problem.losses(), problem.parameters[0].sum() * 0.0]
    weighting.update(losses, problem.parameters)
    assert weighting.weights[1] != 1.0
    assert weighting.weights[2] == 1.0
    assert all(parameter.grad is None for parameter in problem.parameters)


def test_gradnorm_is_the_papers():
    """Chen et al. 2018, algorithm 1, its gradient by a second backward pass and torch's Adam."""
    weighting, problem = weightings.GradNorm(4, alpha=0.7, lr=0.03), Problem(4)
    theirs = nn.Parameter(torch.ones(4, dtype=torch.float64))
    adam = torch.optim.Adam([theirs], lr=0.03)
    initial = problem.losses().detach()
    for _ in range(30):
        losses = problem.losses()
        weighting.update(losses, problem.parameters)
        norms = []
        for weight, loss in zip(theirs, losses, strict=True):
            parts = torch.autograd.grad(weight * loss, problem.parameters, create_graph=True)
            norms.append(torch.cat([part.flatten() for part in parts]).norm())
        norms, rates = torch.stack(norms), losses.detach() / initial
        target = (norms.mean() * (rates / rates.mean()) ** 0.7).detach()
        (theirs.grad,) = torch.autograd.grad((norms - target).abs().sum(), theirs, retain_graph=True)
        adam.step()
        theirs.data *= 4 / theirs.data.sum()
        torch.testing.assert_close(weighting.weights, theirs.data, rtol=1e-9, atol=1e-9)
        for parameter, gradient in zip(
            problem.parameters, torch.autograd.grad(weighting(losses), problem.parameters), strict=True
        ):
            parameter.data -= 0.02 * gradient
    assert weighting.weights.max() > 1.3


def test_gradnorm_never_turns_a_loss_around():
    weighting, theta = weightings.GradNorm(2, alpha=0.0, lr=5.0), nn.Parameter(torch.ones(3))
    for _ in range(4):
        weighting.update([1e3 * theta.sum(), theta.sum()], [theta])
        assert weighting.weights.isfinite().all()
        assert (weighting.weights >= 0).all()
        torch.testing.assert_close(weighting.weights.sum().item(), 2.0)


def test_gradnorm_leaves_out_what_it_cannot_balance():
    weighting, theta = weightings.GradNorm(2), nn.Parameter(torch.ones(1, dtype=torch.float64))
    weighting.update([theta.sum(), 2 * theta.sum()], [theta])
    before = copy.deepcopy(weighting.state_dict())
    infinite = (theta - 1).sqrt().sum()  # 0, of infinite slope
    weighting.update([infinite, theta.sum()], [theta])
    weighting.update([-theta.sum(), theta.sum()], [theta])  # a rate of -1 has no power 1.5
    for key, value in before.items():
        assert torch.equal(weighting.state_dict()[key], value), key


def test_complex_parameters_and_sparse_gradients_have_sizes():
    table, phase = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.tensor([3 + 4j]))
    losses = [table(torch.tensor([1, 1])).sum(), (phase * phase.conj()).real.sum() / 2]
    weighting = weightings.LearningRateAnnealing(2, alpha=1.0)
    weighting.update(losses, [table.weight, phase])
    torch.testing.assert_close(weighting.weights[1].item(), 2.0 / (5.0 / 11))


def test_the_package_shows_them():
    assert fc.weightings is weightings
    assert all(issubclass(getattr(weightings, name), weightings.Weighting) for name in weightings.__all__)


def test_totals_that_are_not_to_be_watched():
    """FAMO's rises while losses under 1 fall; that of UncertaintyWeighting falls while losses stay."""
    famo, uncertainty = weightings.FAMO(2), weightings.UncertaintyWeighting(2)
    optimizer = torch.optim.Adam(uncertainty.parameters(), lr=0.05)
    falling = [famo(torch.tensor([0.9, 0.5]) * 0.9**step).item() for step in range(12, 40)]
    assert falling == sorted(falling)
    staying = []
    for _ in range(40):
        total = uncertainty(torch.tensor([0.3, 0.1]))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        staying.append(total.item())
    assert staying == sorted(staying, reverse=True)
    assert staying[-1] < staying[0] - 0.5
