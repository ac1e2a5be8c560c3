"""The sections on what a call costs beside moving memory: the host's time, its launches, and the first call."""

from __future__ import annotations

import cProfile
import os
import pstats
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from gpubench.inputs import combinations, gradients
from gpubench.processes import own_command
from gpubench.results import Run
from gpubench.shapes import SHAPES, SMALL, Shape
from gpubench.timing import Call, Timing, device_seconds, kernels_of


def measure_host(run: Run) -> None:
    """How long the Python call takes, while the device works on its own."""
    import fastconfig as fc

    shape = run.shrunk(Shape(3, 10_000))
    grads = gradients(shape, run, copies=1)[0]
    out, rows = torch.empty_like(grads[0]), list(grads)
    ways = {
        "combine(matrix, out=)": lambda: fc.combine(grads, out=out),
        "combine(matrix)": lambda: fc.combine(grads),
        "combine(vectors, out=)": lambda: fc.combine(rows, out=out),
        "torch.add(out=), for scale": lambda: torch.add(rows[0], rows[1], out=out),
    }
    if run.on_gpu:
        ways["one small Triton launch, for scale"] = small_launch(run.device)
    for name, call in ways.items():
        with run.case(name):
            run.add({**shape.labels, "what": name, **asdict(host_time(call, run, 2000 if run.on_gpu else 20))})
    with run.case("profile"):
        run.add({"what": "profile", "lines": profile_of(ways["combine(matrix, out=)"], 1000 if run.on_gpu else 5)})


def small_launch(device: torch.device) -> Call:
    from fastconfig.kernels import launched

    table = torch.empty(16, dtype=torch.int64, device=device)
    return lambda: launched.table_of_addresses[(1,)](table, 0, 16, *range(16), num_warps=1)


def host_time(call: Call, run: Run, times: int) -> Timing:
    for _ in range(20):
        call()
    taken = []
    for i in range(times):
        if i % 50 == 0:
            run.check_device()  # a full queue would make the host wait
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return Timing.of(taken)


def profile_of(call: Call, times: int) -> list[str]:
    """Where the host's time goes, the profiler's own cost included: microseconds a call in each function itself."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(times):
        call()
    profiler.disable()
    found = sorted(pstats.Stats(profiler).stats.items(), key=lambda item: -item[1][2])
    return [
        f"{stats[2] / times * 1e6:6.2f} µs  {stats[1] / times:4.1f} calls  {Path(where[0]).name}:{where[1]} {where[2]}"
        for where, stats in found[:25]
    ]


def measure_launches(run: Run) -> None:
    """Kernels of one call, by name, and their time on the device."""
    if not run.on_gpu:
        run.skip("all", "needs a GPU")
        return
    for shape in run.cases([*SMALL, *(shape for shape in SHAPES if shape.n >= 1_000_000)], 3.0):
        with run.case(shape):
            block = gradients(shape, run)
            kernels = kernels_of(combinations(block))
            if not kernels:
                raise RuntimeError("the profiler saw no kernel")
            run.add(
                {
                    **shape.labels,
                    "launches": sum(kernel["a_call"] for kernel in kernels),
                    "device_s": device_seconds(kernels),
                    "kernels": kernels,
                    "what": ", ".join(f"{k['kernel'][:40]} {k['median_us']:.1f} µs" for k in kernels),
                }
            )
            del block


def measure_first_call(run: Run) -> None:
    """The first combination of a process: with nothing compiled, and with the kernels in Triton's cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        for what in ("compiling", "from Triton's cache"):
            with run.case(what):
                command = own_command(run.device, "--first-call")
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
                if done.returncode:
                    raise RuntimeError(done.stderr[-500:])
                run.add({"what": what, "seconds": float(done.stdout.split()[-1])})


def first_call(device: torch.device) -> None:
    """Print the seconds that the first combination takes, in this new process, PyTorch being awake."""
    import fastconfig as fc

    grads = torch.randn(3, 1_000_000 if device.type == "cuda" else 1000, device=device)
    float((grads @ grads.T).sum())
    begin = time.perf_counter()
    fc.combine(grads)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(time.perf_counter() - begin)
