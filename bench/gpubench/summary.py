"""What is said at the end: a table of times, what was left undone, and which of the design's targets are met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gpubench.results import Report
from gpubench.shapes import name_of


@dataclass(frozen=True)
class Target:
    """One of the design's targets, and what was measured."""

    text: str
    value: float | None
    unit: str
    met: bool | None

    def __str__(self) -> str:
        state = {True: "met", False: "MISSED", None: "unknown"}[self.met]
        value = "not measured" if self.value is None else f"{self.value:.3g} {self.unit}".strip()
        return f"{state:8} {self.text}: {value}"


def at_least(text: str, value: float | None, limit: float, unit: str) -> Target:
    return Target(text, value, unit, None if value is None else value >= limit)


def at_most(text: str, value: float | None, limit: float, unit: str) -> Target:
    return Target(text, value, unit, None if value is None else value <= limit)


def find(records: Sequence[dict], **wanted: object) -> dict:
    return next((r for r in records if all(r.get(key) == value for key, value in wanted.items())), {})


def scaled(seconds: float | None) -> float | None:
    """Microseconds."""
    return None if seconds is None else seconds * 1e6


def targets_of(report: Report) -> list[Target]:
    records, launches, host = report.records("combination"), report.records("launches"), report.records("host")
    ours = [record for record in records if record["contender"] == "fastconfig"]
    small = find(launches, m=3, n=10_000, dtype="float32")
    call = find(host, what="combine(matrix, out=)")
    most = max((record["launches"] for record in launches), default=None)
    return [
        *bandwidth_targets(ours),
        at_most("at most 2 launches a call", most, 2, ""),
        at_most("(3, 1e4): one launch", small.get("launches"), 1, ""),
        at_most("(3, 1e4): 15 µs on the device", scaled(small.get("device_s")), 15, "µs"),
        at_most("(3, 1e4): 30 µs on the host", scaled(call.get("median_s")), 30, "µs"),
        worst_ratio("plain PyTorch", 2, ours, records),
        worst_ratio("compiled PyTorch", 2, ours, report.records("compiled")),
        worst_ratio("conflictfree", 50, ours, report.records("libraries")),
        *method_targets(report.records("methods")),
    ]


def method_targets(records: Sequence[dict]) -> Iterator[Target]:
    """The slowest method's solver, and its whole combination beside ConFIG's."""
    for m, limit in ((3, 40), (40, 400)):
        slowest = slowest_of(record for record in records if record["what"] == "solver" and record["m"] == m)
        text = f"{m} losses: {limit} µs for any method's solver; most by {slowest.get('method', '?')}"
        yield at_most(text, scaled(slowest.get("median_s")), limit, "µs")
    large = {"what": "combination", "m": 3, "n": 100_000_000}
    config = find(records, **large, method="config").get("median_s")
    slowest = slowest_of(record for record in records if find([record], **large))
    ratio = slowest["median_s"] / config if config else None
    yield at_most(f"(3, 1e+08): 1.3 × ConFIG; most by {slowest.get('method', '?')}", ratio, 1.3, "×")


def slowest_of(records: Iterable[dict]) -> dict:
    return max(records, key=lambda record: record["median_s"], default={})


def bandwidth_targets(ours: Sequence[dict]) -> list[Target]:
    found = []
    for record in ours:
        percent = 100 * record["of_bandwidth"] if "of_bandwidth" in record else None
        if record["m"] <= 8 and record["m"] * record["n"] >= 1e8:
            found.append(at_least(f"{name_of(record)}: 85 % of copy bandwidth", percent, 85, "%"))
        if (record["m"], record["n"]) == (40, 10_000_000):
            found.append(at_least(f"{name_of(record)}: 60 % of copy bandwidth", percent, 60, "%"))
    return found


def worst_ratio(name: str, factor: float, ours: Sequence[dict], others: Sequence[dict]) -> Target:
    """By how much fastconfig is quicker, where it is by least."""
    ratios = {}
    for record in others:
        own = find(ours, m=record["m"], n=record["n"], dtype=record["dtype"])
        if own and record["contender"] == name:
            ratios[name_of(record)] = record["median_s"] / own["median_s"]
    if not ratios:
        return Target(f"{factor} × {name} everywhere", None, "×", None)
    least = min(ratios, key=ratios.__getitem__)
    return at_least(f"{factor} × {name} everywhere; least at {least}", ratios[least], factor, "×")


OTHERS = {
    "plain PyTorch": "plain",
    "compiled PyTorch": "compiled",
    "conflictfree": "conflictfree",
    "conflictfree pinv": "its pinv",
    "torchjd": "torchjd",
}


def table_of(report: Report) -> list[str]:
    """One line a shape: fastconfig's time, and the others' as multiples of it."""
    records = [*report.records("combination"), *report.records("compiled"), *report.records("libraries")]
    head = f"{'m, n, dtype':28}{'floor':>12}{'fastconfig':>12}{'of copy':>9}{'error':>9}"
    lines = [head + "".join(f"{head:>14}" for head in OTHERS.values())]
    for own in (record for record in records if record["contender"] == "fastconfig"):
        line = f"{own['m']:>2}, {own['n']:>11,}, {own['dtype']:10}"
        line += f"{microseconds(own.get('floor_s')):>12}{microseconds(own['median_s']):>12}"
        line += f"{100 * own.get('of_bandwidth', math.nan):>8.1f}%{own['error']:>9.1e}"
        for name in OTHERS:
            other = find(records, m=own["m"], n=own["n"], dtype=own["dtype"], contender=name)
            times = f"{other['median_s'] / own['median_s']:,.1f} ×" if other else "-"
            line += f"{times:>14}"
        lines.append(line)
    return lines


def momentum_table_of(report: Report) -> Iterator[str]:
    """One line a shape of M-ConFIG's step, beside PyTorch's fused Adam."""
    records = report.records("momentum")
    if records:
        yield f"{'M-ConFIG: m, n, dtype':28}{'recorded':>12}{'floor':>12}{'step':>12}{'of copy':>9}{'fused Adam':>12}"
    for own in (record for record in records if record["contender"] == "M-ConFIG"):
        adam = find(records, m=own["m"], n=own["n"], dtype=own["dtype"], contender="fused Adam")
        line = f"{own['m']:>2}, {own['n']:>11,}, {own['dtype']:10}{own['recorded']:>13}"
        line += f"{microseconds(own.get('floor_s')):>12}{microseconds(own['median_s']):>12}"
        line += f"{100 * own.get('of_bandwidth', math.nan):>8.1f}%{microseconds(adam.get('median_s')):>12}"
        yield line


def methods_table_of(report: Report) -> Iterator[str]:
    """One line a method: its solver alone, and whole combinations."""
    records = report.records("methods")
    if records:
        yield f"{'method: solver at m =':24}{'3':>12}{'40':>12}{'(3, 1e8)':>14}{'(40, 1e7)':>14}"
    for name in dict.fromkeys(record["method"] for record in records):
        line = f"{name:24}"
        for m in (3, 40):
            line += f"{microseconds(find(records, what='solver', method=name, m=m).get('median_s')):>12}"
        for m in (3, 40):
            line += f"{microseconds(find(records, what='combination', method=name, m=m).get('median_s')):>14}"
        yield line


def microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:,.1f} µs"


def summary(report: Report) -> list[str]:
    machine = report.content.get("machine", {})
    bandwidth = max((record["bytes_per_s"] for record in report.records("bandwidth")), default=math.nan)
    tests = report.content.get("tests", {})
    return [
        "",
        " · ".join(f"{name} {machine.get(name, '?')}" for name in ("gpu", "driver", "torch", "triton")),
        f"copy bandwidth {bandwidth / 1e12:.3f} TB/s, read and written",
        *table_of(report),
        "",
        *momentum_table_of(report),
        "",
        *methods_table_of(report),
        "",
        *left_undone(report),
        f"tests: status {tests.get('status', 'not run')}, {tests.get('what', '')}",
        *map(str, targets_of(report)),
    ]


def left_undone(report: Report) -> Iterator[str]:
    """Sections that did not end well, and what was skipped."""
    for name, section in report.content["sections"].items():
        if section["state"] != "done" or section["skipped"]:
            some = "; ".join(section["skipped"][:3])
            yield f"{name}: {section['state']}, {len(section['skipped'])} skipped {some}"[:300]
