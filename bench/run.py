"""Runs the benchmarks, prints tables of medians measured in this run, and writes bench/results/<machine>.json."""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import fastconfig
from fastconfig.diagnostics import collect_config

HERE = Path(__file__).parent

TITLES = {
    "combination": "one combination",
    "method": "one combination by each method",
    "step": "one step of M-ConFIG, one loss backpropagated before it",
    "training": "a training step: forward and backward passes, combination, optimizer",
    "fresh": "a result that is not given, and a buffer's first step",
}

COLUMNS = {
    "combination": ("time", "/ floor", "fastconfig is", "error", "least cosine", "peak, n elements"),
    "method": ("time", "/ ConFIG, in turns", "torchjd", "torchjd / fastconfig, in turns"),
    "step": ("time", "/ floor", "fastconfig is", "/ floor, in turns"),
    "training": ("time, in turns", "/ summed loss", "over backward, in turns", "combine() or step()", "error"),
    "fresh": ("time", "/ the other, in turns"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="pytest's -k: which cases to run (default: all)")
    parser.add_argument("--no-save", action="store_true", help="print the table, write no file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [sys.executable, "-m", "pytest", str(HERE), "-q", "-k", arguments.k, f"--benchmark-json={raw}"]
        done = subprocess.run([*command, "--benchmark-quiet", "-p", "no:cacheprovider"], check=False)
        if done.returncode != 0:
            return done.returncode
        cases = [summary(case) for case in json.loads(raw.read_text())["benchmarks"]]
    machine = describe_machine()
    for kind, title in TITLES.items():
        if some := [case for case in cases if case["kind"] == kind]:
            Console(width=150).print(table_of(some, title, machine))
    if not arguments.no_save:
        path = HERE / "results" / f"{re.sub(r'[^a-z0-9]+', '-', machine['cpu'].lower()).strip('-')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"machine": machine, "cases": cases}, indent=1) + "\n")
        print(f"written: {path.relative_to(HERE.parent)}")
    return 0


def summary(case: dict) -> dict:
    """What is kept of one case: its labels, and median and quartiles in seconds."""
    stats, labels = case["stats"], case["extra_info"]
    q1, q3 = labels.get("quartiles_override_s", (stats["q1"], stats["q3"]))
    return {
        **labels,
        "median_s": labels.get("median_override_s", stats["median"]),
        "q1_s": q1,
        "q3_s": q3,
        "rounds": labels.get("rounds_override", stats["rounds"]),
    }


def describe_machine() -> dict[str, str]:
    return {
        "cpu": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "system": f"{platform.system()} {platform.machine()}",
        "fastconfig": fastconfig.__version__,
        "torch": torch.__version__,
        "isa": collect_config()["ISA tier"],
    }


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"model name\s*:\s*(.+)", text)
    return match.group(1).strip() if match else platform.machine()


def table_of(cases: list[dict], title: str, machine: dict[str, str]) -> Table:
    table = Table(title=f"{title}, medians · {machine['cpu']} · torch {machine['torch']} · {machine['isa']}")
    for name in ("m, n, dtype", "contender"):
        table.add_column(name)
    kind = cases[0]["kind"]
    for name in COLUMNS[kind]:
        table.add_column(name, justify="right")
    for group in grouped(cases):
        times = {case["contender"]: case["median_s"] for case in group}
        for case in group:
            table.add_row(*row_of(case, times), end_section=case is group[-1])
    return table


def grouped(cases: list[dict]) -> Iterator[list[dict]]:
    keys = dict.fromkeys((case["m"], case["n"], case["dtype"]) for case in cases)
    for key in keys:
        yield [case for case in cases if (case["m"], case["n"], case["dtype"]) == key]


def row_of(case: dict, times: dict[str, float]) -> Iterator[str]:
    seconds, name = case["median_s"], case["contender"]
    yield f"{case['m']}, {case['n']:.1e}, {case['dtype']}"
    yield name
    yield time_of(seconds)
    if case["kind"] == "method":
        yield f"{case['of_config_in_turns']:.2f}"
        yield time_of(case["torchjd_s"]) if "torchjd_s" in case else ""
        yield f"{case['torchjd_in_turns']:,.1f}" if "torchjd_s" in case else ""
        return
    if case["kind"] == "training":
        yield f"{seconds / times['Adam, summed loss']:.2f}" if "Adam, summed loss" in times else ""
        yield f"{100 * case['over_backward']:+.1f} %" if "over_backward" in case else ""
        yield time_of(case["combine_s"]) if "combine_s" in case else ""
        yield f"{case['error']:.1e}" if "error" in case else ""
        return
    if case["kind"] == "fresh":
        yield f"{case['of_other_in_turns']:.2f}"
        return
    yield f"{seconds / times['floor']:.2f}" if "floor" in times else ""
    yield f"{seconds / times['fastconfig']:.1f} × faster" if name != "floor" and "fastconfig" in times else ""
    if case["kind"] == "step":
        yield f"{case['of_floor_in_turns']:.2f}" if "of_floor_in_turns" in case else ""
        return
    yield f"{case['error']:.1e}" if "error" in case else ""
    yield f"{case['least_cosine']:.3f}" if "least_cosine" in case else ""
    peak = case.get("peak_bytes")
    size = {"float32": 4, "bfloat16": 2}[case["dtype"]]
    yield f"{peak / size / case['n']:.1f}" if peak is not None and case["n"] >= 1_000_000 else ""


def time_of(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"


if __name__ == "__main__":
    sys.exit(main())
