"""What the compiled kernels cost, counted on the emulator of tests/ptx: needs no GPU, and gives the same every time.

``PYTHONPATH=.venv/triton-3.9.0 .venv/bin/python bench/budgets.py`` writes ``bench/results/budgets.json``: for each m×m
solve its warp instructions, barriers and, by a model, microseconds; for the Gramian and the combination the float64
operations a column. ``tests/ptx/test_budgets.py`` compares.

The model (``tests/ptx/machine/clock.hpp``) issues in order an instruction a cycle and scheduler, with latencies as
published for the H100 (Luo et al. 2024, arXiv 2402.13499, and NVIDIA's throughput tables) at 1.75 GHz. What a program
wrote itself and reads again it finds in the first-level cache; the second number is that of a device where it never
does. It is an estimate for comparing kernels: it has not been held against a GPU.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Before the kernels are imported: they are to be compiled, and Triton 3.9 warns where nobody says how it may fuse.
os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import torch
import triton
from gramians import NUMBERS, operand
from ptx.emulator import Latencies
from ptx.launching import Emulator, Kept, flattened, memory_of
from rich.console import Console
from rich.table import Table

import fastconfig as fc
from fastconfig.backends import triton as backend
from fastconfig.backends.rules import GramianRule
from fastconfig.validation import check_rows

RESULTS = Path(__file__).resolve().parent / "results" / "budgets.json"
CLOCK = 1.75e3
"""Cycles a microsecond of an H100."""
H100 = {
    "integer": 5.0,
    "float64": 16.0,
    "division": 160.0,
    "special": 24.0,
    "matrix": 36.0,
    "shuffle": 24.0,
    "shared": 30.0,
    "first_level": 34.0,
    "second_level": 262.0,
    "atomic": 262.0,
    "barrier": 24.0,
    "branch": 12.0,
    "float64_interval": 2.0,
    "division_interval": 24.0,
    "special_interval": 4.0,
    "matrix_interval": 8.0,
    "float64_units": 4,
}
WITHOUT_A_SOLVER = ("constant", "inverse_norm", "priority")
SOLVES = ("config", "config, singular", *(kind for kind in NUMBERS if kind not in WITHOUT_A_SOLVER))
LOSSES = (3, 40)
ALLOCATION = 512
"""Bytes at a multiple of which allocations on a GPU begin."""
ARITHMETIC = ("fma.rn", "mul.rn", "add.rn", "sub.rn")
PRODUCTS = {"m8n8k4": 256, "m16n8k4": 512, "m16n8k8": 1024, "m16n8k16": 2048}
"""Multiply-adds of a warp's matrix product."""


class Counter(Emulator):
    """Counts what a launch costs: a lone program by the clock, several without it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.found: list[dict[str, float]] = []

    def launch(self, function, args, grid, kwargs) -> Kept | None:
        program, signature, bound = self.compiled(function, args, kwargs)
        kinds = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        values = list(flattened([bound[name] for name in kinds]))
        cycles = []
        for latency in (H100["first_level"], H100["second_level"]):
            placed = [on_a_gpu(value) if isinstance(value, torch.Tensor) else value for value in values]
            tensors = [value for value in placed if isinstance(value, torch.Tensor)]
            numbers = [
                value.data_ptr() if isinstance(value, torch.Tensor) else value for value in placed if value is not None
            ]
            clock = Latencies(**{**H100, "first_level": latency})
            # UPGrad's programs each solve a part, side by side: one of them, and its ticket.
            how = {"clock": clock} if grid[0] == 1 or function.__name__ == "rule_of_gramian" else {}
            programs = 1 if how else grid[0]
            outcome = program.run(programs, numbers, memory_of(tensors).items(), detects_races=False, **how)
            cycles.append(outcome.cycles)
        float64 = sum(
            count * (PRODUCTS[shape_of(text)] if "mma.sync" in text else 32)
            for text, count in zip(program.texts, outcome.executed, strict=True)
            if "mma.sync" in text or any(f"{name}.f64" in text for name in ARITHMETIC)
        )
        float32 = 32 * sum(
            count
            for text, count in zip(program.texts, outcome.executed, strict=True)
            if any(f"{name}.f32" in text for name in ARITHMETIC)
        )
        self.found.append(
            {
                "instructions": outcome.issued,
                "barriers": outcome.barriers,
                "us": round(cycles[0] / CLOCK, 1),
                "us_past_l1": round(cycles[1] / CLOCK, 1),
                "float64": float64,
                "float32": float32,
            }
        )
        return None


def on_a_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins where PyTorch's allocator for GPUs lets it: an access meets as many lines of the cache."""
    memory = torch.empty(tensor.nbytes + ALLOCATION, dtype=torch.uint8)
    copy = memory[-memory.data_ptr() % ALLOCATION :][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def shape_of(text: str) -> str:
    return next(part for part in text.split(".") if part.startswith("m") and part in PRODUCTS)


def counter(capability: int = 90) -> Counter:
    """Where all launches of this process go from now on."""
    backend.INTERPRETED = True
    made = Counter(capability)
    made.install()
    backend.device_of = lambda device: made.device
    return made


def gramian(m: int, singular: bool = False) -> torch.Tensor:
    rows = np.random.default_rng(0).standard_normal((m, 2 * m + 3))
    if singular:
        rows[m // 2 :] = rows[: m - m // 2]
    return torch.from_numpy(rows @ rows.T)


def cost_of_solve(counts: Counter, name: str, m: int) -> dict[str, float]:
    """Of one method's weights of a Gramian of m losses."""
    counts.found.clear()
    if name in NUMBERS:
        rule = GramianRule(name, NUMBERS[name], None, "propagate")
        taken = operand(name, m)
        backend.rule_weights(gramian(m), rule, None if taken is None else torch.from_numpy(taken))
    else:
        backend.config_weights(gramian(m, name != "config"), fc.ConFIG().rule)
    (found,) = counts.found
    return {key: value for key, value in found.items() if key not in ("float64", "float32")}


STREAMS: dict[str, Callable[[torch.Tensor], object]] = {
    "gramian": lambda rows: backend.gramian(check_rows(rows)),
    "combination": lambda rows: backend.apply(
        check_rows(rows), torch.ones(len(rows), dtype=torch.float64), torch.empty(rows.shape[1])
    ),
}


def operations_a_column(counts: Counter, name: str, m: int) -> dict[str, float]:
    """Multiply-adds and other operations in "float64" and "float32" that one more column of float32 costs."""
    found = []
    for n in (1 << 16, 1 << 17):
        counts.found.clear()
        STREAMS[name](torch.zeros(m, n))
        found += counts.found
    fewer, more = found
    return {kind: round((more[kind] - fewer[kind]) / (1 << 16), 2) for kind in ("float32", "float64")}


def in_two_floats(counts: Counter, m: int) -> dict[str, float]:
    """Operations a column of the Gramian on a device with few float64 units."""
    seen = backend.device_of
    backend.device_of = lambda device: counts.device._replace(has_quick_float64=False)
    try:
        return operations_a_column(counts, "gramian", m)
    finally:
        backend.device_of = seen


def main() -> None:
    counts = counter()
    solves = {name: {str(m): cost_of_solve(counts, name, m) for m in LOSSES} for name in SOLVES}
    columns = {name: {str(m): operations_a_column(counts, name, m)["float64"] for m in LOSSES} for name in STREAMS}
    few_units = {str(m): in_two_floats(counts, m) for m in LOSSES}
    content = {
        "triton": triton.__version__,
        "architecture": "sm_90",
        "solves": solves,
        "float64 a column": columns,
        "gramian in two floats, a column": few_units,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    table = Table(title=f"m×m solves as Triton {triton.__version__} compiles them for sm_90")
    for heading in ("method", "losses", "warp instructions", "barriers", "µs by the model", "µs without L1"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, costs in solves.items():
        for m, cost in costs.items():
            table.add_row(
                name, m, f"{cost['instructions']:,}", str(cost["barriers"]), str(cost["us"]), str(cost["us_past_l1"])
            )
    console = Console(width=110)
    console.print(table)
    for name, costs in columns.items():
        console.print(
            f"{name}: " + ", ".join(f"{cost:g} float64 operations a column of {m}" for m, cost in costs.items())
        )
    for m, cost in few_units.items():
        console.print(
            f"gramian in two floats: {cost['float32']:g} float32 and {cost['float64']:g} float64 operations "
            f"a column of {m}"
        )


if __name__ == "__main__":
    main()
