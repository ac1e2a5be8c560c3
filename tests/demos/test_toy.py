"""The toy problem: its losses, its Pareto set, its picture, and that every method gets there from its five starts."""

from __future__ import annotations

import math

import pytest
import torch

import fastconfig as fc
from fastconfig.demos import toy_figure
from fastconfig.demos.toy_problem import STARTS, losses, pareto_set, regret, trajectories

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = toy_figure.toy_methods()


def published(a: float, b: float) -> tuple[float, float]:
    """CAGrad's appendix, number by number."""
    f1 = math.log(max(abs(0.5 * (-a - 7) - math.tanh(-b)), 0.000005)) + 6
    f2 = math.log(max(abs(0.5 * (-a + 3) + math.tanh(-b) + 2), 0.000005)) + 6
    g1 = ((-a + 7) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20
    g2 = ((-a - 7) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20
    c1, c2 = max(math.tanh(0.5 * b), 0.0), max(math.tanh(-0.5 * b), 0.0)
    return f1 * c1 + g1 * c2, f2 * c1 + g2 * c2


def test_losses_are_the_published_ones():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(200, 2, generator=generator, dtype=torch.float64) * 22 - 11
    points = torch.cat((points, torch.tensor(STARTS, dtype=torch.float64), torch.tensor([[-7.0, 1e-9]]).double()))
    wanted = torch.tensor([published(*point) for point in points.tolist()], dtype=torch.float64)
    torch.testing.assert_close(losses(points), wanted, rtol=1e-12, atol=1e-12)


def test_gradients_are_opposed_on_the_pareto_set():
    """So that no direction makes both losses fall: g₁/|g₁| = -g₂/|g₂|, or one of them is zero, at the ends."""
    points = pareto_set(31).requires_grad_()
    first, second = (torch.autograd.grad(total, points, retain_graph=True)[0] for total in losses(points).sum(dim=0))
    share = ((points.detach()[:, :1] + 7.0) / 14.0).clamp(0.0, 1.0)
    torch.testing.assert_close(share * first, -(1.0 - share) * second, rtol=0.0, atol=1e-8)


def test_nothing_is_better_than_the_pareto_set_in_both_losses():
    axis = torch.linspace(-11.0, 11.0, 221, dtype=torch.float64)
    everywhere = regret(torch.cartesian_prod(axis, axis))
    assert everywhere.min() > -0.05
    assert regret(pareto_set(401)).abs().max() < 1e-12
    assert regret(torch.tensor(STARTS)).min() > 5


def test_starts_trained_side_by_side_do_not_see_each_other():
    together = trajectories(fc.ConFIG, steps=100)
    assert together.shape == (5, 101, 2)
    assert torch.equal(together[:, 0], torch.tensor(STARTS, dtype=torch.float64))
    for i, start in enumerate(STARTS):
        torch.testing.assert_close(trajectories(fc.ConFIG, [start], steps=100)[0], together[i], rtol=1e-9, atol=1e-9)


def test_a_step_is_adam_s_on_the_combined_gradient():
    point = torch.tensor([[-8.5, 7.5]], dtype=torch.float64, requires_grad=True)
    grads = torch.cat([torch.autograd.grad(total, point, retain_graph=True)[0] for total in losses(point)[0]])
    step = -0.25 * fc.combine(grads, fc.PCGrad()).sign()  # Adam's first step has this length, whatever the gradient's
    path = trajectories(fc.PCGrad, [(-8.5, 7.5)], steps=1, lr=0.25)
    torch.testing.assert_close(path[0, 1], point.detach()[0] + step, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_reaches_the_pareto_set_from_its_five_starts(name):
    torch.manual_seed(0)
    ends = trajectories(METHODS[name])[:, -1]
    assert regret(ends).max() < 0.1, ends


def test_the_picture_has_a_panel_for_every_method(tmp_path):
    paths = {name: trajectories(METHODS[name], steps=2) for name in ("ConFIG", "GradDrop")}
    toy_figure.save_figure(paths, tmp_path / "toy.png")
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["toy.png"]
    with pytest.raises(FileNotFoundError):
        toy_figure.save_figure(paths, tmp_path / "missing" / "toy.png")
