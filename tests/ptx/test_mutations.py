"""Kernels with what orders them taken out must fail on the emulator: else its silence would say nothing."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from fastconfig.kernels import geometry
from kernel_problems import assert_gramian, assert_solved, combined, fresh_workspaces, problem, small_programs
from triton.runtime.jit import JITFunction

import fastconfig as fc
from fastconfig.backends import reference
from fastconfig.backends import triton as backend
from ptx import EMULATED

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not EMULATED, reason="of the emulator: `make test` runs it in a process of its own"),
    pytest.mark.usefixtures("poisoned_memory", "one_thread", fresh_workspaces.__name__),
]
SCHEDULES = 4
"""Orders of programs and warps that are tried before a fault counts as not noticed."""
BARRIER = re.compile(r"bar\.sync\s+0;")


class Mutants:
    """Launches of kernels that were edited after they were compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ptx.launching import Emulator

        self.monkeypatch, self.make = monkeypatch, lambda edit: Emulator(int(EMULATED.removeprefix("sm_")), edit)

    def notice(self, edit: Callable[[str], str], call: Callable[[], None]) -> bool:
        """Whether the edited kernels fault, race, or compute something else, in one of several schedules."""
        from ptx.emulator import EmulationError

        self.monkeypatch.setattr(JITFunction, "run", JITFunction.run)  # put back when the test ends
        self.make(edit).install()
        for _ in range(SCHEDULES):
            self.monkeypatch.setattr(backend, "_WORKSPACES", {})
            try:
                call()
            except (EmulationError, AssertionError):
                return True
        return False


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> Mutants:
    return Mutants(monkeypatch)


def few() -> None:
    """Four programs, two levels of the reduction."""
    rows = problem(3, 1500)
    assert_solved(rows, combined(rows))


def many() -> None:
    rows = problem(20, 300)
    assert_gramian(backend.gramian(rows), rows)


CALLS = {"few": few, "many": many}


@pytest.mark.usefixtures(small_programs.__name__)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_kernels_that_are_left_alone_pass(call: Callable[[], None], mutants: Mutants) -> None:
    assert not mutants.notice(str, call)


@pytest.mark.usefixtures(small_programs.__name__)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_ticket_that_orders_nothing_is_noticed(call: Callable[[], None], mutants: Mutants) -> None:
    assert mutants.notice(lambda ptx: ptx.replace("atom.global.gpu.acq_rel", "atom.global.gpu.relaxed"), call)


@pytest.mark.usefixtures(small_programs.__name__)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_ticket_before_its_store_is_noticed(call: Callable[[], None], mutants: Mutants) -> None:
    assert mutants.notice(ticket_first, call)


def ticket_first(ptx: str) -> str:
    """The last store to global memory before the first ticket, behind it."""
    ticket = re.search(r"^.*atom\.global\.gpu.*$", ptx, re.MULTILINE)
    if ticket is None:
        return ptx
    *_, store = re.finditer(r"^.*st\.global.*$", ptx[: ticket.start()], re.MULTILINE)
    between = ptx[store.end() : ticket.end()]
    return ptx[: store.start()] + between + "\n" + store[0] + ptx[ticket.end() :]


@pytest.mark.parametrize("warps", [4, 8])
def test_a_missing_barrier_before_the_tickets_is_noticed(
    warps: int, mutants: Mutants, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What puts all threads' partial sums before the ticket that one of them takes."""
    monkeypatch.setattr(geometry, "ONE_LAUNCH_BYTES", 0)
    monkeypatch.setattr(geometry, "few", lambda m: (geometry.Few(warps=warps, unroll=1, programs=4, group=2),))
    rows = problem(8, 4 * 32 * warps * 5)

    def call() -> None:
        assert_gramian(backend.gramian(rows), rows)

    assert not mutants.notice(str, call)
    assert mutants.notice(without_barriers_before_tickets, call)


def without_barriers_before_tickets(ptx: str) -> str:
    """Without the barriers between a store to global memory and the ticket behind it."""
    for ticket in reversed(list(re.finditer(r"atom\.global\.gpu", ptx))):
        stored = ptx.rindex("st.global", 0, ticket.start())
        ptx = ptx[:stored] + BARRIER.sub("", ptx[stored : ticket.start()]) + ptx[ticket.start() :]
    return ptx


@pytest.mark.parametrize("m", [3, 17])
def test_most_barriers_of_the_solve_are_missed(m: int, mutants: Mutants) -> None:
    """One at a time: those that are not stand where a launch of this size has nothing to put in order."""
    regular = torch.eye(m, dtype=torch.float64) + 0.1
    singular = torch.ones(m, m, dtype=torch.float64)
    singular[0] = singular[:, 0] = 0.0
    singular[0, 0] = 1.0
    rule = fc.ConFIG().rule

    def call() -> None:
        for gramian in (regular, singular):
            torch.testing.assert_close(backend.config_weights(gramian, rule), reference.config_weights(gramian, rule))

    counts: list[int] = []

    def counted(ptx: str) -> str:
        counts.append(len(BARRIER.findall(ptx)))
        return ptx

    assert not mutants.notice(counted, call)
    noticed = [mutants.notice(lambda ptx, k=k: without(ptx, k), call) for k in range(counts[0])]
    assert sum(noticed) >= 0.8 * len(noticed)


def without(ptx: str, number: int) -> str:
    """Without one of its barriers."""
    found = list(BARRIER.finditer(ptx))[number]
    return ptx[: found.start()] + ptx[found.end() :]
