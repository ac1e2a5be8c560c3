"""The sections on speed: of copies, of whole combinations beside their rivals, and of landing before them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from gpubench.accuracy import Truth, quality
from gpubench.inputs import combinations, gradients
from gpubench.results import Run
from gpubench.rivals import plain_torch, slow_contenders
from gpubench.shapes import COMPILED, LARGE_MODEL, SHAPES, SMALL, Shape
from gpubench.timing import Call, Timing, peak_bytes, time_calls, time_replays


def measure_bandwidth(run: Run) -> None:
    """Bytes a second of copies of a few sizes, each several times the second-level cache."""
    for megabytes in (512, 2048, 8192) if run.on_gpu else (1,):
        with run.case(f"{megabytes} MB"):
            source = torch.empty(megabytes << 18, dtype=torch.float32, device=run.device).normal_()
            target = torch.empty_like(source)
            timing = time_calls([lambda s=source, t=target: t.copy_(s)], run)
            moved = 2 * source.numel() * 4
            run.add({"megabytes": megabytes, "bytes_per_s": moved / timing.median_s, **asdict(timing)})
            del source, target


def measure_combination(run: Run) -> None:
    """fastconfig and plain PyTorch at every shape: time, accuracy, memory."""
    import fastconfig as fc

    for shape in map(run.shrunk, run.cases(SHAPES, 3.0)):
        with run.case(shape):
            block = gradients(shape, run)
            calls = combinations(block)
            truth = Truth.of(block[0])
            record = {**shape.labels, "contender": "fastconfig", "copies": len(block), **asdict(time_calls(calls, run))}
            record |= quality(calls[0](), block[0], truth)
            if run.on_gpu:
                unit = shape.n * shape.dtype.itemsize
                record["peak_n"] = peak_bytes(calls[0]) / unit
                record["peak_n_new_result"] = peak_bytes(lambda block=block: fc.combine(block[0])) / unit
            if run.bandwidth:
                record["floor_s"] = shape.floor_bytes / run.bandwidth
                record["of_bandwidth"] = record["floor_s"] / record["median_s"]
            run.add(record)
            del calls
            timing = time_calls([lambda grads=grads: plain_torch(grads) for grads in block], run, 0.15)
            record = {**shape.labels, "contender": "plain PyTorch", **asdict(timing)}
            run.add(record | quality(plain_torch(block[0]), block[0], truth))
            del block, truth


def measure_replays(run: Run) -> None:
    """Time on the device alone, by replaying a CUDA graph, where launching would hide it."""
    replay(run, "fastconfig", combinations)


def measure_plain_replays(run: Run) -> None:
    """The same for plain PyTorch, last: that its solve can be captured is not certain."""
    replay(run, "plain PyTorch", lambda block: [partial(plain_torch, grads) for grads in block[:100]])


def replay(run: Run, name: str, calls_of: Callable[[Tensor], list[Call]]) -> None:
    if not run.on_gpu:
        run.skip("all", "needs a GPU")
        return
    for shape in run.cases(SMALL, 3.0):
        with run.case(shape):
            timing = time_replays(calls_of(gradients(shape, run)), run)
            run.add({**shape.labels, "contender": name, **asdict(timing)})
        if run.tainted:
            return


def measure_alignment(run: Run) -> None:
    """Rows that begin anywhere, as an odd number of parameters has them, and the same rows 16 or 128 bytes apart."""
    for dtype, row_bytes in run.cases([(t, b) for t in (torch.float32, torch.bfloat16) for b in (1, 16, 128)], 3.0):
        shape = run.shrunk(Shape(3, LARGE_MODEL, dtype))
        with run.case(f"{shape}, rows {row_bytes} bytes"):
            block = gradients(shape, run, copies=1, row_bytes=row_bytes)
            record = {**shape.labels, "row_bytes": row_bytes, **asdict(time_calls(combinations(block), run, 0.15))}
            if run.bandwidth:
                record["of_bandwidth"] = shape.floor_bytes / run.bandwidth / record["median_s"]
            run.add(record)
            del block


def measure_landing(run: Run) -> None:
    """The ways a gradient lands in its row."""
    import landing

    sizes = [10_000, 10_000_000] if run.on_gpu else [10_000]
    if run.on_gpu and torch.cuda.mem_get_info()[0] > 40 << 30:
        sizes.append(100_000_000)
    for n in run.cases(sizes, 6.0):
        with run.case(n):
            for record in landing.measure(run.device, [n], 2.0, log=lambda _: None):
                run.add(record)


def measure_compiled(run: Run) -> None:
    """Plain PyTorch under torch.compile."""
    for shape in map(run.shrunk, run.cases(COMPILED, 25.0)):
        with run.case(shape):
            torch.compiler.reset()
            block = gradients(shape, run)
            compiled = torch.compile(plain_torch, dynamic=False)
            begin = time.perf_counter()
            compiled(block[0])
            run.check_device()
            compilation = time.perf_counter() - begin
            timing = time_calls([partial(compiled, grads) for grads in block], run, 0.15)
            run.add({**shape.labels, "contender": "compiled PyTorch", "compile_s": compilation, **asdict(timing)})
            del block


def measure_libraries(run: Run) -> None:
    """conflictfree and torchjd, from small problems to large ones for as long as a call is bearable."""
    contenders = slow_contenders(run)
    cost: dict[str, float] = {}  # seconds an element of the Gramian's work, from the last shape
    shapes = sorted((shape for shape in SHAPES if shape.dtype is torch.float32), key=lambda s: s.m**2 * s.n)
    for shape in map(run.shrunk, shapes):
        for name, combine in contenders.items():
            expected = cost.get(name, 0.0) * shape.m**2 * shape.n
            if expected > 2.0 or run.seconds_left() < 4.0 + 5 * expected:
                run.skip(f"{name} {shape}", f"a call would take about {expected:.1f} s")
                continue
            with run.case(f"{name} {shape}"):
                block = gradients(shape, run, copies=1)
                truth = Truth.of(block[0])
                found = quality(combine(block[0]), block[0], truth)
                run.check_device()
                begin = time.perf_counter()
                combine(block[0])
                run.check_device()
                taken = time.perf_counter() - begin
                cost[name] = taken / (shape.m**2 * shape.n)
                timing = Timing(taken, taken, taken, 1)
                if taken < 0.3:
                    timing = time_calls([lambda block=block, combine=combine: combine(block[0])], run, 0.2)
                run.add({**shape.labels, "contender": name, **asdict(timing), **found})
                del block
