"""Figures as texts for an HTML page: curves as SVG, slices of volumes as PNG. Also the file that slices are kept in."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
MORE = ("#332288", "#882255", "#117733", "#999933", "#661100", "#aa4499", "#44aa99", "#bbbbbb")  # of a long table
TRUE, PREDICTED = "#3ddc62", "#ff9d2e"
PLANES = ("sagittal", "coronal", "axial")  # perpendicular to x, y, z of RAS axes
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


def to_png(figure: Figure, dpi: int = 110) -> str:
    """A figure as the ``data:`` address of a PNG."""
    file = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(file, format="png", dpi=dpi, facecolor=figure.get_facecolor(), metadata={"Software": None})
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
        _legend(figure, [run for run in colours if any(run in lines for lines in panels.values())], colours)
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


def _legend(figure: Figure, runs: Sequence[str], colours: Mapping[str, str]) -> None:
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
        _legend(figure, [run for run in colours if any(run in curves for curves in panels.values())], colours)
    return figure


def precision_recall_curves(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], title: str, colours: Mapping[str, str]
) -> Figure:
    """One panel per class.

    Args:
        panels: ``{class: {run: {"recall", "precision"}}}``.
        title: above all panels.
        colours: of the runs.
    """
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.6 * max(columns, 3), 2.5 * lines + 0.9), layout="constrained")
        figure.suptitle(title, fontsize=11)
        grid = np.ravel(figure.subplots(lines, columns, sharey=True, squeeze=False))
        for axes, (name, curves) in zip(grid, panels.items(), strict=False):
            for run, curve in curves.items():
                axes.plot(curve["recall"], curve["precision"], color=colours[run])
            axes.set(title=name, xlabel="recall", xlim=(0, 1.02), ylim=(0, 1.02), xticks=(0, 0.5, 1))
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        grid[0].set_ylabel("precision")
        _legend(figure, [run for run in colours if any(run in curves for curves in panels.values())], colours)
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
        _legend(figure, list(values), colours)
    return figure


def save_case_picture(path: str | Path, *arguments: Any, **options: Any) -> None:
    """Keeps what a report shows of a case, `case_picture` of these arguments: ``<run>/pictures/test_<case>.npz``."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **case_picture(*arguments, **options))


def case_picture(
    image: np.ndarray,
    true_boxes: np.ndarray,
    true_labels: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    classes: Sequence[str],
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    num_points: int = 3,
    points: np.ndarray | None = None,
) -> dict[str, Any]:
    """Three planes through a few objects of a case, and its boxes.

    Args:
        image: (X, Y, Z) on RAS axes, normalised.
        true_boxes, boxes: (N, 6), (M, 6) in its voxels.
        true_labels, labels, scores: (N,), (M,), (M,).
        classes: names of the labels.
        spacing_mm: size of a voxel.
        num_points: objects to cut through: the largest of every class first; without objects the best prediction.
        points: (P, 3) voxels to cut through instead.

    Returns:
        ``slice_<point>_<axis>`` (uint8, the plane perpendicular to that axis, the other axes in order), ``points``
        (P, 3) voxels, ``shape``, ``spacing_mm``, ``true_boxes``, ``true_labels``, ``boxes``, ``labels``, ``scores``
        (the best 100), ``classes``.
    """
    assert image.ndim == 3, image.shape
    true_boxes, boxes = (np.asarray(array, np.float32).reshape(-1, 6) for array in (true_boxes, boxes))
    best = np.argsort(-np.asarray(scores), kind="stable")[:100]
    if points is None:
        points = _points(image.shape, true_boxes, np.asarray(true_labels), boxes[best[:1]], num_points)
    low, high = np.percentile(image[::2, ::2, ::2], (1.0, 99.8))
    planes: dict[str, Any] = {}
    for index, point in enumerate(points):
        for axis in range(3):
            plane = np.take(image, point[axis], axis=axis).astype(np.float32)
            grey = np.clip((plane - low) / max(float(high - low), 1e-6), 0.0, 1.0)
            planes[f"slice_{index}_{axis}"] = np.round(grey * 255).astype(np.uint8)
    return {
        "points": points, "shape": np.asarray(image.shape), "spacing_mm": np.asarray(spacing_mm, np.float64),
        "true_boxes": true_boxes, "true_labels": np.asarray(true_labels, np.int64), "boxes": boxes[best],
        "labels": np.asarray(labels, np.int64)[best], "scores": np.asarray(scores, np.float32)[best],
        "classes": np.asarray(list(classes), dtype=np.str_), **planes,
    }  # fmt: skip


def _points(shape: tuple[int, ...], boxes: np.ndarray, labels: np.ndarray, best: np.ndarray, count: int) -> np.ndarray:
    """(P, 3) voxels to cut at: centres of true objects, of the best prediction, or of the volume."""
    if len(boxes):
        volume = np.prod(boxes[:, 3:] - boxes[:, :3], axis=1)
        by_size = np.argsort(-volume, kind="stable")
        _, first = np.unique(labels[by_size], return_index=True)  # the largest of each class
        order = [*by_size[np.sort(first)], *np.delete(by_size, first)]
        boxes = boxes[order[:count]]
    elif len(best):
        boxes = best
    else:
        boxes = np.array([[0, 0, 0, *shape]], np.float32)
    center = np.floor((boxes[:, :3] + boxes[:, 3:]) / 2)
    return np.clip(center, 0, np.asarray(shape) - 1).astype(np.int64)


def case_figure(path: str | Path) -> Figure:
    """`draw_case` of a `save_case_picture` file: three more predictions than the case has objects."""
    with np.load(path, allow_pickle=False) as file:
        data: dict[str, Any] = dict(file)
    return draw_case(data, most=len(data["true_boxes"]) + 3)


def draw_case(data: Mapping[str, Any], most: int) -> Figure:
    """Three planes through each point of a `case_picture`, true boxes green, predictions orange with score.

    Drawn are the predictions that the slice cuts among the ``most`` best of the case.
    """
    points, classes = data["points"], [str(name) for name in data["classes"]]
    shown = slice(0, most)
    extent = data["shape"] * data["spacing_mm"]
    widths = [float(extent[others[0]]) for others in ((1, 2), (0, 2), (0, 1))]
    height = max(float(extent[2]), float(extent[1]))
    figure = Figure(figsize=(10, len(points) * 10 * height / sum(widths)), facecolor="#111111", layout="constrained")
    panels = figure.subplots(len(points), 3, squeeze=False, width_ratios=widths)
    for row, (point, axes_row) in enumerate(zip(points, panels, strict=True)):
        for axis, axes in enumerate(axes_row):
            _draw_plane(axes, data[f"slice_{row}_{axis}"], axis, data["spacing_mm"])
            where = float(point[axis]) + 0.5
            _draw_boxes(axes, data["true_boxes"], [classes[i] for i in data["true_labels"]], axis, where, TRUE)
            texts = [f"{classes[label]} {score:.2f}"
                     for label, score in zip(data["labels"][shown], data["scores"][shown], strict=True)]  # fmt: skip
            _draw_boxes(axes, data["boxes"][shown], texts, axis, where, PREDICTED, below=True)
            if row == 0:
                axes.set_title(PLANES[axis], color="#bbbbbb", fontsize=9)
    return figure


def _draw_plane(axes: Axes, plane: np.ndarray, axis: int, spacing_mm: np.ndarray) -> None:
    """A slice as it hangs at a light box: right of the patient on the left, front and head on top."""
    columns, rows = [other for other in range(3) if other != axis]
    extent = (0, plane.shape[0], 0, plane.shape[1])
    aspect = float(spacing_mm[rows] / spacing_mm[columns])
    axes.imshow(plane.T, cmap="gray", vmin=0, vmax=255, origin="lower", extent=extent, aspect=aspect)
    axes.set(xlim=(plane.shape[0], 0), ylim=(0, plane.shape[1]))
    axes.set_axis_off()


def _draw_boxes(
    axes: Axes, boxes: np.ndarray, texts: Sequence[str], axis: int, where: float, colour: str, below: bool = False
) -> None:
    columns, rows = [other for other in range(3) if other != axis]
    for box, text in zip(boxes, texts, strict=True):
        if box[axis] <= where < box[axis + 3]:
            corner, width = (box[columns], box[rows]), box[columns + 3] - box[columns]
            axes.add_patch(Rectangle(corner, width, box[rows + 3] - box[rows], fill=False, color=colour, linewidth=1.2))
            y, anchor = (box[rows], "top") if below else (box[rows + 3], "bottom")
            axes.annotate(
                text, (box[columns + 3], y), (0, -2 if below else 2), textcoords="offset points", color=colour,
                fontsize=7, va=anchor, ha="left", path_effects=[withStroke(linewidth=1.5, foreground="#000000")],
            )  # fmt: skip
