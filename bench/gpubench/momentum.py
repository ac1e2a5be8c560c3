"""The section on M-ConFIG's step: the kernels of look and write, beside PyTorch's fused Adam on as many parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from gpubench.results import Run
from gpubench.shapes import Shape
from gpubench.timing import Call, time_calls

SHAPES = [Shape(3, 10_000), Shape(3, 100_000_000), Shape(40, 10_000_000)]


def floor_bytes(shape: Shape) -> int:
    """Bytes of a step with one new gradient: averages and gradient read to be looked at, and again to be written.

    Beside these 2(m + 1) elements a column, second moment and parameter are read, and one average, second moment and
    parameter written.
    """
    return (2 * shape.m + 7) * shape.n * shape.dtype.itemsize


def measure_momentum(run: Run) -> None:
    """One new gradient a step, the losses in turn; and all of them at once."""
    for shape in map(run.shrunk, run.cases(SHAPES, 5.0)):
        for recorded in (1, shape.m):
            with run.case(f"{shape}, {recorded} recorded"):
                timing = time_calls(steps(shape, recorded, run.device), run)
                record = {**shape.labels, "contender": "M-ConFIG", "recorded": recorded, **asdict(timing)}
                if run.bandwidth and recorded == 1:
                    record["floor_s"] = floor_bytes(shape) / run.bandwidth
                    record["of_bandwidth"] = record["floor_s"] / record["median_s"]
                run.add(record)
        with run.case(f"{shape}, Adam"):
            run.add(
                {**shape.labels, "contender": "fused Adam", **asdict(time_calls([adam_step(shape, run.device)], run))}
            )


def steps(shape: Shape, recorded: int, device: torch.device) -> Sequence[Call]:
    """As many steps as there are losses to take turns, all on the same averages and parameters."""
    import fastconfig as fc
    from fastconfig.backends import select
    from fastconfig.backends.moments import Group, Ledger, Moments, Piece, Recorded, StepRule
    from fastconfig.backends.momentum import reference, triton

    m, n = shape.m, shape.n
    module = triton if select(device).__name__.endswith("triton") else reference
    padded = n + -n % 32  # so that every row begins at 128 bytes
    rows = torch.randn(m, padded, dtype=shape.dtype, device=device)[:, :n]
    state = torch.zeros(m + 1, padded, dtype=shape.dtype, device=device)[:, :n]
    segment = module.Segment(Moments(state[:-1], state[-1]), layers(shape, device, Piece))
    ledger = Ledger.zeros(m, device)
    rule = StepRule(0.9, 0.999, (Group(1e-3, 0.0, 1e-8, False),))
    scales = torch.ones(m, dtype=torch.float64, device=device)
    segment.step(ledger, Recorded(tuple(range(m)), tuple(rows)), rule, fc.ConFIG().rule, scales)

    def call(losses: tuple[int, ...]) -> Call:
        some = Recorded(losses, tuple(rows[i] for i in losses))
        return lambda: segment.step(ledger, some, rule, fc.ConFIG().rule, scales[: len(losses)])

    return [call(tuple((i + j) % m for j in range(recorded))) for i in range(m)]


def layers(shape: Shape, device: torch.device, piece: type) -> list:
    """Parameters of a hundred layers: a large and a small tensor each, as weights and biases are."""
    pieces, at = [], 0
    large = max(1, shape.n // 101)
    while at < shape.n:
        for count in (large, 99):
            count = min(count, shape.n - at)
            if count:
                pieces.append(piece(torch.randn(count, dtype=shape.dtype, device=device), at, 0))
            at += count
    return pieces


def adam_step(shape: Shape, device: torch.device) -> Call:
    """For scale: 4 elements read and 3 written a parameter, of one tensor, with a gradient that is there."""
    parameter = torch.nn.Parameter(torch.randn(shape.n, dtype=shape.dtype, device=device))
    parameter.grad = torch.randn_like(parameter)
    return torch.optim.Adam([parameter], lr=1e-3, fused=True).step
