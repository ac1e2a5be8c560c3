"""How a loss's gradient best lands in its row of a buffer: backward and landing, way by way, in time and memory.

``python bench/landing.py`` prints a table for this machine; ``--device cuda`` for its GPU. ``bench/gpu.py`` takes it as
one of its sections.

What must move a loss, in vectors of n elements beside the backward pass's own: views, one zeroed, two read and one
written; a hook or a copy, one read and one written. The latter hold the gradient twice, a hook one tensor at a time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from gpubench.timing import peak_bytes
from torch import Tensor, nn

import fastconfig as fc

BATCH = 8
"""Small, so that a backward pass reads and writes each parameter about as often as landing does."""
ROWS = 3
SIZES = [10_000, 10_000_000]

Call = Callable[[], object]


class Problem:
    """An MLP of about n parameters in eight tensors, one loss with its graph, and m rows to land in."""

    def __init__(self, n: int, device: torch.device) -> None:
        torch.manual_seed(0)
        width = max(4, round((n / 4) ** 0.5) // 8 * 8)
        layers = [module for _ in range(4) for module in (nn.Linear(width, width), nn.Tanh())]
        self.model = nn.Sequential(*layers).to(device)
        self.parameters = list(self.model.parameters())
        self.n = sum(parameter.numel() for parameter in self.parameters)
        self.loss = self.model(torch.randn(BATCH, width, device=device)).square().mean()

    def row(self) -> tuple[Tensor, list[Tensor]]:
        """The first of m rows, and the view of it for each parameter."""
        row = torch.zeros(ROWS, self.n, device=self.parameters[0].device)[0]
        parts = row.split([parameter.numel() for parameter in self.parameters])
        return row, [part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]

    def forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def plain_backward(problem: Problem) -> Call:
    """No landing at all: autograd allocates every ``p.grad`` anew. What the others are measured against."""

    def call() -> None:
        problem.forget()
        problem.loss.backward(retain_graph=True)

    return call


def views_of_the_row(problem: Problem) -> Call:
    """``p.grad`` is a view of the zeroed row, in which autograd accumulates."""
    row, views = problem.row()

    def call() -> None:
        row.zero_()
        for parameter, view in zip(problem.parameters, views, strict=True):
            parameter.grad = view
        problem.loss.backward(retain_graph=True)

    return call


def gradient_buffer(problem: Problem) -> Call:
    """What fastconfig does: a copying hook that then makes ``p.grad`` the view, and all of GradientBuffer's care."""
    buffer = fc.GradientBuffer(problem.parameters, ROWS)

    def call() -> None:
        with buffer.record(0, accumulate=False):
            problem.loss.backward(retain_graph=True)

    return call


def copying_hook(problem: Problem) -> Call:
    """A hook copies every ``p.grad`` into the row as soon as it is there, and drops it."""
    _, views = problem.row()

    def hook_for(view: Tensor) -> Callable[[Tensor], None]:
        def land(parameter: Tensor) -> None:
            view.copy_(parameter.grad)
            parameter.grad = None

        return land

    for parameter, view in zip(problem.parameters, views, strict=True):
        parameter.register_post_accumulate_grad_hook(hook_for(view))

    def call() -> None:
        problem.loss.backward(retain_graph=True)

    return call


def foreach_copy(problem: Problem) -> Call:
    """torch.autograd.grad, then one fused copy of all tensors into the row's views."""
    _, views = problem.row()

    def call() -> None:
        torch._foreach_copy_(views, torch.autograd.grad(problem.loss, problem.parameters, retain_graph=True))

    return call


def concatenated(problem: Problem) -> Call:
    """torch.autograd.grad, then torch.cat into the row."""
    row, _ = problem.row()

    def call() -> None:
        grads = torch.autograd.grad(problem.loss, problem.parameters, retain_graph=True)
        torch.cat([grad.reshape(-1) for grad in grads], out=row)

    return call


WAYS: dict[str, Callable[[Problem], Call]] = {
    "plain backward": plain_backward,
    "views of the row": views_of_the_row,
    "copying hook": copying_hook,
    "GradientBuffer": gradient_buffer,
    "grad, foreach copy": foreach_copy,
    "grad, cat": concatenated,
}


def measure(
    device: torch.device, sizes: Sequence[int], seconds: float, log: Callable[[str], None] = print
) -> list[dict[str, object]]:
    """Median time and peak memory of every way at every size; the ways take turns, so that all meet the same noise."""
    results = []
    for n in sizes:
        problems = {name: Problem(n, device) for name in WAYS}  # one each: a hook would stay for the next way
        calls = {name: WAYS[name](problem) for name, problem in problems.items()}
        columns = problems["plain backward"].n
        for call in calls.values():
            call()
            call()
        times = alternated(calls, device, seconds)
        for name, call in calls.items():
            problems[name].forget()
            peak = peak_growth(call, device)
            results.append(
                {
                    "way": name,
                    "n": columns,
                    "median_s": statistics.median(times[name]),
                    "q1_s": quartile(times[name], 0),
                    "q3_s": quartile(times[name], 2),
                    "rounds": len(times[name]),
                    "peak_n_elements": None if peak is None else peak / 4 / columns,
                }
            )
            log(line_of(results[-1]))
    return results


def alternated(calls: dict[str, Call], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds a call, again and again, five rounds at least."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[names[0]]) < 5:
        for name in names:
            times[name].append(timed(calls[name], device))
        names.append(names.pop(0))  # nobody always follows the same one
    return times


def timed(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def quartile(values: Sequence[float], index: int) -> float:
    return statistics.quantiles(values, n=4)[index] if len(values) > 1 else values[0]


def peak_growth(call: Call, device: torch.device) -> int | None:
    """Bytes by which a call raises the memory in use over what it was.

    On a CPU (Linux only) what is resident, without the memory that the allocator had kept from earlier calls.
    """
    if device.type == "cuda":
        return peak_bytes(call)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        call()
        return resident("VmHWM") - before
    except (OSError, LookupError):
        return None


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def line_of(result: dict) -> str:
    peak = result["peak_n_elements"]
    memory = f"{peak:6.2f} n" if peak is not None and result["n"] >= 1_000_000 else "       -"
    return (
        f"{result['n']:>11,}  {result['way']:20} {result['median_s'] * 1e3:10.3f} ms"
        f"  ({result['q1_s'] * 1e3:.3f} to {result['q3_s'] * 1e3:.3f})  peak {memory}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=lambda text: [int(float(size)) for size in text.split(",")], default=SIZES)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each size")
    arguments = parser.parse_args()
    measure(torch.device(arguments.device), arguments.sizes, arguments.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
