"""The raw layouts of nnU-Net and of the Medical Segmentation Decathlon: images and label maps.

    dataset.json                 channel_names {"0": "CT", ...}, labels {"background": 0, name: 1, ...} (version 2), or
                                 modality {"0": "CT", ...}, labels {"0": "background", "1": name, ...} (version 1, MSD)
    imagesTr/<case>_0000.nii.gz [, _0001 ...]    one file per channel; or, as the Decathlon has it, without a number
    imagesTr/<case>.nii.gz                       one file of all channels, (X, Y, Z) or (X, Y, Z, C)
    labelsTr/<case>.nii.gz                       label maps
    imagesTs, labelsTs                           test cases, the labels optional

Beyond it, all optional keys of dataset.json: ``"groups": {case: patient}``, ``"mirror_classes": {name: name}``,
``"licence"``, ``"annotated": {case: [names]}`` for cases in which only some labels were drawn, and ``"objects":
{name: fewest voxels}``, the labels that hold objects to detect. Without it the map is for supervised pretraining alone.

A name may stand for a region, the union of several labels: ``"labels": {"background": 0, "tumour": [1, 2], "core":
2}``. The map keeps the labels as they are in the file, one per voxel; one without a name of its own is named by its
number and its regions, ``"1 of tumour"``. What ``regions_class_order`` says concerns predictions and is not needed.

Each connected component (26 neighbours) of a label or region under ``objects`` is an object of that class. One of fewer
voxels is a speck: counted, and no object. A case in which a name was not annotated has no objects of it, and one with a
voxel that nobody looked at (``ignore``) none at all, since others may lie there; the map keeps all that is in the file.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from pretrain3d.config import UserError
from pretrain3d.data.readers import volumes
from pretrain3d.data.readers.contract import RawCase, RawVolume, Reader, check_all_used
from pretrain3d.data.readers.description import (
    check_known,
    classes_by_number,
    groups_of,
    mirror_pairs,
    names_by_number,
    read_json,
    text_of,
)

FOLDERS = {"train": "Tr", "test": "Ts"}
IGNORE = "ignore"  # nnU-Net's name of voxels that nobody looked at: a class that is annotated nowhere


class NnUNet(Reader):
    """Reads the layout above.

    Args:
        folder: holds dataset.json.

    Raises:
        UserError: no dataset.json, or it lacks or contradicts something.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.file = self.folder / "dataset.json"
        description = read_json(self.file)
        self.name = text_of(self.file, description, ("name",), self.folder.resolve().name)
        channels: Any = description.get("channel_names", description.get("modality"))
        self.modality = names_by_number(self.file, "channel_names", channels, 0)
        self.labels = _values_by_name(self.file, description.get("labels"))
        self.semantic_classes = _label_names(self.labels)
        self.objects = self._fewest_voxels(description.get("objects", {}))
        self.classes = list(self.objects)
        self.mirror_classes = mirror_pairs(
            self.file, description.get("mirror_classes", {}), self.semantic_classes, self.classes
        )
        self.licence = text_of(self.file, description, ("licence", "license"), "")
        self.groups = groups_of(self.file, description)
        self.annotated = self._annotations(description.get("annotated", {}))

    def cases(self) -> list[RawCase]:
        """Training and test cases, by name."""
        numbered = [self._first_channels(ending, "_0000") for ending in FOLDERS.values()]
        suffix = "_0000" if any(numbered) else ""
        cases = []
        for split, ending in FOLDERS.items():
            for first in self._first_channels(ending, suffix):
                case_id = volumes.stem(first).removesuffix(suffix)
                images = self._images(first, case_id) if suffix else [first]
                files = (*images, *self._label_map(first, case_id, split))
                in_file = len(self.modality) // len(images)
                cases.append(RawCase(case_id, split, self.groups.get(case_id, case_id), files, in_file))
        check_all_used(
            [self.folder / f"{kind}{ending}" for kind in ("images", "labels") for ending in FOLDERS.values()], cases,
            f"images <case>_0000 to _{len(self.modality) - 1:04d} (channel_names of dataset.json), and label maps "
            "<case> with the ending of their image",
        )  # fmt: skip
        if not cases:
            raise UserError(f"{self.folder}: no image imagesTr/<case>_0000.nii.gz or imagesTs/<case>_0000.nii.gz")
        for key, named in (("groups", self.groups), ("annotated", self.annotated)):
            check_known(self.file, key, named, (case.id for case in cases))
        return sorted(cases, key=lambda case: case.id)

    def _first_channels(self, ending: str, suffix: str) -> list[Path]:
        images = volumes.files_in(self.folder / f"images{ending}")
        return [path for path in images if volumes.stem(path).endswith(suffix)]

    def _images(self, first: Path, case_id: str) -> list[Path]:
        """A file for each channel."""
        suffix = first.name.removeprefix(volumes.stem(first))
        return [first.with_name(f"{case_id}_{channel:04d}{suffix}") for channel in range(len(self.modality))]

    def _label_map(self, first: Path, case_id: str, split: str) -> list[Path]:
        """The label map if there is one (a training case must have it)."""
        suffix = first.name.removeprefix(volumes.stem(first))
        labels = self.folder / f"labels{FOLDERS[split]}" / f"{case_id}{suffix}"
        return [labels] if split == "train" or labels.is_file() else []

    def settings(self, case: RawCase) -> list[Any]:
        """What dataset.json says of the objects and regions, and of what was annotated in this case."""
        if not self.objects and case.id not in self.annotated:
            return []
        regions = {name: values for name, values in self.labels.items() if len(values) > 1}
        return [self.objects, self.annotated.get(case.id), *([regions] if regions else [])]

    def read(self, case: RawCase) -> RawVolume:
        """Image, and where there is a label map the map and its objects."""
        first, number = case.files[0], len(self.modality) // case.channels_in_file
        images, rest = case.files[:number], case.files[number:]
        image, affine = volumes.read_channels(images, case.channels_in_file)
        if not rest:
            return RawVolume(image, affine)
        semantic = volumes.read_mask(rest[0], first)
        if semantic.max() > len(self.semantic_classes):
            raise UserError(f"{rest[0]}: label {semantic.max()} has no name in {self.file}")
        names = {name for name in self.annotated.get(case.id, self.labels) if name != IGNORE}
        annotated = self._known_labels(names)
        if IGNORE in self.labels and (semantic == self.labels[IGNORE][0]).any():
            names = set()
        known = tuple(index for index, name in enumerate(self.classes) if name in names)
        if not known:
            return RawVolume(image, affine, semantic=semantic, semantic_annotated=annotated)
        instances, labels, specks = self._instances(semantic, known, rest[0])
        return RawVolume(image, affine, instances, labels, known, semantic, annotated, specks)

    def _known_labels(self, names: set[str]) -> tuple[int, ...]:
        """Indices of the labels that are told from all others, background among them, by the annotated ``names``.

        Where only a region was annotated, its labels are one: which of them a voxel has was not said.
        """
        numbers = range(len(self.semantic_classes) + 1)
        meant = [{name for name, values in self.labels.items() if number in values} - {IGNORE} for number in numbers]
        drawn = [regions & names for regions in meant]
        return tuple(
            number - 1
            for number in numbers
            if drawn[number]
            and all(drawn[number] != drawn[other] or meant[number] == meant[other] for other in numbers)
        )

    def _instances(
        self, semantic: np.ndarray, known: tuple[int, ...], path: Path
    ) -> tuple[np.ndarray, dict[int, int], int]:
        """Mask of the objects, the class of each, and the number of components that are none, of classes ``known``."""
        instances = np.zeros(semantic.shape, dtype=np.uint16)
        labels: dict[int, int] = {}
        specks = 0
        boxes = dict(enumerate(ndimage.find_objects(semantic), start=1))
        for index in known:
            values = self.labels[self.classes[index]]
            parts = [box for value in values if (box := boxes.get(value)) is not None]
            if not parts:
                continue
            region = tuple(
                slice(min(part.start for part in axis), max(part.stop for part in axis))
                for axis in zip(*parts, strict=True)
            )
            components, number = ndimage.label(np.isin(semantic[region], values), structure=np.ones((3, 3, 3)))
            large = np.bincount(components.reshape(-1))[1:] >= self.objects[self.classes[index]]
            ids = np.where(large, len(labels) + np.cumsum(large), 0)
            if ids.max() > np.iinfo(np.uint16).max:
                raise UserError(f"{path}: {number} components of {self.classes[index]!r} are too many for objects; "
                                f"state more voxels under objects in {self.file}")  # fmt: skip
            instances[region] += np.concatenate([[0], ids]).astype(np.uint16)[components]
            labels |= {int(instance): index for instance in ids[large]}
            specks += int((~large).sum())
        return instances, labels, specks

    def _fewest_voxels(self, objects: Any) -> dict[str, int]:
        if not isinstance(objects, dict) or not all(type(v) is int and v > 0 for v in objects.values()):
            raise UserError(f"{self.file}: objects must be {{name of a label: fewest voxels of an object, from 1}}, "
                            f"got {objects!r}")  # fmt: skip
        labels = [name for name in self.labels if name != IGNORE]
        if unknown := [name for name in objects if name not in labels]:
            raise UserError(f"{self.file}: objects has {unknown[0]!r}; expected names among {labels}")
        for one, other in combinations(objects, 2):
            if shared := set(self.labels[one]) & set(self.labels[other]):
                raise UserError(f"{self.file}: objects has {one!r} and {other!r}, which share label {min(shared)}, but "
                                "a voxel is of one object; name one of them, and prepare a store for each")  # fmt: skip
        return objects

    def _annotations(self, annotated: Any) -> dict[str, list[str]]:
        if not isinstance(annotated, dict) or not all(isinstance(names, list) for names in annotated.values()):
            raise UserError(f"{self.file}: annotated must be {{case: [names of labels], ...}}, got {annotated!r}")
        for case_id, names in annotated.items():
            if unknown := [name for name in names if name not in self.labels]:
                raise UserError(f"{self.file}: annotated of {case_id} has {unknown[0]!r}, which is no label")
        return annotated


def _values_by_name(file: Path, labels: Any) -> dict[str, list[int]]:
    """Labels of either version as {name: its values}, of a region several; without background."""
    if not isinstance(labels, dict) or "background" not in labels:
        numbered = {key: name for key, name in labels.items() if key != "0"} if isinstance(labels, dict) else labels
        return {name: [value] for value, name in enumerate(classes_by_number(file, "labels", numbered, 1), start=1)}
    found: dict[str, list[int]] = {}
    for name, given in labels.items():
        values = given if isinstance(given, list) else [given]
        if not name or not values or not all(type(value) is int for value in values):
            raise UserError(f"{file}: labels must be {{name: number or [numbers]}}, got {{{name!r}: {given!r}}}")
        found[name] = sorted(set(values))
    if found.pop("background") != [0] or len(found.get(IGNORE, [0])) > 1:
        raise UserError(f"{file}: labels must have background 0 and for ignore one number, got {labels!r}")
    numbers = {value for values in found.values() for value in values}
    if not numbers or numbers != set(range(1, len(numbers) + 1)):
        raise UserError(f"{file}: labels must name every number from 1 on, got {labels!r}")
    for one, other in combinations(found, 2):
        if found[one] == found[other] or (IGNORE in (one, other) and set(found[one]) & set(found[other])):
            raise UserError(f"{file}: labels has {one!r} and {other!r} for the same number, {labels[one]!r} and "
                            f"{labels[other]!r}; expected one of them")  # fmt: skip
    return found


def _label_names(labels: dict[str, list[int]]) -> list[str]:
    """The name of each number from 1 on: its own, else the number and the regions that hold it."""
    own = {values[0]: name for name, values in labels.items() if len(values) == 1}
    return [
        own.get(number, f"{number} of {'+'.join(name for name, values in labels.items() if number in values)}")
        for number in range(1, 1 + max(map(max, labels.values())))
    ]
