"""Timings of a training step, contender by contender, for pytest-benchmark; ``bench/run.py`` makes the table."""

import statistics
import time

import pytest
import torch
from training import CONTENDERS, LOSS_BY_LOSS, MODELS, YARDSTICKS, error_of

TURNS_SECONDS = 8.0
"""How long all contenders take turns on a model, five turns at least."""

YARDSTICK_SECONDS = 3.0
"""How long a contender and its yardstick do."""

MOST_TURNS = 300

RIGHT = {
    **dict.fromkeys(["fastconfig, buffer", "fastconfig, batched", "fastconfig, features"], 1e-5),
    **dict.fromkeys(["m backward passes, Adam", "Adam, summed loss"], 1e-5),
    **dict.fromkeys(["torchjd, ConFIG", "torchjd, UPGrad"], 1e-2),
}
"""How far a gradient may be from the float64 one; conflictfree's is as far as the table says."""


@pytest.fixture
def threads(request):
    """As many of torch's threads as the model asks for."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param or before)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def measured():
    """Of a model, what each contender's parts took; they take turns, so all are timed when the first is asked for."""
    kept = {}

    def of(model):
        if model not in kept:
            kept.clear()
            task = model.make()
            made = {name: ready(name, make, model) for name, make in CONTENDERS.items()}
            steps = {name: step for name, step in made.items() if step is not None}
            times = in_turns(steps, model.kinds, TURNS_SECONDS)
            kept[model] = times, task.m, sum(parameter.numel() for parameter in task.network.parameters())
        return kept[model]

    return of


def ready(name, make, model):
    """A contender's step on a task of its own, begun, so that every loss has been seen; the first one is next.

    None where the contender has none for this model.
    """
    task = model.make()
    step = make(task)
    if step is None:
        return None
    for _ in range(task.m if name in LOSS_BY_LOSS else model.kinds):
        step()
    return step


def order_of(names, turn):
    """Which one begins rotates, and every other round goes backwards: nobody always follows the same one."""
    backwards, first = divmod(turn, len(names))
    order = names[first:] + names[:first]
    return order[::-1] if backwards % 2 else order


def in_turns(steps, kinds, seconds):
    """Of each step and part, the times in seconds, a list a kind of loss.

    A loss of every kind is a turn's worth, so that each kind sees every order.
    """
    names = list(steps)
    times = {name: {} for name in names}
    stop, turn = time.perf_counter() + seconds, 0
    while turn < MOST_TURNS and (time.perf_counter() < stop or turn < 5 or turn % kinds):
        for name in order_of(names, turn // kinds):
            start = time.perf_counter()
            parts = steps[name]()
            parts["whole"] = time.perf_counter() - start
            for part, took in parts.items():
                times[name].setdefault(part, [[] for _ in range(kinds)])[turn % kinds].append(took)
        turn += 1
    return times


def mean_of(kinds, quantile=2):
    """The mean of the kinds' medians, or of another quartile. One median of losses of unlike cost is that of one."""
    return statistics.fmean(statistics.quantiles(times, n=4, method="inclusive")[quantile - 1] for times in kinds)


@pytest.mark.filterwarnings("ignore")  # of the peers
@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize(
    ("model", "threads"),
    [(model, model.threads) for model in MODELS],
    ids=lambda value: getattr(value, "name", ""),
    indirect=["threads"],
)
def test_training(benchmark, measured, model, threads, name):
    times, m, n = measured(model)
    if name not in times:
        pytest.skip("its losses have no features in common")
    whole = times[name]["whole"]
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(kind="training", m=m, n=n, dtype=model.name, contender=name)
    quartiles = [mean_of(whole, 1), mean_of(whole, 3)]
    benchmark.extra_info.update(median_override_s=mean_of(whole), quartiles_override_s=quartiles)
    benchmark.extra_info.update(rounds_override=sum(map(len, whole)))
    if (error := error_of(name, model)) is not None:
        benchmark.extra_info.update(error=error)
        assert error < RIGHT.get(name, float("inf"))
    if name in YARDSTICKS:
        pair = {"one": CONTENDERS[name], "yardstick": YARDSTICKS[name]}
        took = in_turns({key: ready(name, make, model) for key, make in pair.items()}, model.kinds, YARDSTICK_SECONDS)
        mine, least = mean_of(took["one"]["backward"]), mean_of(took["yardstick"]["backward"])
        benchmark.extra_info.update(over_backward=mine / least - 1.0, combine_s=mean_of(took["one"]["combine"]))


@pytest.mark.filterwarnings("ignore")  # of conflictfree
def test_mconfig_moves_as_conflictfree_does():
    """On the demo's network, where conflictfree's answer is right; both learn by the same losses."""
    moved = []
    for name in LOSS_BY_LOSS:
        task = MODELS[0].make()
        before = torch.nn.utils.parameters_to_vector(task.network.parameters()).detach().clone()
        step = CONTENDERS[name](task)
        for _ in range(4 * task.m):
            step()
        moved.append(torch.nn.utils.parameters_to_vector(task.network.parameters()).detach() - before)
    assert (moved[0] - moved[1]).norm() < 1e-2 * moved[1].norm()
    assert moved[1].norm() > 0


@pytest.mark.parametrize("kinds", [1, 3])
def test_nobody_always_goes_first(kinds):
    """For each kind of loss, every contender begins as often as any other; no time is measured."""
    begun, turns = [], [0]

    def step(name):
        def of_name():
            if turns[0] % 2 == 0:
                begun.append(name)
            turns[0] += 1
            return {}

        return of_name

    times = in_turns({"one": step("one"), "other": step("other")}, kinds, 0.0)
    assert len(begun) == 5 + -5 % kinds == sum(map(len, times["one"]["whole"]))
    for kind in range(kinds):
        assert len(set(begun[kind::kinds])) == 2
