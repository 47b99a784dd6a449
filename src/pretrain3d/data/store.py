"""The training store: chunked, compressed volumes that give a random crop without reading the volume, and their index.

On disk: ``index.json``, ``plan.yaml``, ``image/<case>.b2nd``, ``instances/<case>.b2nd``, ``semantic/<case>.b2nd``,
``cases/<case>.json``. Files are written beside their place and moved into it, so a reader never sees half a file.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import yaml

from pretrain3d.config import UserError
from pretrain3d.data.fingerprint import Histogram
from pretrain3d.data.identity import data_hash
from pretrain3d.files import replacing, write_text
from pretrain3d.geometry import Frame

FORMAT = 1
CHUNK, BLOCK = 64, 32
KINDS = ("image", "instances", "semantic")
EDGE = 1e-2  # voxels by which rounding may put a box over the edge of its volume
OPEN_ARRAYS = 256  # per process, well below the usual limit of 1024 open files


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
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["frame"] = self.frame.to_dict()
        values["histograms"] = {k: [h.to_dict() for h in channels] for k, channels in self.histograms.items()}
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
        return cls(**values)


class Store:
    """A prepared data set, read-only.

    Safe to hand to data-loading workers, forked or spawned: open arrays belong to one process.

    Raises:
        UserError: the folder is not a finished store of this format, or a case has objects that cannot be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = _read_index(self.path)
        self.name: str = index["name"]
        self.classes: list[str] = index["classes"]
        self.mirror_classes: dict[str, str] = index["mirror_classes"]
        self.modality: list[str] = index["modality"]
        self.semantic_classes: list[str] = index["semantic_classes"]
        self.spacing_mm: tuple[float, ...] = tuple(index["spacing_mm"])
        self.licence: str = index["licence"]
        self.data_hash: str = index["data_hash"]
        self.cases: dict[str, Case] = {case_id: read_case(self.path, case_id) for case_id in sorted(index["cases"])}
        for case_id, case in self.cases.items():
            if problem := case.problem(len(self.classes)):
                raise UserError(f"{case_path(self.path, case_id)}: case {case_id}: {problem}; prepare the data again")
        self._open: OrderedDict[tuple[str, str], blosc2.NDArray] = OrderedDict()
        self._pid = os.getpid()

    @property
    def plan(self) -> dict[str, Any]:
        """``plan.yaml`` of this store.

        Raises:
            UserError: there is none or it is not YAML.
        """
        path = self.path / "plan.yaml"
        try:
            plan = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} is missing; run `pretrain3d prepare` again to make it") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(plan, dict):
            raise UserError(f"{path} holds no settings; delete it and run `pretrain3d prepare` again")
        return plan

    def read(self, case_id: str, kind: str, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray:
        """The voxels ``[start, stop)``; only the touched blocks are decompressed.

        Args:
            case_id: a key of `cases`.
            kind: "image", "instances" or "semantic".
            start: first voxel per axis; must lie inside the volume, as must ``stop``.
            stop: one past the last voxel per axis.

        Returns:
            (C, x, y, z) raw intensities for "image" (int16 for CT, else float32), (x, y, z) integers otherwise.
        """
        shape = self.cases[case_id].shape
        assert all(0 <= a < b <= size for a, b, size in zip(start, stop, shape, strict=True)), (start, stop, shape)
        region = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
        array = self._array(case_id, kind)
        return array[(slice(None), *region)] if kind == "image" else array[region]

    def _array(self, case_id: str, kind: str) -> blosc2.NDArray:
        assert kind in KINDS, kind
        if self._pid != os.getpid():  # forked: the parent's handles share its file positions
            self._open, self._pid = OrderedDict(), os.getpid()
        key = (case_id, kind)
        if key not in self._open:
            path = array_path(self.path, kind, case_id)
            try:
                self._open[key] = blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
            except (FileNotFoundError, RuntimeError) as error:
                raise UserError(f"cannot read {path} ({error}); run `pretrain3d prepare` again") from error
            if len(self._open) > OPEN_ARRAYS:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        return self._open[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


class StoreWriter:
    """Writes a store case by case; `finish` makes it one.

    Args:
        path: folder of the store, made if missing.
        name: of the data set.
        classes: names of the objects' classes.
        spacing_mm: target spacing per cached axis.
        modality: per channel.
        mirror_classes: class -> class under a left-right mirror.
        semantic_classes: names of labels 1.. of the semantic map.
        licence: as the data set states it.
    """

    def __init__(
        self,
        path: str | Path,
        name: str,
        classes: list[str],
        spacing_mm: Iterable[float],
        modality: list[str],
        mirror_classes: dict[str, str] | None = None,
        semantic_classes: list[str] | None = None,
        licence: str = "",
    ) -> None:
        self.path = Path(path)
        self.index: dict[str, Any] = {
            "format": FORMAT,
            "name": name,
            "classes": list(classes),
            "mirror_classes": dict(mirror_classes or {}),
            "modality": list(modality),
            "semantic_classes": list(semantic_classes or []),
            "spacing_mm": [float(value) for value in spacing_mm],
            "licence": licence,
        }

    def add(
        self, case: Case, image: np.ndarray, instances: np.ndarray | None = None, semantic: np.ndarray | None = None
    ) -> None:
        """Writes the arrays of a case, then its record: a case whose record exists is complete.

        Args:
            case: the record; its ``has_instances`` and ``has_semantic`` say which arrays follow.
            image: (C, X, Y, Z) raw intensities.
            instances: (X, Y, Z) instance ids, 0 = background.
            semantic: (X, Y, Z) labels, 0 = background.
        """
        assert image.shape == (case.channels, *case.shape), (image.shape, case.shape)
        assert case.has_instances == (instances is not None) and case.has_semantic == (semantic is not None)
        for kind, array in zip(KINDS, (image, instances, semantic), strict=True):
            target = array_path(self.path, kind, case.id)
            if array is None:
                target.unlink(missing_ok=True)
            else:
                assert array.shape[-3:] == case.shape, (kind, array.shape, case.shape)
                _write_array(target, array)
        write_json(case_path(self.path, case.id), case.to_dict())

    def finish(self, case_ids: Iterable[str]) -> Store:
        """Writes the index over ``case_ids``, which must all have been added (now or by an earlier writer)."""
        ids = sorted(case_ids)
        hashes = {case_id: read_case(self.path, case_id).content_hash for case_id in ids}
        write_json(self.path / "index.json", {**self.index, "data_hash": data_hash(hashes), "cases": ids})
        return Store(self.path)


def array_path(path: Path, kind: str, case_id: str) -> Path:
    """Where an array of a case lies."""
    return path / kind / f"{case_id}.b2nd"


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


def _read_index(path: Path) -> dict[str, Any]:
    file = path / "index.json"
    if not file.is_file():
        raise UserError(f"{path} is not a store (no index.json); `pretrain3d prepare RAW_FOLDER out={path}` makes one")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); run `pretrain3d prepare` again") from error
    if index.get("format") != FORMAT:
        raise UserError(f"{file} has format {index.get('format')}, this version reads {FORMAT}; prepare the data again")
    return index


def _write_array(path: Path, array: np.ndarray) -> None:
    lead = (1,) * (array.ndim - 3)
    chunks = lead + tuple(min(CHUNK, size) for size in array.shape[-3:])
    blocks = lead + tuple(min(BLOCK, size) for size in array.shape[-3:])
    compression = {
        "codec": blosc2.Codec.LZ4HC,
        "clevel": 5,
        "filters": [blosc2.Filter.SHUFFLE],
        "filters_meta": [0],
        "nthreads": 1,
        "typesize": array.dtype.itemsize,
    }
    with replacing(path) as temporary:
        blosc2.asarray(
            np.ascontiguousarray(array), chunks=chunks, blocks=blocks, cparams=compression,
            urlpath=str(temporary), mode="w", contiguous=True,
        )  # fmt: skip
