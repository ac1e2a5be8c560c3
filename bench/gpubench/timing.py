"""Time and memory of a call: in a stream of calls, on the device alone, kernel by kernel, and at its peak."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from gpubench.results import Run

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds a call."""

    median_s: float
    q1_s: float
    q3_s: float
    batches: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
        return cls(statistics.median(times), quartiles[0], quartiles[2], len(times))


def time_calls(calls: Sequence[Call], run: Run, seconds: float = 0.3) -> Timing:
    """Time a call as a stream of them sees it, the calls taking turns; the first ones, which compile, do not count."""
    turns = itertools.cycle(calls)
    for _ in range(min(len(calls), 3)):
        next(turns)()
    run.check_device()
    begin = time.perf_counter()
    for _ in range(3):
        next(turns)()
    run.check_device()
    estimate = (time.perf_counter() - begin) / 3
    a_batch = max(1, min(200, math.ceil(3e-4 / estimate)))  # an event is good to half a microsecond
    batches = max(7, min(200, round(seconds / (estimate * a_batch))))
    return Timing.of(batch_times(turns, run, a_batch, batches))


def batch_times(turns: Iterator[Call], run: Run, a_batch: int, batches: int) -> list[float]:
    if not run.on_gpu:
        times = []
        for _ in range(batches):
            begin = time.perf_counter()
            for _ in range(a_batch):
                next(turns)()
            times.append((time.perf_counter() - begin) / a_batch)
        return times
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(batches)]
    for first, last in events:  # no waiting in between: the device always has work
        first.record()
        for _ in range(a_batch):
            next(turns)()
        last.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) / 1e3 / a_batch for first, last in events]


def time_replays(calls: Sequence[Call], run: Run, seconds: float = 0.2) -> Timing:
    """Time a call on the device alone: all of them in one CUDA graph, replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    run.tainted = True
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    run.tainted = False
    timing = time_calls([graph.replay], run, seconds)
    del graph
    return Timing(timing.median_s / len(calls), timing.q1_s / len(calls), timing.q3_s / len(calls), timing.batches)


def kernels_of(calls: Sequence[Call], times: int = 20) -> list[dict]:
    """The kernels, copies and fills that one call launches, by the profiler: how many of each, and how long."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    turns = itertools.cycle(calls)
    for _ in range(3):
        next(turns)()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(times):
            next(turns)()
        torch.cuda.synchronize()
    durations: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            durations.setdefault(event.name, []).append(float(event.time_range.elapsed_us()))
    return [
        {"kernel": name, "a_call": len(found) / times, "median_us": statistics.median(found)}
        for name, found in durations.items()
    ]


def device_seconds(kernels: Sequence[dict]) -> float:
    """What one call's kernels, as ``kernels_of`` lists them, take together."""
    return sum(kernel["a_call"] * kernel["median_us"] for kernel in kernels) / 1e6


def peak_bytes(call: Call) -> int:
    """What a call adds to the memory that PyTorch has given out."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
