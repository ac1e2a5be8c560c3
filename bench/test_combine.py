"""Timings of one combination, contender by contender, for pytest-benchmark; ``bench/run.py`` makes the table."""

import time
from pathlib import Path

import pytest
import torch
from contenders import CONTENDERS, FLOAT32_ONLY, SHAPES, quality

CASES = [
    pytest.param(shape, name, id=f"{shape.name}-{name}")
    for shape in SHAPES
    for name in CONTENDERS
    if shape.dtype is torch.float32 or name not in FLOAT32_ONLY
]
MEASURED_SECONDS = 3.0
"""How long a case is timed, five calls at least: a shared machine is slow for seconds at a time."""


def peak_growth(call) -> int | None:
    """Bytes by which a call raises the process's resident peak over what is resident before it (Linux only)."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    call()
    reset.write_text("5")
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_combination(benchmark, gradients, shape, name):
    grads = gradients(shape)
    call = CONTENDERS[name](grads)
    call()
    start = time.perf_counter()
    call()
    rounds = max(5, round(MEASURED_SECONDS / (time.perf_counter() - start)))
    answer = benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info.update(kind="combination", m=shape.m, n=shape.n, dtype=str(shape.dtype)[6:], contender=name)
    if name != "floor":
        found = quality(answer, grads)
        benchmark.extra_info.update(error=found.error, least_cosine=found.least_cosine, peak_bytes=peak_growth(call))
