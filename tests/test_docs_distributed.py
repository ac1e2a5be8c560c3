"""The blocks of docs/distributed.md run on two ranks, and the example in every layout."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from versions import FSDP2
from worlds import World, world_of

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "several_ranks.py"
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "distributed.md").read_text(), flags=re.MULTILINE)


def block_of(section: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL))


COMMON = block_of(SECTIONS[0])
BLOCKS = {section.partition("\n")[0]: block_of(section) for section in SECTIONS[1:] if "```python" in section}
TRAINED = {title for title, block in BLOCKS.items() if "for step" in block}

two = world_of(2)


def run(rank: int, block: str) -> tuple[Tensor, list[float], list[float]]:
    """The parameters after the block, and the losses before and after it."""
    names: dict = {}
    exec(compile(COMMON, "docs/distributed.md", "exec"), names)

    def losses() -> list[float]:
        with torch.no_grad():
            return [float(loss) for loss in names["losses_of"](names["model"](names["x"]))]

    before = losses()
    exec(compile(block, "docs/distributed.md", "exec"), names)
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in names["model"].parameters()]
    return torch.cat([p.detach().flatten() for p in parameters]), before, losses()


@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=FSDP2 if "fully_shard" in block else ()) for title, block in BLOCKS.items()]
)
def test_a_block_runs_and_trains_equally(two: World, title: str) -> None:
    (theta, before, after), (other, _, _) = two.run(run, BLOCKS[title])
    assert torch.equal(theta, other)
    if title in TRAINED:
        assert sum(after) < sum(before)


def test_every_way_to_train_has_a_block() -> None:
    ways = {"Sharded and split models", "Plain replicas", "One loss a rank", "DistributedDataParallel", "M-ConFIG"}
    assert ways <= TRAINED


def example(rank: int, layout: str) -> list[float]:
    del rank
    spec = importlib.util.spec_from_file_location("several_ranks", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train(layout, steps=12)


@FSDP2  # which the example imports
@pytest.mark.parametrize("layout", ["sync", "ddp", "fsdp", "tensor", "mconfig"])
def test_the_example_trains_in_every_layout(two: World, layout: str) -> None:
    """As one process does, which the example is without torchrun."""
    first, second = two.run(example, layout)
    assert first == second
    assert first == pytest.approx(example(0, layout), rel=1e-9)


@FSDP2
@pytest.mark.slow
def test_torchrun_runs_the_example() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run_by = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*run_by, str(EXAMPLE), "--layout", "fsdp", "--steps", "12"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    # gloo's threads now and then abort a process that has done all it had to do and leaves.
    assert done.returncode == 0 or "SIGABRT" in done.stderr, done.stderr
    value, slope, energy = (float(number) for number in re.findall(r"\d\.\d{6}", done.stdout))
    assert [value, slope, energy] == pytest.approx(example(0, "fsdp"), abs=1e-6)
