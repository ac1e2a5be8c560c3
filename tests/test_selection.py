"""Which losses MConFIG backpropagates next."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from mconfig_oracle import parameters_of

import fastconfig as fc
from fastconfig.optim.selection import LossSelector

pytestmark = pytest.mark.usefixtures("one_thread")


def steps_of(selector: LossSelector, k: int, count: int) -> list[tuple[int, ...]]:
    return [tuple(selector.next() for _ in range(k)) for _ in range(count)]


@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 1), (3, 2), (4, 4), (5, 3)])
def test_in_order(m, k):
    drawn = [loss for step in steps_of(LossSelector("ordered", m, k, None), k, 20) for loss in step]
    assert drawn == [i % m for i in range(20 * k)]


SELECTIONS = {
    "random": "random",
    "weights": [1.0, 2.0, 0.5, 4.0, 1.0],
    "function": lambda drawn: [1.0 + count for count in drawn],
    "one only": [0.0, 0.0, 1.0, 0.0, 0.0],
}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_by_chance_all_losses_come_first_and_those_of_a_step_are_distinct(selection, k):
    for seed in range(20):
        selector = LossSelector(selection, 5, k, torch.Generator().manual_seed(seed))
        steps = steps_of(selector, k, 20)
        assert sorted(set(sum(steps, ())[:5] if k in (1, 5) else sum(steps[: math.ceil(5 / k)], ()))) == [0, 1, 2, 3, 4]
        assert all(len(set(step)) == k for step in steps)


def test_all_are_equally_likely_at_random():
    selector = LossSelector("random", 4, 1, torch.Generator().manual_seed(0))
    counts = Counter(selector.next() for _ in range(4000))
    deviation = math.sqrt(4000 * 0.25 * 0.75)
    assert all(abs(counts[i] - 1000) < 4 * deviation for i in range(4))
    firsts = Counter(LossSelector("random", 4, 1, torch.Generator().manual_seed(s)).next() for s in range(400))
    assert all(abs(firsts[i] - 100) < 4 * math.sqrt(75) for i in range(4))


@pytest.mark.parametrize("weights", [[1.0, 3.0, 0.0, 6.0], torch.tensor([1.0, 3.0, 0.0, 6.0]), (1, 3, 0, 6)])
def test_in_proportion_to_weights(weights):
    selector = LossSelector(weights, 4, 1, torch.Generator().manual_seed(0))
    assert {selector.next() for _ in range(4)} == {0, 1, 2, 3}
    counts = Counter(selector.next() for _ in range(4000))
    assert counts[2] == 0
    for i, share in ((0, 0.1), (1, 0.3), (3, 0.6)):
        assert abs(counts[i] - 4000 * share) < 4 * math.sqrt(4000 * share * (1 - share))


def test_a_function_is_told_how_often_each_was_drawn():
    """And so can give the losses in any order whatever."""
    told = []

    def least_drawn_last_first(drawn):
        told.append(drawn)
        fewest = min(drawn)
        last = max(i for i, count in enumerate(drawn) if count == fewest)
        return [float(i == last) for i in range(len(drawn))]

    selector = LossSelector(least_drawn_last_first, 3, 1, None)
    first = [selector.next() for _ in range(3)]
    assert sorted(first) == [0, 1, 2]
    assert [selector.next() for _ in range(6)] == [2, 1, 0, 2, 1, 0]
    assert told[-1] == (2, 3, 3)
    assert all(isinstance(drawn, tuple) for drawn in told)


def test_torch_manual_seed_decides_and_other_draws_do_not_disturb():
    def draw(disturb: bool) -> list[int]:
        torch.manual_seed(5)
        optimizer = fc.optim.MConFIG(parameters_of((2,)), num_losses=9, selection="random")
        drawn = []
        for _ in range(40):
            drawn.append(optimizer.next_loss())
            if disturb:
                torch.rand(3)
        return drawn

    assert draw(False) == draw(True)
    torch.manual_seed(6)
    other = fc.optim.MConFIG(parameters_of((2,)), num_losses=9, selection="random")
    assert [other.next_loss() for _ in range(40)] != draw(False)


def test_a_generator_is_drawn_from():
    drawn = [steps_of(LossSelector("random", 9, 1, torch.Generator().manual_seed(seed)), 1, 40) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_next_losses_are_as_many_as_a_step_takes():
    optimizer = fc.optim.MConFIG(parameters_of((2,)), num_losses=3, losses_per_step=2)
    assert [optimizer.next_losses() for _ in range(3)] == [(0, 1), (2, 0), (1, 2)]


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("after", [0, 3, 7, 20])
def test_a_state_goes_on_where_it_was(selection, after):
    """In the midst of a step, too; and it is a copy."""
    selector = LossSelector(selection, 5, 2, torch.Generator().manual_seed(1))
    for _ in range(after):
        selector.next()
    state = selector.state()
    wanted = [selector.next() for _ in range(40)]
    other = LossSelector(selection, 5, 2, torch.Generator().manual_seed(2))
    other.load(state)
    assert [other.next() for _ in range(40)] == wanted


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        ("sorted", ValueError, "selection.*'sorted'"),
        (3, TypeError, "selection.*3"),
        ([1.0], ValueError, "2 weights.*got 1"),
        ([1.0, -1.0], ValueError, "finite, 0 or more"),
        ([1.0, math.nan], ValueError, "finite, 0 or more"),
        ([0.0, 0.0], ValueError, "not all zero"),
    ],
)
def test_a_selection_that_cannot_be_is_refused_at_once(selection, error, message):
    with pytest.raises(error, match=message):
        fc.optim.MConFIG(parameters_of((2,)), num_losses=2, selection=selection)


def test_a_function_that_gives_no_weights_is_refused_when_it_is_asked():
    selector = LossSelector(lambda drawn: [1.0], 2, 1, None)
    selector.next()
    selector.next()
    with pytest.raises(ValueError, match="2 weights"):
        selector.next()


@pytest.mark.parametrize("generator", [0, torch.Generator])
def test_a_generator_that_is_none_is_refused(generator):
    with pytest.raises(TypeError, match="generator"):
        fc.optim.MConFIG(parameters_of((2,)), num_losses=2, generator=generator)
