"""The demo's problem: a network u(x, t) that is to satisfy Burgers' equation, its boundary and its initial condition.

The test problem of the ConFIG paper (arXiv 2408.11104, section 4.1): three losses whose gradients disagree.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastconfig.demos.burgers_exact import VISCOSITY, exact_solution

LOSS_NAMES = ("residual", "boundary", "initial")

_HIDDEN_LAYERS, _WIDTH = 5, 50
_POINTS = (256, 64, 64)
"""Points a step of each loss, drawn anew in every step."""

_GRID_X, _GRID_T = 257, 51


class Jet(NamedTuple):
    """The network's value and the derivatives that the equation needs, each (N,)."""

    u: Tensor
    u_x: Tensor
    u_t: Tensor
    u_xx: Tensor


class BurgersNetwork(nn.Module):
    """(x, t) -> u: five hidden layers of 50 tanh units, Xavier's initial weights.

    Args:
        seed: of the initial weights; the same on every device.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [2] + [_WIDTH] * _HIDDEN_LAYERS + [1]
        self._linears: list[nn.Linear] = []
        for inputs, outputs in pairwise(sizes):
            layer = nn.Linear(inputs, outputs)
            nn.init.xavier_normal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
            self._linears.append(layer)
        self.layers = nn.ModuleList(self._linears)

    def forward(self, points: Tensor) -> Tensor:
        """The network's u at ``points`` (N, 2), columns x and t: (N,)."""
        *hidden, last = self._linears
        values = points
        for layer in hidden:
            values = torch.tanh(layer(values))
        result: Tensor = last(values).squeeze(-1)
        return result

    def jet(self, points: Tensor) -> Jet:
        """u, u_x, u_t and u_xx at ``points`` (N, 2), carried forward through the layers by the chain rule.

        The same numbers as nested ``torch.autograd.grad``, 10 to 15 % faster with the backward pass that follows.
        """
        first, *others = self._linears
        z, z_x, z_t = first(points), first.weight[:, 0], first.weight[:, 1]
        z_xx = torch.zeros_like(z)
        for layer in others:
            a = torch.tanh(z)
            slope = 1.0 - a * a  # tanh' ; tanh'' = -2·a·slope
            stacked = torch.cat([a, slope * z_x, slope * z_t, slope * (z_xx - 2.0 * a * z_x * z_x)])
            z, z_x, z_t, z_xx = (stacked @ layer.weight.t()).view(4, len(points), -1).unbind(0)
            z = z + layer.bias
        return Jet(z.squeeze(-1), z_x.squeeze(-1), z_t.squeeze(-1), z_xx.squeeze(-1))


class Problem:
    """The three losses at points drawn anew on each call, from a stream of its own for each loss.

    So two methods see the same points in their k-th evaluation of a loss, however differently they order the losses.

    Args:
        seed: of the streams; the same points on every device.
        device: where the losses are computed.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._generators = [torch.Generator().manual_seed(seed + i) for i in range(len(LOSS_NAMES))]

    def loss(self, network: BurgersNetwork, index: int) -> Tensor:
        """Loss ``index`` in the order of ``LOSS_NAMES``, a mean of squares."""
        points = torch.rand(_POINTS[index], 2, generator=self._generators[index])
        points[:, 0].mul_(2.0).sub_(1.0)
        if index == 1:
            points[:, 0].sign_()  # each point to the nearer end, x = -1 or 1
        elif index == 2:
            points[:, 1] = 0.0
        points = points.to(self._device)
        if index == 0:
            u, u_x, u_t, u_xx = network.jet(points)
            excess = u_t + u * u_x - VISCOSITY * u_xx
        elif index == 1:
            excess = network(points)
        else:
            excess = network(points) + torch.sin(math.pi * points[:, 0])
        return excess.square().mean()


class ExactGrid:
    """The exact solution on a grid of x in [-1, 1] by t in [0, 1], to measure a network against.

    Attributes:
        x: (257,). t: (51,). exact: (51, 257), one row a time.
    """

    def __init__(self, device: torch.device) -> None:
        self.x = np.linspace(-1.0, 1.0, _GRID_X)
        self.t = np.linspace(0.0, 1.0, _GRID_T)
        t, x = np.meshgrid(self.t, self.x, indexing="ij")
        self.exact = exact_solution(x, t)
        self._points = torch.tensor(np.stack([x.ravel(), t.ravel()], axis=1), dtype=torch.float32, device=device)

    @torch.no_grad()
    def predict(self, network: BurgersNetwork) -> NDArray[np.float64]:
        """The network's u on the grid, (51, 257)."""
        values: Tensor = network(self._points).reshape(self.exact.shape)
        return values.double().cpu().numpy()

    def error(self, prediction: NDArray[np.float64]) -> float:
        """Mean squared error of a prediction (51, 257)."""
        return float(np.mean((prediction - self.exact) ** 2))
