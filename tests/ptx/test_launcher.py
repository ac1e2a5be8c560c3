"""What Triton's own launcher hands to the driver: recorded by a libcuda of ours, which launches nothing."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
from fastconfig.kernels import geometry, launched
from kernel_problems import fresh_workspaces

import fastconfig as fc
from fastconfig.backends import launching
from fastconfig.backends import triton as backend
from fastconfig.validation import check_rows
from ptx import EMULATED

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(EMULATED != "sm_90", reason="of compiled kernels: `make test` runs it in a process of its own"),
    pytest.mark.usefixtures("one_thread", fresh_workspaces.__name__),
]
STREAM = 77
PYTHON_CALLS = 34
"""Python functions that a combination in one launch may call, Triton's among them: 32 by Triton 3.9, 29 by 3.6."""


class Launch(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 64),
        *((name, ctypes.c_uint) for name in ("grid", "block", "shared_bytes")),
        ("stream", ctypes.c_ulonglong),
        ("parameters", ctypes.c_ulonglong * 32),
    )


class Recorder:
    """The library, and the launches since it was last asked."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.recorded_launch.restype = ctypes.POINTER(Launch)

    def of(self, call: Callable[[], object], parameters: int) -> list[Launch]:
        """What a call launches, and so many of each kernel's parameters, which must have them."""
        self.library.record_anew(parameters)
        call()
        count = self.library.recorded_launches()
        return [Launch.from_buffer_copy(self.library.recorded_launch(k).contents) for k in range(count)]

    @property
    def modules(self) -> int:
        """Compilations that were loaded."""
        return self.library.recorded_modules()


# For the whole process: Triton loads the first libcuda that it is shown, and records nothing in a second one.
@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, Path]:
    folder = tmp_path_factory.mktemp("libcuda")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_name("recording_libcuda.c")
    built = folder / "libcuda.so.1"
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-Wall", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, str(source), "-o", str(built)], check=True)
    (folder / "libcuda.so").symlink_to(built.name)
    return ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL), folder


@pytest.fixture(scope="session")
def nvidia(library: tuple[ctypes.CDLL, Path]):
    """Triton's driver for NVIDIA, as far as the library; for as long as there are kernels that it loaded."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    _, folder = library
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_LIBCUDA_PATH", str(folder))
        active = CudaDriver()
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device: STREAM
    active.get_device_capability = lambda device=0: (9, 0)
    active.set_current_device = lambda device: None
    driver.set_active(active)


@pytest.fixture
def recorder(library: tuple[ctypes.CDLL, Path], nvidia: None, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Triton's launches on the CPU's tensors."""
    from triton.runtime.jit import JITFunction

    from ptx.launching import ORIGINAL_RUN

    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(library[1]))
    monkeypatch.setattr(JITFunction, "run", ORIGINAL_RUN)
    monkeypatch.setattr(launching, "_KEPT", {})
    device = backend.describe(132, 32, nvidia=True, capability=(9, 0))
    monkeypatch.setattr(backend, "device_of", lambda _: device)
    for kernel in (launched.config_of_few, launched.config_of_many, launched.combination, launched.table_of_addresses):
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))  # nothing is compiled yet
    return Recorder(library[0])


def test_one_launch_has_the_arguments_of_the_call(recorder: Recorder) -> None:
    grads, out, before = torch.randn(3, 1000), torch.empty(1000), recorder.modules
    for _ in range(3):  # the first compiles it, the others launch what is kept
        (launch,) = recorder.of(lambda: fc.combine(grads, out=out, backend="triton"), 14)
        assert launch.name == b"config_of_few"
        assert (launch.grid, launch.block, launch.stream) == (1, 32 * geometry.one(3).warps, STREAM)
        assert list(launch.parameters[:3]) == [grads.data_ptr(), grads.stride(0), 1000]
        assert not any(launch.parameters[3:11])
        assert launch.parameters[13] == out.data_ptr()  # behind the Gramian and the weights; the rest is None
    assert recorder.modules == before + 1


def test_separate_vectors_are_addresses_of_one_kernel(recorder: Recorder) -> None:
    block, before = torch.randn(5000), recorder.modules
    for shift in (0, 1, 2, 3):
        rows = [block[shift + 1001 * i :][:1000] for i in range(3)]
        (launch,) = recorder.of(lambda rows=rows: fc.combine(rows, backend="triton"), 11)
        assert list(launch.parameters[3:11]) == [row.data_ptr() for row in rows] + [0] * 5
    assert recorder.modules == before + 1


def test_two_launches_fill_the_device(recorder: Recorder) -> None:
    grads, out = torch.randn(3, 1 << 20), torch.empty(1 << 20)
    few, combination = recorder.of(lambda: fc.combine(grads, out=out, backend="triton"), 13)
    assert [few.name, combination.name] == [b"config_of_few", b"combination"]
    launch = geometry.few(3)[0]
    assert few.grid == min(launch.programs * 132, (1 << 20) // (launch.warps * 32 * 4 * launch.unroll))
    assert combination.parameters[12] == out.data_ptr()
    assert few.stream == combination.stream == STREAM


def test_many_losses_read_a_table_that_is_written_once(recorder: Recorder) -> None:
    rows = [torch.randn(500) for _ in range(20)]
    first, second = (recorder.of(lambda: fc.gramian(rows, backend="triton"), 3) for _ in range(2))
    assert [launch.name for launch in first] == [b"table_of_addresses"] * 2 + [b"config_of_many"]
    assert [launch.name for launch in second] == [b"config_of_many"]


def test_a_launch_calls_few_python_functions(recorder: Recorder) -> None:
    """The host's time, as a number that is the same on every machine."""
    rows, out, rule = check_rows(torch.randn(3, 1000)), torch.empty(1000), fc.ConFIG().rule
    backend.config_combine(rows, rule, out)
    names: list[str] = []

    def note(frame, event: str, argument: object) -> None:
        if event == "call":
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        backend.config_combine(rows, rule, out)
    finally:
        sys.setprofile(None)
    assert 0 < len(names) <= PYTHON_CALLS, names
