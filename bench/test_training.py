"""Timings of a training step, contender by contender, for pytest-benchmark; ``bench/run.py`` makes the table."""

import statistics
import time

import pytest
import torch
from training import CONTENDERS, MODELS, YARDSTICKS

import fastconfig as fc

MEASURED_SECONDS = 2.0
"""How long a case is timed, and how long it and its yardstick take turns; five steps at least."""


@pytest.fixture
def threads(request):
    """As many of torch's threads as the model asks for."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param or before)
    yield
    torch.set_num_threads(before)


def in_turns(step, yardstick, seconds):
    """What parts of both took, medians: they take turns, and nobody always follows the other."""
    parts: dict[str, list[float]] = {}
    stop, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < stop or turn < 5:
        pair = [("", step), ("yardstick ", yardstick)]
        for prefix, one in pair if turn % 2 else reversed(pair):
            for part, took in one().items():
                parts.setdefault(prefix + part, []).append(took)
        turn += 1
    return {part: statistics.median(times) for part, times in parts.items()}


@pytest.mark.filterwarnings("ignore")  # of the peers
@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize(
    ("model", "threads"),
    [(model, model.threads) for model in MODELS],
    ids=lambda value: getattr(value, "name", ""),
    indirect=["threads"],
)
def test_training(benchmark, model, threads, name):
    step = CONTENDERS[name](model)
    for _ in range(model.m + 1):  # M-ConFIG moves once every loss has been seen
        step()
    start = time.perf_counter()
    step()
    rounds = min(2000, max(5, round(MEASURED_SECONDS / (time.perf_counter() - start))))
    benchmark.pedantic(step, rounds=rounds)
    network = model.make()[0]
    n = sum(parameter.numel() for parameter in network.parameters())
    benchmark.extra_info.update(kind="training", m=model.m, n=n, dtype=model.name, contender=name)
    if name in YARDSTICKS:
        yardstick = YARDSTICKS[name](model)
        yardstick()
        took = in_turns(step, yardstick, 2 * MEASURED_SECONDS)
        benchmark.extra_info.update(over_backward=took["backward"] / took["yardstick backward"] - 1.0)
        benchmark.extra_info.update({"step_s": took["step"]} if "step" in took else {})


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_what_is_timed_is_right(model):
    """A buffer's step is the combination of what autograd gives for each loss."""
    torch.manual_seed(0)
    network, losses, _ = model.make()
    buffer = fc.GradientBuffer(network, model.m)
    values = losses()
    parameters = list(network.parameters())
    rows = []
    for loss in values:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for p, g in zip(parameters, grads, strict=True)
                ]
            )
        )
    buffer.backward(values)
    buffer.combine()
    torch.testing.assert_close(buffer.grad, fc.combine(torch.stack(rows)), rtol=1e-4, atol=1e-7)
