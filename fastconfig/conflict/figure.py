"""A ConflictMonitor's picture: who conflicts with whom, and cosines, norms, weights and conflict rate over time."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fastconfig.conflict.history import ConflictHistory, Floats

SUFFIXES = (".png", ".svg", ".pdf")

Style = str | tuple[int, tuple[int, ...]]
Bins = list[NDArray[np.int64]]

# Okabe and Ito's colours, told apart with every common colour blindness; line styles tell them apart in grey, too.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES: tuple[Style, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
_DIVERGING = "RdBu"
"""ColorBrewer's: red below 0, white there, blue above; told apart with every common colour blindness."""
_MOST_LINES = len(_COLORS)
"""Beyond, a loss or a pair gets a row of a heat map or a part in a band, not a line."""
_MOST_NUMBERED = 12
"""Losses up to which the cells of the heat map hold numbers."""
_LONGEST_LABEL = 20
_FONT_SIZE = 11
_BINS = 120
_MOST_WORST = 10
_SAMPLES = 2_000_000
"""Cosines of which quantiles are drawn: those of a longer run are thinned evenly, which no eye can see."""


def save_figure(history: ConflictHistory, path: Path) -> None:
    """Draw a history of at least one record.

    Args:
        history: what to draw.
        path: the picture, .png, .svg or .pdf; replaced whole or left as it is.

    Raises:
        ValueError: another suffix.
        OSError: it cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"path must end in {', '.join(SUFFIXES)}, got {str(path)!r}")
    figure = _draw(history)
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format=suffix[1:], dpi=110)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _draw(history: ConflictHistory) -> Figure:
    m = len(history.names)
    side = max(6.0, 0.26 * m + 2.0)  # of the heat map, in inches: each label wants a line, as does each below
    rows = max(2.6, 0.16 * m + 0.4) if m > _MOST_LINES else 2.6
    heights = (2.6, rows, rows, 2.6)
    figure = Figure(figsize=(side + 10.0, sum(heights) + 1.0), layout="constrained")
    FigureCanvasAgg(figure)  # never a window, whatever backend the user has set
    cells = figure.add_gridspec(1, 2, width_ratios=(side, 10.0))
    left = cells[0].subgridspec(2, 1, height_ratios=(side + 0.5, max(1.0, sum(heights) - side - 0.5)))
    labels = [_shown(name) for name in history.names]
    bins = np.array_split(np.arange(len(history)), min(_BINS, len(history)))
    _draw_mean_cosines(figure, figure.add_subplot(left[0]), history, labels)
    _draw_worst_pairs(figure.add_subplot(left[1]), history, labels)
    axes = _stacked(figure, cells[1], heights)
    _draw_cosines(axes[0], history, labels, bins)
    _draw_losses(figure, axes[1], "gradient norms", "norm", history, history.norms, labels, bins)
    _draw_losses(figure, axes[2], "weights that the method chose", "weight", history, history.weights, labels, bins)
    _draw_conflict_rate(axes[3], history, bins)
    axes[3].set_xlabel("step", fontsize=_FONT_SIZE)
    axes[3].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(_title(history), fontsize=_FONT_SIZE + 4)
    return figure


def _title(history: ConflictHistory) -> str:
    m, steps = len(history.names), history.steps
    losses = "1 loss" if m == 1 else f"{m} losses"
    records = "1 step recorded" if len(history) == 1 else f"{len(history):,} steps recorded"
    return f"Gradients of {losses}: {records}, {steps[0]:,} to {steps[-1]:,}"


def _shown(name: str) -> str:
    """A loss's name as matplotlib shows it whole: no formula, and nothing that a legend leaves out."""
    short = name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…"
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")


def _stacked(figure: Figure, where: SubplotSpec, heights: tuple[float, ...]) -> list[Axes]:
    """Axes below each other over one time."""
    cells = where.subgridspec(len(heights), 1, height_ratios=heights)
    first = figure.add_subplot(cells[0])
    axes = [first, *(figure.add_subplot(cells[i], sharex=first) for i in range(1, len(heights)))]
    for ax in axes[:-1]:
        ax.tick_params(labelbottom=False)
    return axes


def _draw_mean_cosines(figure: Figure, ax: Axes, history: ConflictHistory, labels: list[str]) -> None:
    mean, m = history.mean_cosines(), len(labels)
    _label(ax, "mean cosine between the losses' gradients", "")
    ax.set_facecolor("#CCCCCC")  # a pair that never met
    image = ax.imshow(np.ma.masked_invalid(mean), cmap=_DIVERGING, vmin=-1, vmax=1)
    bar = figure.colorbar(image, ax=ax, location="bottom", shrink=0.7, pad=0.01, aspect=35)
    bar.set_ticks([-1.0, -0.5, 0.0, 0.5, 1.0], labels=["−1: opposed", "−0.5", "0", "0.5", "1: alike"])
    size = min(_FONT_SIZE, 2.0 + 360.0 / m)
    ax.set_xticks(range(m), labels, rotation=90 if max(map(len, labels)) * m > 48 else 0, fontsize=size)
    ax.set_yticks(range(m), labels, fontsize=size)
    if m <= _MOST_NUMBERED:
        for (row, column), value in np.ndenumerate(mean):
            color = "white" if abs(value) > 0.6 else "black"
            text = "" if np.isnan(value) else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # no −0.00
            ax.text(column, row, text, ha="center", va="center", color=color, fontsize=_FONT_SIZE)


def _draw_worst_pairs(ax: Axes, history: ConflictHistory, labels: list[str]) -> None:
    _label(ax, "pairs that conflict most: mean cosine; steps below 0", "")
    ax.set_xlim(-1.0, 1.0)
    ax.set_yticks([])
    mean = history.mean_cosines()
    pairs = [(mean[i, j], pair, i, j) for pair, (i, j) in enumerate(history.pairs) if not np.isnan(mean[i, j])]
    pairs = sorted(pairs)[:_MOST_WORST]
    if not pairs:
        _say(ax, "no two losses met")
        return
    cosines = [cosine for cosine, _, _, _ in pairs]
    ax.barh(range(len(pairs)), cosines, color=[_COLORS[1] if cosine < 0 else _COLORS[0] for cosine in cosines])
    ax.set_ylim(max(len(pairs), 3) - 0.4, -0.6)
    ax.axvline(0.0, color="black", linewidth=0.8)
    for row, (cosine, pair, i, j) in enumerate(pairs):
        text = f"{labels[i]} · {labels[j]}: {_percent(history.cosines[:, pair])}"
        at, side = (0.02, "left") if cosine < 0 else (-0.02, "right")  # where there is no bar
        ax.text(at, row, text, ha=side, va="center", fontsize=_FONT_SIZE - 1)


def _draw_cosines(ax: Axes, history: ConflictHistory, labels: list[str], bins: Bins) -> None:
    """A line a pair, or the range of all pairs; each with the range of 80 % of the steps, or of pairs and steps."""
    every = -(-len(history) * max(1, len(history.pairs)) // _SAMPLES)
    thinned = [steps[:: min(every, len(steps))] for steps in bins]
    cosines, time = history.cosines, _middle(history.steps, bins)
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.set_ylim(-1.05, 1.05)
    if len(history.pairs) <= _MOST_LINES:
        _label(ax, "cosines: median, and the range of 80 % of the steps", "cosine")
        for pair, ((i, j), color, style) in enumerate(zip(history.pairs, _COLORS, _STYLES, strict=False)):
            low, middle, high = _quantiles([cosines[steps, pair] for steps in thinned])
            below = _percent(cosines[:, pair])
            _line(ax, time, middle, color, style, f"{labels[i]} · {labels[j]}: below 0 in {below}", (low, high))
    else:
        _label(ax, "cosines of all pairs: median, worst, and the range of 80 % of pairs and steps", "cosine")
        low, middle, high = _quantiles([cosines[steps].ravel() for steps in thinned])
        _line(ax, time, middle, _COLORS[0], "-", "median", (low, high))
        lowest = np.array([np.fmin.reduce(cosines[steps], axis=None) for steps in bins])
        _line(ax, time, lowest, _COLORS[1], "--", "worst")
    _legend(ax)


def _draw_losses(
    figure: Figure,
    ax: Axes,
    title: str,
    quantity: str,
    history: ConflictHistory,
    values: Floats,
    labels: list[str],
    bins: Bins,
) -> None:
    """One number of each loss over time: a line each, or a row of a heat map where they are many."""
    finite = np.where(np.isfinite(values), values, np.nan)
    positive = bool((finite[~np.isnan(finite)] >= 0).all()) and bool((finite > 0).any())
    if len(labels) > _MOST_LINES:
        _draw_rows(figure, ax, title, quantity, history, np.array([_mean(finite[steps]) for steps in bins]), labels)
        return
    _label(ax, f"{title}: median, and the range of 80 % of the steps", quantity)
    if positive:
        ax.set_yscale("log")
        finite = np.where(finite > 0, finite, np.nan)  # a loss that constrained nothing
    for loss, (label, color, style) in enumerate(zip(labels, _COLORS, _STYLES, strict=False)):
        low, middle, high = _quantiles([finite[steps, loss] for steps in bins])
        _line(ax, _middle(history.steps, bins), middle, color, style, label, (low, high))
    _legend(ax)


def _draw_rows(
    figure: Figure, ax: Axes, title: str, quantity: str, history: ConflictHistory, means: Floats, labels: list[str]
) -> None:
    _label(ax, f"{title}: means", "")
    there = means[np.isfinite(means)]
    norm: Normalize
    if there.size and there.min() >= 0 and there.max() > 0:
        low, high = np.quantile(there[there > 0], (0.01, 0.99))
        norm, colors = LogNorm(low, max(high, 1.01 * low)), "viridis"
        means = np.where(means > 0, means, np.nan)
    else:
        high = float(np.quantile(np.abs(there), 0.99)) if there.size else 1.0
        norm, colors = Normalize(-(high or 1.0), high or 1.0), _DIVERGING
    m, steps = len(labels), history.steps
    ax.set_facecolor("#CCCCCC")  # no such number
    extent = (float(steps[0]) - 0.5, float(steps[-1]) + 0.5, m - 0.5, -0.5)
    ax.imshow(
        np.ma.masked_invalid(means.T), cmap=colors, norm=norm, aspect="auto", interpolation="nearest", extent=extent
    )
    ax.set_yticks(range(m), labels, fontsize=min(_FONT_SIZE, 4.0 + 160.0 / m))
    figure.colorbar(ScalarMappable(norm, colors), ax=ax, pad=0.01, aspect=12, extend="both", label=quantity)


def _draw_conflict_rate(ax: Axes, history: ConflictHistory, bins: Bins) -> None:
    rates = history.conflict_rates
    _label(ax, "conflict rate: share of pairs whose gradients have a cosine below 0, means", "share of pairs")
    ax.set_ylim(-0.03, 1.03)
    overall = _mean(rates[:, None])[0]
    if np.isnan(overall):
        _say(ax, "no two losses met")
        return
    values = np.array([_mean(rates[steps, None])[0] for steps in bins])
    _line(ax, _middle(history.steps, bins), values, _COLORS[1], "-", f"mean of the run: {100 * overall:.0f} %")
    _legend(ax)


def _line(
    ax: Axes,
    time: Floats,
    values: Floats,
    color: str,
    style: Style,
    label: str,
    band: tuple[Floats, Floats] | None = None,
) -> None:
    marker = "o" if len(time) < 30 else None  # so few points, or one alone, are to be seen
    ax.plot(time, values, color=color, linestyle=style, linewidth=1.8, marker=marker, markersize=3, label=label)
    there = ~np.isnan(np.concatenate([[np.nan], values, [np.nan]]))
    alone = there[1:-1] & ~there[:-2] & ~there[2:]  # between two gaps there is no line
    ax.plot(time[alone], values[alone], color=color, linestyle="none", marker="o", markersize=3)
    if band is not None:
        ax.fill_between(time, *band, color=color, alpha=0.15, linewidth=0)


def _legend(ax: Axes) -> None:
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=_FONT_SIZE - 2, ncols=2, loc="best", framealpha=0.7)


def _say(ax: Axes, words: str) -> None:
    ax.text(0.5, 0.6, words, transform=ax.transAxes, ha="center", va="center", fontsize=_FONT_SIZE + 1)


def _label(ax: Axes, title: str, y: str) -> None:
    ax.set_title(title, fontsize=_FONT_SIZE + 1)
    ax.set_ylabel(y, fontsize=_FONT_SIZE)
    ax.tick_params(labelsize=_FONT_SIZE - 1)


def _middle(steps: NDArray[np.int64], bins: Bins) -> Floats:
    return np.array([steps[some].mean() for some in bins])


def _percent(values: Floats) -> str:
    there = values[~np.isnan(values)]
    return f"{100 * np.mean(there < 0):.0f} %" if there.size else "no step"


def _quantiles(samples: list[Floats]) -> tuple[Floats, Floats, Floats]:
    """The 10, 50 and 90 % quantiles of each sample, NaN left out."""
    there = [sample[~np.isnan(sample)] for sample in samples]
    found = [np.quantile(sample, (0.1, 0.5, 0.9)) if sample.size else np.full(3, np.nan) for sample in there]
    low, middle, high = np.array(found).T
    return low, middle, high


def _mean(values: Floats) -> Floats:
    """Of each column, NaN left out and NaN where there is nothing else."""
    count = (~np.isnan(values)).sum(axis=0)
    total: Floats = np.where(np.isnan(values), 0.0, values).sum(axis=0)
    mean: Floats = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    return mean
