"""At the sizes where today's packages go wrong, and past 2³¹ elements. Each under 8 GiB of memory."""

import os
import subprocess
import sys

import pytest
import torch

import fastconfig as fc
from fastconfig.backends import cpu


def cosines(answer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """In float64, a row at a time."""
    answer = answer.to(torch.float64)
    return torch.stack([(row := r.to(torch.float64)) @ answer / row.norm() / answer.norm() for r in rows])


@pytest.mark.slow
def test_ten_million_parameters_at_scales_1_100_001_keep_equal_cosines():
    """Where pinv's cut at eps·n discards what distinguishes the losses, some of conflictfree's cosines are negative."""
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(3, 10_000_000, generator=generator)
    grads *= torch.tensor([[1.0], [100.0], [0.01]])
    found = cosines(fc.combine(grads), grads)
    assert found.min() > 0.5
    assert (found - found.mean()).abs().max() < 1e-4


@pytest.mark.slow
def test_more_than_two_to_the_31_elements_in_bfloat16():
    """m·n = 2³¹ + 96: offsets past 32 bits, checked where they differ: at the end of the last row."""
    m, n = 16, (1 << 27) + 6
    assert m * n > 1 << 31
    grads = torch.zeros(m, n, dtype=torch.bfloat16)
    for i in range(m):
        grads[i, i] = 1.0
        grads[i, n - m + i] = 2.0
    gramian = fc.gramian(grads)
    assert torch.equal(gramian, 5.0 * torch.eye(m, dtype=torch.float64))
    combined = fc.combine(grads)
    # m orthogonal gradients of equal norm: ConFIG is their sum.
    assert torch.equal(combined[:m], torch.ones(m, dtype=torch.bfloat16))
    assert torch.equal(combined[n - m :], torch.full((m,), 2.0, dtype=torch.bfloat16))
    assert not combined[m : n - m].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", cpu.tiers())
def test_rows_more_than_two_to_the_31_elements_apart(name):
    """The same offsets by a stride instead of by work: two short rows at the ends of 4 GiB of untouched memory."""
    before = cpu.active_tier()
    far = torch.empty((1 << 32) + 100, dtype=torch.uint8)
    rows = far[: (1 << 32) + 64].view(torch.bfloat16).as_strided((2, 32), ((1 << 31), 1))
    rows[0], rows[1] = 1.0, 3.0
    try:
        cpu.use_tier(name)
        assert torch.equal(fc.gramian(rows), torch.tensor([[32.0, 96.0], [96.0, 288.0]], dtype=torch.float64))
        assert torch.equal(fc.combine(rows), torch.full((32,), 4.0, dtype=torch.bfloat16))
    finally:
        cpu.use_tier(before)


PEAK = """
import torch, fastconfig as fc

def kib(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

grads = torch.ones(3, 10_000_000)
grads[1:] *= 2
fc.combine(grads[:, :1000])
with open("/proc/self/clear_refs", "w") as reset:
    before = kib("VmRSS")
    reset.write("5")
    reset.flush()
result = fc.combine(grads)
print((kib("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc for the resident peak")
def test_peak_memory_beyond_the_input_is_the_result():
    """Resident peak of one combine at (3, 1e7) float32: 40 MB of result, and next to nothing else.

    In a process of its own: one that ran other tests has memory to spare, and does not grow.
    """
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 40_000_000 <= int(done.stdout) <= 1.1 * 40_000_000
