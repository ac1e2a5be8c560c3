"""The loops of the documentation run, and train."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[1] / "docs" / "loops.md").read_text()
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)


def blocks_of(section: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


COMMON, *LOOPS = [("common", blocks_of(SECTIONS[0]))] + [
    (section.partition("\n")[0], blocks_of(section)) for section in SECTIONS[1:]
]


def run(code: str, names: dict) -> None:
    exec(compile(code, "docs/loops.md", "exec"), names)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("title", "blocks"), LOOPS, ids=[title for title, _ in LOOPS])
def test_a_loop_runs_and_lowers_the_losses(title, blocks):
    assert blocks, title
    names: dict = {}
    run(COMMON[1][0], names)
    untrained = names["Net"]
    for block in blocks:
        torch.manual_seed(0)
        for _ in range(3):  # epochs
            run(block if "model" not in names else re.sub(r"^model = Net\(\)\n", "", block, flags=re.MULTILINE), names)
        with torch.no_grad():
            after = torch.stack(names["losses_of"](names["model"], names["inputs"], names["targets"]))
            torch.manual_seed(0)
            before = torch.stack(names["losses_of"](untrained(), names["inputs"], names["targets"]))
        assert after.sum() < before.sum(), title
        del names["model"]
