"""The toy problem's picture: how each method goes from five starts through the valley. ``python -m`` draws it.

A panel a method, over the contours of the losses' mean; the Pareto set is the line at the bottom.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from torch import Tensor

from fastconfig.demos.toy_problem import STARTS, losses, pareto_set, regret, trajectories
from fastconfig.methods import Method, StreamingMethod
from fastconfig.methods.catalogue import CATALOGUE

# Okabe and Ito's colours, a start each; markers tell them apart in grey, too.
_STARTS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"))
_COLUMNS = 5
_FONT_SIZE = 10
_EDGE = 11.0
_LEFT_OUT = ("sum", "constant")
"""Mean, longer: Adam makes the same steps of it."""


def toy_methods() -> dict[str, Callable[[], Method | StreamingMethod]]:
    """Every method by the name of its class, each made anew for two losses."""
    return {entry.kind.__name__: partial(entry.make, 2) for name, entry in CATALOGUE.items() if name not in _LEFT_OUT}


def save_figure(paths: Mapping[str, Tensor], path: Path) -> None:
    """Draw trajectories from the five starts, a panel a method, into a PNG.

    Args:
        paths: of each method, by its name, what ``trajectories`` gives.
        path: the PNG; replaced whole or left as it is.

    Raises:
        OSError: it cannot be written.
    """
    rows = math.ceil((len(paths) + 1) / _COLUMNS)
    figure = Figure(figsize=(2.6 * _COLUMNS, 2.75 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)  # never a window, whatever backend the user has set
    axes = figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False)
    for ax, (name, method_paths) in zip(axes.flat, paths.items(), strict=False):
        _draw_panel(ax, name, method_paths)
    for ax in axes.flat[len(paths) :]:
        ax.set_axis_off()
    for ax in axes.flat[max(0, len(paths) - _COLUMNS) : len(paths)]:
        ax.tick_params(labelbottom=True)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].legend(handles, labels, loc="center", fontsize=_FONT_SIZE, frameon=False)
    figure.supxlabel("$\\theta_1$", fontsize=_FONT_SIZE + 2)
    figure.supylabel("$\\theta_2$", fontsize=_FONT_SIZE + 2)
    figure.suptitle(
        "Two losses, a valley with kinks, five starts: the way of each method to the Pareto set "
        "(in brackets how many starts reach it)",
        fontsize=_FONT_SIZE + 3,
    )
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format="png", dpi=72, pil_kwargs={"optimize": True})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _draw_panel(ax: Axes, name: str, paths: Tensor) -> None:
    axis = torch.linspace(-_EDGE, _EDGE, 221, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    mean = losses(torch.stack((x, y), dim=-1)).mean(dim=-1)
    ax.contour(axis, axis, mean, levels=12, colors="#b0b0b0", linestyles="-", linewidths=0.6)
    front = pareto_set()
    ax.plot(front[:, 0], front[:, 1], color="black", linewidth=5, alpha=0.3, label="Pareto set")
    for start, way, (color, marker) in zip(STARTS, paths, _STARTS, strict=True):
        label = f"from ({start[0]:g}, {start[1]:g})"
        ax.plot(way[:, 0], way[:, 1], color=color, linewidth=1.3)
        ax.plot(*way[0], marker, color=color, markersize=5, label=label)
        end = ax.plot(*way[-1], "*", color=color, markersize=11)
        end[0].set_path_effects([Stroke(linewidth=1.5, foreground="white"), Normal()])
    arrived = int((regret(paths[:, -1]) < 0.1).sum())
    ax.set_title(f"{name} ({arrived})", fontsize=_FONT_SIZE + 1)
    ax.set_xlim(-_EDGE, _EDGE)
    ax.set_ylim(-_EDGE, _EDGE)
    ax.set_xticks([-10, 0, 10])
    ax.set_yticks([-10, 0, 10])
    ax.tick_params(labelsize=_FONT_SIZE - 1)


def main() -> None:
    """Train by every method, from one seed, and draw."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "out", type=Path, nargs="?", default=Path("docs/toy.png"), help="the PNG (default: %(default)s)"
    )
    out: Path = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_figure({name: trajectories(make) for name, make in toy_methods().items()}, out)


if __name__ == "__main__":
    main()
