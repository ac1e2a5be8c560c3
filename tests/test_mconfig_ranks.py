"""MConFIG on several ranks: what each does, and what a single float64 process does on the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from rank_problems import (
    LOSSES,
    METHODS,
    ToldError,
    averaged,
    batch,
    error_of,
    gradient,
    laid_out,
    losses_of,
    network,
    part,
    values,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from versions import FSDP2, HSDP, layouts
from worlds import World, world_of

import fastconfig as fc

two = world_of(2)
four = world_of(4)

STEPS = 7
NAMES = [name for name in METHODS if name != "graddrop"]  # which has no weights
OPTIONS = {
    "plain": {},
    "clipped": {"losses_per_step": 2, "max_norm": 0.5, "max_update_norm": 1.0, "weight_decay": 0.1},
    "random": {"selection": "random"},
}


def trained(model: nn.Module, x: Tensor, name: str, how: str, sync="auto") -> tuple[Tensor, Tensor, list[int]]:
    """The parameters after some steps, the last weights, and the losses that were drawn."""
    optimizer = fc.optim.MConFIG(model, lr=0.05, num_losses=LOSSES, method=METHODS[name](), sync=sync, **OPTIONS[how])
    drawn = []
    for _ in range(STEPS):
        for loss in optimizer.next_losses():
            drawn.append(loss)
            with optimizer.record(loss):
                losses_of(model(x))[loss].backward()
        optimizer.step()
    return values(model), optimizer.combination.weights, drawn


def on_a_rank(rank: int, count: int, layout: str, name: str, how: str) -> tuple[Tensor, Tensor, list[int], int]:
    model, index, parts, hidden = laid_out(layout, rank, count)
    torch.manual_seed(rank)
    sync = torch.distributed.group.WORLD if layout == "sync" else "auto"
    return *trained(model, part(batch(), index, parts), name, how, sync), hidden


def assert_as_alone(answers: list, name: str, how: str) -> None:
    for answer in answers[1:]:
        assert torch.equal(answer[0], answers[0][0])
        assert torch.equal(answer[1], answers[0][1])
        assert answer[2] == answers[0][2]
    theta, weights, drawn, hidden = answers[0]
    model = network(hidden)
    torch.manual_seed(0)
    wanted = trained(model, batch(), name, how)
    assert drawn == wanted[2]
    assert (theta - values(network(hidden))).norm() > 0.1
    torch.testing.assert_close(theta, wanted[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weights, wanted[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("layout", layouts("sharded", "tensor", "sequence", "replicate", "ddp", "sync"))
def test_two_ranks_train_as_one_process(two: World, layout: str, how: str) -> None:
    assert_as_alone(two.run(on_a_rank, 2, layout, "config", how), "config", how)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", layouts("sharded", "ddp"))
def test_methods_that_draw_or_remember(two: World, layout: str, name: str) -> None:
    assert_as_alone(two.run(on_a_rank, 2, layout, name, "plain"), name, "plain")


@pytest.mark.parametrize("how", ["plain", "clipped"])
@pytest.mark.parametrize("layout", layouts("sharded", "hybrid", "tensor and sharded", "sync"))
def test_four_ranks_train_as_one_process(four: World, layout: str, how: str) -> None:
    assert_as_alone(four.run(on_a_rank, 4, layout, "config", how), "config", how)


def misused(rank: int) -> list[str]:
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = fc.optim.MConFIG(model, num_losses=LOSSES, losses_per_step=2)
    x = part(batch(), rank, 2)
    first, second, _ = losses_of(model(x))

    def twice() -> None:
        with optimizer.record(0):
            first.backward(retain_graph=True)
        with optimizer.record(1):
            second.backward()

    def unsynchronised() -> None:
        with model.no_sync(), optimizer.record(0):
            pass

    return [
        error_of(lambda: fc.optim.MConFIG(network().parameters(), num_losses=2)),
        error_of(twice),
        error_of(unsynchronised),
    ]


def test_gradients_that_nobody_averages_are_refused(two: World) -> None:
    for plain, twice, unsynchronised in two.run(misused):
        assert plain.startswith("RuntimeError: 2 processes train, and this MConFIG was given plain parameters")
        assert twice.startswith("RuntimeError: record(1) backpropagated a forward pass of DistributedDataParallel for")
        assert unsynchronised.startswith("RuntimeError: record(0) inside no_sync()")


def one_fails(rank: int, where: str) -> list:
    """Rank 1 raises, or does otherwise; then both go on."""
    model = network()
    optimizer = fc.optim.MConFIG(
        model, num_losses=2, losses_per_step=2, selection="random", group=torch.distributed.group.WORLD
    )

    def record(*losses: int) -> None:
        for loss in losses:
            with optimizer.record(loss):
                for p in model.parameters():
                    if p.requires_grad:
                        p.grad = averaged(torch.full_like(p, 1.0 + rank + loss))

    def in_record() -> None:
        record(0)
        if rank == 1:
            with optimizer.record(1):
                raise ToldError("no labels")
        optimizer.step()

    def in_step() -> None:
        if rank == 0:
            with optimizer.record(0):
                model.scale.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()

    def other_losses() -> None:
        with optimizer.record(rank):
            model.scale.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()

    told = error_of({"record": in_record, "step": in_step, "losses": other_losses}[where])
    optimizer.zero_grad()
    for _ in range(3):
        record(*optimizer.next_losses())
        optimizer.step()
    return [told, values(model)]


@pytest.mark.parametrize(
    ("where", "there", "elsewhere"),
    [
        ("record", "ToldError: no labels", "RuntimeError: rank 1 raised ToldError: no labels"),
        ("step", "RuntimeError: step found no gradient", "RuntimeError: rank 1 raised RuntimeError: step found no"),
        ("losses", "RuntimeError: the 2 ranks have recorded different losses", "RuntimeError: the 2 ranks have"),
    ],
)
def test_what_a_rank_raises_all_raise_and_all_go_on(two: World, where: str, there: str, elsewhere: str) -> None:
    first, second = two.run(one_fails, where)
    assert second[0].startswith(there)
    assert first[0].startswith(elsewhere)
    assert torch.equal(first[1], second[1])


def with_a_scaler(rank: int) -> tuple[Tensor, int]:
    """An overflow in one rank's shard alone leaves the step out on both."""
    model = laid_out("sharded", rank, 2)[0]
    optimizer = fc.optim.MConFIG(model, num_losses=LOSSES)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x = part(batch(), rank, 2)
    for step in range(5):
        loss = optimizer.next_loss()
        with optimizer.record(loss):
            scaler.scale(losses_of(model(x))[loss]).backward()
            if step == 3 and rank == 1:
                model.second.weight.grad.to_local().fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update(4.0)
    return values(model), optimizer.steps_left_out


@FSDP2
def test_an_overflow_on_one_rank_leaves_the_step_out_on_all(two: World) -> None:
    (theta, left_out), other = two.run(with_a_scaler)
    assert left_out == other[1] == 1
    assert theta.isfinite().all()
    assert torch.equal(theta, other[0])


def saved(rank: int, count: int, layout: str, folder: str, name: str) -> Tensor:
    """Some steps, a checkpoint, and some more."""
    model, index, parts, _ = laid_out(layout, rank, count)
    optimizer = new_optimizer(model, name, layout)
    x = part(batch(), index, parts)
    steps(optimizer, model, x, 5)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.save(state, checkpoint_id=folder)
    steps(optimizer, model, x, 5)
    return values(model)


def resumed(rank: int, count: int, layout: str, folder: str, name: str) -> tuple[Tensor, int]:
    """The same steps from the checkpoint, on other ranks."""
    model, index, parts, _ = laid_out(layout, rank, count)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = new_optimizer(model, name, layout)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert "shared" not in optimizer.param_groups[0]
    steps(optimizer, model, part(batch(), index, parts), 5)
    return values(model), optimizer.next_loss()


def new_optimizer(model: nn.Module, name: str, layout: str) -> fc.optim.MConFIG:
    options = {"selection": "random", "generator": torch.Generator().manual_seed(3), "losses_per_step": 2}
    options["sync"] = torch.distributed.group.WORLD if layout == "sync" else "auto"
    method = fc.PCGrad(generator=torch.Generator().manual_seed(5)) if name == "pcgrad" else METHODS[name]()
    return fc.optim.MConFIG(model, lr=0.05, num_losses=LOSSES, method=method, **options)


def steps(optimizer: fc.optim.MConFIG, model: nn.Module, x: Tensor, count: int) -> None:
    for _ in range(count):
        for loss in optimizer.next_losses():
            with optimizer.record(loss):
                losses_of(model(x))[loss].backward()
        optimizer.step()


@FSDP2
@pytest.mark.parametrize("name", ["config", "nashmtl", "pcgrad"])
def test_a_checkpoint_of_two_ranks_goes_on_on_four(two: World, four: World, name: str, tmp_path) -> None:
    wanted = two.run(saved, 2, "sharded", str(tmp_path), name)[0]
    for theta, _ in [
        *four.run(resumed, 4, "sharded", str(tmp_path), name),
        *two.run(resumed, 2, "sharded", str(tmp_path), name),
    ]:
        torch.testing.assert_close(theta, wanted, rtol=1e-9, atol=1e-9)


@HSDP
def test_a_checkpoint_between_layouts(two: World, four: World, tmp_path) -> None:
    wanted = four.run(saved, 4, "hybrid", str(tmp_path), "config")[0]
    for theta, _ in two.run(resumed, 2, "sharded", str(tmp_path), "config"):
        torch.testing.assert_close(theta, wanted, rtol=1e-9, atol=1e-9)
    for first, second in (("ddp", "sharded"), ("sharded", "sync")):
        folder = str(tmp_path / first)
        wanted = two.run(saved, 2, first, folder, "nashmtl")[0]
        for theta, _ in four.run(resumed, 4, second, folder, "nashmtl"):
            torch.testing.assert_close(theta, wanted, rtol=1e-9, atol=1e-9)


def averaged_here(rank: int, where: str) -> list:
    """Without DistributedDataParallel: another model on each rank, a loss that one has no gradient of, a failure."""
    torch.manual_seed(rank)
    model = network()
    with torch.no_grad():
        model.scale += rank
    optimizer = fc.optim.MConFIG(model, num_losses=LOSSES, lr=0.05, sync=torch.distributed.group.WORLD)
    begins, x = values(model), part(batch(), rank, 2)

    def step(fails: bool = False) -> None:
        loss = optimizer.next_loss()
        with optimizer.record(loss):
            losses_of(model(x))[loss].backward()
            if fails:
                raise ToldError("no labels")
        with optimizer.record(loss, accumulate=True):
            if rank == 0:
                losses_of(model(x))[loss].backward()
        shown.append(model.second.weight.grad.clone())
        optimizer.step()

    shown: list[Tensor] = []
    told = error_of(lambda: step(fails=where == "fails" and rank == 1))
    for _ in range(4):
        step()
    return [begins, values(model), told, torch.stack(shown[-4:])]


@pytest.mark.parametrize("where", ["fails", "goes on"])
def test_replicas_are_averaged_without_a_wrapper(two: World, where: str) -> None:
    first, second = two.run(averaged_here, where)
    for i in (0, 1, 3):
        assert torch.equal(first[i], second[i])
    assert not torch.equal(first[0], first[1])
    if where == "fails":
        assert second[2] == "ToldError: no labels"
        assert first[2].startswith("RuntimeError: rank 1 raised ToldError")
    else:
        assert first[2] == second[2] == ""


def moved_shards(rank: int, moves: bool) -> tuple[Tensor, Tensor]:
    """What M-ConFIG and the buffer make of a model whose shards come to lie elsewhere."""

    def move() -> None:
        for p in model.parameters():
            if hasattr(p, "_local_tensor"):
                p._local_tensor = p._local_tensor.clone()

    model, x = laid_out("tensor", rank, 2)[0], batch()
    optimizer, buf = fc.optim.MConFIG(model, lr=0.05, num_losses=LOSSES), fc.GradientBuffer(model, LOSSES)
    for step in range(4):
        if moves and step in (0, 2):  # before the first step, and after one
            move()
        with optimizer.record(step % LOSSES):
            losses_of(model(x))[step % LOSSES].backward()
        if moves and step == 3:  # and between a gradient and its step
            move()
        optimizer.step()
    if not moves:
        buf = fc.GradientBuffer(model, LOSSES)
    buf.backward(losses_of(model(x)))
    buf.combine()
    return values(model), gradient(model)


def test_shards_may_come_to_lie_elsewhere(two: World) -> None:
    """As FSDP2 pads uneven ones in the first forward pass, or pins them; nobody may write where they lay before."""
    for moved, still in zip(two.run(moved_shards, True), two.run(moved_shards, False), strict=True):
        assert all(map(torch.equal, moved, still))
