"""What is timed of a whole training step: forward, backward passes, combination, optimizer; contender by contender."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchjd.aggregation as jd
import torchjd.autojac as autojac
from conflictfree.grad_operator import ConFIG_update
from conflictfree.momentum_operator import PseudoMomentumOperator
from conflictfree.utils import get_gradient_vector
from torch import Tensor, nn

import fastconfig as fc
from fastconfig.demos.burgers_problem import BurgersNetwork, Problem

RATE = 1e-4
BATCH = 128

Losses = Callable[[], list[Tensor]]
Loss = Callable[[int], Tensor]


@dataclass(frozen=True)
class Model:
    """A network and its losses.

    Attributes:
        name: in tables.
        m: losses.
        threads: of torch, while it is measured; None for all.
        make: a new network, and from it: all losses of a batch, with the graph they share; or one alone.
    """

    name: str
    m: int
    threads: int | None
    make: Callable[[], tuple[nn.Module, Losses, Loss]]


def burgers() -> tuple[nn.Module, Losses, Loss]:
    """The network of the demo, 12 tensors, each loss at points of its own."""
    network, problem = BurgersNetwork(seed=0), Problem(seed=0, device=torch.device("cpu"))
    return network, lambda: [problem.loss(network, i) for i in range(3)], lambda i: problem.loss(network, i)


def perceptron() -> tuple[nn.Module, Losses, Loss]:
    """About 4e6 parameters in four layers; the losses are of parts of its output."""
    torch.manual_seed(0)
    network = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(1000, 1000), nn.Tanh())])
    x = torch.randn(BATCH, 1000)

    def losses() -> list[Tensor]:
        parts = network(x).chunk(3, dim=1)
        return [(part - i).square().mean() for i, part in enumerate(parts)]

    return network, losses, lambda i: losses()[i]


class Heads(nn.Module):
    """40 heads on a trunk of 5.6e5 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
        self.heads = nn.ModuleList(nn.Linear(512, 1) for _ in range(40))

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x).relu()
        return [head(z) for head in self.heads]


def heads() -> tuple[nn.Module, Losses, Loss]:
    """Losses of one trunk with a head each."""
    torch.manual_seed(0)
    network, x = Heads(), torch.randn(BATCH, 64)

    def losses() -> list[Tensor]:
        return [(out - i).square().mean() for i, out in enumerate(network(x))]

    return network, losses, lambda i: (network.heads[i](network.trunk(x).relu()) - i).square().mean()


MODELS = [Model("Burgers", 3, 1, burgers), Model("MLP", 3, None, perceptron), Model("40 heads", 40, None, heads)]

Step = Callable[[], dict[str, float]]
"""One step, and of parts of it how many seconds they took, the forward pass left out."""


def _elapsed(start: float) -> float:
    return time.perf_counter() - start


def backward_passes(model: Model) -> Step:
    """The m backward passes alone, which every method of gradients must do; nothing is done with the gradients."""
    network, losses, _ = model.make()
    parameters = list(network.parameters())

    def step() -> dict[str, float]:
        values = losses()
        start = time.perf_counter()
        for i, loss in enumerate(values):
            loss.backward(retain_graph=i < model.m - 1)
            for parameter in parameters:
                parameter.grad = None
        return {"backward": _elapsed(start)}

    return step


def one_backward_pass(model: Model) -> Step:
    """The backward pass of one loss, in turn."""
    network, _, loss = model.make()
    parameters, turn = list(network.parameters()), [0]

    def step() -> dict[str, float]:
        value = loss(turn[0])
        turn[0] = (turn[0] + 1) % model.m
        start = time.perf_counter()
        value.backward()
        for parameter in parameters:
            parameter.grad = None
        return {"backward": _elapsed(start)}

    return step


def adam(model: Model) -> Step:
    """Adam on the summed loss: one backward pass, no method."""
    network, losses, _ = model.make()
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        torch.stack(losses()).sum().backward()
        optimizer.step()
        return {}

    return step


def fastconfig_buffer(model: Model) -> Step:
    """A buffer over all parameters, ConFIG, Adam."""
    network, losses, _ = model.make()
    buffer = fc.GradientBuffer(network, model.m)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        values = losses()
        start = time.perf_counter()
        buffer.backward(values)
        buffer.combine()
        seconds = _elapsed(start)
        optimizer.step()
        return {"backward": seconds}

    return step


def fastconfig_mconfig(model: Model) -> Step:
    """M-ConFIG, one loss a step."""
    network, _, loss = model.make()
    optimizer = fc.optim.MConFIG(network, lr=RATE, num_losses=model.m)

    def step() -> dict[str, float]:
        i = int(optimizer.next_loss())
        value = loss(i)
        start = time.perf_counter()
        with optimizer.record(i):
            value.backward()
        recorded = time.perf_counter()
        optimizer.step()
        return {"backward": _elapsed(start), "step": _elapsed(recorded)}

    return step


def conflictfree_config(model: Model) -> Step:
    """conflictfree as its documentation has it: a gradient vector a loss, ``ConFIG_update``, Adam."""
    network, losses, _ = model.make()
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)

    def step() -> dict[str, float]:
        values, grads = losses(), []
        for i, loss in enumerate(values):
            optimizer.zero_grad()
            loss.backward(retain_graph=i < model.m - 1)
            grads.append(get_gradient_vector(network, none_grad_mode="zero"))
        update = ConFIG_update(grads)
        position = 0
        for parameter in network.parameters():  # its apply_gradient_vector leaves out a head that the last loss misses
            parameter.grad = update[position : position + parameter.numel()].view_as(parameter)
            position += parameter.numel()
        optimizer.step()
        return {}

    return step


def conflictfree_momentum(model: Model) -> Step:
    """conflictfree's M-ConFIG, one loss a step, and SGD, as its update is Adam's already."""
    network, _, loss = model.make()
    optimizer, operator = torch.optim.SGD(network.parameters(), lr=RATE), PseudoMomentumOperator(model.m)
    turn = [0]

    def step() -> dict[str, float]:
        i, turn[0] = turn[0], (turn[0] + 1) % model.m
        optimizer.zero_grad()
        loss(i).backward()
        operator.update_gradient(network, i, get_gradient_vector(network, none_grad_mode="zero"))
        optimizer.step()
        return {}

    return step


def torchjd_config(model: Model) -> Step:
    """torchjd as its documentation has it: the Jacobian in one batched pass, its ConFIG, Adam."""
    network, losses, _ = model.make()
    optimizer, aggregator = torch.optim.Adam(network.parameters(), lr=RATE), jd.ConFIG()
    shared = list(network.trunk.parameters() if isinstance(network, Heads) else network.parameters())

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        if isinstance(network, Heads):  # mtl_backward: the heads have gradients, the trunk a Jacobian
            z = network.trunk(network_input).relu()
            values = [(head(z) - i).square().mean() for i, head in enumerate(network.heads)]
            autojac.mtl_backward(values, features=z)
        else:
            autojac.backward(losses())
        autojac.jac_to_grad(shared, aggregator)
        optimizer.step()
        return {}

    torch.manual_seed(1)
    network_input = torch.randn(BATCH, 64)
    return step


CONTENDERS: dict[str, Callable[[Model], Step]] = {
    "m backward passes": backward_passes,
    "fastconfig, buffer": fastconfig_buffer,
    "torchjd": torchjd_config,
    "conflictfree": conflictfree_config,
    "Adam, summed loss": adam,
    "fastconfig, M-ConFIG": fastconfig_mconfig,
    "conflictfree, M-ConFIG": conflictfree_momentum,
}

YARDSTICKS = {"fastconfig, buffer": backward_passes, "fastconfig, M-ConFIG": one_backward_pass}
"""What a contender's backward passes and bookkeeping are compared with, in turns."""
