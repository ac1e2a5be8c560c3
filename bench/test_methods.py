"""Timings of one combination, method by method, for pytest-benchmark; ``bench/run.py`` makes the table."""

import time

import pytest
import turns
from methods import CATALOGUE, METHOD_SHAPES, combination, rival

MEASURED_SECONDS = 1.5
"""How long a case is timed, and how long it and ConFIG take turns; five calls at least."""


@pytest.mark.filterwarnings("ignore")  # of the peers' solvers
@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("shape", METHOD_SHAPES, ids=lambda shape: shape.name)
def test_method(benchmark, gradients, shape, name):
    grads = gradients(shape)
    call = combination(name, grads)
    call()
    start = time.perf_counter()
    call()
    rounds = min(2000, max(5, round(MEASURED_SECONDS / (time.perf_counter() - start))))
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
    ours, config = turns.medians([call, combination("config", grads)], MEASURED_SECONDS)
    benchmark.extra_info.update(kind="method", m=shape.m, n=shape.n, dtype="float32", contender=name)
    benchmark.extra_info.update(of_config_in_turns=ours / config)
    if (theirs := rival(name, grads)) is not None:
        ours, peer = turns.medians([call, theirs], MEASURED_SECONDS, least=3)
        benchmark.extra_info.update(torchjd_s=peer, torchjd_in_turns=peer / ours)
