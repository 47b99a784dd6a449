"""The training store: chunked, compressed volumes that give a random crop without reading the volume, and their index.

On disk: ``index.json``, ``plan.yaml``, ``image/<case>.b2nd``, ``instances/<case>.b2nd``, ``semantic/<case>.b2nd``,
``cases/<case>.json``. Files are written beside their place and moved into it, so a reader never sees half a file.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import yaml

from pretrain3d.config import UserError
from pretrain3d.data.case import Case, case_path, read_case, write_json
from pretrain3d.data.identity import data_hash
from pretrain3d.files import replacing

FORMAT = 1
CHUNK, BLOCK = 64, 32
KINDS = ("image", "instances", "semantic")
PLAN_NEEDED = ("patch_size", "intensity")  # of a plan, to train with it
PLAN_KEYS = (
    *PLAN_NEEDED, "spacing_mm", "anchors", "coverage", "batch_size", "accumulate_grad_batches", "detection_levels",
    "planned_for",
)  # fmt: skip
OPEN_ARRAYS = 256  # per process, well below the usual limit of 1024 open files


class Store:
    """A prepared data set, read-only.

    Safe to hand to data-loading workers, forked or spawned: open arrays belong to one process.

    Raises:
        UserError: the folder is not a finished store of this format, or a case has objects that cannot be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = read_index(self.path)
        self.name: str = index["name"]
        self.classes: list[str] = index["classes"]
        self.mirror_classes: dict[str, str] = index["mirror_classes"]
        self.modality: list[str] = index["modality"]
        self.semantic_classes: list[str] = index["semantic_classes"]
        self.spacing_mm: tuple[float, ...] = tuple(index["spacing_mm"])
        self.licence: str = index["licence"]
        self.data_hash: str = index["data_hash"]
        self.folds: list[dict[str, list[str]]] = index.get("folds", [])  # of a splits file, see `data.splits`
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
            UserError: there is none, it is not YAML, a value makes no sense, or the cases have another spacing.
        """
        path = self.path / "plan.yaml"
        try:
            plan = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} is missing; `pretrain3d plan {self.path}` makes it") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}; {repair(path)}") from error
        if not isinstance(plan, dict):
            raise UserError(f"{path} holds no settings; delete it and run `pretrain3d prepare` again")
        check_plan(path, plan)
        spacing = plan.get("spacing_mm", self.spacing_mm)
        if not np.allclose(spacing, self.spacing_mm, rtol=1e-6):
            raise UserError(f"{path} says spacing_mm={list(spacing)}, but the cases were prepared at "
                            f"{list(self.spacing_mm)}; run `pretrain3d prepare` again, or set it back")  # fmt: skip
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
        try:
            return array[(slice(None), *region)] if kind == "image" else array[region]
        except RuntimeError as error:
            path = array_path(self.path, kind, case_id)
            raise UserError(f"{path} is damaged ({error}); delete it and run `pretrain3d prepare` again") from error

    def _array(self, case_id: str, kind: str) -> blosc2.NDArray:
        assert kind in KINDS, kind
        if self._pid != os.getpid():  # forked: the parent's handles share its file positions
            self._open, self._pid = OrderedDict(), os.getpid()
        key = (case_id, kind)
        if key not in self._open:
            self._open[key] = _open_array(array_path(self.path, kind, case_id))
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
        folds: of a splits file, see `data.splits.read_folds`; none: they are dealt by patient.
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
        folds: list[dict[str, list[str]]] | None = None,
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
            **({"folds": folds} if folds else {}),
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


def check_plan(path: Path, plan: dict[str, Any]) -> None:
    """Checks the keys of a plan and the values that are read as they are (not the normalisation and the anchors).

    Raises:
        UserError: a missing or unknown key, or a value that makes no sense; names ``path``.
    """
    if missing := [key for key in PLAN_NEEDED if key not in plan]:
        raise UserError(f"{path}: {missing[0]} is missing; {repair(path)}")
    if unknown := [key for key in plan if key not in PLAN_KEYS]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}; a plan has {', '.join(PLAN_KEYS)}; {repair(path)}")
    checks = {
        "spacing_mm": (lambda v: _three(v, (int, float)) and min(v) > 0, "three sizes in mm"),
        "patch_size": (lambda v: _three(v, (int,)) and min(v) >= 1, "three numbers of voxels"),
        "intensity": (lambda v: isinstance(v, dict), "keys and values, such as scheme: ct"),
        "batch_size": (lambda v: type(v) is int and v >= 1, "a whole number above 0"),
        "accumulate_grad_batches": (lambda v: type(v) is int and v >= 1, "a whole number above 0"),
        "detection_levels": (
            lambda v: v is None or (isinstance(v, list) and v and all(type(n) is int and n >= 0 for n in v)),
            "null or a list of levels, such as [1, 2, 3]",
        ),
        "planned_for": (lambda v: isinstance(v, dict), "keys and values"),
        "coverage": (lambda v: v is None or isinstance(v, dict), "null or keys and values"),
    }
    for key, (fine, expected) in checks.items():
        if key in plan and not fine(plan[key]):
            raise UserError(f"{path}: {key} must be {expected}, got {plan[key]!r}; {repair(path)}")


def repair(path: Path) -> str:
    """What to do about a plan with a mistake: `plan` reads the file that is there."""
    return f"correct it there, or delete the file and call `pretrain3d plan {path.parent}`"


def _three(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(v) in kinds for v in value)


def array_path(path: Path, kind: str, case_id: str) -> Path:
    """Where an array of a case lies."""
    return path / kind / f"{case_id}.b2nd"


def check_case(path: Path, case_id: str) -> None:
    """Reads the record of a case and opens its arrays, without their voxels.

    Raises:
        UserError: one is missing, cut or of another shape.
    """
    case = read_case(path, case_id)
    for kind, stored in zip(KINDS, (True, case.has_instances, case.has_semantic), strict=True):
        if stored and _open_array(file := array_path(path, kind, case_id)).shape[-3:] != case.shape:
            raise UserError(f"{file} has another shape than its record; run `pretrain3d prepare` again")


def _open_array(path: Path) -> blosc2.NDArray:
    try:
        return blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); run `pretrain3d prepare` again") from error


def read_index(path: Path) -> dict[str, Any]:
    """``index.json`` of a store.

    Raises:
        UserError: it is missing, damaged or of another format.
    """
    file = path / "index.json"
    if not file.is_file():
        where = "" if Path(path).is_absolute() else f", looked for in {Path.cwd()}"
        raise UserError(
            f"{path} is not a store (no index.json){where}; `pretrain3d prepare RAW_FOLDER out={path}` makes one"
        )
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); run `pretrain3d prepare` again") from error
    if not isinstance(index, dict):
        raise UserError(f"{file} is damaged (no JSON object); run `pretrain3d prepare` again")
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
