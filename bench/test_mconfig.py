"""Timings of one step of M-ConFIG, contender by contender, for pytest-benchmark; ``bench/run.py`` makes the table."""

import itertools
import time

import pytest
from steps import STEP_CONTENDERS, STEP_SHAPES

MEASURED_SECONDS = 3.0
"""How long a case is timed, five steps at least."""


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
    benchmark.extra_info.update(kind="step", m=shape.m, n=shape.n, dtype="float32", contender=name)
