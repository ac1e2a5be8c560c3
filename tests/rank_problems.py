"""One small network, its losses, and the ways in which ranks lay it out: what tests of several ranks share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from versions import TORCH

import fastconfig as fc

METHODS = {
    "config": fc.ConFIG,
    "upgrad": fc.UPGrad,
    "pcgrad": fc.PCGrad,  # its order is drawn by chance
    "nashmtl": fc.NashMTL,
    "graddrop": fc.GradDrop,
}
BATCH, LOSSES = 8, 3


class Net(nn.Module):
    """Seven hidden units, so that no number of ranks divides all of its parameters."""

    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(6, hidden)
        self.second = nn.Linear(hidden, 5)
        self.norm = nn.LayerNorm(5)
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.second(self.first(x).tanh()))
        return (out.full_tensor() if hasattr(out, "full_tensor") else out) * self.scale


def network(hidden: int = 7) -> Net:
    torch.manual_seed(0)
    return Net(hidden).double()


def batch() -> Tensor:
    return torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def losses_of(out: Tensor) -> list[Tensor]:
    return [(out[:, i] - i).square().mean() + out[:, 3 + i % 2].mean() for i in range(LOSSES)]


def part(x: Tensor, index: int, count: int) -> Tensor:
    return x[index * len(x) // count : (index + 1) * len(x) // count]


def alone(name: str, hidden: int) -> dict:
    """What one process makes of the whole batch."""
    model = network(hidden)
    torch.manual_seed(0)
    buf = fc.GradientBuffer(model, LOSSES)
    buf.backward(losses_of(model(batch())))
    made = buf.combine(METHODS[name]())
    return {"grad": gradient(model), "gramian": made.gramian, "weights": made.weights}


def gradient(model: nn.Module) -> Tensor:
    """All of ``p.grad``, put together from the ranks."""
    return whole(p.grad for p in model.parameters() if p.requires_grad)


def values(model: nn.Module) -> Tensor:
    """All trained parameters, put together from the ranks."""
    return whole(p.detach() for p in model.parameters() if p.requires_grad)


def whole(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([(t.full_tensor() if hasattr(t, "full_tensor") else t).flatten() for t in tensors])


def laid_out(layout: str, rank: int, count: int) -> tuple[nn.Module, int, int, int]:
    """The model on the ranks; which part of the batch is this rank's, of how many; hidden units."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    if TORCH < (2, 6):  # DTensors and FSDP2 have private names there
        from torch.distributed._tensor import Shard
    else:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard

    hidden = 8 if "tensor" in layout or layout == "sequence" else 7
    model = network(hidden)
    parts, index = count, rank
    mesh = None
    if layout == "hybrid":
        mesh = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("replicate", "shard"))
    elif layout == "tensor and sharded":
        both = init_device_mesh("cpu", (count // 2, 2), mesh_dim_names=("data", "model"))
        parallelize_module(model, both["model"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
        mesh, parts, index = both["data"], count // 2, rank // 2
    elif layout == "tensor":
        model_mesh = init_device_mesh("cpu", (count,))
        parallelize_module(model, model_mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})
        parts, index = 1, 0
    elif layout == "sequence":
        rows_of_the_batch = {
            "second": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
            "norm": SequenceParallel(sequence_dim=0),  # its gradient is a sum that is yet to be made over the ranks
        }
        parallelize_module(model, init_device_mesh("cpu", (count,)), {"first": ColwiseParallel(), **rows_of_the_batch})
        parts, index = 1, 0
    elif layout == "replicate":
        from torch.distributed._composable.replicate_with_fsdp import replicate

        replicate(model)
    elif layout == "sharded":
        mesh = init_device_mesh("cpu", (count,))
    if mesh is not None:
        for layer in (model.first, model.second):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if layout == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    return model, index, parts, hidden


class ToldError(Exception):
    """What a loss of a test raises."""


def averaged(gradients: Tensor) -> Tensor:
    torch.distributed.all_reduce(gradients)
    return gradients / torch.distributed.get_world_size()


def recorded_by_hand(rank: int, buf: fc.GradientBuffer, model: nn.Module, seed: int = 0) -> None:
    """Gradients that the ranks have averaged by themselves."""
    generator = torch.Generator().manual_seed(seed + rank)
    for i in range(LOSSES):
        with buf.record(i):
            for p in model.parameters():
                p.grad = averaged(torch.randn(p.shape, generator=generator, dtype=p.dtype))


def errors_of(*calls) -> list[str]:
    """What each call raises, in words; empty where it raises nothing."""
    return [error_of(call) for call in calls]


def error_of(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
