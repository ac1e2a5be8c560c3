"""GradientBuffer on several ranks: what each does, and what a single float64 process does on the whole batch."""

from __future__ import annotations

import warnings
from datetime import timedelta

import pytest
import torch
from rank_problems import (
    LOSSES,
    METHODS,
    Net,
    ToldError,
    alone,
    averaged,
    batch,
    error_of,
    errors_of,
    gradient,
    laid_out,
    losses_of,
    network,
    part,
    recorded_by_hand,
    values,
)
from torch import Tensor, nn
from versions import FSDP2, layouts, since
from worlds import World, world_of

import fastconfig as fc
from fastconfig.diagnostics import collect_config
from fastconfig.gradients import exchange, processes

two = world_of(2)
four = world_of(4)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


def step(rank: int, count: int, layout: str, name: str, callables: bool) -> dict:
    """One step on the ranks."""
    model, index, parts, hidden = laid_out(layout, rank, count)
    torch.manual_seed(rank)
    buf = fc.GradientBuffer(model, LOSSES, sync=torch.distributed.group.WORLD if layout == "sync" else "auto")
    x = part(batch(), index, parts)
    if callables:
        buf.backward([lambda i=i: losses_of(model(x))[i] for i in range(LOSSES)])
    else:
        buf.backward(losses_of(model(x)))
    whole = buf.gramian()
    made = buf.combine(METHODS[name]())
    assert torch.equal(buf.gramian(), whole)
    return {"grad": gradient(model), "gramian": made.gramian, "weights": made.weights, "hidden": hidden}


def assert_as_alone(answers: list[dict], name: str) -> None:
    for answer in answers[1:]:
        for what in ("grad", "gramian", "weights"):
            assert torch.equal(answer[what], answers[0][what]) or answer[what].isnan().all()
    got, wanted = answers[0], alone(name, answers[0]["hidden"])
    for what in ("grad", "gramian", "weights"):
        torch.testing.assert_close(
            got[what], wanted[what], rtol=0, atol=1e-12 * float(wanted[what].nan_to_num().norm()), equal_nan=True
        )


TWO_RANKS = layouts("sharded", "tensor", "sequence", "replicate", "ddp", "sync")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_ranks_combine_as_one_process(two: World, layout: str, name: str) -> None:
    for callables in {"sharded": [False, True], "ddp": [True], "sync": [False, True]}.get(layout, [False]):
        assert_as_alone(two.run(step, 2, layout, name, callables), name)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layout", layouts("sharded", "hybrid", "tensor and sharded", "tensor", "sync"))
def test_four_ranks_combine_as_one_process(four: World, layout: str, name: str) -> None:
    assert_as_alone(four.run(step, 4, layout, name, False), name)


def plain_parameters(rank: int) -> list[str]:
    model = nn.Linear(3, 2)
    return errors_of(
        lambda: fc.GradientBuffer(model, 2),
        lambda: fc.GradientBuffer(model.named_parameters(), 2),
        lambda: fc.GradientBuffer(model, 2, sync="nonsense"),
        lambda: fc.GradientBuffer(model, 2, sync=None),
    )


def test_plain_parameters_need_a_word_on_how_their_gradients_meet(two: World) -> None:
    for module, pairs, nonsense, silenced in two.run(plain_parameters):
        assert module.startswith("RuntimeError: 2 processes train, and this GradientBuffer was given plain parameters")
        assert pairs == module
        assert nonsense == "ValueError: sync must be 'auto', a process group or None, got 'nonsense'"
        assert silenced == ""


def silenced_buffers_go_their_own_way(rank: int) -> tuple[Tensor, Tensor]:
    model = network()
    buf = fc.GradientBuffer(model, LOSSES, sync=None)
    buf.backward(losses_of(model(part(batch(), rank, 2))))
    buf.combine()
    return gradient(model), buf.rows.clone()


def test_a_rank_may_train_for_itself(two: World) -> None:
    for grad, rows in two.run(silenced_buffers_go_their_own_way):
        assert torch.equal(grad, fc.combine(rows))


def ddp_misused(rank: int) -> list[str]:
    model = nn.parallel.DistributedDataParallel(network())
    buf = fc.GradientBuffer(model, LOSSES)
    x = part(batch(), rank, 2)

    def twice() -> None:
        first, second, _ = losses_of(model(x))
        with buf.record(0):
            first.backward(retain_graph=True)
        with buf.record(1):
            second.backward()

    def unsynchronised() -> None:
        with model.no_sync():
            buf.backward([lambda i=i: losses_of(model(x))[i] for i in range(LOSSES)])

    def outside() -> None:
        fc.GradientBuffer(nn.ModuleList([model, nn.Linear(2, 2)]), 2)

    told = errors_of(lambda: buf.backward(losses_of(model(x))), twice, unsynchronised, outside)
    buf.backward([lambda i=i: losses_of(model(x))[i] for i in range(LOSSES)])  # and all is as ever
    buf.combine()
    return [*told, gradient(model)]


def test_ddp_averages_once_a_forward_pass_and_is_held_to_it(two: World) -> None:
    answers = two.run(ddp_misused)
    for tensors, twice, unsynchronised, outside, _ in answers:
        assert tensors.startswith("ValueError: 3 losses were given as tensors")
        assert twice.startswith("RuntimeError: record(1) backpropagated a forward pass of DistributedDataParallel for")
        assert unsynchronised.startswith("RuntimeError: backward inside no_sync()")
        assert outside.startswith("RuntimeError: 2 parameters, the first of shape (2, 2), are in no Distributed")
    assert torch.equal(answers[0][-1], answers[1][-1])
    torch.testing.assert_close(answers[0][-1], alone("config", 7)["grad"])


def fsdp_without_synchronisation(rank: int) -> list[str]:
    model = laid_out("sharded", rank, 2)[0]
    buf = fc.GradientBuffer(model, LOSSES)
    model.set_requires_gradient_sync(False)
    x = part(batch(), rank, 2)
    return errors_of(lambda: buf.backward(losses_of(model(x))), lambda: buf.record(0).__enter__())


@FSDP2
def test_fsdp_must_not_keep_gradients_local(two: World) -> None:
    for told in two.run(fsdp_without_synchronisation):
        assert told[0].startswith("RuntimeError: backward after set_requires_gradient_sync(False)")
        assert told[1].startswith("RuntimeError: record(0) after set_requires_gradient_sync(False)")


def gathers(rank: int, reshard: bool) -> int:
    """How often parameters are gathered in one forward pass and three backward passes."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    model = network()
    for module in (model.first, model.second, model):
        fully_shard(module, reshard_after_forward=reshard)
    buf = fc.GradientBuffer(model, LOSSES)
    x = part(batch(), rank, 2)
    buf.backward(losses_of(model(x)))
    with CommDebugMode() as counted:
        buf.backward(losses_of(model(x)))
    return counted.get_comm_counts()[torch.ops.c10d._allgather_base_]


@since(2, 8, "fully_shard keeps the root's parameters")
def test_fsdp_gathers_parameters_once_where_it_keeps_them_anyway(two: World) -> None:
    assert two.run(gathers, False) == [3, 3]  # a module
    assert two.run(gathers, True) == [12, 12]  # forwards, and for each loss


def one_fails(rank: int, where: str) -> list[object]:
    """Rank 1 raises; then both go on."""
    model = network()
    buf = fc.GradientBuffer(model, LOSSES, group=torch.distributed.group.WORLD)

    class Rule:
        def weights(self, gramian: Tensor) -> Tensor:
            raise ToldError("no weights")

    def in_record() -> None:
        recorded_by_hand(rank, buf, model)
        if rank == 1:
            with buf.record(2, accumulate=False):
                raise ToldError("no labels")
        buf.combine()

    def in_backward() -> None:
        def loss() -> Tensor:
            if rank == 1:
                raise ToldError("no labels")
            return sum(p.square().sum() for p in model.parameters() if p.requires_grad)

        buf.backward([loss] * LOSSES)
        buf.combine()

    def in_combine() -> None:
        recorded_by_hand(rank, buf, model)
        buf.combine(stale="error" if rank == 0 else "nonsense")

    def in_rule() -> None:
        recorded_by_hand(rank, buf, model)
        buf.combine(Rule())

    def not_finite() -> None:
        recorded_by_hand(rank, buf, model)
        buf.rows[1, 3] = torch.inf
        buf.combine(fc.ConFIG(nonfinite="raise"))

    cases = {
        "record": in_record, "backward": in_backward, "combine": in_combine, "rule": in_rule, "nonfinite": not_finite,
    }  # fmt: skip
    told = errors_of(cases[where])
    recorded_by_hand(rank, buf, model, seed=10)
    buf.combine()
    return [*told, gradient(model)]


@pytest.mark.parametrize(
    ("where", "there", "elsewhere"),
    [
        (
            "record",
            "ToldError: no labels",
            "RuntimeError: rank 1 raised ToldError: no labels; the step is over on every rank",
        ),
        (
            "backward",
            "ToldError: no labels",
            "RuntimeError: rank 1 raised ToldError: no labels; the step is over on every rank",
        ),
        ("combine", "ValueError: stale must be", "ValueError: rank 1 raised ValueError: stale must be"),
        ("rule", "RuntimeError: rank 0 raised ToldError: no weights", "ToldError: no weights"),
        (
            "nonfinite",
            "FloatingPointError: the squared norm of the gradient of loss 1",
            "FloatingPointError: the squared norm of the gradient of loss 1",
        ),
    ],
)
def test_what_a_rank_raises_all_raise_and_all_go_on(two: World, where: str, there: str, elsewhere: str) -> None:
    first, second = two.run(one_fails, where)
    assert second[0].startswith(there)
    assert first[0].startswith(elsewhere)
    assert torch.equal(first[1], second[1])


def unequal_copies(rank: int) -> list[str]:
    model = network()
    buf = fc.GradientBuffer(model, LOSSES, group=torch.distributed.group.WORLD)
    buf.backward(losses_of(model(part(batch(), rank, 2))))  # which nobody averages
    return errors_of(buf.combine)


def test_copies_whose_gradients_differ_are_noticed(two: World) -> None:
    for (told,) in two.run(unequal_copies):
        assert told.startswith("RuntimeError: the gradients of loss ")
        assert "over the same parameters differ between rank 0" in told


def other_sizes(rank: int) -> list[str]:
    return errors_of(lambda: fc.GradientBuffer(nn.Linear(2, 2 + rank), 2, group=torch.distributed.group.WORLD))


def test_parameters_of_one_name_must_be_of_one_size(two: World) -> None:
    for (told,) in two.run(other_sizes):
        assert "parameter 'weight' has 6 columns of torch.float32 on rank 1 and 4 of torch.float32 on rank 0" in told


def stages(rank: int, named_alike: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Two stages of a pipeline, each with its gradients; the trunk before them is on both."""
    whole = [network(), network()]
    stage = whole[rank]
    names = [("stage" if named_alike else f"stage{rank}") + f".{name}" for name, _ in stage.named_parameters()]
    shared = nn.Parameter(torch.ones(70, dtype=torch.float64))
    pairs = [("shared", shared), *zip(names, stage.parameters(), strict=True)]
    everyone = torch.distributed.group.WORLD
    buf = fc.GradientBuffer(pairs, LOSSES, group=everyone, local=[stage] if named_alike else [])
    generator, together = torch.Generator().manual_seed(rank), torch.Generator().manual_seed(7)
    rows = []
    for i in range(LOSSES):
        with buf.record(i):
            shared.grad = torch.randn(70, generator=together, dtype=torch.float64)
            for p in stage.parameters():
                if p.requires_grad:
                    p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            mine = [p.grad.flatten().clone() for p in stage.parameters() if p.requires_grad]
            rows.append((shared.grad.clone(), torch.cat(mine)))
    buf.combine(fc.UPGrad())
    combined = (shared.grad.clone(), gradient(stage))
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows]), *combined


@pytest.mark.parametrize("named_alike", [False, True])
def test_stages_of_a_pipeline_are_columns_of_one_problem(two: World, named_alike: bool) -> None:
    (shared, first, *got), (_, second, *other) = two.run(stages, named_alike)
    wanted = fc.combine(torch.cat([shared, first, second], dim=1), fc.UPGrad())
    torch.testing.assert_close(torch.cat([*got, other[1]]), wanted)
    assert torch.equal(got[0], other[0])


def with_a_scaler_and_absent_losses(rank: int) -> tuple[Tensor, tuple[int, ...], bool, bool]:
    model = network()
    buf = fc.GradientBuffer(model, LOSSES, group=torch.distributed.group.WORLD)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    recorded_by_hand(rank, buf, model)
    buf.rows.mul_(8.0)
    made = buf.combine(fc.NashMTL(), scaler=scaler)
    both = recorded_twice(rank, model)
    x = batch()
    buf.backward([losses_of(model(x))[0], None, None if rank else losses_of(model(x))[2]])
    buf.rows[2] = 0.0
    absent = buf.combine().absent
    buf.zero()
    nothing = errors_of(lambda: buf.combine())[0].startswith("RuntimeError: combine found nothing")
    return made.gramian, absent, nothing, both


def recorded_twice(rank: int, model: nn.Module) -> bool:
    """Micro-batches add up on ranks, too."""
    buf = fc.GradientBuffer(model, LOSSES, group=torch.distributed.group.WORLD)
    recorded_by_hand(rank, buf, model)
    once = buf.gramian()
    with buf.record(0, accumulate=True):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    return torch.equal(buf.gramian(), once)


def test_what_holds_for_one_process_holds_for_ranks(two: World) -> None:
    first, second = two.run(with_a_scaler_and_absent_losses)
    assert torch.equal(first[0], second[0])
    assert first[1:] == second[1:] == ((1,), True, True)


def refused(rank: int) -> list[str]:
    import copy
    import pickle

    buf = fc.GradientBuffer(network(), 2, group=torch.distributed.group.WORLD)
    return errors_of(lambda: copy.deepcopy(buf), lambda: pickle.dumps(buf))


def test_buffers_of_ranks_are_not_copied(two: World) -> None:
    for told in two.run(refused):
        assert all(text.startswith("TypeError: a GradientBuffer of several ranks cannot be copied") for text in told)


def shared_out(rank: int) -> dict:
    """Rows that the ranks share out."""
    everyone = torch.distributed.group.WORLD
    torch.manual_seed(rank)
    model = Net().double()  # another one on each rank
    buf = fc.GradientBuffer(model, LOSSES, sync=everyone)
    begins = values(model)
    x = part(batch(), rank, 2)
    (segment,) = buf.segments
    buf.backward(losses_of(model(x)))
    buf.combine(sharded=True)
    hidden = all(p.grad is None for p in model.parameters())
    shares = torch.cat([segment.share[here : here + count] for here, _, count in segment.runs])
    buf.combine(stale="use")
    whole = gradient(model)
    halves = x.split(2)
    for half in halves:
        buf.backward([loss / 2 for loss in losses_of(model(half))], accumulate=True)
    accumulated = buf.gramian()
    buf.backward(losses_of(model(x)))
    once = buf.gramian()
    return {
        "begins": begins,
        "hidden": hidden,
        "share": shares,
        "whole": whole,
        "shape": tuple(buf.rows.shape),
        "accumulated": accumulated,
        "once": once,
    }


def test_rows_are_shared_out(two: World) -> None:
    answers = two.run(shared_out)
    for answer in answers:
        assert torch.equal(answer["begins"], answers[0]["begins"])
        assert answer["hidden"]
        assert torch.equal(torch.cat([a["share"] for a in answers]), answer["whole"])
        assert answer["shape"] == (LOSSES, 64)  # of 105 columns, and so many that shares begin where lines do
        assert (answer["accumulated"] - answer["once"]).abs().max() < 1e-9 * answer["once"].max()


def of_its_own(rank: int) -> tuple[Tensor, tuple[int, ...], Tensor, str]:
    model = network()
    buf = fc.GradientBuffer(model, LOSSES, sync=torch.distributed.group.WORLD)
    task = (0, 2)[rank]
    buf.backward_own(task, lambda: losses_of(model(batch()))[task])
    made = buf.combine(fc.UPGrad())
    plain = fc.GradientBuffer(network(), LOSSES, sync=None)
    return gradient(model), made.absent, made.gramian, error_of(lambda: plain.backward_own(0, lambda: None))


def test_each_rank_may_backpropagate_a_loss_of_its_own(two: World) -> None:
    first, second = two.run(of_its_own)
    model = network()
    buf = fc.GradientBuffer(model, LOSSES)
    losses = losses_of(model(batch()))
    buf.backward([losses[0], None, losses[2]])
    wanted = buf.combine(fc.UPGrad())
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1] == (1,)
    torch.testing.assert_close(first[0], gradient(model))
    torch.testing.assert_close(first[2], wanted.gramian)
    assert first[3].startswith("ValueError: backward_own is of a buffer with sync=group")


def several_ranks_of_a_loss(rank: int) -> Tensor:
    model = network()
    buf = fc.GradientBuffer(model, 2, sync=torch.distributed.group.WORLD)
    buf.backward_own(rank // 2, losses_of(model(part(batch(), rank % 2, 2)))[rank // 2])
    return buf.combine().gramian


def test_ranks_of_one_loss_are_averaged(four: World) -> None:
    model = network()
    buf = fc.GradientBuffer(model, 2)
    buf.backward(losses_of(model(batch()))[:2])
    for gramian in four.run(several_ranks_of_a_loss):
        torch.testing.assert_close(gramian, buf.combine().gramian)


def one_fails_where_rows_are_shared(rank: int, where: str) -> list:
    model = network()
    buf = fc.GradientBuffer(model, LOSSES, sync=torch.distributed.group.WORLD)
    x = part(batch(), rank, 2)

    def loss(i: int) -> Tensor:
        if rank == 1 and i == 1:
            raise ToldError("no labels")
        return losses_of(model(x))[i]

    def in_record() -> None:
        for i in range(LOSSES):
            with buf.record(i):
                loss(i).backward()

    cases = {
        "record": in_record,
        "backward": lambda: buf.backward([lambda i=i: loss(i) for i in range(LOSSES)]),
        "own": lambda: buf.backward_own(1, lambda: loss(1)),
        "combine": lambda: buf.combine(stale="nonsense" if rank else "use"),
        "check": lambda: buf.backward([torch.ones(2 - rank).sum().requires_grad_(rank == 0)] * LOSSES),
    }
    told = error_of(cases[where])
    nothing = error_of(buf.combine)
    buf.backward([losses_of(model(x))[0], None, losses_of(model(x))[2] if rank else None])
    made = buf.combine()
    return [told, nothing, gradient(model), made.absent]


@pytest.mark.parametrize("where", ["record", "backward", "own", "combine", "check"])
def test_a_rank_that_fails_where_rows_are_shared_ends_the_step_on_all(two: World, where: str) -> None:
    first, second = two.run(one_fails_where_rows_are_shared, where)
    errors = {"combine": "ValueError: stale must be", "check": "ValueError: losses[0] does not require grad"}
    error = errors.get(where, "ToldError: no labels")
    assert second[0].startswith(error)
    assert first[0].startswith(("RuntimeError: rank 1 raised ToldError", "ValueError: rank 1 raised ValueError"))
    assert first[1].startswith("RuntimeError: combine found nothing to combine")
    assert first[1] == second[1]
    assert torch.equal(first[2], second[2])
    assert first[3] == second[3] == (1,)


def sync_misused(rank: int) -> list[str]:
    everyone = torch.distributed.group.WORLD
    wrapped = nn.parallel.DistributedDataParallel(network())
    return errors_of(
        lambda: fc.GradientBuffer(wrapped, 2, sync=everyone),
        lambda: fc.GradientBuffer(network(), 2, sync=everyone, group=everyone),
        lambda: fc.GradientBuffer(laid_out("tensor", rank, 2)[0], 2, sync=everyone),
        lambda: fc.GradientBuffer(nn.Linear(2, 2 + rank), 2, sync=everyone),
    )


def test_sync_is_of_plain_replicas(two: World) -> None:
    for wrapped, both, sharded, other in two.run(sync_misused):
        assert wrapped.startswith("ValueError: sync= was given with a module within DistributedDataParallel")
        assert both.startswith("ValueError: sync and group were both given")
        assert sharded.startswith("ValueError: sync= is for plain replicas, and some parameters are DTensors")
        assert other.startswith("RuntimeError: sync= is for replicas, and rank 1 has other parameters than rank 0")


def refreshed(rank: int) -> tuple[tuple[int, ...], Tensor]:
    model = network()
    buf = fc.GradientBuffer(model, LOSSES, sync=torch.distributed.group.WORLD)
    buf.backward(losses_of(model(part(batch(), rank, 2))))
    model.frozen.requires_grad_()
    buf.refresh()
    nothing = error_of(buf.combine)
    assert nothing.startswith("RuntimeError: combine found nothing")
    buf.backward(losses_of(model(part(batch(), rank, 2))))
    buf.combine()
    model.frozen.requires_grad_(False)
    return tuple(buf.rows.shape), gradient(model)


def test_refresh_takes_in_what_is_new(two: World) -> None:
    for shape, grad in two.run(refreshed):
        assert shape == (LOSSES, 64)
        torch.testing.assert_close(grad, alone("config", 7)["grad"])


def monitored(rank: int, count: int, layout: str, folder: str) -> tuple:
    model, index, parts, _ = laid_out(layout, rank, count)
    buf = fc.GradientBuffer(model, LOSSES, sync=torch.distributed.group.WORLD if layout == "sync" else "auto")
    x = part(batch(), index, parts)
    with fc.ConflictMonitor(buf, csv=f"{folder}/run.csv", modules_every=1) as monitor:
        for _ in range(2):
            buf.backward([lambda i=i: losses_of(model(x))[i] for i in range(LOSSES)])
            buf.combine()
            monitor.step()
    monitor.plot(f"{folder}/run.png")
    by_parameter = buf.gramian(by="parameter")
    return {name.removeprefix("module."): k for name, k in by_parameter.items()}, repr(monitor.by_module())


@pytest.mark.parametrize("layout", layouts("sharded", "tensor", "ddp", "sync"))
def test_a_monitor_watches_all_ranks_and_writes_once(two: World, layout: str, tmp_path) -> None:
    first, second = two.run(monitored, 2, layout, str(tmp_path))
    hidden = 8 if layout == "tensor" else 7
    model = network(hidden)
    buf = fc.GradientBuffer(model, LOSSES)
    buf.backward(losses_of(model(batch())))
    wanted = buf.gramian(by="parameter")
    assert first[1] == second[1]
    assert first[0].keys() == second[0].keys() == wanted.keys()
    for name, gramian in wanted.items():
        assert torch.equal(first[0][name], second[0][name])
        torch.testing.assert_close(first[0][name], gramian, rtol=1e-9, atol=1e-9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.csv", "run.png"]
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 3


def reduced_by_hand(rank: int) -> tuple[Tensor, Tensor]:
    model = network()
    buf = fc.GradientBuffer(model, LOSSES, sync=None)
    buf.backward(losses_of(model(part(batch(), rank, 2))))
    torch.distributed.all_reduce(buf.block)
    buf.block.div_(2)
    buf.combine()
    return gradient(model), buf.block[:, buf.rows.shape[1] :]


def test_rows_can_be_reduced_by_their_user(two: World) -> None:
    for grad, padding in two.run(reduced_by_hand):
        torch.testing.assert_close(grad, alone("config", 7)["grad"])
        assert padding.numel()
        assert not padding.any()


def compiled_and_checkpointed(rank: int, layout: str) -> Tensor:
    """The same step with activations that are computed again, and by torch.compile."""
    from torch.utils.checkpoint import checkpoint

    model = laid_out(layout, rank, 2)[0]
    buf = fc.GradientBuffer(model, LOSSES, sync=torch.distributed.group.WORLD if layout == "sync" else "auto")
    x = part(batch(), rank, 2)
    buf.backward([lambda i=i: losses_of(checkpoint(model, x, use_reentrant=False))[i] for i in range(LOSSES)])
    buf.combine()
    again = gradient(model)
    compiled = torch.compile(model, backend="aot_eager")
    buf.backward([lambda i=i: losses_of(compiled(x))[i] for i in range(LOSSES)])
    buf.combine()
    return torch.stack([again, gradient(model)])


@pytest.mark.parametrize("layout", layouts("sharded", "ddp", "sync"))
def test_activation_checkpoints_and_compiled_models(two: World, layout: str) -> None:
    for grads in two.run(compiled_and_checkpointed, layout):
        for grad in grads:
            torch.testing.assert_close(grad, alone("config", 7)["grad"])


def described(rank: int) -> str:
    return collect_config()["processes"]


def test_the_configuration_tells_of_the_ranks(two: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert two.run(described) == ["rank 0 of 2, by gloo", "rank 1 of 2, by gloo"]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert described(0) == "one: torch.distributed is not initialised"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert described(0) == "one: torch.distributed is not initialised; a launcher says WORLD_SIZE=8"


def by_bfloat16(rank: int) -> tuple[Tensor, Tensor, list[str]]:
    everyone = torch.distributed.group.WORLD
    model = network()
    buf = fc.GradientBuffer(model, LOSSES, sync=everyone, wire_dtype=torch.bfloat16)
    buf.backward(losses_of(model(part(batch(), rank, 2))))
    buf.combine()
    return (
        gradient(model),
        buf.gramian(),
        errors_of(
            lambda: fc.GradientBuffer(network(), 2, sync=everyone, wire_dtype=torch.int8),
            lambda: fc.GradientBuffer(network(), 2, sync=None, wire_dtype=torch.bfloat16),
        ),
    )


def test_gradients_may_travel_in_bfloat16(two: World) -> None:
    first, second = two.run(by_bfloat16)
    wanted = alone("config", 7)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[0].bfloat16().double(), first[0])
    torch.testing.assert_close(first[1], wanted["gramian"], rtol=2e-2, atol=1e-2)
    assert 1e-6 < (first[0] - wanted["grad"]).norm() / wanted["grad"].norm() < 3e-2
    assert all(text.startswith("ValueError: wire_dtype must be None, or with sync=group") for text in first[2])


class Mixed(nn.Module):
    """Layers of two dtypes, one of them twice in the model, and heads outside of the buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.trunk.append(self.trunk[0])
        self.wide = nn.Linear(6, 5).double()
        self.heads = nn.ModuleList(nn.Linear(5, 1).double() for _ in range(LOSSES))

    def forward(self, x: Tensor) -> list[Tensor]:
        shared = self.wide(self.trunk(x.float()).double())
        return [head(shared).square().mean() for head in self.heads]


def mixed(rank: int | None, layout: str) -> list[Tensor]:
    if layout == "sharded":
        from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Mixed()
    if layout == "sharded":
        for part_of in (model.trunk, model.wide, *model.heads):
            fully_shard(part_of)
        fully_shard(model)
    inside = [*model.trunk.named_parameters(prefix="trunk"), *model.wide.named_parameters(prefix="wide")]
    buf = fc.GradientBuffer(inside, LOSSES, sync=torch.distributed.group.WORLD if layout == "sync" else "auto")
    x = batch() if rank is None else part(batch(), rank, 2)
    buf.backward(model(x))
    buf.combine(fc.UPGrad())
    if layout == "sync":  # what is outside is its user's
        for p in model.heads.parameters():
            p.grad = averaged(p.grad)
    grads = [p.grad for p in model.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


@since(2, 8, "fully_shard has wrong gradients of the tied layer, without us too")
@pytest.mark.parametrize("layout", ["sharded", "sync"])
def test_mixed_dtypes_tied_weights_and_heads_outside(two: World, layout: str) -> None:
    first, second = two.run(mixed, layout)
    wanted = mixed(None, "alone")
    assert len(wanted) == 2 + 2 + 2 + 2 * LOSSES  # the tied layer once
    for one, other, grad in zip(first, second, wanted, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, grad, rtol=1e-4, atol=1e-5 if grad.dtype == torch.float32 else 1e-6)


def learning_rates(rank: int) -> list[float]:
    model = network()
    buf = fc.GradientBuffer(model, LOSSES, sync=torch.distributed.group.WORLD)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = fc.ConflictAwareLR(optimizer, buf, threshold=0.9, shrink=0.5)
    for _ in range(3):
        buf.backward(losses_of(model(part(batch(), rank, 2))))
        buf.combine()
        optimizer.step()
        scheduler.step()
    return [float(rate) for rate in scheduler.get_last_lr()]


def test_the_learning_rate_that_follows_the_conflict_is_one(two: World) -> None:
    first, second = two.run(learning_rates)
    assert first == second
    assert first != [0.1]


def one_does_not_come(rank: int) -> str:
    """In a group of its own, whose connections are of no use afterwards."""
    group = torch.distributed.new_group()
    model = network()
    buf = fc.GradientBuffer(model, LOSSES, group=group)
    recorded_by_hand(rank, buf, model)
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)  # from here on one waits for nobody
    told = error_of(buf.combine) if rank == 0 else ""
    torch.distributed.barrier()
    return told


@since(2, 11, "the timeout of a group of gloo's stays what it was made with")
def test_a_rank_that_does_not_come_ends_the_others_wait_by_the_groups_timeout(two: World) -> None:
    told, _ = two.run(one_does_not_come)
    assert told.startswith(("RuntimeError", "DistBackendError"))
    assert "imed out" in told or "imeout" in told


def other_losses(rank: int, how: str) -> list:
    model = laid_out("ddp", rank, 2)[0] if how == "ddp" else network()
    everyone = torch.distributed.group.WORLD
    buf = fc.GradientBuffer(model, LOSSES, sync=everyone if how == "sync" else "auto")
    x = part(batch(), rank, 2)
    for loss in (0, 1 + rank):
        with buf.record(loss):
            losses_of(model(x))[loss].backward()
    told = error_of(buf.combine)
    buf.backward([lambda i=i: losses_of(model(x))[i] for i in range(LOSSES)])
    buf.combine()
    return [told, gradient(model)]


@pytest.mark.parametrize("how", ["ddp", "sync"])
def test_ranks_that_record_other_losses_are_told(two: World, how: str) -> None:
    answers = two.run(other_losses, how)
    for told, grad in answers:
        assert told.startswith("RuntimeError: the 2 ranks have recorded different losses for this step (loss 0 on 2, ")
        torch.testing.assert_close(grad, alone("config", 7)["grad"])


def micro_batches(rank: int, layout: str) -> Tensor:
    model = laid_out(layout, rank, 2)[0]
    buf = fc.GradientBuffer(model, LOSSES)
    for half in part(batch(), rank, 2).split(2):
        buf.backward([lambda i=i, x=half: losses_of(model(x))[i] / 2 for i in range(LOSSES)], accumulate=True)
    buf.combine()
    return gradient(model)


@pytest.mark.parametrize("layout", layouts("sharded", "ddp", "replicate"))
def test_micro_batches_add_up(two: World, layout: str) -> None:
    for grad in two.run(micro_batches, layout):
        torch.testing.assert_close(grad, alone("config", 7)["grad"])


def compiled_combination(rank: int) -> Tensor:
    model = laid_out("sharded", rank, 2)[0]
    buf = fc.GradientBuffer(model, LOSSES)
    buf.backward(losses_of(model(part(batch(), rank, 2))))
    torch.compile(lambda: buf.combine(), backend="eager")()
    return gradient(model)


@FSDP2
def test_a_compiled_step_combines_outside_of_its_graph(two: World) -> None:
    for grad in two.run(compiled_combination):
        torch.testing.assert_close(grad, alone("config", 7)["grad"])


def overflowed(rank: int, sharded: bool) -> list[bool]:
    """A row that overflowed, which the method drops, is left for a scaler to find on every rank."""
    model = network()
    buf = fc.GradientBuffer(model, LOSSES, sync=torch.distributed.group.WORLD)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x = part(batch(), rank, 2)
    buf.backward(list(scaler.scale(losses_of(model(x)))))
    if rank == 1:
        buf.rows[1, 3] = torch.inf
    buf.combine(fc.ConFIG(nonfinite="drop"), scaler=scaler, sharded=sharded)
    (segment,) = buf.segments
    return [bool((segment.share if sharded else gradient(model)).isfinite().all()), bool(buf.combination.weights[1])]


@pytest.mark.parametrize("sharded", [False, True])
def test_an_overflow_that_is_dropped_is_found_on_every_rank(two: World, sharded: bool) -> None:
    assert two.run(overflowed, sharded) == [[False, False]] * 2


def test_what_was_made_before_the_processes_met_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    buf, optimizer = fc.GradientBuffer(model, LOSSES), fc.optim.MConFIG(network(), num_losses=LOSSES)
    buf.backward(losses_of(model(batch())))
    monkeypatch.setattr(processes, "world", lambda: "several")
    assert error_of(buf.combine).startswith("RuntimeError: combine: torch.distributed runs several processes now")
    assert error_of(optimizer.step).startswith("RuntimeError: step: torch.distributed runs several processes now")
    monkeypatch.undo()
    assert error_of(buf.combine) == ""


def by_buckets(rank: int, case: str) -> list:
    """Every parameter travels by itself, and something happens to a gradient that has been sent."""
    exchange.BUCKET_BYTES = 1
    try:
        model = network()
        buf = fc.GradientBuffer(model, LOSSES, sync=torch.distributed.group.WORLD)
    finally:
        exchange.BUCKET_BYTES = 25 << 20
    x = part(batch(), rank, 2)
    (segment,) = buf.segments
    assert len(segment.buckets) == len(segment.parameters) == 7

    def record(i: int) -> None:
        with buf.record(i):
            loss = losses_of(model(x))[i]
            if case == "two passes":
                (loss / 4).backward(retain_graph=True)
                (3 * loss / 4).backward()
                return
            loss.backward()
            if case == "changed" and rank == 1:
                model.second.weight.grad.mul_(3.0)
                model.first.bias.grad = 2 * model.first.bias.grad
                model.scale.grad = None
            if case == "fails" and rank == 1 and i == 1:
                raise ToldError("after it was sent")

    if case == "own":
        buf.backward_own(rank, losses_of(model(batch()))[rank])
    elif case == "fails":
        told = errors_of(lambda: [record(i) for i in range(LOSSES)])
        assert "ToldError: after it was sent" in told[0]
        buf.backward(losses_of(model(x)))
    elif case == "all":
        buf.backward(losses_of(model(x)))
    else:
        for i in range(LOSSES):
            record(i)
    made = buf.combine(fc.GradDrop() if case == "all" else fc.UPGrad())
    parts = buf.gramian(by="parameter")
    assert torch.allclose(sum(parts.values()), made.gramian)
    grad = gradient(model)
    buf.combine(fc.UPGrad(), sharded=True, stale="use")
    assert sum(count for _, _, count in segment.runs) + 64 >= segment.n // 2
    return [grad, made.gramian]


@pytest.mark.parametrize("case", ["all", "two passes", "changed", "fails", "own"])
def test_buckets_bring_what_a_gradient_is_when_the_block_ends(two: World, case: str) -> None:
    torch.manual_seed(0)
    (grad, gramian), other = two.run(by_buckets, case)
    assert torch.equal(grad, other[0])
    assert torch.equal(gramian, other[1])
    model = network()
    buf = fc.GradientBuffer(model, LOSSES)
    if case == "own":
        losses = losses_of(model(batch()))
        buf.backward([losses[0], losses[1], None])
    elif case == "changed":
        for i in range(LOSSES):
            with buf.record(i):
                losses_of(model(batch()[:4]))[i].backward()
                half = [p.grad / 2 for p in model.parameters() if p.requires_grad]
                model.zero_grad()
                losses_of(model(batch()[4:]))[i].backward()
                model.second.weight.grad.mul_(3.0)
                model.first.bias.grad.mul_(2.0)
                model.scale.grad.zero_()
                for p, other_half in zip([p for p in model.parameters() if p.requires_grad], half, strict=True):
                    p.grad = p.grad / 2 + other_half
    else:
        buf.backward(losses_of(model(batch())))
    wanted = buf.combine(fc.UPGrad())
    torch.testing.assert_close(gramian, wanted.gramian)
    if case != "all":  # whose draws are by the column of the whole model, and of a seed of rank 0
        torch.testing.assert_close(grad, gradient(model))


def without_labels(rank: int) -> tuple[Tensor, tuple[int, ...], str]:
    """One rank has no labels at all; then none has."""
    model = network()
    buf = fc.GradientBuffer(model, LOSSES, sync=torch.distributed.group.WORLD)
    buf.backward([None] * LOSSES if rank else losses_of(model(batch())))
    made = buf.combine()
    grad = gradient(model)
    buf.backward([None] * LOSSES)
    return grad, made.absent, error_of(buf.combine)


def test_a_rank_without_any_labels_takes_part(two: World) -> None:
    for grad, absent, nothing in two.run(without_labels):
        torch.testing.assert_close(grad, alone("config", 7)["grad"] / 2)
        assert absent == ()
        assert nothing.startswith("RuntimeError: combine found nothing to combine: every loss was absent")


def stepped_by_nothing(rank: int) -> list[str]:
    model = network()
    buf = fc.GradientBuffer(model, LOSSES, sync=torch.distributed.group.WORLD)
    buf.backward(losses_of(model(part(batch(), rank, 2))))
    buf.combine(sharded=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    return [str(warning.message) for warning in said]


def test_an_optimizer_that_steps_by_no_gradient_is_told(two: World) -> None:
    for said in two.run(stepped_by_nothing):
        assert any("after combine(sharded=True)" in message for message in said)
