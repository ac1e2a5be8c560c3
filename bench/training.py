"""What is timed of a whole training step: forward, backward passes, combination, optimizer; contender by contender."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torchjd.aggregation as jd
import torchjd.autojac as autojac
from conflictfree.grad_operator import ConFIG_update
from conflictfree.momentum_operator import PseudoMomentumOperator
from conflictfree.utils import apply_gradient_vector, get_gradient_vector
from torch import Tensor, nn

import fastconfig as fc
from fastconfig.demos.burgers_problem import BurgersNetwork, Problem

RATE = 1e-4
BATCH = 128


class Task(NamedTuple):
    """A new network and its m losses: all of a batch, with the graph they share; or one alone."""

    network: nn.Module
    m: int
    losses: Callable[[], list[Tensor]]
    loss: Callable[[int], Tensor]
    split: Callable[[], tuple[Tensor, list[Tensor]]] | None = None
    """All losses of a batch behind the features that they are computed from; None where each has samples of its own."""


@dataclass(frozen=True)
class Model:
    """A network and its losses.

    Attributes:
        name: in tables.
        kinds: loss i costs what loss i mod kinds does.
        threads: of torch, while it is measured; None for all.
        make: a task, the same every time.
    """

    name: str
    kinds: int
    threads: int | None
    make: Callable[[], Task]


def burgers() -> Task:
    """The network of the demo, 12 tensors, each loss at points of its own."""
    network, problem = BurgersNetwork(seed=0), Problem(seed=0, device=torch.device("cpu"))
    return Task(network, 3, lambda: [problem.loss(network, i) for i in range(3)], lambda i: problem.loss(network, i))


def perceptron() -> Task:
    """About 4e6 parameters in four layers; the losses are of parts of its output."""
    torch.manual_seed(0)
    network = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(1000, 1000), nn.Tanh())])
    x = torch.randn(BATCH, 1000)

    def split() -> tuple[Tensor, list[Tensor]]:
        z = network[:-2](x)
        parts = network[-2:](z).chunk(3, dim=1)
        return z, [(part - i).square().mean() for i, part in enumerate(parts)]

    return Task(network, 3, lambda: split()[1], lambda i: split()[1][i], split)


class Heads(nn.Module):
    """A trunk with a head for each loss, and the batch that they see.

    Args:
        trunk: the trunk.
        heads: the heads, each a layer.
        inputs: the batch.
    """

    def __init__(self, trunk: nn.Module, heads: Iterable[nn.Module], inputs: Tensor) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(heads)
        self.inputs = inputs

    def features(self) -> Tensor:
        """What the heads share."""
        z: Tensor = self.trunk(self.inputs).relu()
        return z

    def loss(self, i: int, z: Tensor) -> Tensor:
        """Loss i, from what the heads share."""
        return (self.heads[i](z) - i).square().mean()

    def losses(self, z: Tensor) -> list[Tensor]:
        """All of them."""
        return [self.loss(i, z) for i in range(len(self.heads))]

    def split(self) -> tuple[Tensor, list[Tensor]]:
        """What the heads share, and the losses computed from it."""
        z = self.features()
        return z, self.losses(z)

    def task(self) -> Task:
        """The losses, a head each."""
        return Task(self, len(self.heads), lambda: self.split()[1], lambda i: self.loss(i, self.features()), self.split)


def heads() -> Task:
    """40 heads on a trunk of 5.6e5 parameters."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    return Heads(trunk, [nn.Linear(512, 1) for _ in range(40)], torch.randn(BATCH, 64)).task()


def convolutions() -> Task:
    """Three dense predictions, such as depth, normals and classes, of 16 images of 32 by 32."""
    torch.manual_seed(0)
    widths = [3, 64, 64, 128, 128, 128]
    trunk = nn.Sequential(
        *(part for a, b in itertools.pairwise(widths) for part in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())),
        nn.Conv2d(128, 128, 3, stride=2, padding=1),
    )
    return Heads(trunk, [nn.Conv2d(128, width, 1) for width in (1, 3, 13)], torch.randn(16, 3, 32, 32)).task()


def transformer() -> Task:
    """Four properties of each of 16 · 64 tokens, by a transformer of four layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    trunk = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return Heads(trunk, [nn.Linear(256, 10) for _ in range(4)], torch.randn(16, 64, 256)).task()


def small() -> Task:
    """Ten outputs of a network of 3,200 parameters, which share all but its last rows."""
    torch.manual_seed(0)
    widths = [2, 50, 50, 10]
    network = nn.Sequential(*(part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())))
    x = torch.randn(BATCH, 2)

    def split() -> tuple[Tensor, list[Tensor]]:
        z = network[:-2](x)
        return z, list(network[-2:](z).square().mean(0))

    return Task(network, 10, lambda: split()[1], lambda i: split()[1][i], split)


MODELS = [
    Model("Burgers", 3, 1, burgers),
    Model("10 outputs", 1, 1, small),
    Model("MLP", 1, None, perceptron),
    Model("40 heads", 1, None, heads),
    Model("convolutions", 1, None, convolutions),
    Model("transformer", 1, None, transformer),
]

Step = Callable[[], dict[str, float]]
"""One step, and of parts of it how many seconds they took, the forward pass left out."""


def _parameters(task: Task) -> list[Tensor]:
    return list(task.network.parameters())


def _adam(task: Task) -> torch.optim.Adam:
    return torch.optim.Adam(task.network.parameters(), lr=RATE)


def backward_passes(task: Task) -> Step:
    """The m backward passes alone, which every method of gradients must do; nothing is done with the gradients."""
    parameters = _parameters(task)

    def step() -> dict[str, float]:
        values = task.losses()
        start = time.perf_counter()
        for i, loss in enumerate(values, start=1):
            loss.backward(retain_graph=i < len(values))
            for parameter in parameters:
                parameter.grad = None
        return {"backward": time.perf_counter() - start}

    return step


def backward_passes_and_adam(task: Task) -> Step:
    """The m backward passes, whose gradients add up, and Adam: the least that a step of a method on gradients takes."""
    optimizer = _adam(task)

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        values = task.losses()
        for i, loss in enumerate(values, start=1):
            loss.backward(retain_graph=i < len(values))
        optimizer.step()
        return {}

    return step


def one_backward_pass(task: Task) -> Step:
    """The backward pass of one loss, in turn."""
    parameters, turn = _parameters(task), [0]

    def step() -> dict[str, float]:
        value = task.loss(turn[0])
        turn[0] = (turn[0] + 1) % task.m
        start = time.perf_counter()
        value.backward()
        for parameter in parameters:
            parameter.grad = None
        return {"backward": time.perf_counter() - start}

    return step


def adam(task: Task) -> Step:
    """Adam on the summed loss: one backward pass, no method."""
    optimizer = _adam(task)

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        torch.stack(task.losses()).sum().backward()
        optimizer.step()
        return {}

    return step


def fastconfig_buffer(task: Task, batched: bool | None = None) -> Step:
    """A buffer over all parameters, ConFIG, Adam."""
    buffer, optimizer = fc.GradientBuffer(task.network, task.m), _adam(task)

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        values = task.losses()
        start = time.perf_counter()
        buffer.backward(values, batched=batched)
        landed = time.perf_counter()
        buffer.combine()
        combined = time.perf_counter()
        optimizer.step()
        return {"backward": combined - start, "combine": combined - landed}

    return step


def fastconfig_features(task: Task) -> Step | None:
    """ConFIG at the features, one pass through the trunk, Adam."""
    split = task.split
    if split is None:
        return None
    optimizer = _adam(task)

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        z, values = split()
        fc.backward(values, features=z)
        optimizer.step()
        return {}

    return step


def fastconfig_mconfig(task: Task) -> Step:
    """M-ConFIG, one loss a step."""
    optimizer = fc.optim.MConFIG(task.network, lr=RATE, num_losses=task.m)

    def step() -> dict[str, float]:
        i = int(optimizer.next_loss())
        value = task.loss(i)
        start = time.perf_counter()
        with optimizer.record(i):
            value.backward()
        recorded = time.perf_counter()
        optimizer.step()
        stepped = time.perf_counter()
        return {"backward": stepped - start, "combine": stepped - recorded}

    return step


def conflictfree_config(task: Task) -> Step:
    """conflictfree as its documentation has it: a gradient vector a loss, ``ConFIG_update``, Adam."""
    network, optimizer = task.network, _adam(task)

    def step() -> dict[str, float]:
        values, grads = task.losses(), []
        for i, loss in enumerate(values, start=1):
            optimizer.zero_grad()
            loss.backward(retain_graph=i < len(values))
            grads.append(get_gradient_vector(network, none_grad_mode="zero"))
        apply_gradient_vector(network, ConFIG_update(grads), none_grad_mode="zero")
        optimizer.step()
        return {}

    return step


def conflictfree_momentum(task: Task) -> Step:
    """conflictfree's M-ConFIG, one loss a step, and SGD, as its update is Adam's already.

    By ``calculate_gradient``: its ``update_gradient`` leaves out heads that a loss misses, and gives the one that it
    does not miss another's update.
    """
    network = task.network
    optimizer, operator = torch.optim.SGD(network.parameters(), lr=RATE), PseudoMomentumOperator(task.m)
    turn = [0]

    def step() -> dict[str, float]:
        i, turn[0] = turn[0], (turn[0] + 1) % task.m
        optimizer.zero_grad()
        task.loss(i).backward()
        grad = get_gradient_vector(network, none_grad_mode="zero")
        update = operator.calculate_gradient(i, grad)
        apply_gradient_vector(network, update, none_grad_mode="zero")
        optimizer.step()
        return {}

    return step


def torchjd_step(task: Task, aggregator: jd.Aggregator) -> Step:
    """torchjd as its documentation has it: the Jacobian in one batched pass, an aggregator, Adam.

    With heads by ``mtl_backward``: they have gradients, the trunk alone a Jacobian.
    """
    network, optimizer = task.network, _adam(task)
    shared = list((network.trunk if isinstance(network, Heads) else network).parameters())

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        if isinstance(network, Heads):
            z = network.features()
            autojac.mtl_backward(network.losses(z), features=z)
        else:
            autojac.backward(task.losses())
        autojac.jac_to_grad(shared, aggregator)
        optimizer.step()
        return {}

    return step


CONTENDERS: dict[str, Callable[[Task], Step | None]] = {
    "m backward passes": backward_passes,
    "m backward passes, Adam": backward_passes_and_adam,
    "fastconfig, buffer": fastconfig_buffer,
    "fastconfig, batched": lambda task: fastconfig_buffer(task, batched=True),
    "fastconfig, features": fastconfig_features,
    "torchjd, ConFIG": lambda task: torchjd_step(task, jd.ConFIG()),
    "torchjd, UPGrad": lambda task: torchjd_step(task, jd.UPGrad()),
    "conflictfree": conflictfree_config,
    "Adam, summed loss": adam,
    "fastconfig, M-ConFIG": fastconfig_mconfig,
    "conflictfree, M-ConFIG": conflictfree_momentum,
}

YARDSTICKS: dict[str, Callable[[Task], Step]] = {
    "fastconfig, buffer": backward_passes,
    "fastconfig, M-ConFIG": one_backward_pass,
}
"""What a contender's backward passes and bookkeeping are compared with, in turns."""

LOSS_BY_LOSS = ("fastconfig, M-ConFIG", "conflictfree, M-ConFIG")
"""Those that backpropagate one loss a step, and move once every loss has been seen."""

SUMS = ("Adam, summed loss", "m backward passes, Adam")


def error_of(name: str, model: Model) -> float | None:
    """How far the gradient that a contender's first step hands to its optimizer is from the float64 one, relatively.

    None where a step has none to hand over.
    """
    task = model.make()
    step = CONTENDERS[name](task)
    if step is None or name in LOSS_BY_LOSS or name == "m backward passes":
        return None
    step()
    given = torch.cat([parameter.grad.flatten() for parameter in _parameters(task) if parameter.grad is not None])
    wanted = _wanted(name, model.make())
    return float((given - wanted).norm() / wanted.norm())


def _wanted(name: str, task: Task) -> Tensor:
    """(n,) float64: the gradient that a contender should hand to its optimizer."""
    if name.endswith("features"):
        return _wanted_at_features(task)
    rows = rows_of(task)
    if name in SUMS:
        return rows.sum(0)
    shared = rows.shape[1]
    if isinstance(task.network, Heads) and name.startswith("torchjd"):
        shared = sum(parameter.numel() for parameter in task.network.trunk.parameters())
    method = fc.UPGrad() if name.endswith("UPGrad") else fc.ConFIG()
    return torch.cat([fc.combine(rows[:, :shared].contiguous(), method), rows[:, shared:].sum(0)])


def _wanted_at_features(task: Task) -> Tensor:
    """The combination at the features, carried on by autograd; of what lies in front of them the losses' sum."""
    assert task.split is not None
    z, losses = task.split()
    rows = [torch.autograd.grad(loss, z, retain_graph=True)[0].flatten().double() for loss in losses]
    combined = fc.combine(rows).view(z.shape).to(z.dtype)
    parameters = _parameters(task)
    behind = torch.autograd.grad(z, parameters, combined, retain_graph=True, allow_unused=True)
    summed = torch.autograd.grad(torch.stack(losses).sum(), parameters)
    grads = [total if grad is None else grad for grad, total in zip(behind, summed, strict=True)]
    return torch.cat([grad.flatten() for grad in grads]).double()


def rows_of(task: Task) -> Tensor:
    """What autograd gives for each loss of a batch, (m, n) float64; zeros where a loss does not reach."""
    rows, parameters = [], _parameters(task)
    for loss in task.losses():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        given = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)]
        rows.append(torch.cat([grad.flatten() for grad in given]).double())
    return torch.stack(rows)
