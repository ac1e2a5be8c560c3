"""What several test files share: the backends that run here, poisoned memory, hypothesis' profile."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import random
import sys
from collections import Counter

# Before numpy is imported: its BLAS spins a second set of threads beside torch's, which costs seconds on two cores.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# Before a GPU's first matrix product, which PyTorch else refuses while fresh memory is filled (poisoned_memory).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# PyTorch keeps compiled graphs on disk for all processes, and 2.13 takes one of `grads` and `out` that overlap for one
# where they do not: a test would fail by what another has left there.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads would only wait for each other
    torch.set_num_threads(1)

# PyTorch's own Triton may be one whose interpreter cannot run every kernel: `make test` names a newer one.
if not torch.cuda.is_available() and os.environ.get("FASTCONFIG_TRITON"):
    sys.path.insert(0, os.path.abspath(os.environ["FASTCONFIG_TRITON"]))

# Before the kernels are imported: without a GPU, Triton's interpreter runs them, on the CPU's tensors; or, where an
# architecture is named, the emulator of tests/ptx does, as they are compiled for it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "0" if os.environ.get("FASTCONFIG_EMULATE") else "1")

from ptx import EMULATED

from fastconfig import backends
from fastconfig.backends import BACKENDS
from fastconfig.gradients import landing, sweep

# What PyTorch says once a process it says in every test: else the order in which they run would decide which one fails.
torch.set_warn_always(True)

if importlib.util.find_spec("hypothesis"):  # the tests that a bare machine with a GPU runs do without
    import hypothesis

    # The same examples in every run, so that a red test is a change in the code; no deadline, as CI machines stall.
    hypothesis.settings.register_profile(
        "fastconfig",
        deadline=None,
        derandomize=True,
        max_examples=50,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    # `make fuzz`: other ones every time, and as many as it says.
    hypothesis.settings.register_profile(
        "fuzz",
        parent=hypothesis.settings.get_profile("fastconfig"),
        derandomize=False,
        database=None,
        print_blob=True,
        max_examples=int(os.environ.get("FASTCONFIG_FUZZ") or 1),
    )
    hypothesis.settings.load_profile("fuzz" if os.environ.get("FASTCONFIG_FUZZ") else "fastconfig")

# test_cpu.py asserts that the compiled core is built; here a missing one only shortens the list.
BACKENDS_HERE = ["reference"] + (["cpu"] if BACKENDS["cpu"].available() is None else [])


@pytest.fixture(scope="session", params=BACKENDS_HERE)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that can run here, for ``fc.combine(..., backend=backend)``."""
    return request.param


@pytest.fixture
def interpreter():
    """Triton's interpreter where there is no GPU; before 3.9 it cannot run every kernel."""
    triton = backends.triton
    if triton.INTERPRETED and not triton.IMPORT_ERROR and not runs_every_kernel():
        pytest.skip("Triton's interpreter runs every kernel from 3.9 on; `make test` brings one")


def runs_every_kernel() -> bool:
    """Whether the installed Triton's interpreter does."""
    import triton

    return bool(EMULATED) or tuple(int(number) for number in triton.__version__.split(".")[:2]) >= (3, 9)


if EMULATED:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns of it; the kernels say what they want
    from ptx.launching import Emulator, Tally

    EMULATOR = Emulator(int(EMULATED.removeprefix("sm_")))
    EMULATOR.install()
    backends.triton.INTERPRETED = True  # on tensors of any device
    backends.triton.device_of = lambda device: EMULATOR.device

    @pytest.fixture
    def emulator() -> Emulator:
        """Where every launch of this process goes."""
        return EMULATOR

    @pytest.fixture(autouse=True)
    def schedule_of_the_test(request: pytest.FixtureRequest):
        """The same order of programs and warps whenever this test runs, and another one for each number asked for."""
        EMULATOR.random = random.Random(f"{os.environ.get('FASTCONFIG_EMULATE_SEED', '0')} {request.node.nodeid}")


def counted_here() -> dict[str, dict[str, int]]:
    """What this process has run: on the emulator, and of random inputs."""
    fuzz = sys.modules.get("test_fuzz")
    return {
        "emulated": dataclasses.asdict(EMULATOR.tally) if EMULATED else {},
        "fuzzed": dict(fuzz.FUZZED) if fuzz else {},
    }


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell it to the process that asked for the tests."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counted"] = counted_here()


COUNTED: list[dict[str, dict[str, int]]] = []


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_testnodedown(node) -> None:
    """A process has ended, or died without a word."""
    if hasattr(node, "workeroutput"):
        COUNTED.append(node.workeroutput["counted"])


def pytest_terminal_summary(terminalreporter) -> None:
    """What ran in all."""
    everywhere = [*COUNTED, counted_here()]
    if EMULATED:
        total = sum((Tally(**counted["emulated"]) for counted in everywhere), start=Tally())
        terminalreporter.write_line(f"{EMULATED}, Triton {backends.triton.triton.__version__}: {total}")
    fuzzed = sum((Counter(counted["fuzzed"]) for counted in everywhere), start=Counter())
    if fuzzed and os.environ.get("FASTCONFIG_FUZZ"):
        for name, count in fuzzed.items():
            terminalreporter.write_line(f"{count:10,} {name}")
        terminalreporter.write_line(f"{fuzzed.total():10,} random inputs")


@pytest.fixture
def poisoned_memory():
    """Memory that torch allocates without a value holds NaN, so an element that nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """One thread: at the sizes of these tests more of them only wait for each other, for seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def lstsq_by_svd(monkeypatch):
    """conflictfree's least squares by LAPACK's gelsd: the pivots of the default, gelsy, are uninitialised memory.

    PyTorch issue 187411: where that memory is not zero, the leading m columns, good or bad, decide the rank. In float32
    at (10, 1e4) one answer in a few hundred is 20 % off, which makes a poor oracle.
    """
    monkeypatch.setattr(torch.linalg, "lstsq", functools.partial(torch.linalg.lstsq, driver="gelsd"))


@pytest.fixture(params=["hooked", "collected", "collected in Python"])
def way_of_landing(request, monkeypatch):
    """Gradients go home in a hook, as large ones do, or when the block ends; then by the core or without it."""
    monkeypatch.setattr(landing, "HOOKED_BYTES", 0 if request.param == "hooked" else 1 << 60)
    if request.param == "collected in Python":
        monkeypatch.setattr(sweep, "Sweep", sweep.PlainSweep)
        monkeypatch.setattr(landing, "Copies", sweep.PlainCopies)
    return request.param
