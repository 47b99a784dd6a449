"""Slices of a case with its true and predicted boxes: the file that they are kept in, and its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

TRUE, PREDICTED = "#3ddc62", "#ff9d2e"
POINTS = 3  # that planes are laid through
PLANES = ("sagittal", "coronal", "axial")  # perpendicular to x, y, z of RAS axes


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
    points: np.ndarray | None = None,
) -> dict[str, Any]:
    """Three planes through a few objects of a case, and its boxes.

    Args:
        image: (X, Y, Z) on RAS axes, normalised.
        true_boxes, boxes: (N, 6), (M, 6) in its voxels.
        true_labels, labels, scores: (N,), (M,), (M,).
        classes: names of the labels.
        spacing_mm: size of a voxel.
        points: (P, 3) voxels to cut through; None: `POINTS` objects, the largest of every class first; without objects
            the best prediction.

    Returns:
        ``slice_<point>_<axis>`` (uint8, the plane perpendicular to that axis, the other axes in order), ``points``
        (P, 3) voxels, ``shape``, ``spacing_mm``, ``true_boxes``, ``true_labels``, ``boxes``, ``labels``, ``scores``
        (the best 100), ``classes``.
    """
    assert image.ndim == 3, image.shape
    true_boxes, boxes = (np.asarray(array, np.float32).reshape(-1, 6) for array in (true_boxes, boxes))
    best = np.argsort(-np.asarray(scores), kind="stable")[:100]
    if points is None:
        points = _points(image.shape, true_boxes, np.asarray(true_labels), boxes[best[:1]])
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


def _points(shape: tuple[int, ...], boxes: np.ndarray, labels: np.ndarray, best: np.ndarray) -> np.ndarray:
    """(P, 3) voxels to cut at: centres of true objects, of the best prediction, or of the volume."""
    if len(boxes):
        volume = np.prod(boxes[:, 3:] - boxes[:, :3], axis=1)
        by_size = np.argsort(-volume, kind="stable")
        _, first = np.unique(labels[by_size], return_index=True)  # the largest of each class
        order = [*by_size[np.sort(first)], *np.delete(by_size, first)]
        boxes = boxes[order[:POINTS]]
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
