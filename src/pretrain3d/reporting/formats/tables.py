"""One file for all images: JSON (a score file with millimetres), CSV, a LUNA16 submission, COCO-style JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.delimited import as_csv
from pretrain3d.files import write_text
from pretrain3d.reporting.formats.found import LPS, Found
from pretrain3d.reporting.results import write_json

CSV_HEADER = ("case", "class", "score", "x1", "y1", "z1", "x2", "y2", "z2",
              "center_x_mm", "center_y_mm", "center_z_mm", "size_x_mm", "size_y_mm", "size_z_mm")  # fmt: skip
LUNA16_HEADER = ("seriesuid", "coordX", "coordY", "coordZ", "probability")


def write_json_boxes(folder: Path, classes: Sequence[str], found: Mapping[str, Found]) -> None:
    """``predictions.json``: a score file (`pretrain3d score` reads it) in the voxels and axes of the input files.

    Its cases also hold ``center_mm`` and ``size_mm`` of each box in RAS millimetres and the ``axes`` they are along.
    """
    cases = {case: each.restored() for case, each in found.items()}
    write_json(folder / "predictions.json", {"classes": list(classes), "cases": cases})


def write_csv(folder: Path, classes: Sequence[str], found: Mapping[str, Found]) -> None:
    """``predictions.csv``: one row per box, class by name, voxels of the input file, centre and size in RAS mm."""
    rows = []
    for case, each in found.items():
        values = each.restored()
        for index, label in enumerate(values["labels"]):
            numbers = np.concatenate([values[key][index] for key in ("boxes", "center_mm", "size_mm")])
            row = [case, classes[int(label)], f"{float(values['scores'][index]):.6g}"]
            rows.append(row + [f"{number:.3f}" for number in numbers.tolist()])
    write_text(folder / "predictions.csv", as_csv(CSV_HEADER, rows))


def write_luna16(folder: Path, classes: Sequence[str], found: Mapping[str, Found]) -> None:
    """``luna16.csv``: a submission to LUNA16, box centres in its LPS millimetres; the files' names are its UIDs.

    Raises:
        UserError: the detector has several classes, which the format cannot tell apart.
    """
    if len(classes) != 1:
        raise UserError(f"format=luna16 is for one class, this detector has {len(classes)}: {', '.join(classes)}")
    rows = []
    for case, each in found.items():
        values = each.restored()
        for center, score in zip(values["center_mm"] * LPS, values["scores"], strict=True):
            rows.append([case, *(f"{number:.6f}" for number in center.tolist()), f"{float(score):.6g}"])
    write_text(folder / "luna16.csv", as_csv(LUNA16_HEADER, rows))


def write_coco(folder: Path, classes: Sequence[str], found: Mapping[str, Found]) -> None:
    """``coco.json``: images, categories and annotations as in COCO with a third axis, ids from 1.

    An annotation has ``bbox`` [x, y, z, width, height, depth] in the voxels of the input file (corner and size),
    ``area`` (the volume in voxels), ``score``, ``image_id`` and ``category_id``; an image its ``file_name`` (the case),
    ``width``, ``height`` and ``depth``.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (case, each) in enumerate(found.items(), start=1):
        width, height, depth = each.frame.shape
        images.append({"id": number, "file_name": case, "width": width, "height": height, "depth": depth})
        values = each.restored()
        for box, score, label in zip(values["boxes"], values["scores"], values["labels"], strict=True):
            size = box[3:] - box[:3]
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": int(label) + 1,
                "bbox": [*box[:3].tolist(), *size.tolist()], "area": float(size.prod()), "score": float(score),
                "iscrowd": 0,
            })  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    write_json(folder / "coco.json", {"images": images, "categories": categories, "annotations": annotations})
