"""The Burgers demo: the exact solution, the network's derivatives, the losses, the three trainers, the picture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import fastconfig as fc
from fastconfig.demos import burgers
from fastconfig.demos.burgers_exact import VISCOSITY, exact_solution
from fastconfig.demos.burgers_problem import BurgersNetwork, ExactGrid, Jet, Problem
from fastconfig.methods.catalogue import CATALOGUE

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(kind, steps, seed=0):
    return kind(seed, CPU, burgers.Budget(None, steps))


def trio(steps, seed=0, method="config"):
    return burgers.trainers(seed, CPU, burgers.Budget(None, steps), method)


def weights(trained):
    return torch.nn.utils.parameters_to_vector(trained.network.parameters()).detach()


def never():
    return False


def test_exact_solution_starts_as_the_sine():
    x = np.linspace(-1, 1, 41)
    assert_allclose(exact_solution(x, 0.0), -np.sin(np.pi * x), atol=1e-14)


def test_exact_solution_is_odd_and_zero_at_the_boundary():
    x, t = np.linspace(0, 1, 57), np.linspace(0, 1, 9)[:, np.newaxis]
    assert_allclose(exact_solution(-x, t), -exact_solution(x, t), atol=1e-13)
    assert_allclose(exact_solution([-1.0, 0.0, 1.0], t), 0.0, atol=1e-13)


def test_exact_solution_has_the_published_steepest_slope():
    """Basdevant et al. 1986: |u_x| at x = 0 is at most 152.00516, at πt = 1.6037."""
    h = 1e-4
    t = np.linspace(1.59, 1.62, 301) / np.pi
    slope = (
        8 * (exact_solution(h, t) - exact_solution(-h, t)) - exact_solution(2 * h, t) + exact_solution(-2 * h, t)
    ) / (12 * h)
    assert slope.min() == pytest.approx(-152.00516, abs=1e-4)
    assert np.pi * t[slope.argmin()] == pytest.approx(1.6037, abs=1e-3)


def test_exact_solution_satisfies_the_equation():
    rng = np.random.default_rng(0)
    x, t = rng.uniform(-1, 1, 500), rng.uniform(0.02, 0.98, 500)
    x[:100] *= 0.02  # a fifth of the points in the steep front
    h = 2e-4
    u = exact_solution(x, t)
    x_sides = [exact_solution(x + k * h, t) for k in (-2, -1, 1, 2)]
    t_sides = [exact_solution(x, t + k * h) for k in (-2, -1, 1, 2)]
    u_x, u_t = ((s[0] - 8 * s[1] + 8 * s[2] - s[3]) / (12 * h) for s in (x_sides, t_sides))
    u_xx = (-x_sides[0] + 16 * x_sides[1] - 30 * u + 16 * x_sides[2] - x_sides[3]) / (12 * h * h)
    scale = 1.0 + np.abs(u_t) + np.abs(u * u_x) + VISCOSITY * np.abs(u_xx)
    assert_allclose((u_t + u * u_x - VISCOSITY * u_xx) / scale, 0.0, atol=1e-5)


@pytest.mark.parametrize(("x", "t"), [(0.003, 0.3), (-0.01, 0.6), (0.4, 1.0), (1e-4, 1.0), (0.9, 0.05)])
def test_exact_solution_equals_the_integrals_by_the_trapezoidal_rule(x, t):
    eta = np.linspace(-4, 4, 40001)
    exponent = -np.cos(np.pi * (x - eta)) / (2 * np.pi * VISCOSITY) - eta**2 / (4 * VISCOSITY * t)
    kernel = np.exp(exponent - exponent.max())
    expected = -(np.sin(np.pi * (x - eta)) * kernel).sum() / kernel.sum()
    assert exact_solution(x, t) == pytest.approx(expected, abs=1e-12)


def test_jet_equals_autograd():
    network = BurgersNetwork(seed=3).double()
    for parameter in network.parameters():  # biases are zero at first
        torch.nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(parameter.numel()))
    points = torch.rand(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    u = network(points)
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), points)
    jet = network.jet(points.detach())
    for name, expected in (("u", u), ("u_x", first[:, 0]), ("u_t", first[:, 1]), ("u_xx", second[:, 0])):
        torch.testing.assert_close(getattr(jet, name), expected, rtol=1e-11, atol=1e-12)


class Solution(torch.nn.Module):
    """x/(1+t) solves the equation (u_xx = 0); as a value, -sin(πx) meets both conditions."""

    def forward(self, points):
        assert points.shape[1] == 2
        return -torch.sin(math.pi * points[:, 0])

    def jet(self, points):
        x, t = points.unbind(1)
        assert -1 <= x.min() < -0.9
        assert 0.9 < x.max() <= 1
        assert 0 <= t.min() < 0.1 < 0.9 < t.max() <= 1
        return Jet(x / (1 + t), 1 / (1 + t), -x / (1 + t) ** 2, torch.zeros_like(x))


def test_losses_are_zero_for_a_solution_and_not_for_a_shifted_one(monkeypatch):
    for index in range(3):
        assert Problem(0, CPU).loss(Solution(), index).item() < 1e-12
    solution, jet = Solution.forward, Solution.jet
    monkeypatch.setattr(Solution, "forward", lambda self, points: solution(self, points) + 0.5)
    monkeypatch.setattr(
        Solution, "jet", lambda self, points: jet(self, points)._replace(u_t=jet(self, points).u_t + 0.5)
    )
    for index, loss_of_half in ((1, 0.25), (2, 0.25)):
        assert Problem(0, CPU).loss(Solution(), index).item() == pytest.approx(loss_of_half, rel=1e-5)
    jet_once = Problem(0, CPU).loss(Solution(), 0).item()
    assert jet_once == pytest.approx(0.25, rel=1e-5)


def test_points_of_a_loss_do_not_depend_on_the_order_of_the_losses():
    network = BurgersNetwork(0)
    together, in_turn = Problem(5, CPU), Problem(5, CPU)
    first = [[together.loss(network, i).item() for i in range(3)] for _ in range(2)]
    second = [[in_turn.loss(network, i).item() for _ in range(2)] for i in (2, 0, 1)]
    assert [row[2] for row in first] == second[0]
    assert [row[0] for row in first] == second[1]
    assert first[0] != first[1]


def test_learning_rate_rises_then_falls():
    rates = [burgers.learning_rate(share) for share in np.linspace(0, 1, 201)]
    peak = int(np.argmax(rates))
    assert 0 < rates[0] < rates[peak]
    assert 0 < peak < 20
    assert all(a >= b for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))
    assert rates[-1] == pytest.approx(1e-5)


def test_budget_ends_with_whichever_limit_comes_first():
    both = burgers.Budget(seconds=10.0, steps=100)
    assert both.share(5.0, 20) == 0.5
    assert both.share(1.0, 100) == 1.0
    assert burgers.Budget(None, 4).share(1e9, 1) == 0.25


def test_training_is_reproducible_and_starts_from_the_same_weights():
    def run(seed):
        trainers = trio(steps=9, seed=seed)
        starts = [weights(t) for t in trainers]
        burgers.train(trainers, ExactGrid(CPU), never, lambda: None)
        return starts, [weights(t) for t in trainers], trainers

    starts, ends, trainers = run(4)
    _, same, _ = run(4)
    _, other, _ = run(5)
    assert all(torch.equal(start, starts[0]) for start in starts)
    for end, again, different, trained in zip(ends, same, other, trainers, strict=True):
        assert torch.equal(end, again)
        assert not torch.equal(end, different)
        assert trained.steps == 9
        assert np.isfinite(trained.losses).all()
        assert trained.share == 1.0
    for trained in trainers:
        assert 0 < trained.backward_seconds < trained.seconds


def test_training_lowers_the_error_of_every_method():
    trainers = trio(steps=80)
    burgers.train(trainers, ExactGrid(CPU), never, lambda: None)
    for trained in trainers:
        errors = trained.history.errors
        assert errors[-1] < 0.8 * errors[0], trained.name
        assert trained.history.seconds == sorted(trained.history.seconds)
        assert len(trained.history.losses) == len(errors)
    cosines = np.array(trainers[1].history.cosines)
    assert cosines.shape == (8, 3)
    assert (np.abs(cosines) <= 1).all()


def test_a_config_step_is_adam_on_the_combined_gradient():
    trained = trainer(burgers.MethodTrainer, steps=2)
    by_hand = BurgersNetwork(0)
    parameters = list(by_hand.parameters())
    problem = Problem(0, CPU)
    rows = [
        torch.nn.utils.parameters_to_vector(
            torch.autograd.grad(problem.loss(by_hand, i), parameters, allow_unused=True)
        )
        for i in range(3)
    ]
    combined = fc.combine(torch.stack(rows))
    for parameter, part in zip(parameters, combined.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    torch.optim.Adam(parameters, lr=burgers.learning_rate(0.0)).step()
    trained.train_until(0.5, never)
    assert trained.steps == 1
    torch.testing.assert_close(weights(trained), torch.nn.utils.parameters_to_vector(parameters).detach())


def test_m_config_moves_once_every_loss_has_had_its_turn():
    trained = trainer(burgers.MConFIGTrainer, steps=4)
    start = weights(trained)
    trained.train_until(0.5, never)
    assert torch.equal(weights(trained), start)
    assert math.isnan(trained.losses[2])
    trained.train_until(0.75, never)
    assert not torch.equal(weights(trained), start)
    assert np.isfinite(trained.losses).all()


def test_training_stops_when_asked_and_restores_the_threads():
    torch.set_num_threads(2)
    trainers = trio(steps=10**6)
    asked = iter([False] * 5)
    burgers.train(trainers, ExactGrid(CPU), lambda: next(asked, True), lambda: None)
    assert [trained.steps for trained in trainers] == [5, 0, 0]
    assert len(trainers[0].history.errors) == 2
    assert torch.get_num_threads() == 2


def test_picture_of_what_there_is(tmp_path):
    """A network that diverged, one in the middle of its work, one that has not begun."""
    figure = pytest.importorskip("fastconfig.demos.burgers_figure")
    grid = ExactGrid(CPU)
    trainers = trio(steps=21)
    for trained in trainers[:2]:
        trained.evaluate(grid)
        trained.train_until(0.5, never)
    with torch.no_grad():
        next(trainers[0].network.parameters()).fill_(math.nan)
    for trained in trainers:
        trained.evaluate(grid)
    path = tmp_path / "picture.png"
    figure.save_figure(trainers, grid, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    figure = pytest.importorskip("fastconfig.demos.burgers_figure")
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def half_written(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure.Figure, "savefig", half_written)
    with pytest.raises(OSError, match="disk full"):
        figure.save_figure(trio(steps=1), ExactGrid(CPU), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("method", sorted(CATALOGUE))
def test_every_method_trains(method):
    trained = trio(steps=4, method=method)[1]
    before = weights(trained)
    trained.train_until(1.0, never)
    assert trained.steps == 4
    assert torch.isfinite(weights(trained)).all()
    assert not torch.equal(weights(trained), before)
    assert trained.name.lower() == method
