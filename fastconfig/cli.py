"""The ``fastconfig`` command: ``fastconfig doctor``, ``methods``, ``plot`` and ``demo burgers``."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType

import torch

from fastconfig.conflict.history import ConflictHistory
from fastconfig.diagnostics import show_config
from fastconfig.methods.catalogue import CATALOGUE, entry_of

_PICTURE = "burgers.png"
_DEFAULT_SECONDS = 60.0
_INTERRUPTED = 130
"""128 + SIGINT, what a shell reports of a command that Ctrl-C ended."""
_PIPE_CLOSED = 141
"""128 + SIGPIPE."""


class Interrupt:
    """Ctrl-C as a wish to finish early, noted instead of raised; a second one raises KeyboardInterrupt as usual.

    Noting it keeps the training consistent: no step is left half done, and what there is can be evaluated.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: object = None

    def __enter__(self) -> Interrupt:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments, without the program's name; None for those of the process.

    Returns:
        The exit code: 0, 2 where it cannot start or write, 130 after Ctrl-C, 141 where nobody reads its output.

    Raises:
        SystemExit: from argparse, 2 for wrong arguments and 0 after ``--help``.
    """
    parser, demo = _parsers()
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "demo":
            return _demo_burgers(arguments, demo)
        if arguments.command == "plot":
            return _plot(arguments)
        if arguments.command == "methods":
            _print_methods()
        else:
            show_config()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # As in `fastconfig doctor | head -1`. Else the interpreter fails once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    return 0


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The whole command's, and the one of ``demo burgers`` for its errors."""
    parser = argparse.ArgumentParser(prog="fastconfig", description="Conflict-free gradients, at memory speed.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="show the version, the backends and why one is missing")
    commands.add_parser("methods", help="list the methods, what each does and where it was published")
    plot = commands.add_parser(
        "plot",
        help="draw what a ConflictMonitor recorded",
        description="Draw a CSV file of fc.ConflictMonitor: who conflicts with whom, and cosines, gradient norms, "
        "weights and conflict rate over time.",
    )
    plot.add_argument("csv", type=Path, metavar="run.csv", help="what ConflictMonitor(..., csv=...) wrote")
    plot.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="PICTURE",
        help="a .png, .svg or .pdf (default: the CSV file's name with .png); replaces an old one",
    )
    demos = commands.add_parser("demo", help="train on a real problem").add_subparsers(
        dest="demo", required=True, metavar="PROBLEM"
    )
    description = (
        "Train the physics-informed network of the ConFIG paper on Burgers' equation by Adam on the summed loss, by "
        "ConFIG (or another method) and by M-ConFIG, each for the same wall time; print a table and draw a PNG. They "
        "take turns, so Ctrl-C at any moment leaves all three equally far: the table and the PNG then show what there "
        "is."
    )
    demo = demos.add_parser("burgers", help="a physics-informed network, three ways", description=description)
    demo.add_argument(
        "--seconds",
        type=_seconds,
        help=f"wall time of training for each method (default: {_DEFAULT_SECONDS:g}; no limit if --steps is given)",
    )
    demo.add_argument(
        "--steps",
        type=_steps,
        help="steps at most for each method. Without --seconds, the same seed and steps give the same result",
    )
    demo.add_argument(
        "--method",
        type=_method,
        default="config",
        metavar="NAME",
        help="what combines the three gradients in ConFIG's place, one of `fastconfig methods` (default: config)",
    )
    demo.add_argument("--seed", type=_seed, default=0, help="of the initial weights and the points (default: 0)")
    demo.add_argument("--device", type=_device, default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    demo.add_argument(
        "--out",
        type=_picture_path,
        default=".",
        help=f"the PNG to write, or an existing directory to put {_PICTURE} in (default: here); replaces an old one",
    )
    return parser, demo


def _print_methods() -> None:
    width = max(len(name) for name in CATALOGUE)
    wide = max(len(entry.rule) for entry in CATALOGUE.values())
    for name, entry in CATALOGUE.items():
        print(f"{name:<{width}}  {entry.rule:<{wide}}  {entry.source}")


def _method(text: str) -> str:
    try:
        entry_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text.lower()


def _steps(text: str) -> int:
    try:
        steps = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}; for instance 1000") from None
    if steps < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {steps}; leave it out for a limit by time alone")
    return steps


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}; for instance 60") from None
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError(
            f"must be a finite number above 0, got {text}; for a limit by steps alone give only --steps"
        )
    return seconds


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1, got {text!r}; for instance 0")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # the Gramian is float64, which not all have
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        available = "cpu" + "".join(f", cuda:{i}" for i in range(torch.cuda.device_count()))
        raise argparse.ArgumentTypeError(f"cannot use {text!r} ({reason}); available: {available}") from None
    return device


def _picture_path(text: str) -> Path:
    """Where the PNG goes, after making sure before any training that it can."""
    path = Path(text).expanduser()
    if path.is_dir():
        path /= _PICTURE
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(
            f"must be a file ending in .png or an existing directory, got {text!r}; make the directory, or add .png"
        )
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{str(path)!r} is a directory, in the PNG's place; give another name")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no directory {str(path.parent)!r}, got {text!r}; make it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"cannot write into {str(path.parent)!r} ({error.strerror}), got {text!r}; choose another directory"
        ) from None
    return path


def _plot(arguments: argparse.Namespace) -> int:
    if not _has("fastconfig plot", "matplotlib"):
        return 2
    from fastconfig.conflict.figure import save_figure  # here, not above: it draws in the optional package

    source: Path = arguments.csv
    out: Path = arguments.out or source.with_suffix(".png")
    try:
        history = ConflictHistory.read_csv(source)
        if not len(history):
            raise ValueError(f"{source} holds no record yet; the monitor writes in batches, and when it is closed")
        save_figure(history, out)
    except (OSError, ValueError) as error:
        print(f"fastconfig plot: error: {error}", file=sys.stderr)
        return 2
    print(f"Picture: {out}")
    return 0


def _has(command: str, *packages: str) -> bool:
    """Whether packages are installed; else it is said how to get them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not installed"
        print(f"{command}: error: {reason}; run: pip install {' '.join(packages)}", file=sys.stderr)
    return not missing


def _demo_burgers(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if not _has(parser.prog, "matplotlib", "rich"):
        return 2
    with Interrupt() as interrupt:
        # Here, not above: both draw in the optional packages.
        from rich.console import Console

        from fastconfig.demos import burgers, burgers_figure, burgers_problem, report

        console = Console(highlight=False)
        seconds = arguments.seconds
        if seconds is None and arguments.steps is None:
            seconds = _DEFAULT_SECONDS
        budget = burgers.Budget(seconds, arguments.steps)
        grid = burgers_problem.ExactGrid(arguments.device)
        trainers = burgers.trainers(arguments.seed, arguments.device, budget, arguments.method)
        with report.TrainingProgress(console, trainers) as progress:
            burgers.train(trainers, grid, lambda: interrupt.requested, progress.update)
        if interrupt.requested:
            console.print("Interrupted: writing what there is. Ctrl-C again leaves at once.")
        console.print(report.results_table(trainers))
        try:
            burgers_figure.save_figure(trainers, grid, arguments.out)
        except OSError as error:
            print(f"{parser.prog}: error: argument --out: cannot write {arguments.out} ({error})", file=sys.stderr)
            return 2
        print(f"Picture: {arguments.out}")
        return _INTERRUPTED if interrupt.requested else 0
