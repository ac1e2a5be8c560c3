"""What is timed of M-ConFIG: one optimizer step after one loss was backpropagated, and the floor below all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from conflictfree.momentum_operator import PseudoMomentumOperator as UpstreamOperator
from torch import Tensor, nn

import fastconfig as fc
from fastconfig.conflictfree.momentum_operator import PseudoMomentumOperator

RATE = 1e-4


@dataclass(frozen=True)
class StepShape:
    """m losses and n float32 parameters."""

    m: int
    n: int

    @property
    def name(self) -> str:
        return f"{self.m}-{self.n}-float32"

    def network(self) -> nn.Module:
        """Parameters as of a network: tensors of halving sizes, none a multiple of a vector, small ones in between."""
        network, left = nn.Module(), self.n
        sizes = []
        while left > 100:
            sizes += [left // 2 + 1, min(51, left - left // 2 - 1)]
            left -= sum(sizes[-2:])
        network.weights = nn.ParameterList(torch.randn(size) / size**0.5 for size in [*sizes, left] if size)
        return network


STEP_SHAPES = [StepShape(3, 10_401), StepShape(3, 1_000_000), StepShape(3, 4_000_000), StepShape(40, 250_000)]


@dataclass(frozen=True)
class Contender:
    """A step in two parts: what happens before it, off the clock, and the step."""

    before: Callable[[int], None]
    step: Callable[[int], None]


def backpropagate(network: nn.Module, targets: list[Tensor], loss: int) -> None:
    """A gradient for every parameter that depends on the parameters, so that training goes on."""
    parameters = list(network.parameters())
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    (flat * targets[loss]).sum().backward()


def targets_of(shape: StepShape) -> list[Tensor]:
    generator = torch.Generator().manual_seed(shape.m)
    return [torch.randn(shape.n, generator=generator) for _ in range(shape.m)]


def mconfig(shape: StepShape) -> Contender:
    """fc.optim.MConFIG: everything from the recorded gradient to the new parameters."""
    network, targets = shape.network(), targets_of(shape)
    optimizer = fc.optim.MConFIG(network.parameters(), lr=RATE, num_losses=shape.m)

    def before(loss: int) -> None:
        with optimizer.record(loss):
            backpropagate(network, targets, loss)

    return Contender(before, lambda loss: optimizer.step())


def by_operator(operator_type: type) -> Callable[[StepShape], Contender]:
    """A conflictfree operator followed by SGD, the gradient given as the one vector that it wants."""

    def contender(shape: StepShape) -> Contender:
        network, targets = shape.network(), targets_of(shape)
        operator = operator_type(shape.m)
        optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
        vector: list[Tensor] = []

        def before(loss: int) -> None:
            optimizer.zero_grad()
            backpropagate(network, targets, loss)
            vector[:] = [torch.cat([parameter.grad.flatten() for parameter in network.parameters()])]

        def step(loss: int) -> None:
            operator.update_gradient(network, loss, vector[0])
            optimizer.step()

        return Contender(before, step)

    return contender


def adam(shape: StepShape) -> Contender:
    """torch's fused Adam on one loss, for scale: it knows nothing of the other losses and moves 7n elements."""
    network, targets = shape.network(), targets_of(shape)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE, fused=True)

    def before(loss: int) -> None:
        optimizer.zero_grad()
        backpropagate(network, targets, loss)

    return Contender(before, lambda loss: optimizer.step())


def floor(shape: StepShape) -> Contender:
    """A copy that moves as many bytes as (2m + 7)n elements, after the same backward pass as the others'.

    Two reads of the averages, of the gradient, of second moment and parameters once, writes of an average, second
    moment and parameters.
    """
    network, targets = shape.network(), targets_of(shape)
    source = torch.ones((2 * shape.m + 7) * shape.n // 2)
    target = torch.ones_like(source)

    def before(loss: int) -> None:
        network.zero_grad()
        backpropagate(network, targets, loss)

    def copy(loss: int) -> None:
        target.copy_(source)

    return Contender(before, copy)


STEP_CONTENDERS: dict[str, Callable[[StepShape], Contender]] = {
    "floor": floor,
    "fastconfig": mconfig,
    "fastconfig operator, SGD": by_operator(PseudoMomentumOperator),
    "conflictfree operator, SGD": by_operator(UpstreamOperator),
    "torch Adam, one loss": adam,
}
