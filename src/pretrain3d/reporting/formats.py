"""Predicted boxes as files: JSON (a score file with millimetres beside the voxels) and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain3d.files import write_text
from pretrain3d.geometry import Frame
from pretrain3d.reporting.results import write_json

CSV_HEADER = ("case", "class", "score", "x1", "y1", "z1", "x2", "y2", "z2",
              "center_x_mm", "center_y_mm", "center_z_mm", "size_x_mm", "size_y_mm", "size_z_mm")  # fmt: skip


@dataclass(frozen=True)
class Found:
    """The predicted boxes of one input file.

    Attributes:
        frame: of the volume that was predicted.
        boxes: (N, 6) in its voxels (cached axes, half-open).
        scores: (N,).
        labels: (N,).
    """

    frame: Frame
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def restored(self) -> dict[str, Any]:
        """Best first: boxes in the voxels of the input file, and the same boxes in RAS millimetres.

        Returns:
            ``boxes`` (N, 6), ``scores``, ``labels``, ``center_mm`` (N, 3), ``size_mm`` (N, 3) along the axes of the
            input file, and ``axes`` (3, 3), whose columns are the directions of those axes in the world.
        """
        order = np.argsort(-np.asarray(self.scores), kind="stable")
        boxes = np.asarray(self.boxes).reshape(-1, 6)[order]
        named = {"scores": np.asarray(self.scores)[order], "labels": np.asarray(self.labels)[order]}
        return {"boxes": self.frame.to_original(boxes), **named, **self.frame.to_world(boxes)}


def write_boxes_json(path: str | Path, classes: Sequence[str], found: Mapping[str, Found]) -> None:
    """Writes a score file (`pretrain3d score` reads it) whose cases also hold ``center_mm``, ``size_mm`` and ``axes``.

    Args:
        path: the file.
        classes: names of the labels.
        found: by case id.
    """
    write_json(path, {"classes": list(classes), "cases": {case: each.restored() for case, each in found.items()}})


def write_boxes_csv(path: str | Path, classes: Sequence[str], found: Mapping[str, Found]) -> None:
    """Writes one row per box: class by name, voxels of the input file, centre and size in mm; see `CSV_HEADER`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for case, each in found.items():
        values = each.restored()
        for index, label in enumerate(values["labels"]):
            numbers = np.concatenate([values[key][index] for key in ("boxes", "center_mm", "size_mm")])
            row = [case, classes[int(label)], f"{float(values['scores'][index]):.6g}"]
            writer.writerow(row + [f"{number:.3f}" for number in numbers.tolist()])
    write_text(path, text.getvalue())
