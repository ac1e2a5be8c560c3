"""Large blocks of the library's own ask for huge pages; nothing else does, and nothing in them changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastconfig as fc
from fastconfig.backends import cpu
from fastconfig.conflictfree.momentum_operator import PseudoMomentumOperator
from fastconfig.gradients import memory

LARGE = memory.HUGE_BYTES // 4
"""Float32 elements of a large block."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def advised(monkeypatch):
    """The blocks for which huge pages were asked, as (address, bytes)."""
    blocks = []
    ask = cpu.advise_huge_pages
    monkeypatch.setattr(cpu, "advise_huge_pages", lambda *block: blocks.append(block) or ask(*block))
    return blocks


def holds(blocks, tensor):
    return any(address <= tensor.data_ptr() < address + size for address, size in blocks)


def test_a_large_result_asks_and_a_small_one_or_one_that_is_given_does_not(advised):
    grads = torch.randn(2, LARGE)
    result = fc.combine(grads)
    assert advised == [(result.data_ptr(), 4 * LARGE)]
    assert torch.equal(result, fc.combine(grads, out=torch.empty(LARGE)))
    assert torch.equal(fc.combine(grads[:, :1000]), fc.combine(grads[:, :1000], out=torch.empty(1000)))
    assert len(advised) == 1


def test_rows_results_and_averages_ask(advised):
    weight = nn.Parameter(torch.zeros(LARGE))
    buf = fc.GradientBuffer([weight], 2)
    assert holds(advised, buf.rows)
    assert holds(advised, buf.grad)
    assert not buf.rows.any()
    optimizer = fc.optim.MConFIG([weight], num_losses=2)
    with optimizer.record(0):
        weight.sum().backward()
    assert holds(advised, weight.grad)
    optimizer.step()
    assert all(holds(advised, average) for average in optimizer.state[weight].values())


def test_the_drop_ins_results_ask(advised):
    vectors = [torch.randn(LARGE) for _ in range(2)]
    operator = PseudoMomentumOperator(2)
    for index, vector in enumerate(vectors):
        update = operator.calculate_gradient(index, vector)
    assert holds(advised, update)


def mapping_of(address: int) -> str:
    """What Linux says of the mapping that an address lies in."""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, end = (int(number, 16) for number in block.split(" ")[0].split("-"))
        if begin <= address < end:
            return block
    raise LookupError(address)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no transparent huge pages"
)
def test_the_system_takes_the_advice():
    block = memory.fresh(16 * LARGE, torch.float32, torch.device("cpu"))
    middle = block.data_ptr() + 2 * LARGE
    assert " hg" in mapping_of(middle).partition("VmFlags:")[2].splitlines()[0]
    assert not cpu.advise_huge_pages(block.data_ptr() + 1, 100)  # no whole page inside


def test_a_compiler_asks_for_no_address(advised):
    compiled = torch.compile(fc.combine, backend="eager", fullgraph=True)
    grads = torch.randn(2, LARGE)
    assert torch.equal(compiled(grads), fc.combine(grads))
    with torch._subclasses.FakeTensorMode():
        assert fc.combine(torch.randn(2, LARGE)).shape == (LARGE,)
