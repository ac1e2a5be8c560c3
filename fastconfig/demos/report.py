"""What the demo prints: progress while it trains, a table at the end. Plain lines where stdout is no terminal."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from fastconfig.demos.burgers import Trainer
from fastconfig.demos.burgers_problem import LOSS_NAMES

_SHARE_PER_LINE = 0.2
"""Of the budget, between two lines where there is no terminal."""


class TrainingProgress:
    """One bar a method with its latest losses; without a terminal, one line at every fifth of the budget.

    Args:
        console: what to print on.
        trainers: what to report on; read at every ``update``.
    """

    def __init__(self, console: Console, trainers: Sequence[Trainer]) -> None:
        self._console = console
        self._trainers = trainers
        self._next_line = _SHARE_PER_LINE
        self._bars: Progress | None = None

    def __enter__(self) -> TrainingProgress:
        heading = f"Losses: {', '.join(LOSS_NAMES)}"
        self._console.print(heading)
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description:9}"),
                BarColumn(24),
                TaskProgressColumn(),
                TextColumn("{task.fields[losses]}"),
            )
            self._bars = Progress(*columns, console=self._console, refresh_per_second=4)
            for trainer in self._trainers:
                self._bars.add_task(trainer.name, total=1.0, losses="")
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self) -> None:
        """Show where the trainers are."""
        if self._bars is not None:
            for task, trainer in zip(self._bars.task_ids, self._trainers, strict=True):
                self._bars.update(task, completed=trainer.share, losses=_losses(trainer))
            return
        share = min(trainer.share for trainer in self._trainers)
        if share >= self._next_line - 1e-9:
            while self._next_line <= share + 1e-9:
                self._next_line += _SHARE_PER_LINE
            # print, for the console would break the line at its idea of a width
            print(f"{share:4.0%}  " + "  |  ".join(f"{t.name} {_losses(t)}" for t in self._trainers), flush=True)


def results_table(trainers: Sequence[Trainer]) -> Table:
    """Test MSE, steps, seconds, steps a second and the share of time outside losses and backward, one row a method."""
    table = Table(title="Burgers' equation")
    table.add_column("method")
    for heading in ("test MSE", "steps", "seconds", "steps/s", "outside backward"):
        table.add_column(heading, justify="right")
    for trainer in trainers:
        table.add_row(trainer.name, *_cells(trainer))
    return table


def _cells(trainer: Trainer) -> list[str]:
    if trainer.steps == 0:
        return ["not run", "0", "-", "-", "-"]
    return [
        f"{trainer.history.errors[-1]:.2e}",
        str(trainer.steps),
        f"{trainer.seconds:.1f}",
        f"{trainer.steps / trainer.seconds:.0f}",
        f"{1 - trainer.backward_seconds / trainer.seconds:.1%}",
    ]


def _losses(trainer: Trainer) -> str:
    return " ".join(f"{loss:.1e}" for loss in trainer.losses)
