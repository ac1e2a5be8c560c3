"""Timings of memory that the library allocates: new results, and the first step of a buffer."""

import time

import pytest
import torch
import turns
from torch import nn

import fastconfig as fc

MEASURED_SECONDS = 3.0
SIZES = [4_000_000, 10_000_000]


def test_fresh_result(benchmark):
    """``fc.combine(grads)`` beside ``out=``."""
    grads, out = torch.randn(3, 10_000_000), torch.empty(10_000_000)
    for _ in range(10):  # a virtual machine's host backs huge pages at their first use
        fc.combine(grads)
    benchmark.pedantic(lambda: fc.combine(grads), rounds=50, warmup_rounds=1)
    new, given = turns.medians([lambda: fc.combine(grads), lambda: fc.combine(grads, out=out)], MEASURED_SECONDS)
    benchmark.extra_info.update(kind="fresh", m=3, n=10_000_000, dtype="float32", contender="a new result, / out=")
    benchmark.extra_info.update(of_other_in_turns=new / given)


@pytest.mark.parametrize("n", SIZES)
def test_fresh_buffer(benchmark, n):
    """A buffer's first step beside its tenth."""
    width = round((n / 4) ** 0.5)
    model = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(width, width), nn.Tanh())])
    x = torch.randn(64, width)

    def losses():
        return [(part - i).square().mean() for i, part in enumerate(model(x).chunk(3, dim=1))]

    ratios, firsts = [], []
    for _ in range(7):
        torch.stack(losses()).sum().backward()
        model.zero_grad()
        buffer, times = fc.GradientBuffer(model, 3), []
        for _ in range(10):
            values = losses()
            start = time.perf_counter()
            buffer.backward(values)
            buffer.combine()
            times.append(time.perf_counter() - start)
        firsts.append(times[0])
        ratios.append(times[0] / times[9])
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(kind="fresh", m=3, n=n, dtype="float32", contender="a buffer's first step, / its tenth")
    benchmark.extra_info.update(of_other_in_turns=sorted(ratios)[3], median_override_s=sorted(firsts)[3])
