"""fc.backward on several ranks: each has a part of the batch, and all train as one process on the whole of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from versions import FSDP2
from worlds import world_of

import fastconfig as fc

two_ranks = world_of(2)
four_ranks = world_of(4)

SAMPLES = 8


class Net(nn.Module):
    """A trunk, and a head for each loss; the first two share a layer, and what it computes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh()).double()
        self.shared = nn.Linear(5, 5).double()
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3)).double()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        z = self.trunk(x)
        hidden = self.shared(z)
        return z, [head(hidden if i < 2 else z).squeeze(1) for i, head in enumerate(self.heads)]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((SAMPLES, 4), (3, SAMPLES))]


def step(model: nn.Module, x: Tensor, targets: Tensor, method: object, sync: object, missing: int = -1):
    z, outputs = model(x)
    losses = [(out - target).square().mean() for out, target in zip(outputs, targets, strict=True)]
    if missing >= 0:
        losses[missing] = None
    return fc.backward(losses, features=z, method=method, sync=sync)


def full(grad: Tensor | None) -> Tensor | None:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def trained_here(method: object) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    torch.manual_seed(7)
    model = Net()
    for _ in range(2):
        info = step(model, *batch(), method, None)
    return {name: parameter.grad for name, parameter in model.named_parameters()}, info.gramian, info.weights


def trained_on_a_rank(rank: int, layout: str, method: object) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    torch.manual_seed(7 + rank)  # what rank 0 draws counts
    count = dist.get_world_size()
    x, targets = batch()
    x, targets = x.chunk(count)[rank], targets.chunk(count, dim=1)[rank]
    model = Net()
    used = DistributedDataParallel(model) if layout == "ddp" else model
    if layout in ("fsdp", "fsdp by parts"):
        from torch.distributed.fsdp import fully_shard

        for part in (model.trunk, model.shared, *model.heads) if layout == "fsdp by parts" else ():
            fully_shard(part)
        fully_shard(model)
    for _ in range(2):
        info = step(used, x, targets, method, dist.group.WORLD)
    if layout == "plain":
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= count
    grads = {name: full(parameter.grad).clone() for name, parameter in model.named_parameters()}
    return grads, info.gramian, info.weights


LAYOUTS = ["plain", "ddp", pytest.param("fsdp", marks=FSDP2), pytest.param("fsdp by parts", marks=FSDP2)]


def assert_trains_as_one(found: list, method: object) -> None:
    grads, gramian, weights = trained_here(method)
    for theirs, their_gramian, their_weights in found:
        torch.testing.assert_close(their_weights, found[0][2], rtol=0.0, atol=0.0, equal_nan=True)
        assert torch.equal(their_gramian, found[0][1])
        torch.testing.assert_close(their_gramian, gramian)
        torch.testing.assert_close(their_weights, weights, equal_nan=True)
        for name, grad in grads.items():
            torch.testing.assert_close(theirs[name], grad, msg=name)


@pytest.mark.parametrize("method", ["config", "pcgrad", "graddrop"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_as_one_process(two_ranks, layout: str, method: str) -> None:
    assert_trains_as_one(two_ranks.run(trained_on_a_rank, layout, method), method)


def test_four_ranks_train_as_one_process(four_ranks) -> None:
    assert_trains_as_one(four_ranks.run(trained_on_a_rank, "ddp", "upgrad"), "upgrad")


def without_a_word(rank: int) -> str:
    del rank
    with pytest.raises(RuntimeError) as error:
        step(Net(), *batch(), None, "auto")
    return str(error.value)


def test_several_processes_want_a_word(two_ranks) -> None:
    for words in two_ranks.run(without_a_word):
        assert "sync=torch.distributed.group.WORLD" in words


def alone(rank: int) -> Tensor:
    x, targets = batch()
    return step(Net(), x.chunk(2)[rank], targets.chunk(2, dim=1)[rank], "mgda", None).weights


def test_every_process_for_itself(two_ranks) -> None:
    first, second = two_ranks.run(alone)
    assert not torch.equal(first, second)


def failing(rank: int, what: str) -> str:
    model = Net()
    x, targets = batch()
    z, outputs = model(x)
    losses = [(out - target).square().mean() for out, target in zip(outputs, targets, strict=True)]
    if rank == 1:
        if what == "callable":
            losses[2] = lambda: {}["labels"]
        elif what == "input":
            losses[0] = losses[0].detach()
        else:
            losses[1] = losses[1] * torch.nan
    with pytest.raises((RuntimeError, KeyError, ValueError, FloatingPointError)) as error:
        fc.backward(losses, features=z, method=fc.ConFIG(nonfinite="raise"), sync=dist.group.WORLD)
    assert model.trunk[0].weight.grad is None
    return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize(
    ("what", "words"),
    [("callable", "RuntimeError: rank 1 raised KeyError"), ("input", "ValueError: rank 1 raised"), ("nan", "loss 1")],
)
def test_a_rank_that_fails_ends_the_step_on_all(two_ranks, what: str, words: str) -> None:
    told = two_ranks.run(failing, what)
    assert words in told[0]
    assert told[1]


def absent(rank: int) -> tuple[tuple[int, ...], Tensor]:
    x, targets = batch()
    missing = 2 if rank == 0 else -1
    some = step(Net(), x.chunk(2)[rank], targets.chunk(2, dim=1)[rank], None, dist.group.WORLD, missing)
    none = step(Net(), x.chunk(2)[rank], targets.chunk(2, dim=1)[rank], None, dist.group.WORLD, 2)
    return some.absent, none.absent, some.weights


def test_a_loss_is_absent_where_no_rank_has_labels(two_ranks) -> None:
    first, second = two_ranks.run(absent)
    assert first[:2] == second[:2] == ((), (2,))
    assert torch.equal(first[2], second[2])
    assert first[2][2] > 0
