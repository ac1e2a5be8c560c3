"""The processes of the benchmark: how one is called, awaited and ended, with what it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "gpu.py"


def own_command(device: object, *options: str) -> list[str]:
    """The benchmark itself as another process, which may run in any folder."""
    return [sys.executable, str(SCRIPT), "--device", str(device), *options]


def finish(process: subprocess.Popen, seconds: float) -> int | None:
    """Its exit status, or None where it had to be ended: asked first, as pytest then says what it has so far."""
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        end(process, (signal.SIGINT, signal.SIGKILL))
        return None


def end(process: subprocess.Popen, signals: Sequence[signal.Signals]) -> None:
    """Signal a process and its children, one signal after the other until the process is gone."""
    for what in signals:
        if process.poll() is None:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, what)
                process.wait(8)
