"""What tests of the Triton kernels share: problems, what an answer is held to, launches that are small or counted."""

from __future__ import annotations

import math

import pytest
import torch
from fastconfig.kernels import geometry, launched
from guarded import assert_close_in_units, poisoned, row_of, rows_in_poison
from ptx import EMULATED
from torch import Tensor

import fastconfig as fc
from fastconfig.backends import reference
from fastconfig.backends import triton as backend
from fastconfig.backends.rows import Rows
from fastconfig.validation import check_rows

DEVICE = "cpu" if backend.INTERPRETED else "cuda"
COMPILED = bool(EMULATED) or not backend.INTERPRETED
"""The interpreter adds up threads' sums a number at a time, and takes seconds where compiled kernels take none."""
KERNELS = [
    "config_of_few",
    "config_of_many",
    "config_of_blocks",
    "config_of_gramian",
    "combination",
    "table_of_addresses",
]


@pytest.fixture
def fresh_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workspaces of its own, whose memory holds NaN (see ``poisoned_memory``)."""
    monkeypatch.setattr(backend, "_WORKSPACES", {})


@pytest.fixture
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 128 columns and groups of two programs, so that few columns take both levels of the reduction."""
    monkeypatch.setattr(geometry, "ONE_LAUNCH_BYTES", 0)
    monkeypatch.setattr(geometry, "few", lambda m: (geometry.Few(warps=1, unroll=1 + m % 2, programs=4, group=2),))
    many = geometry.many

    def few_programs(m: int, itemsize: int, lanes: int) -> tuple[geometry.Many, ...]:
        first = many(m, itemsize, lanes)[0]
        return (geometry.Many(first.left, first.right, first.depth, warps=1, programs=4, group=2),)

    monkeypatch.setattr(geometry, "many", few_programs)
    monkeypatch.setattr(geometry, "combination", lambda _: (geometry.Combination(programs=2, warps=1),))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched, in order."""
    names: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(launched, name)

        def __getitem__(self, grid: tuple[int, ...]):
            names.append(self.name)
            return self.kernel[grid]

    for name in KERNELS:
        monkeypatch.setattr(launched, name, Counted(name))
    return names


def problem(m: int, n: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Rows:
    return check_rows(rows_in_poison(m, n, dtype, layout, device=DEVICE))


def combined(rows: Rows, rule=None, offset: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The combination, K and c, all written to memory that held NaN; the neighbours of the output are untouched."""
    block, out = poisoned(rows.n, rows.dtype, offset, DEVICE)
    kept = torch.full((rows.m + 1, rows.m), math.nan, dtype=torch.float64, device=DEVICE)
    backend.config_combine(rows, fc.ConFIG().rule if rule is None else rule, out, kept[:-1], kept[-1])
    assert (block[: 8 + offset] == -1).all()
    assert (block[8 + offset + rows.n :] == -1).all()
    return out, kept[:-1], kept[-1]


def assert_gramian(got: Tensor, rows: Rows) -> None:
    wanted = reference.gramian(rows)
    norms = wanted.diagonal().sqrt()
    assert (got - wanted).abs().le(1e-13 * norms.outer(norms)).all()
    assert torch.equal(got, got.T)


def assert_combination(got: Tensor, rows: Rows, weights: Tensor) -> None:
    wanted = torch.empty_like(got)
    reference.apply(rows, weights, wanted)
    scale = sum(weights[i].abs() * row_of(rows, i).abs() for i in range(rows.m) if weights[i] != 0)
    assert_close_in_units(got, wanted, rows.dtype, torch.as_tensor(scale, device=DEVICE))


def assert_solved(rows: Rows, got: tuple[Tensor, Tensor, Tensor], rule=None) -> None:
    """K, c and the combination, each against the reference on what the kernels had before it."""
    out, k, c = got
    assert_gramian(k, rows)
    wanted = reference.config_weights(k, fc.ConFIG().rule if rule is None else rule)
    torch.testing.assert_close(c, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
    assert_combination(out, rows, c)
