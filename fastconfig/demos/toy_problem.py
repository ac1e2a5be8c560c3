"""The two-loss toy problem of CAGrad's paper: two parameters, a valley with kinks, and a known Pareto front.

Liu et al. 2021 (arXiv 2110.14048), section 5.1 and appendix; the five starts are those of Nash-MTL (Navon et al. 2022,
arXiv 2202.01017), of which two are CAGrad's. Both papers train by Adam with lr 1e-3, for 100,000 and 35,000 steps; here
it is lr 0.1 for 2,000, which may go as far (200 against 35 to 100, in lr times steps) and takes seconds instead of
minutes; with less, CAGrad and GradVac are still in the valley. Nash-MTL also scales the first loss by 0.1; here neither
is scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from fastconfig.gradients.buffer import GradientBuffer
from fastconfig.methods import Method, StreamingMethod

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
"""Where training begins, (θ₁, θ₂)."""

STEPS = 2000
LEARNING_RATE = 0.1

_LEAST = 5e-6
"""Under the logarithms."""


def losses(theta: Tensor) -> Tensor:
    """L₁ and L₂ of parameters (..., 2), as (..., 2).

    Above θ₂ = 0 they are logarithms with steep kinks, below it quadratic bowls about θ₁ = 7 and -7; tanh(±θ₂/2) leads
    over from the one to the other.
    """
    x, y = theta.unbind(-1)
    above, below = (0.5 * y).tanh().clamp(min=0.0), (-0.5 * y).tanh().clamp(min=0.0)
    bend = (-y).tanh()
    kinks = torch.stack((0.5 * (-x - 7.0) - bend, 0.5 * (-x + 3.0) + bend + 2.0), dim=-1)
    logarithms = kinks.abs().clamp(min=_LEAST).log() + 6.0
    across = torch.stack((x - 7.0, x + 7.0), dim=-1).square()
    bowls = (across + 0.1 * (y + 8.0).square().unsqueeze(-1)) / 10.0 - 20.0
    return logarithms * above.unsqueeze(-1) + bowls * below.unsqueeze(-1)


def pareto_set(count: int = 401) -> Tensor:
    """Parameters (count, 2) float64 at which neither loss can fall without the other's rising, θ₁ from -7 to 7.

    In the bowls w L₁ + (1 - w) L₂ is least at θ₁ = 7 (2w - 1), whatever θ₂ is, where the squares across average to
    49 - θ₁². What is left is ((49 - θ₁²) / 10 + (θ₂ + 8)² / 100 - 20) tanh(-θ₂/2), whose derivative Newton's method
    sets to zero, from θ₂ = -8 on.
    """
    x = torch.linspace(-7.0, 7.0, count, dtype=torch.float64)
    y = torch.full_like(x, -8.0)
    for _ in range(20):
        tanh = (-0.5 * y).tanh()
        value, slope = (49.0 - x.square()) / 10.0 + (y + 8.0).square() / 100.0 - 20.0, (y + 8.0) / 50.0
        tanh_slope = -0.5 * (1.0 - tanh.square())
        tanh_bend = tanh * tanh_slope
        first = slope * tanh + value * tanh_slope
        second = tanh / 50.0 + 2.0 * slope * tanh_slope + value * tanh_bend
        y = y - first / second
    return torch.stack((x, y), dim=-1)


def regret(theta: Tensor) -> Tensor:
    """How much both losses of parameters (..., 2) can still fall together, (...) float64: 0 on the Pareto front.

    The greatest t by which some point of the front is better in both; down to -0.05 between the points standing for it.
    """
    front = losses(pareto_set())
    return (losses(theta.to(torch.float64)).unsqueeze(-2) - front).amin(dim=-1).amax(dim=-1)


def trajectories(
    make: Callable[[], Method | StreamingMethod],
    starts: Sequence[tuple[float, float]] = STARTS,
    steps: int = STEPS,
    lr: float = LEARNING_RATE,
) -> Tensor:
    """Train from every start, each with a method and a buffer of its own, side by side; Adam takes the steps.

    Args:
        make: a new method, called once a start.
        starts: where to begin.
        steps: how many steps from each.
        lr: Adam's learning rate.

    Returns:
        (starts, steps + 1, 2) float64: the parameters before every step, and at the end.
    """
    parameters = [torch.tensor(start, dtype=torch.float64, requires_grad=True) for start in starts]
    buffers = [GradientBuffer([parameter], num_losses=2) for parameter in parameters]
    methods = [make() for _ in starts]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    path = torch.empty(steps + 1, len(starts), 2, dtype=torch.float64)
    for step in range(steps):
        together = torch.stack(parameters)
        path[step] = together.detach()
        # The starts share nothing, so that a sum over them gives each its own gradient, at the price of one.
        totals = losses(together).sum(dim=0)
        for i, total in enumerate(totals):
            with ExitStack() as recording:
                for buffer in buffers:
                    recording.enter_context(buffer.record(i))
                total.backward(retain_graph=i == 0)
        for buffer, method in zip(buffers, methods, strict=True):
            buffer.combine(method)
        optimizer.step()
    path[steps] = torch.stack(parameters).detach()
    return path.transpose(0, 1)
