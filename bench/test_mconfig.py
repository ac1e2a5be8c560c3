"""Timings of one step of M-ConFIG, contender by contender, for pytest-benchmark; ``bench/run.py`` makes the table."""

import itertools
import statistics
import time

import pytest
from steps import STEP_CONTENDERS, STEP_SHAPES

MEASURED_SECONDS = 3.0
"""How long a case is timed, five steps at least."""


def in_turns(contender, floor, m: int) -> float:
    """Median time over the floor's, the two taking turns: a shared machine's memory changes its speed between cases."""
    times = {contender: [], floor: []}
    for turn in range(100):
        for one, kept in times.items():
            one.before(turn % m)
            start = time.perf_counter()
            one.step(turn % m)
            kept.append(time.perf_counter() - start)
    return statistics.median(times[contender]) / statistics.median(times[floor])


@pytest.mark.parametrize("name", STEP_CONTENDERS)
@pytest.mark.parametrize("shape", STEP_SHAPES, ids=lambda shape: shape.name)
def test_step(benchmark, shape, name):
    contender = STEP_CONTENDERS[name](shape)
    losses = itertools.cycle(range(shape.m))

    def prepare():
        loss = next(losses)
        contender.before(loss)
        return (loss,), {}

    for _ in range(shape.m):  # until every loss has been seen there is no update
        contender.step(*prepare()[0])
    arguments, _ = prepare()
    start = time.perf_counter()
    contender.step(*arguments)
    rounds = min(2000, max(5, round(MEASURED_SECONDS / (time.perf_counter() - start))))
    benchmark.pedantic(contender.step, setup=prepare, rounds=rounds)
    if name == "fastconfig":
        benchmark.extra_info.update(of_floor_in_turns=in_turns(contender, STEP_CONTENDERS["floor"](shape), shape.m))
    benchmark.extra_info.update(kind="step", m=shape.m, n=shape.n, dtype="float32", contender=name)
