"""All sections in their order, and the process that runs them one after the other, whatever fails."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence

import torch

from gpubench import launch_table, methods, momentum, overhead, speed
from gpubench.machine import describe_device
from gpubench.results import Report, Run

BROKEN_DEVICE = 3
"""Exit status of a measuring process that is of no more use."""
SECTIONS: dict[str, Callable[[Run], None]] = {
    "bandwidth": speed.measure_bandwidth,
    "combination": speed.measure_combination,
    "host": overhead.measure_host,
    "launches": overhead.measure_launches,
    "replays": speed.measure_replays,
    "one launch": launch_table.measure_one_launch,
    "momentum": momentum.measure_momentum,
    "methods": methods.measure_methods,
    "alignment": speed.measure_alignment,
    "first call": overhead.measure_first_call,
    "libraries": speed.measure_libraries,
    "landing": speed.measure_landing,
    "launch table": launch_table.measure_launch_table,
    "kernels": launch_table.list_kernels,
    "compiled": speed.measure_compiled,
    "plain replays": speed.measure_plain_replays,
}
NO_TIME_LEFT = "skipped: no time left"
SHARE = {"combination": 0.45, "launches": 0.3, "one launch": 0.3, "libraries": 0.3, "launch table": 0.6}
"""Of the time left when they begin, at most how much these sections may take; the others are short."""


def measure(names: Sequence[str], device: torch.device, deadline: float, report: Report, shrink: int) -> int:
    """Run sections one after the other in this process."""
    report.content.setdefault("machine", {}).update(describe_device(device))
    for name in names:
        left = deadline - time.time()
        run = Run(device, time.time() + SHARE.get(name, 1.0) * left, report, shrink, name)
        section = report.section(name)
        if left < 3.0:
            section["state"] = NO_TIME_LEFT
            report.save()
            continue
        print(f"{name} ({left:.0f} s left)", flush=True)
        section["state"], begin = "running", time.time()
        report.save()
        try:
            SECTIONS[name](run)
            section["state"] = "done"
        except Exception:
            section["state"] = "failed"
            section["error"] = traceback.format_exc()[-3000:]
            print(section["error"], flush=True)
        section["seconds"] = round(time.time() - begin, 1)
        report.save()
        if run.tainted or not answers(device):
            return BROKEN_DEVICE
    return 0


def answers(device: torch.device) -> bool:
    """Whether the device still works: after an illegal access nothing in this process ever does."""
    try:
        return float(torch.ones(2, device=device).sum()) == 2.0
    except Exception as error:
        print(f"the device answers no more: {error}", flush=True)
        return False
