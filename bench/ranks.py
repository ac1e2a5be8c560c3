"""What travels between ranks in a training step on several losses, counted, beside what it should be.

``.venv/bin/python bench/ranks.py``: W processes on this machine's loopback, whose counters tell the bytes: those of the
kernel, so everything that is sent, headers and all; nothing else may use the loopback meanwhile. Time is told, too, but
is that of a loopback and of W processes on this machine's cores.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastconfig as fc

LOSSES, WIDTH, DEPTH = 4, 1000, 4
STEPS, WARM_UP = 5, 2
HERE = Path(__file__).parent
Step = Callable[[], object]


def network() -> nn.Sequential:
    """Some 4e6 parameters."""
    torch.manual_seed(0)
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers)


def losses_of(out: Tensor) -> list[Tensor]:
    return [(part - i).square().mean() for i, part in enumerate(out.chunk(LOSSES, dim=1))]


def apart(model: nn.Module, x: Tensor) -> list[Callable[[], Tensor]]:
    """A forward pass a loss."""
    return [lambda i=i: losses_of(model(x))[i] for i in range(LOSSES)]


def ways(count: int, x: Tensor) -> Iterator[tuple[str, float, Callable[[], Step]]]:
    """Each way to step: its name, how many times n elements a rank should send, and what makes it."""
    half = (count - 1) / count

    def summed() -> Step:
        model = nn.parallel.DistributedDataParallel(network())
        return lambda: sum(losses_of(model(x))).backward()

    def ddp() -> Step:
        model = nn.parallel.DistributedDataParallel(network())
        buf = fc.GradientBuffer(model, LOSSES)
        return lambda: (buf.backward(apart(model, x)), buf.combine())

    def by_hand() -> Step:
        model = network()
        buf = fc.GradientBuffer(model, LOSSES, sync=None)
        return lambda: (buf.backward(losses_of(model(x))), dist.all_reduce(buf.block), buf.combine())

    def sync() -> Step:
        model = network()
        buf = fc.GradientBuffer(model, LOSSES, sync=dist.group.WORLD)
        return lambda: (buf.backward(losses_of(model(x))), buf.combine())

    def sharded() -> Step:
        model = network()
        buf = fc.GradientBuffer(model, LOSSES, sync=dist.group.WORLD)
        return lambda: (buf.backward(losses_of(model(x))), buf.combine(sharded=True))

    def own() -> Step:
        model = network()
        buf = fc.GradientBuffer(model, LOSSES, sync=dist.group.WORLD)
        task = dist.get_rank() % LOSSES
        return lambda: (buf.backward_own(task, losses_of(model(x))[task]), buf.combine())

    def mconfig(*, wrapped: bool) -> Step:
        model = nn.parallel.DistributedDataParallel(network()) if wrapped else network()
        optimizer = fc.optim.MConFIG(model, num_losses=LOSSES, sync="auto" if wrapped else dist.group.WORLD)

        def step() -> None:
            loss = int(optimizer.next_loss())
            with optimizer.record(loss):
                losses_of(model(x))[loss].backward()
            optimizer.step()

        return step

    def fsdp() -> Step:
        from torch.distributed.fsdp import fully_shard

        model = network()
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, reshard_after_forward=False)
        fully_shard(model)
        buf = fc.GradientBuffer(model, LOSSES)
        return lambda: (buf.backward(losses_of(model(x))), buf.combine())

    yield "summed loss, DDP", 2 * half, summed
    yield "DDP, m forward passes", 2 * half * LOSSES, ddp
    yield "rows all-reduced by hand", 2 * half * LOSSES, by_hand
    yield "sync=group", half * (LOSSES + 1), sync
    yield "sync=group, sharded=True", half * LOSSES, sharded
    yield "backward_own", half * 2, own
    yield "M-ConFIG, DDP", 2 * half, partial(mconfig, wrapped=True)
    yield "M-ConFIG, sync=group", 2 * half, partial(mconfig, wrapped=False)
    yield "FSDP2, gathered once", half * (1 + 2 * LOSSES), fsdp  # gloo scatters what it reduces by an all-reduce


def sent_on_the_loopback() -> int:
    """Bytes since the machine was started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    raise RuntimeError("/proc/net/dev knows no loopback")


def measured(rank: int, count: int, folder: str) -> None:
    """All ways, one after the other; rank 0 writes what it has seen."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", count), rank=rank, world_size=count)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(rank))
    n = sum(parameter.numel() for parameter in network().parameters())
    found = []
    for name, formula, make in ways(count, x):
        step = make()
        bytes_sent, seconds = [], []
        for i in range(WARM_UP + STEPS):
            dist.barrier()
            before, began = sent_on_the_loopback(), time.perf_counter()
            step()
            dist.barrier()
            if i >= WARM_UP:
                bytes_sent.append((sent_on_the_loopback() - before) / count / (4 * n))
                seconds.append(time.perf_counter() - began)
        found.append({"way": name, "formula": formula, "sent": median(bytes_sent), "ms": 1e3 * median(seconds)})
    if rank == 0:
        Path(f"{folder}/found.json").write_text(json.dumps({"ranks": count, "m": LOSSES, "n": n, "ways": found}))
        dist.barrier()
    else:
        dist.barrier()
    os._exit(0)  # past gloo's threads, whose end aborts a process now and then


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ranks.json")
    arguments = parser.parse_args()
    results = []
    for count in arguments.ranks:
        with TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(measured, (count, folder), nprocs=count)
            results.append(json.loads(Path(f"{folder}/found.json").read_text()))
    arguments.out.write_text(json.dumps({"torch": torch.__version__, "runs": results}, indent=1) + "\n")
    for result in results:
        table = Table(title=f"{result['ranks']} ranks, m = {result['m']}, n = {result['n']:,}, float32, gloo")
        for column in ("", "sent a rank and step, n elements", "by the formula", "of DDP's", "ms"):
            table.add_column(column, justify="left" if not column else "right")
        ddp = next(way["sent"] for way in result["ways"] if way["way"].startswith("DDP"))
        for way in result["ways"]:
            numbers = f"{way['sent']:.3f}", f"{way['formula']:.3f}", f"{way['sent'] / ddp:.2f}", f"{way['ms']:.0f}"
            table.add_row(way["way"], *numbers)
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
