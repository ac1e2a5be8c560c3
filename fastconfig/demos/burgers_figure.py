"""The demo's picture: solution, errors, test error and losses over time, cosines between the losses' gradients."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastconfig.demos.burgers import PAIRS, Trainer
from fastconfig.demos.burgers_problem import LOSS_NAMES, ExactGrid

# Okabe and Ito's colours, told apart with every common colour blindness; line styles tell them apart in grey, too.
_METHOD_LINES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."))
_PAIR_LINES = (("#CC79A7", "-"), ("#E69F00", "--"), ("#56B4E9", "-."))
_ERROR_RANGE = (1e-4, 1.0)
_FONT_SIZE = 11
_COSINE_BINS = 40

Field = NDArray[np.float64]


def save_figure(trainers: Sequence[Trainer], grid: ExactGrid, path: Path) -> None:
    """Draw what there is of the trainers' work, 'not run' where there is none, into a PNG.

    Args:
        trainers: evaluated on ``grid`` as they are now.
        grid: the exact solution.
        path: the PNG; replaced whole or left as it is.

    Raises:
        OSError: it cannot be written.
    """
    figure = _draw(trainers, grid)
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format="png", dpi=110)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _draw(trainers: Sequence[Trainer], grid: ExactGrid) -> Figure:
    figure = Figure(figsize=(16, 15), layout="constrained")
    FigureCanvasAgg(figure)  # never a window, whatever backend the user has set
    columns = len(trainers) + 1
    cells = figure.add_gridspec(4, columns, height_ratios=(1, 1, 1, 1))
    axes = [[figure.add_subplot(cells[row, column]) for column in range(columns)] for row in range(3)]
    predictions = [grid.predict(trainer.network) if trainer.steps else None for trainer in trainers]
    _draw_solutions(figure, axes[0], trainers, predictions, grid)
    _draw_errors(figure, axes[1], trainers, predictions, grid)
    _draw_histories(axes[2], trainers)
    _draw_cosines(figure.add_subplot(cells[3, :]), trainers)
    figure.suptitle(
        "Burgers' equation $u_t + u\\,u_x = (0.01/\\pi)\\,u_{xx}$: one network, three ways to train it on three losses",
        fontsize=_FONT_SIZE + 4,
    )
    return figure


def _draw_solutions(
    figure: Figure, axes: list[Axes], trainers: Sequence[Trainer], predictions: list[Field | None], grid: ExactGrid
) -> None:
    titles = ["exact solution"] + [_title(trainer) for trainer in trainers]
    for ax, title, field in zip(axes, titles, [grid.exact, *predictions], strict=True):
        _label_field(ax, title)
        if field is None:
            _say_not_run(ax)
            continue
        image = ax.imshow(field.T, extent=(0, 1, -1, 1), origin="lower", aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
        if ax is axes[0]:
            figure.colorbar(image, ax=axes, label="$u(x, t)$", pad=0.01, aspect=15)


def _draw_errors(
    figure: Figure, axes: list[Axes], trainers: Sequence[Trainer], predictions: list[Field | None], grid: ExactGrid
) -> None:
    profile, *fields = axes
    profile.plot(grid.x, grid.exact[-1], color="black", linewidth=3.5, alpha=0.35, label="exact")
    norm = LogNorm(*_ERROR_RANGE)
    for ax, trainer, (color, style), prediction in zip(fields, trainers, _METHOD_LINES, predictions, strict=True):
        _label_field(ax, f"{trainer.name}: error")
        if prediction is None:
            _say_not_run(ax)
            continue
        profile.plot(grid.x, prediction[-1], color=color, linestyle=style, label=trainer.name)
        error = np.maximum(np.abs(prediction - grid.exact), _ERROR_RANGE[0])
        ax.imshow(error.T, extent=(0, 1, -1, 1), origin="lower", aspect="auto", cmap="viridis", norm=norm)
    _label(profile, "solution at $t = 1$", "position $x$", "$u(x, 1)$")
    profile.legend(fontsize=_FONT_SIZE - 1)
    scale = ScalarMappable(norm, "viridis")
    figure.colorbar(scale, ax=axes, label="$|u - u_\\mathrm{exact}|$", pad=0.01, aspect=15, extend="both")


def _draw_histories(axes: list[Axes], trainers: Sequence[Trainer]) -> None:
    for ax, name in zip(axes, ("test MSE", *(f"{name} loss" for name in LOSS_NAMES)), strict=True):
        quantity = "mean of $(u - u_\\mathrm{exact})^2$" if ax is axes[0] else "mean of squares"
        _label(ax, name, "training time (s)", quantity)
        ax.set_yscale("log")
        ax.grid(alpha=0.3)
    ran = [(t, line) for t, line in zip(trainers, _METHOD_LINES, strict=True) if t.steps]
    for trainer, (color, style) in ran:
        history = trainer.history
        losses = np.asarray(history.losses)
        for ax, values in zip(axes, (history.errors, *losses.T), strict=True):
            ax.plot(history.seconds, values, color=color, linestyle=style, label=trainer.name)
    if not ran:
        for ax in axes:
            _say_not_run(ax)
    else:
        axes[0].legend(fontsize=_FONT_SIZE - 1)


def _draw_cosines(ax: Axes, trainers: Sequence[Trainer]) -> None:
    """Median and 10 to 90 % range of each pair's cosine in each of 40 stretches of time."""
    recorded = next((trainer for trainer in trainers if trainer.history.cosines), None)
    who = "" if recorded is None else f" while {recorded.name} trains"
    title = f"cosines between the losses' gradients{who}: median, and the range of 80 % of the steps"
    _label(ax, title, "training time (s)", "cosine")
    ax.set_ylim(-1.05, 1.45)  # room for the legend
    ax.set_yticks(np.linspace(-1.0, 1.0, 5))
    if recorded is None:
        _say_not_run(ax)
        return
    history = recorded.history
    seconds, cosines = np.asarray(history.cosine_seconds), np.asarray(history.cosines)
    bins = np.array_split(np.arange(len(seconds)), min(_COSINE_BINS, len(seconds)))
    middle = [seconds[steps].mean() for steps in bins]
    for (i, j), (color, style), values in zip(PAIRS, _PAIR_LINES, cosines.T, strict=True):
        low, median, high = np.array([np.quantile(values[steps], (0.1, 0.5, 0.9)) for steps in bins]).T
        label = f"{LOSS_NAMES[i]} and {LOSS_NAMES[j]}: below 0 in {100 * np.mean(values < 0):.0f} % of the steps"
        ax.fill_between(middle, low, high, color=color, alpha=0.15, linewidth=0)
        ax.plot(middle, median, color=color, linestyle=style, linewidth=2, label=label)
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.set_xlim(0.0, seconds[-1] + 1e-9)
    ax.legend(fontsize=_FONT_SIZE - 1, ncols=len(PAIRS), loc="upper center")


def _title(trainer: Trainer) -> str:
    if not trainer.steps:
        return trainer.name
    return f"{trainer.name}: MSE {trainer.history.errors[-1]:.1e}\n{trainer.steps} steps in {trainer.seconds:.1f} s"


def _label_field(ax: Axes, title: str) -> None:
    _label(ax, title, "time $t$", "position $x$")
    ax.set_xlim(0, 1)
    ax.set_ylim(-1, 1)


def _label(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=_FONT_SIZE + 1)
    ax.set_xlabel(x, fontsize=_FONT_SIZE)
    ax.set_ylabel(y, fontsize=_FONT_SIZE)
    ax.tick_params(labelsize=_FONT_SIZE - 1)


def _say_not_run(ax: Axes) -> None:
    ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", va="center", fontsize=_FONT_SIZE + 2)
