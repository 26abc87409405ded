"""The figures: trajectories over filled level sets, and curves over several seeds, in one style.

matplotlib is imported when a figure is drawn, and through its object interface: no pyplot, no display, no global state.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments import require_extra
from experiments.records import PlanarRun, Run, by_label
from experiments.testfunctions import SumOfSquares

# Okabe and Ito's colours, which colour-blind readers can tell apart; the first is for the plain run.
COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PATH_COLOUR, JUMP_COLOUR, MINIMUM_COLOUR = "#111111", "#D55E00", "#009E73"
DASHES = ("-", "-", (0, (4, 2)), "-")
MARKERS = "os^DvPX*<>"
LANDING_MARK = {"marker": "v", "markevery": [1], "markeredgecolor": "black", "markersize": 7, "zorder": 5}
DPI = 150
CHARACTER_WIDTH, HANDLE_WIDTH = 0.095, 0.7  # inches, of a title or a label of average letters, and of a legend's line
WINDOW_MARGIN = 0.2
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E4E4E4",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


@dataclass(frozen=True)
class Series:
    """One curve: ys holds one list a seed (drawn: their median, and their range as a band), marks the teleports' x.

    Without a colour or dashes of its own it has those of its place in the panel.
    """

    label: str
    x: Sequence[float]
    ys: Sequence[Sequence[float]]
    marks: Sequence[float] = ()
    colour: str | None = None
    dashes: Any = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    x_label: str
    y_label: str
    series: Sequence[Series]
    title: str = ""
    x_scale: str = "linear"
    y_scale: str = "log"


@dataclass(frozen=True)
class Point:
    """One labelled point: ys holds a value a seed (drawn: their mean, and their range as a bar)."""

    label: str
    x: float
    ys: Sequence[float]


@dataclass(frozen=True)
class PointPanel:
    """One pair of axes."""

    title: str
    points: Sequence[Point]
    y_scale: str = "log"


def epoch_series(runs: Sequence[Run], field: str) -> list[Series]:
    """One series for each label of the runs: the field of their epoch records over the epochs."""
    return [
        Series(
            label,
            list(range(max(len(run.epochs) for run in members))),
            [[getattr(record, field) for record in run.epochs] for run in members],
            [teleport.position for teleport in members[0].teleports],
        )
        for label, members in by_label(runs).items()
    ]


def curves(path: Path, title: str, panels: Sequence[Panel]) -> Path:
    """The panels side by side, from four on in two rows, one colour a series; triangles mark the teleports."""
    with _styled():
        figure, all_axes = _figure(len(panels), width=5.2, height=4.2, rows=1 if len(panels) < 4 else 2)
        for axes, panel in zip(all_axes, panels, strict=True):
            axes.set(xscale=panel.x_scale, yscale=panel.y_scale, title=panel.title)
            axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
            if panel.x_scale == "linear":
                axes.locator_params(axis="x", nbins=6, steps=[1, 2, 5, 10])
            else:
                axes.xaxis.set_minor_locator(require_extra("matplotlib.ticker").LogLocator(subs=[2, 5]))
            for index, series in enumerate(panel.series):
                colour = series.colour or COLOURS[index % len(COLOURS)]
                _draw_series(axes, series, colour, series.dashes or DASHES[index % len(DASHES)])
        if any(series.marks for panel in panels for series in panel.series):
            all_axes[0].plot([], [], "v", color="white", markeredgecolor="black", label="teleport")
        seeds = max(len(series.ys) for panel in panels for series in panel.series)
        _set_title(figure, title if seeds == 1 else f"{title} (median and range of {seeds} seeds)")
        _shared_legend(figure, all_axes)
        return _save(figure, path)


def points(path: Path, title: str, x_label: str, y_label: str, panels: Sequence[PointPanel]) -> Path:
    """The panels side by side, from four on in two rows, a marker a label."""
    with _styled():
        figure, all_axes = _figure(len(panels), width=5.2, height=4.6, rows=1 if len(panels) < 4 else 2)
        for axes, panel in zip(all_axes, panels, strict=True):
            axes.set(yscale=panel.y_scale, xlabel=x_label, ylabel=y_label, title=panel.title)
            for index, point in enumerate(panel.points):
                mean = float(np.mean(point.ys))
                reach = [[mean - min(point.ys)], [max(point.ys) - mean]]
                style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
                axes.plot(point.x, mean, linestyle="", markersize=8, zorder=3, label=point.label, **style)
                axes.errorbar(point.x, mean, yerr=reach, color=style["color"], elinewidth=0.8)
        seeds = max(len(point.ys) for panel in panels for point in panel.points)
        _set_title(figure, title if seeds == 1 else f"{title} (mean and range of {seeds} seeds)")
        _shared_legend(figure, all_axes)
        return _save(figure, path)


def trajectories(
    path: Path,
    function: SumOfSquares,
    runs: Sequence[PlanarRun],
    minimum: tuple[float, float],
    window: tuple[float, float, float, float],
) -> Path:
    """One panel a run: its points over the filled level sets of L, the teleports as dashed jumps along a level set."""
    window = _including(window, [point for run in runs for point in run.points])
    with _styled():
        figure, all_axes = _figure(len(runs), width=4.6, height=4.6)
        for axes, run in zip(all_axes, runs, strict=True):
            filled = _draw_level_sets(axes, function, window)
            _draw_trajectory(axes, run, minimum)
            axes.set(title=run.label, xlabel="$x_1$", xlim=window[:2], ylim=window[2:])
        all_axes[0].set_ylabel("$x_2$")
        decades = [level for level in filled.levels if np.isclose(np.log10(level) % 1, (0, 1)).any()]
        figure.colorbar(filled, ax=list(all_axes), label="$L(x)$", ticks=decades)
        _shared_legend(figure, all_axes)
        _set_title(figure, function.name)
        return _save(figure, path)


def _draw_series(axes: Any, series: Series, colour: str, dashes: Any) -> None:
    ys = _drawable(series.ys, len(series.x))
    median = np.ma.median(ys, axis=0).filled(np.nan)
    axes.plot(series.x, median, color=colour, linestyle=dashes, label=series.label)
    if len(ys) > 1:
        axes.fill_between(series.x, ys.min(axis=0), ys.max(axis=0), color=colour, alpha=0.18, linewidth=0)
    if len(series.marks):
        heights = np.exp(np.interp(series.marks, series.x, np.log(median)))
        axes.plot(series.marks, heights, "v", color=colour, markeredgecolor="black", markersize=6, zorder=5)


def _draw_level_sets(axes: Any, function: SumOfSquares, window: tuple[float, float, float, float]) -> Any:
    x1, x2 = (torch.linspace(low, high, 300, dtype=torch.float64) for low, high in (window[:2], window[2:]))
    grid = torch.stack(torch.meshgrid(x1, x2, indexing="xy"), dim=-1)
    losses = function.loss(grid).numpy()
    lowest, highest = -2, int(np.ceil(np.log10(losses.max())))
    levels = np.logspace(lowest, highest, 3 * (highest - lowest) + 1)
    axes.grid(False)
    scale = require_extra("matplotlib.colors").LogNorm(levels[0], levels[-1])
    return axes.contourf(x1.numpy(), x2.numpy(), losses, levels=levels, norm=scale, cmap="Blues_r", extend="min")


def _draw_trajectory(axes: Any, run: PlanarRun, minimum: tuple[float, float]) -> None:
    for piece in _pieces(run):
        axes.plot(*np.array(piece).T, ".-", color=PATH_COLOUR, linewidth=1.2, markersize=4, label="steps")
    for jump in run.jumps:
        axes.plot(*zip(jump.before, jump.after, strict=True), "--", color=JUMP_COLOUR, label="teleport", **LANDING_MARK)
    axes.plot(*run.points[0], "o", color="white", markeredgecolor="black", markersize=8, zorder=6, label="start")
    axes.plot(*minimum, "*", color=MINIMUM_COLOUR, markeredgecolor="black", markersize=14, zorder=6, label="minimum")


def _pieces(run: PlanarRun) -> list[list[tuple[float, float]]]:
    """The path cut at the teleports, so that a jump is not drawn as a step."""
    landings = {jump.step: jump.after for jump in run.jumps}
    pieces = [[run.points[0]]]
    for step, point in enumerate(run.points[1:], start=1):
        if step in landings:
            pieces.append([landings[step]])
        pieces[-1].append(point)
    return pieces


def _set_title(figure: Any, title: str) -> None:
    """In as many lines as the figure's width takes."""
    figure.suptitle(textwrap.fill(title, int(figure.get_figwidth() / CHARACTER_WIDTH)))


def _shared_legend(figure: Any, all_axes: Any) -> None:
    """One legend below the panels, with each label once, in as many columns as the figure's width takes."""
    entries = (entry for axes in all_axes for entry in zip(*axes.get_legend_handles_labels(), strict=True))
    handles = {label: handle for handle, label in entries}
    widest = HANDLE_WIDTH + CHARACTER_WIDTH * max(map(len, handles))
    columns = max(1, min(len(handles), int(figure.get_figwidth() / widest)))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)


def _including(
    window: tuple[float, float, float, float], points: Sequence[tuple[float, float]]
) -> tuple[float, float, float, float]:
    """The window, widened with a margin where a finite point lies outside it."""
    finite = np.array([point for point in points if np.isfinite(point).all()])
    x1_low, x2_low = finite.min(axis=0) - WINDOW_MARGIN
    x1_high, x2_high = finite.max(axis=0) + WINDOW_MARGIN
    low = (min(window[0], float(x1_low)), min(window[2], float(x2_low)))
    high = (max(window[1], float(x1_high)), max(window[3], float(x2_high)))
    return (low[0], high[0], low[1], high[1])


def _drawable(ys: Sequence[Sequence[float]], length: int) -> np.ma.MaskedArray:
    """The curves as rows; masked is what a logarithmic scale cannot show, and what a run that ended early lacks."""
    rows = np.full((len(ys), length), np.nan)
    for row, y in zip(rows, ys, strict=True):
        row[: len(y)] = y
    return np.ma.masked_invalid(np.where(rows > 0, rows, np.nan))


def _styled() -> Any:
    return require_extra("matplotlib").rc_context(STYLE)


def _figure(panels: int, width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    """A figure of equal panels, and their axes row by row; places without a panel stay empty."""
    figure_class = require_extra("matplotlib.figure").Figure
    columns = math.ceil(panels / rows)
    figure = figure_class(figsize=(width * columns, height * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for place in places[panels:]:
        place.set_axis_off()
    return figure, places[:panels]


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path
