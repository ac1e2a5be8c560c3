"""Tests and measures fastconfig on the GPU of this machine, in one go and unattended, and says which targets are met.

``make gpu``, or ``python3 bench/gpu.py``: builds the package in place, compiles the kernels, measures, runs the tests
that need a device, and measures what there was no time for before. Needs PyTorch with Triton, pybind11, a C++ compiler
and pytest, and no network. A part that fails is noted and the next one begins; a part that hangs or breaks the device
ends its process, not the run; what no time is left for is skipped and named. Everything goes to one JSON file, the
table is printed last.

How times are taken: by events of the device around batches of calls, as medians; inputs rotate through buffers that
together exceed the second-level cache; compilation is over before. "floor" is the time in which the measured copy
bandwidth, bytes read and written, moves the (2mn + n) elements that a combination must move at least.

``--device cpu --shrink 10000`` tries the script itself where there is no GPU; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gpubench.ahead import compile_some
from gpubench.machine import describe_machine
from gpubench.overhead import first_call
from gpubench.processes import end, finish, own_command
from gpubench.results import Report, short
from gpubench.sections import NO_TIME_LEFT, SECTIONS, measure
from gpubench.summary import summary

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TESTS_SHARE = 0.3
"""The part of the time that is kept for the tests."""
SILENCE = 100.0
"""Seconds without a new result after which a measuring process counts as hung."""


@dataclass
class Orchestra:
    """Starts the other processes, and outlives them."""

    arguments: argparse.Namespace
    report: Report
    begin: float = field(default_factory=time.time)
    folder: Path = ROOT
    """Where the processes run: a folder in which ``import fastconfig`` finds the package."""

    @property
    def deadline(self) -> float:
        return self.begin + 60 * self.arguments.minutes - 10

    @property
    def measuring_ends(self) -> float:
        """Until when is measured: the tests come after, as they may take whatever time there is."""
        tests_are_due = not self.arguments.no_tests and "tests" not in self.report.content
        return self.deadline - (TESTS_SHARE * 60 * self.arguments.minutes if tests_are_due else 0.0)

    def left(self) -> float:
        return self.deadline - time.time()

    def start(self, command: Sequence[str], log: Path | None = None, **environment: str) -> subprocess.Popen:
        """A process in a group of its own, so that what it starts can be ended with it."""
        output = log.open("w") if log else None
        return subprocess.Popen(
            command,
            cwd=self.folder,
            stdout=output,
            stderr=subprocess.STDOUT if log else None,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True,
        )

    def stage(self, name: str, work: Callable[[], dict]) -> None:
        print(f"{name} ({self.left():.0f} s left)", flush=True)
        begin = time.time()
        try:
            found = work()
        except Exception:
            found = {"error": traceback.format_exc()[-3000:]}
        found["seconds"] = round(time.time() - begin, 1)
        self.report.content[name] = found
        self.report.save()
        print(f"  {name}: {short(found)}", flush=True)
        for key in ("error", "tail"):
            if found.get(key):
                print(found[key], flush=True)

    def log_path(self, name: str) -> Path:
        return self.report.path.with_name(f"{self.report.path.stem}-{name}.log")

    def install(self) -> dict:
        log = self.log_path("install")
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
        status = finish(self.start(command, log), min(150.0, 0.4 * self.left()))
        if status == 0:
            return {"status": status}
        self.run_from_a_copy()
        return {"status": status, "what": "runs uninstalled, without the CPU core", "tail": log.read_text()[-3000:]}

    def run_from_a_copy(self) -> None:
        """The package as it would be installed, in a folder of its own: the kernels need no compiler but Triton's."""
        self.folder = Path(tempfile.mkdtemp(prefix="fastconfig-"))
        shutil.copytree(ROOT / "fastconfig", self.folder / "fastconfig")
        shutil.copytree(ROOT / "kernels", self.folder / "fastconfig" / "kernels")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])])

    def compile_ahead(self) -> dict:
        parts = max(1, min(12, (os.cpu_count() or 2) - 2))
        commands = [own_command(self.arguments.device, "--compile", f"{part}/{parts}") for part in range(parts)]
        processes = [self.start(command) for command in commands]
        stop = time.time() + min(100.0, 0.3 * self.left())
        while time.time() < stop and any(process.poll() is None for process in processes):
            time.sleep(0.2)
        statuses = [process.poll() for process in processes]
        for process in processes:
            end(process, (signal.SIGKILL,))
        return {"processes": parts, "statuses": str(statuses)}

    def test(self) -> dict:
        """The tests that need a device, in several processes where pytest-xdist is there: they mostly compile."""
        names = ("gpu", "test_triton.py", "test_triton_rules.py", "test_momentum_triton.py")
        paths = [ROOT / "tests" / name for name in names]
        command = [sys.executable, "-m", "pytest", *(str(path) for path in paths if path.exists())]
        command += ["-q", "-W", "default", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += ["--tb=short", "--durations=8", "-rfE"]
        several = min(10, (os.cpu_count() or 2) - 2)
        if importlib.util.find_spec("xdist") and several > 1:
            found = self.run_tests([*command, "-n", str(several)])
            if found["counts"]:
                return found
        return self.run_tests(command)

    def run_tests(self, command: Sequence[str]) -> dict:
        log = self.log_path("tests")
        # PyTorch wants it where a test asks for deterministic algorithms, as the reference multiplies matrices.
        process = self.start(command, log, CUBLAS_WORKSPACE_CONFIG=":4096:8")
        status = finish(process, self.left() - 5)
        text = log.read_text(errors="replace")
        found: dict = {"status": "out of time" if status is None else status, "counts": counts_of(text)}
        found["what"] = " ".join(f"{number} {word}" for word, number in found["counts"].items()) or "no counts"
        found["command"] = " ".join(command[1:])
        if status != 0:
            found["tail"] = text[-5000:]
        return found

    def measure(self) -> dict:
        """Sections in one process, and in another those that are left when it hangs or loses its device."""
        wanted = [name for name in SECTIONS if not self.arguments.only or name in self.arguments.only]
        sections = self.report.content["sections"]
        for name in [name for name, section in sections.items() if section["state"] == NO_TIME_LEFT]:
            del sections[name]
        names = [name for name in wanted if name not in sections]
        processes = 0
        while names and self.measuring_ends - time.time() > 5 and processes < 8:
            processes += 1
            self.report.save()
            status = self.watch(self.start(self.measuring(names)))
            self.report.content = Report(self.report.path).content
            for name in names:
                section = self.report.section(name)
                if section["state"] == "running":
                    section["state"] = f"died with status {status}" if status is not None else "hung, or out of time"
            left = [name for name in names if self.report.section(name)["state"] == "new"]
            if len(left) == len(names):
                return {"error": f"the measuring process ended with status {status} before it began"}
            names = left
        return {"processes": processes, "not_begun": str(names)}

    def measuring(self, names: Sequence[str]) -> list[str]:
        options = ["--out", str(self.report.path), "--shrink", str(self.arguments.shrink)]
        options += ["--deadline", str(self.measuring_ends), "--measure", *names]
        return own_command(self.arguments.device, *options)

    def watch(self, process: subprocess.Popen) -> int | None:
        """Wait for a measuring process while it writes results and there is time. None: it had to be ended."""
        begin = time.time()
        while process.poll() is None:
            time.sleep(0.2)
            heard = max(begin, self.report.path.stat().st_mtime)
            if time.time() - heard > SILENCE or time.time() > self.measuring_ends + 8:
                end(process, (signal.SIGKILL,))
                return None
        return process.returncode


def counts_of(text: str) -> dict[str, int]:
    """Passed, failed and so on from pytest's last line."""
    kinds = r"(\d+) (passed|failed|errors?|skipped|xfailed)\b"
    lines = [line for line in text.splitlines() if re.search(kinds, line) and re.search(r" in [\d.]+s", line)]
    return {word: int(number) for number, word in re.findall(kinds, lines[-1])} if lines else {}


def output_path(arguments: argparse.Namespace, machine: dict) -> Path:
    if arguments.out:
        return Path(arguments.out).resolve()
    folder = Path(os.environ["OUT"]).resolve() if os.environ.get("OUT") else HERE / "results"
    name = "cpu-trial" if arguments.device == "cpu" else str(machine["gpu"]).lower()
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}.json"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="the JSON file (default: bench/results/<gpu>.json, or in the folder $OUT)")
    parser.add_argument("--minutes", type=float, default=8.0, help="how long all of it may take")
    parser.add_argument("--no-install", action="store_true", help="the package is installed already")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, help="sections to measure; the file's others stay")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shrink", type=int, default=1, help="divide every n by this, to try the script itself")
    # For the processes that this one starts.
    parser.add_argument("--measure", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse()
    device = torch.device(arguments.device)
    if arguments.first_call:
        first_call(device)
    elif arguments.compile:
        part, parts = arguments.compile.split("/")
        compile_some(device, int(part), int(parts))
    elif arguments.measure:
        return measure(arguments.measure, device, arguments.deadline, Report(Path(arguments.out)), arguments.shrink)
    else:
        return run_all(arguments)
    return 0


def fresh_report(path: Path, only: Sequence[str] | None) -> Report:
    """A new file, or with ``--only`` the old one without the sections that are measured anew."""
    if not only:
        path.unlink(missing_ok=True)
    report = Report(path)
    for name in only or ():
        report.content["sections"].pop(name, None)
    return report


def run_all(arguments: argparse.Namespace) -> int:
    machine = describe_machine()
    report = fresh_report(output_path(arguments, machine), arguments.only)
    report.content["machine"] = machine
    report.save()
    orchestra = Orchestra(arguments, report)
    if not arguments.no_install:
        orchestra.stage("install", orchestra.install)
    if arguments.device == "cuda":
        orchestra.stage("compile ahead", orchestra.compile_ahead)
    orchestra.stage("measure", orchestra.measure)
    if not arguments.no_tests:
        orchestra.stage("tests", orchestra.test)
        orchestra.stage("measure the rest", orchestra.measure)
    print("\n".join(summary(report)), flush=True)
    print(f"written: {report.path}")
    return 0 if report.content.get("tests", {}).get("status", 0) == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
