"""Curves and values of runs as figures, and figures as texts for an HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
MORE = ("#332288", "#882255", "#117733", "#999933", "#661100", "#aa4499", "#44aa99", "#bbbbbb")  # of a long table
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "pretrain3d", "font.family": "sans-serif", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6",
    "axes.axisbelow": True, "axes.titlesize": 11, "legend.frameon": False,
}  # fmt: skip
Curve = tuple[Sequence[float], Sequence[float]]


def to_svg(figure: Figure) -> str:
    """A figure as an inline ``<svg>``; the same figure gives the same text."""
    text = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def to_png(figure: Figure) -> str:
    """A figure as the ``data:`` address of a PNG."""
    file = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(file, format="png", dpi=110, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return png_address(file.getvalue())


def png_address(content: bytes) -> str:
    """The ``data:`` address of PNG bytes."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def palette(runs: Sequence[str]) -> dict[str, str]:
    """A colour for each run, the same in every figure of a report; of more than 16 runs some share one."""
    colours = COLOURS + MORE
    return {run: colours[index % len(colours)] for index, run in enumerate(runs)}


def training_curves(panels: Mapping[str, Mapping[str, Mapping[str, Curve]]], colours: Mapping[str, str]) -> Figure:
    """Curves over optimiser steps, side by side.

    Args:
        panels: ``{title: {run: {"train" | "val": (steps, values)}}}``; a training curve (solid) is drawn as its running
            median over a faint line, a validation curve (dots, dashed where there are both) with its points.
        colours: of the runs.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
        for axes, (title, lines) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
            for run, kinds in lines.items():
                _draw_run(axes, colours[run], kinds)
            axes.set(title=title, xlabel="step", xlim=(0, None))
            axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
            if "loss" in title:
                axes.set_ylim(*_range_of_losses(lines))
            else:
                axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # what varies little would touch the edge
        _legend(figure, panels.values(), colours)
    return figure


def _draw_run(axes: Axes, colour: str, kinds: Mapping[str, Curve]) -> None:
    if "train" in kinds:
        steps, values = (np.asarray(part, float) for part in kinds["train"])
        axes.plot(steps, values, color=colour, alpha=0.18, linewidth=0.8)
        axes.plot(steps, running_median(values), color=colour, linewidth=1.5)
    if "val" in kinds:
        axes.plot(*kinds["val"], "--" if "train" in kinds else "-", color=colour, marker="o", markersize=3.5)


def _range_of_losses(lines: Mapping[str, Mapping[str, Curve]]) -> tuple[float, float]:
    """All losses but the largest hundredth: a few huge first ones must not flatten the rest."""
    values = np.concatenate([np.asarray(curve[1], float) for kinds in lines.values() for curve in kinds.values()])
    low, high = np.nanpercentile(values, (0, 99))
    margin = 0.05 * max(float(high - low), 1e-9)
    return float(low) - margin, float(high) + margin


def _legend(figure: Figure, drawn: Iterable[Iterable[str]], colours: Mapping[str, str]) -> None:
    """Of the runs that are ``drawn`` in some panel, in the order of the colours."""
    seen = {run for panel in drawn for run in panel}
    runs = [run for run in colours if run in seen]
    handles = [Line2D([], [], color=colours[run], marker="o", markersize=4, label=run) for run in runs]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(runs), 2), fontsize=9)


def running_median(values: np.ndarray) -> np.ndarray:
    """Median over a centred window of about a fiftieth of the curve, five points or more where it has twenty."""
    half = max(len(values) // 100, 2 if len(values) >= 20 else 0)
    return np.array([np.nanmedian(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))])


def froc_curves(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], colours: Mapping[str, str]
) -> Figure:
    """FROC of several runs, over the range that the FROC score averages.

    Args:
        panels: ``{title: {run: {"false_positives_per_case", "sensitivity"}}}``.
        colours: of the runs.
    """
    rates = 2.0 ** np.arange(-3, 4)
    fine = np.geomspace(rates[0], rates[-1], 400)  # straight between corners, which a log axis bends
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(panels), 4.0), layout="constrained")
        for axes, (title, curves) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
            for run, curve in curves.items():
                x = np.asarray(curve["false_positives_per_case"], float)
                y = np.asarray(curve["sensitivity"], float)
                axes.plot(fine, np.interp(fine, x, y), color=colours[run])
                axes.plot(rates, np.interp(rates, x, y), "o", color=colours[run], markersize=4)
            axes.set_xscale("log", base=2)
            axes.set_xticks(rates, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
            axes.set(title=title, xlabel="false positives per case", ylabel="sensitivity", ylim=(0, 1.02))
        _legend(figure, panels.values(), colours)
    return figure


def precision_recall_curves(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], colours: Mapping[str, str]
) -> Figure:
    """One panel per class, at IoU 0.10.

    Args:
        panels: ``{class: {run: {"recall", "precision"}}}``.
        colours: of the runs.
    """
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.6 * max(columns, 3), 2.5 * lines + 0.9), layout="constrained")
        figure.suptitle("Precision and recall at IoU 0.10", fontsize=11)
        grid = np.ravel(figure.subplots(lines, columns, sharey=True, squeeze=False))
        for axes, (name, curves) in zip(grid, panels.items(), strict=False):
            for run, curve in curves.items():
                axes.plot(curve["recall"], curve["precision"], color=colours[run])
            axes.set(title=name, xlabel="recall", xlim=(0, 1.02), ylim=(0, 1.02), xticks=(0, 0.5, 1))
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        grid[0].set_ylabel("precision")
        _legend(figure, panels.values(), colours)
    return figure


def values_per_class(
    values: Mapping[str, Mapping[str, tuple[float, float | None, float | None]]], key: str, colours: Mapping[str, str]
) -> Figure:
    """Dots with intervals.

    Args:
        values: ``{run: {class: (value, low, high)}}``.
        key: name of the values.
        colours: of the runs.
    """
    names = list(dict.fromkeys(name for row in values.values() for name in row))
    with rc_context(STYLE):
        figure = Figure(figsize=(7.8, 1.2 + 0.2 * (len(values) + 1) * len(names)), layout="constrained")
        axes = figure.subplots()
        for index, (run, row) in enumerate(values.items()):
            offset = (index - (len(values) - 1) / 2) * 0.7 / len(values)
            for name, (value, low, high) in row.items():
                place = names.index(name) + offset
                if low is not None and high is not None:
                    axes.plot([low, high], [place, place], color=colours[run], linewidth=1.6, alpha=0.6)
                axes.plot([value], [place], "o", color=colours[run], markersize=5)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(-0.01, 1.01), ylim=(len(names) - 0.5, -0.5), xlabel=f"{key} (bars: 95 % interval over patients)")
        _legend(figure, [values], colours)
    return figure
