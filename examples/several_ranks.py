"""One network, three losses, several processes: the same training in each layout that PyTorch has for it.

    torchrun --nproc-per-node 2 examples/several_ranks.py --layout sync

``sync``: plain replicas, whose gradients the buffer averages. ``ddp``: DistributedDataParallel, one forward pass a
loss. ``fsdp``: parameters sharded by fully_shard. ``tensor``: layers split by tensor parallelism. ``mconfig``:
M-ConFIG, one backward pass a step, within DistributedDataParallel. All see the same data in the same order, and all but
the last end with the same losses, to rounding; so does one process alone (``python examples/several_ranks.py``).
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastconfig as fc

LOSSES = ["value", "slope", "energy"]


class Block(nn.Module):
    """A residual block of two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width) to the same."""
        return x + self.narrow(torch.nn.functional.gelu(self.wide(x)))


class Network(nn.Module):
    """A point to a value, a slope and an energy, which pull its layers in three directions."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.lift = nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.heads = nn.Linear(width, len(LOSSES))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1) to (batch, 3)."""
        hidden = self.lift(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.heads(hidden)


def losses_of(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Of one forward pass."""
    out = network(x)
    wanted = torch.cat([torch.sin(3 * x), 3 * torch.cos(3 * x), x.square()], dim=1)
    return list((out - wanted).square().mean(dim=0))


def laid_out(layout: str, ranks: int) -> tuple[nn.Module, bool]:
    """The network on the ranks, and whether each of them sees a part of the batch of its own."""
    torch.manual_seed(0)
    network = Network().double()
    if ranks == 1 or layout == "sync":
        return network, True
    if layout == "tensor":
        mesh = init_device_mesh("cpu", (ranks,))
        for block in network.blocks:
            parallelize_module(block, mesh, {"wide": ColwiseParallel(), "narrow": RowwiseParallel()})
        return network, False
    if layout == "fsdp":
        for block in network.blocks:
            fully_shard(block)
        return fully_shard(network), True
    return DistributedDataParallel(network), True


def train(layout: str, steps: int) -> list[float]:
    """The losses at the end, over the whole batch."""
    several = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    network, is_divided = laid_out(layout, ranks)
    data = torch.Generator().manual_seed(1)  # the same on every rank
    sync = dist.group.WORLD if several and layout == "sync" else "auto"

    if layout == "mconfig":
        optimizer: torch.optim.Optimizer = fc.optim.MConFIG(network, lr=1e-2, num_losses=LOSSES)
    else:
        buffer = fc.GradientBuffer(network, LOSSES, sync=sync)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(steps):
        batch = 2 * torch.rand(64, 1, generator=data, dtype=torch.float64) - 1
        x = batch.chunk(ranks)[rank] if is_divided else batch
        if isinstance(optimizer, fc.optim.MConFIG):
            loss = optimizer.next_loss()
            with optimizer.record(loss):
                losses_of(network, x)[LOSSES.index(str(loss))].backward()
        elif isinstance(network, DistributedDataParallel):  # which averages one backward pass a forward pass
            buffer.backward([lambda i=i, x=x: losses_of(network, x)[i] for i in range(len(LOSSES))])
            buffer.combine(fc.ConFIG())
        else:
            buffer.backward(losses_of(network, x))
            buffer.combine(fc.ConFIG())
        optimizer.step()
    whole = torch.linspace(-1, 1, 100, dtype=torch.float64).unsqueeze(1)
    with torch.no_grad():
        return [float(loss) for loss in losses_of(network, whole)]


def main() -> None:
    """Train, and say how well on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=["sync", "ddp", "fsdp", "tensor", "mconfig"], default="sync")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    if "WORLD_SIZE" in os.environ:  # torchrun says so
        dist.init_process_group("gloo")
    losses = train(arguments.layout, arguments.steps)
    if not dist.is_initialized() or dist.get_rank() == 0:
        told = ", ".join(f"{name} {loss:.6f}" for name, loss in zip(LOSSES, losses, strict=True))
        print(f"{arguments.layout}: {told}", flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
