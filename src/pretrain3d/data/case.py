"""The record of a case in a store: all that is known of it without reading its volume, as ``cases/<case>.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.data.fingerprint import Histogram, Moments
from pretrain3d.files import write_text
from pretrain3d.geometry import Frame

EDGE = 1e-2  # voxels by which rounding may put a box over the edge of its volume


@dataclass(frozen=True, eq=False)
class Case:
    """What is known of a case without reading its volume.

    Attributes:
        id: unique name.
        split: "train" | "val" | "test" | "pretrain", as in the raw data.
        group: the patient; cases of one group stay in one fold.
        shape: spatial shape of the cached volume.
        channels: C of the image.
        frame: cached voxels <-> input file's voxels <-> mm.
        boxes: (N, 6) float32 cached voxels, mapped exactly from the input file's mask.
        labels: (N,) int64 class indices.
        instances: (N,) int64, the id of each box in the cached instance mask.
        volumes_mm3: (N,) float64, from the input file's mask.
        annotated: indices of the classes that were annotated in this case.
        content_hash: of the decoded input image.
        histograms: "body" and "objects" -> one histogram per channel.
        has_instances: an instance mask is stored.
        has_semantic: a semantic map is stored.
        semantic_annotated: indices of the semantic classes that were annotated in this case; None: all of them.
        signature: what the image looks like, `identity.signature`; "" in older stores.
        moments: of the whole image, one for each channel, `fingerprint.image_moments`; () in older stores.
        specks: pieces of the annotation that were too small to be objects, see `readers.contract.RawVolume`.
    """

    id: str
    split: str
    group: str
    shape: tuple[int, int, int]
    channels: int
    frame: Frame
    boxes: np.ndarray
    labels: np.ndarray
    instances: np.ndarray
    volumes_mm3: np.ndarray
    annotated: tuple[int, ...]
    content_hash: str
    histograms: dict[str, tuple[Histogram, ...]]
    has_instances: bool
    has_semantic: bool
    semantic_annotated: tuple[int, ...] | None = None
    signature: str = ""
    moments: tuple[Moments, ...] = ()
    specks: int = 0

    def problem(self, num_classes: int) -> str:
        """What no case may have: a box that is not finite, empty, inverted or outside the volume, an unknown label.

        Returns:
            the first such box or label with its value, "" when all is well.
        """
        count, outside = len(self.labels), np.asarray(self.shape) + EDGE
        if self.boxes.shape != (count, 6) or len(self.instances) != count:
            return f"{len(self.boxes)} boxes, {count} labels and {len(self.instances)} instances"
        low, high = self.boxes[:, :3], self.boxes[:, 3:]
        checks = {
            "is not finite": ~np.isfinite(self.boxes).all(axis=1),
            "is empty or inverted": (high <= low).any(axis=1),
            f"lies outside the volume {list(self.shape)}": (low < -EDGE).any(axis=1) | (high > outside).any(axis=1),
        }
        for text, wrong in checks.items():
            if wrong.any():
                index = int(wrong.argmax())
                return f"box {index} {self.boxes[index].tolist()} {text}"
        for name, labels in (("label", self.labels), ("annotated class", self.annotated)):
            for label in labels:
                if not 0 <= label < num_classes:
                    return f"{name} {label} is not among the {num_classes} classes (0..{num_classes - 1})"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dict(vars(self))
        values["frame"] = self.frame.to_dict()
        values["histograms"] = {k: [h.to_dict() for h in channels] for k, channels in self.histograms.items()}
        values["moments"] = [vars(moments) for moments in self.moments]
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Case:
        """The inverse of `to_dict`."""
        values = dict(values)
        values["frame"] = Frame.from_dict(values["frame"])
        values["shape"] = tuple(values["shape"])
        values["annotated"] = tuple(values["annotated"])
        if values.get("semantic_annotated") is not None:
            values["semantic_annotated"] = tuple(values["semantic_annotated"])
        values["boxes"] = np.asarray(values["boxes"], dtype=np.float32).reshape(-1, 6)
        values["labels"] = np.asarray(values["labels"], dtype=np.int64)
        values["instances"] = np.asarray(values["instances"], dtype=np.int64)
        values["volumes_mm3"] = np.asarray(values["volumes_mm3"], dtype=np.float64)
        values["histograms"] = {k: tuple(map(Histogram.from_dict, v)) for k, v in values["histograms"].items()}
        values["moments"] = tuple(Moments(**moments) for moments in values.get("moments", ()))
        return cls(**values)


def case_path(path: Path, case_id: str) -> Path:
    """Where the record of a case lies."""
    return path / "cases" / f"{case_id}.json"


def read_case(path: Path, case_id: str) -> Case:
    """The record of a case.

    Raises:
        UserError: it is missing or damaged.
    """
    file = case_path(path, case_id)
    try:
        return Case.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {file} ({error}); run `pretrain3d prepare` again") from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes JSON atomically."""
    write_text(path, json.dumps(values))
