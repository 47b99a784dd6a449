"""One file per image that belongs to its voxel grid: nnDetection's boxes, and a mask of the boxes as NIfTI."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from pretrain3d.files import replacing
from pretrain3d.geometry import Frame
from pretrain3d.reporting.formats.found import LPS, Found
from pretrain3d.reporting.results import write_json

NNDETECTION_COLUMNS = [2, 1, 5, 4, 0, 3]  # of x1 y1 z1 x2 y2 z2: array axes z, y, x as (a0 a1 low, a0 a1 high, a2 both)
NNDETECTION_LOW = [0, 1, 4]  # where its lower ends stand


def write_nndetection(folder: Path, case: str, classes: Sequence[str], found: Found) -> None:
    """``nndetection/<case>_boxes.npz``: the keys of nnDetection's prediction files, plain arrays instead of a pickle.

    ``pred_boxes`` (N, 6) has nnDetection's order and frame: (a0 low, a1 low, a0 high, a1 high, a2 low, a2 high) over
    the array axes z, y, x that SimpleITK gives, in voxel-centre coordinates from ``first voxel - 1`` to ``last voxel +
    1``: a half-open [a, b) is there (a - 1, b). Beside it ``pred_scores``, ``pred_labels``, ``classes``, ``restore``
    (True: boxes are in the file's own voxels), ``original_size_of_raw_data`` (array axes), ``itk_origin``,
    ``itk_spacing`` and ``itk_direction`` (LPS, axes x, y, z).
    """
    values, frame = found.restored(), found.frame
    boxes = values["boxes"][:, NNDETECTION_COLUMNS]
    boxes[:, NNDETECTION_LOW] -= 1
    arrays: dict[str, Any] = {
        "pred_boxes": boxes, "pred_scores": np.asarray(values["scores"], np.float64),
        "pred_labels": np.asarray(values["labels"], np.int64), "classes": np.asarray(list(classes), np.str_),
        "restore": np.asarray(True), "original_size_of_raw_data": np.asarray(frame.shape[::-1]),
        "itk_origin": frame.affine[:3, 3] * LPS, "itk_spacing": np.linalg.norm(frame.affine[:3, :3], axis=0),
        "itk_direction": (values["axes"] * LPS[:, None]).ravel(),
    }  # fmt: skip
    with replacing(folder / "nndetection" / f"{case}_boxes.npz") as temporary:
        np.savez_compressed(temporary, **arrays)


def write_nifti(folder: Path, case: str, classes: Sequence[str], found: Found) -> None:
    """``nifti/<case>.nii.gz`` on the input file's grid: box i of the list, best first, has the value i + 1.

    A voxel belongs to a box that holds its centre; a box that holds none takes the voxel around its own centre. Where
    boxes overlap the better one is seen. ``nifti/<case>.json`` has nnDetection's ``instances`` (value -> class index)
    for all values that occur, their ``scores``, and under ``hidden`` the values that better boxes cover altogether.
    """
    values, frame = found.restored(), found.frame
    mask = box_mask(values["boxes"], frame)
    seen = set(np.unique(mask).tolist())
    numbers = range(1, len(found) + 1)
    about = {
        "classes": list(classes),
        "instances": {number: int(values["labels"][number - 1]) for number in numbers if number in seen},
        "scores": {number: float(values["scores"][number - 1]) for number in numbers if number in seen},
        "hidden": [number for number in numbers if number not in seen],
    }
    with replacing(folder / "nifti" / f"{case}.nii.gz") as temporary:
        nib.save(nib.Nifti1Image(mask, frame.affine), temporary)
    write_json(folder / "nifti" / f"{case}.json", about)


def box_mask(boxes: np.ndarray, frame: Frame) -> np.ndarray:
    """(X, Y, Z) uint16 (uint32 for very many): 1 + index of the first of (N, 6) boxes that holds a voxel, else 0."""
    mask = np.zeros(frame.shape, np.uint16 if len(boxes) < 2**16 else np.uint32)
    limit = np.asarray(frame.shape)
    for index in range(len(boxes) - 1, -1, -1):  # the first box is drawn last
        low, high = np.split(boxes[index], 2)
        start, stop = np.ceil(low - 0.5).astype(int), np.ceil(high - 0.5).astype(int)
        middle = np.floor((low + high) / 2).astype(int)
        start, stop = np.where(stop > start, start, middle), np.where(stop > start, stop, middle + 1)
        start = np.clip(start, 0, limit - 1)
        stop = np.clip(stop, start + 1, limit)
        mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = index + 1
    return mask
