"""The section on the other methods: their solvers alone, and whole combinations beside ConFIG's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from gpubench.inputs import gradients
from gpubench.results import Run
from gpubench.shapes import Shape
from gpubench.timing import Call, time_calls, time_replays

SOLVED = (3, 40)
WHOLE = (Shape(3, 100_000_000), Shape(40, 10_000_000))


def measure_methods(run: Run) -> None:
    """From a Gramian in memory to weights, on the device alone where there is one; then whole combinations."""
    for m in SOLVED:
        gramian = conflicting_gramian(m, run.device)
        for name in run.cases(names(), 2.0):
            with run.case(f"{name}, {m} losses"):
                calls = [solve(name, gramian)]
                timing = (time_replays if run.on_gpu else time_calls)(calls, run, 0.1)
                run.add({"what": "solver", "method": name, "m": m, **asdict(timing)})
        if run.tainted:
            return
    for shape in map(run.shrunk, run.cases(WHOLE, 3.0)):
        block = gradients(shape, run, copies=1)[0]
        for name in run.cases([*names(), "graddrop"], 1.0):
            with run.case(f"{name} {shape}"):
                timing = time_calls([combine(name, block)], run, 0.1)
                run.add({"what": "combination", "method": name, **shape.labels, **asdict(timing)})
        del block
        run.release()


def names() -> list[str]:
    """The methods that are rules on the Gramian: all but GradDrop."""
    from fastconfig.methods.catalogue import CATALOGUE

    return [name for name, entry in CATALOGUE.items() if hasattr(entry.kind, "weights")]


def conflicting_gramian(m: int, device: torch.device) -> Tensor:
    """(m, m) of normal rows without most of their mean, of scales 1 : 100 : 0.01: every solver has work to do."""
    rows = torch.randn(m, 2 * m, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    rows = (rows - 0.9 * rows.mean(dim=0)) * torch.tensor([1.0, 100.0, 0.01]).repeat(m)[:m, None]
    return (rows @ rows.T).to(device)


def solve(name: str, gramian: Tensor) -> Call:
    from fastconfig.methods.catalogue import CATALOGUE

    method = CATALOGUE[name].make(len(gramian))
    return lambda: method.weights(gramian)


def combine(name: str, grads: Tensor) -> Call:
    import fastconfig as fc
    from fastconfig.methods.catalogue import CATALOGUE

    method, out = CATALOGUE[name].make(len(grads)), torch.empty_like(grads[0])
    return lambda: fc.combine(grads, method, out=out)


def compilations(device: torch.device) -> Sequence[Call]:
    """What compiles every kernel that is measured here."""
    solvers = [solve(name, conflicting_gramian(m, device)) for m in SOLVED for name in names()]
    return [*solvers, *(combine("graddrop", torch.ones(m, 4096, device=device)) for m in SOLVED)]
