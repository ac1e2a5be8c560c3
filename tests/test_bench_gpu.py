"""bench/gpu.py where there is no GPU: its arithmetic, its verdicts, and that nothing ends the run early."""

from __future__ import annotations

import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import as_numpy, config

sys.path.append(str(Path(__file__).parents[1] / "bench"))  # where ``python3 bench/gpu.py`` finds its parts

import gpu
from gpubench import methods, momentum, sections, summary, timing
from gpubench.accuracy import Truth, quality
from gpubench.inputs import copies_needed, gradients
from gpubench.results import Report, Run
from gpubench.rivals import plain_torch
from gpubench.shapes import Shape
from gpubench.timing import Timing

from fastconfig.backends.moments import Piece

BENCH = Path(gpu.__file__).parent
CPU = torch.device("cpu")


@pytest.fixture
def report(tmp_path: Path):
    return Report(tmp_path / "results" / "gpu.json")


@pytest.fixture
def run(report):
    return Run(CPU, math.inf, report, shrink=100_000, current="a section")


def test_quality_is_measured_against_float64() -> None:
    grads = torch.randn(4, 500) * torch.tensor([[1.0], [100.0], [0.01], [1.0]])
    right = torch.from_numpy(config(as_numpy(grads)).value)
    truth = Truth.of(grads)
    found = quality(right, grads, truth)
    assert found["error"] < 1e-12
    cosines = grads.double() @ right / grads.double().norm(dim=1) / right.norm()
    assert found["least_cosine"] == pytest.approx(float(cosines.min()))
    assert quality(1.5 * right, grads, truth)["error"] == pytest.approx(0.5)
    assert quality(plain_torch(grads), grads, truth)["error"] < 1e-4


def test_rows_lie_as_far_apart_as_asked(run) -> None:
    for row_bytes, stride in ((1, 1001), (16, 1004), (128, 1024)):
        block = gradients(Shape(3, 1001), run, copies=2, row_bytes=row_bytes)
        assert block.shape == (2, 3, 1001)
        assert block.stride() == (3 * stride, stride, 1)
        assert block.isfinite().all()


def test_copies_exceed_the_cache_and_fit_the_memory() -> None:
    assert copies_needed(Shape(3, 10_000), 60 << 20, 100 << 30) == 1024
    assert copies_needed(Shape(3, 1_000_000), 60 << 20, 100 << 30) == 12
    assert copies_needed(Shape(3, 1_000_000), 60 << 20, 96_000_000) == 2
    assert copies_needed(Shape(3, 100_000_000), 60 << 20, 1 << 30) == 1


def test_times_are_of_one_call(run, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def lasts(seconds: float) -> None:
        clock[0] += seconds

    calls = [partial(lasts, 1e-5), partial(lasts, 3e-5)]  # short ones are timed many at once
    found = timing.time_calls(calls, run, seconds=0.05)
    assert found.q1_s <= found.median_s <= found.q3_s
    assert found.median_s == pytest.approx(2e-5, rel=0.1)


def test_a_section_that_fails_is_noted_and_the_next_begins(report, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run) -> None:
        with run.case("one"):
            raise RuntimeError("out of memory")
        run.add({"median_s": 1.0})
        raise LookupError("broken")

    monkeypatch.setattr(sections, "SECTIONS", {"first": fails, "second": lambda run: run.add({"value": 2})})
    assert sections.measure(["first", "second"], CPU, math.inf, report, 1) == 0
    first, second = (Report(report.path).section(name) for name in ("first", "second"))
    assert first["state"] == "failed"
    assert "LookupError: broken" in first["error"]
    assert first["skipped"] == ["one: RuntimeError: out of memory"]
    assert first["records"] == [{"median_s": 1.0}]
    assert (second["state"], second["records"]) == ("done", [{"value": 2}])


def test_what_there_is_no_time_for_is_named(run, report) -> None:
    assert list(run.cases([1, 2], 0.0)) == [1, 2]
    run.deadline = 0.0
    assert list(run.cases([1, 2], 5.0)) == []
    assert report.section("a section")["skipped"] == ["1: no time left", "2: no time left"]
    sections.measure(["host"], CPU, 0.0, report, 1)
    assert report.section("host")["state"] == "skipped: no time left"


FAKE = """
import json, os, sys, time
path, silent = sys.argv[1:]
content = json.load(open(path))
done = [name for name in ("first", "second") if name in content["sections"]]
name = "second" if done else "first"
content["sections"][name] = {"state": "running", "records": [], "skipped": []}
json.dump(content, open(path, "w"))
if name == "first":
    %s
content["sections"][name]["state"] = "done"
json.dump(content, open(path, "w"))
"""


@pytest.mark.parametrize(
    ("end", "state"),
    [("os._exit(3)", "died with status 3"), ("open(silent, 'w'); time.sleep(3600)", "hung, or out of time")],
)
def test_a_process_that_ends_or_hangs_is_followed_by_another(
    report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str, state: str
) -> None:
    """Whoever falls silent makes the clock jump: how busy this machine is decides nothing."""
    silent = tmp_path / "silent"
    jumps = SimpleNamespace(time=lambda: time.time() + 10 * gpu.SILENCE * silent.exists(), sleep=time.sleep)
    monkeypatch.setattr(gpu, "time", jumps)
    monkeypatch.setattr(gpu, "SECTIONS", dict.fromkeys(["first", "second"]))
    command = [sys.executable, "-c", FAKE % end, str(report.path), str(silent)]
    monkeypatch.setattr(gpu.Orchestra, "measuring", lambda self, names: command)
    report.content["machine"] = {"gpu": "none"}
    report.save()
    orchestra = gpu.Orchestra(gpu.parse(["--minutes", "1000"]), report)
    orchestra.stage("measure", orchestra.measure)
    content = json.loads(report.path.read_text())
    assert content["sections"]["first"]["state"] == state
    assert content["sections"]["second"]["state"] == "done"
    assert content["measure"]["processes"] == 2


def test_targets_say_met_missed_or_unknown(report) -> None:
    shape = {"m": 3, "n": 100_000_000, "dtype": "float32"}
    ours = {**shape, "contender": "fastconfig", "median_s": 1e-3, "of_bandwidth": 0.9, "error": 1e-8}
    plain = {**shape, "contender": "plain PyTorch", "median_s": 1.5e-3}
    report.section("combination")["records"] += [ours, plain]
    verdicts = {str(target).split(":")[0].split("; ")[0]: target.met for target in summary.targets_of(report)}
    assert verdicts["met      (3, 1e+08) float32"]
    assert not verdicts["MISSED   2 × plain PyTorch everywhere"]
    assert verdicts["unknown  50 × conflictfree everywhere"] is None
    assert any("1.5 ×" in line for line in summary.summary(report))


def test_steps_of_momentum_are_measured_beside_adam(run, report, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the reference's; what is counted is what the kernels move."""
    monkeypatch.setattr(momentum, "time_calls", lambda calls, run: Timing.of([call() or 1e-3 for call in calls]))
    report.section("bandwidth")["records"].append({"bytes_per_s": 1e12})
    run.current = "momentum"
    momentum.measure_momentum(run)
    records = report.records("momentum")
    assert report.section("momentum")["skipped"] == []
    assert [(record["m"], record.get("recorded")) for record in records] == [
        *[(3, 1), (3, 3), (3, None)],
        *[(3, 1), (3, 3), (3, None)],
        *[(40, 1), (40, 40), (40, None)],
    ]
    assert records[3]["of_bandwidth"] == pytest.approx(13 * 1000 * 4 / 1e12 / 1e-3)
    assert len(list(summary.momentum_table_of(report))) == 1 + 6
    assert any("1,000.0 µs" in line for line in summary.summary(report))


def test_methods_are_measured_alone_and_whole(run, report, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here on the CPU; the slowest is what the targets ask about."""
    monkeypatch.setattr(
        methods, "time_calls", lambda calls, run, seconds: Timing.of([call() is None or 1e-5 for call in calls])
    )
    run.current = "methods"
    methods.measure_methods(run)
    records = report.records("methods")
    assert report.section("methods")["skipped"] == []
    assert len(records) == 4 * len(methods.names()) + 2  # GradDrop has no solver
    assert len(methods.compilations(CPU)) == 2 * len(methods.names()) + 2
    records[0]["median_s"] = 1e-3
    solver, many, whole = summary.method_targets(
        [{**record, "n": 100_000_000} if record["what"] == "combination" else record for record in records]
    )
    assert (solver.met, many.met, whole.met) == (False, True, True)
    assert whole.value == 1.0
    assert records[0]["method"] in str(solver)
    assert len(list(summary.methods_table_of(report))) == 2 + len(methods.names())
    assert all(target.met is None for target in summary.method_targets([]))


def test_layers_cover_every_parameter_once() -> None:
    pieces = momentum.layers(Shape(3, 100_003), CPU, Piece)
    ends = [piece.first + len(piece.values) for piece in pieces]
    assert [piece.first for piece in pieces] == [0, *ends[:-1]]
    assert ends[-1] == 100_003


def test_counts_are_those_of_the_last_line() -> None:
    text = "FAILED a - assert 3 passed\n=== 2 failed, 10 passed, 1 skipped in 3.21s ===\n"
    assert gpu.counts_of(text) == {"failed": 2, "passed": 10, "skipped": 1}
    assert gpu.counts_of("Killed") == {}


def test_where_results_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = {"gpu": "NVIDIA H200"}
    monkeypatch.delenv("OUT", raising=False)
    assert gpu.output_path(gpu.parse([]), machine) == BENCH / "results" / "nvidia-h200.json"
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.output_path(gpu.parse([]), machine) == tmp_path / "nvidia-h200.json"
    assert gpu.output_path(gpu.parse(["--out", str(tmp_path / "a.json")]), machine) == tmp_path / "a.json"


def test_a_part_measured_anew_leaves_the_others(report) -> None:
    for name in ("host", "landing"):
        report.section(name)["records"].append({"value": 1})
    report.save()
    again = gpu.fresh_report(report.path, ["host"])
    assert again.records("host") == []
    assert again.records("landing") == [{"value": 1}]
    assert gpu.fresh_report(report.path, None).content == {"sections": {}}
