"""Kernels that are launched without Triton's search for them: always the one that was compiled for such a call."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from fastconfig.kernels import geometry
from kernel_problems import assert_gramian, assert_solved, combined, fresh_workspaces, problem
from test_triton_rules import NUMBERS, both, gramian_of, operand_of, rule_of
from triton.runtime.jit import JITFunction

import fastconfig as fc
from fastconfig.backends import launching
from fastconfig.backends import triton as backend
from ptx import EMULATED

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not EMULATED, reason="of the emulator: `make test` runs it in a process of its own"),
    pytest.mark.usefixtures("poisoned_memory", "one_thread", fresh_workspaces.__name__),
]


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch):
    """An emulator whose launches return what was compiled."""
    from ptx.launching import Emulator

    monkeypatch.setattr(JITFunction, "run", JITFunction.run)  # put back when the test ends
    monkeypatch.setattr(launching, "_KEPT", {})
    emulator = Emulator(int(EMULATED.removeprefix("sm_")), returns_kernels=True)
    emulator.install()
    return emulator


def combination(m: int, n: int, dtype: torch.dtype, layout: str, rule) -> None:
    rows = problem(m, n, dtype, layout)
    assert_solved(rows, combined(rows, rule), rule)


def gramian(m: int, n: int, dtype: torch.dtype, layout: str, rule) -> None:
    rows = problem(m, n, dtype, layout)
    assert_gramian(backend.gramian(rows), rows)


def weights(kind: str, m: int, preferred: bool, nonfinite: str) -> None:
    preferences = tuple(np.linspace(0.5, 1.5, m)) if preferred else None
    got, wanted = both(gramian_of(m), rule_of(kind, m, preferences, nonfinite), operand_of(kind, m))
    np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-9 * np.abs(wanted).max())


RULES = [
    fc.ConFIG().rule,
    fc.ConFIG(length="harmonic", nonfinite="drop").rule,
    fc.ConFIG(length=1).rule,
]


def test_calls_of_many_kinds_in_any_order(keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each twice: a compilation taken for another would read, or compute, something else."""
    monkeypatch.setattr(geometry, "ONE_LAUNCH_BYTES", 2000)
    calls = []
    for m, n in ((2, 100), (3, 100), (3, 900), (10, 100)):
        for i, (dtype, layout) in enumerate(
            ((torch.float32, "aligned"), (torch.float32, "vectors"), (torch.bfloat16, "contiguous"))
        ):
            calls.append((combination, m, n, dtype, layout, RULES[(m + i) % len(RULES)]))
        calls.append((gramian, m, n, torch.float32, "aligned", None))
    directed = [fc.ConFIG(weights=torch.linspace(0.5, 2.0, m)).rule for m in (2, 3)]
    calls += [(combination, len(rule.direction), 100, torch.float32, "aligned", rule) for rule in directed]
    for kind in ("constant", "pcgrad", "priority"):
        calls += [(weights, kind, 3, True, "propagate"), (weights, kind, 3, False, "drop")]
    assert {call[1] for call in calls if call[0] is weights} <= set(NUMBERS)
    twice = calls * 2
    random.Random(1).shuffle(twice)
    for call, *arguments in twice:
        call(*arguments)
    found = keeping.tally.searches
    for call, *arguments in calls:
        call(*arguments)
    assert keeping.tally.searches == found
    assert keeping.tally.launches >= 3 * found


def test_vectors_at_other_addresses_are_read_by_the_same_kernel(keeping) -> None:
    """Whatever their alignment, of which there are as many patterns as sets of vectors."""
    block = torch.randn(4000)
    for shift in range(6):
        rows = [block[shift * i + 500 * i :][:301] for i in range(3)]
        got = fc.combine(rows, backend="triton")
        torch.testing.assert_close(got, fc.combine(rows, backend="reference"))
    assert keeping.tally.specialisations == 2  # all aligned, and not


def test_strides_over_two_to_the_31_are_no_other_kind(keeping) -> None:
    block = torch.empty(0, dtype=torch.float16)
    torch.use_deterministic_algorithms(False)  # or PyTorch would fill, and so map, all of it
    block = torch.empty(2**32 + 900, dtype=torch.float16)
    for stride in (400, 2**32):
        rows = block.as_strided((2, 300), (stride, 1))
        rows.copy_(torch.randn(2, 300))
        got = fc.gramian(rows, backend="triton")
        torch.testing.assert_close(got, fc.gramian(rows, backend="reference"))
    assert keeping.tally.searches == 1
