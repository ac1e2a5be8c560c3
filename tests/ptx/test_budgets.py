"""What the kernels cost, against what was recorded: a change that makes them dearer, or cheaper, is seen here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from triton.runtime.jit import JITFunction

from fastconfig.backends import triton as backend
from ptx import EMULATED

sys.path.append(str(Path(__file__).parents[2] / "bench"))

MARGIN = 1.03
"""Of the clock alone: where an array begins decides how many lines of the cache an access meets."""
COUNTED = ("instructions", "barriers")

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(EMULATED != "sm_90", reason="the budgets are of sm_90, on the emulator"),
]


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch):
    """The tool, with an emulator that counts, and what it recorded."""
    import budgets

    for owner, name in ((JITFunction, "run"), (backend, "device_of"), (backend, "_WORKSPACES")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back when the test ends
    recorded = json.loads(budgets.RESULTS.read_text())
    if recorded["triton"] != backend.triton.__version__:
        pytest.skip(f"recorded by Triton {recorded['triton']}")
    return budgets, budgets.counter(), recorded


@pytest.mark.parametrize(
    ("name", "m"), [("config", 3), ("config", 40), ("config, singular", 40), ("mgda", 40), ("nash", 3)]
)
def test_solves_cost_what_was_recorded(name: str, m: int, budgets) -> None:
    tool, counter, recorded = budgets
    cost, budget = tool.cost_of_solve(counter, name, m), recorded["solves"][name][str(m)]
    assert {key: cost[key] for key in COUNTED} == {key: budget[key] for key in COUNTED}
    assert all(cost[key] <= MARGIN * budget[key] + 0.1 for key in budget), (cost, budget)


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("name", ["gramian", "combination"])
def test_columns_cost_what_was_recorded(name: str, m: int, budgets) -> None:
    tool, counter, recorded = budgets
    assert tool.operations_a_column(counter, name, m)["float64"] <= recorded["float64 a column"][name][str(m)]


@pytest.mark.parametrize("m", [3, 40])
def test_columns_in_two_floats_cost_what_was_recorded(m: int, budgets) -> None:
    tool, counter, recorded = budgets
    assert tool.in_two_floats(counter, m) == recorded["gramian in two floats, a column"][str(m)]
