"""The raw layouts of nnU-Net and of the Medical Segmentation Decathlon: images and label maps.

    dataset.json                 channel_names {"0": "CT", ...}, labels {"background": 0, name: 1, ...} (version 2), or
                                 modality {"0": "CT", ...}, labels {"0": "background", "1": name, ...} (version 1, MSD)
    imagesTr/<case>_0000.nii.gz [, _0001 ...]    one file per channel; as the Decathlon has it, of one channel,
    imagesTr/<case>.nii.gz                       without a number (its 4D files of several channels are not read)
    labelsTr/<case>.nii.gz                       label maps
    imagesTs, labelsTs                           test cases, the labels optional

Beyond it, all optional keys of dataset.json: ``"groups": {case: patient}``, ``"mirror_classes": {name: name}``,
``"licence"``, ``"annotated": {case: [names]}`` for cases in which only some labels were drawn, and ``"objects":
{name: fewest voxels}``, the labels that hold objects to detect. Without it the map is for supervised pretraining alone.

Each connected component (26 neighbours) of a label under ``objects`` is an object of that class. One of fewer voxels is
a speck: counted, and no object. A case in which a label was not annotated has no objects of it, and one with a voxel
that nobody looked at (``ignore``) none at all, since others may lie there; the map keeps all that is in the file.
"""

from __future__ import annotations

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
        labels = _without_background(self.file, description.get("labels"))
        self.semantic_classes = classes_by_number(self.file, "labels", labels, 1)
        self.objects = self._fewest_voxels(description.get("objects", {}))
        self.classes = list(self.objects)
        self.mirror_classes = mirror_pairs(self.file, description.get("mirror_classes", {}), self.semantic_classes)
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
                files = self._files(first, case_id, split)
                cases.append(RawCase(case_id, split, self.groups.get(case_id, case_id), files))
        if cases and not suffix and len(self.modality) > 1:
            raise UserError(f"{cases[0].files[0]}: {len(self.modality)} channels in one file are not read; expected "
                            f"a file for each, <case>_0000 to _{len(self.modality) - 1:04d}")  # fmt: skip
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

    def _files(self, first: Path, case_id: str, split: str) -> tuple[Path, ...]:
        """The channels, then the label map if there is one (a training case must have it)."""
        suffix = first.name.removeprefix(volumes.stem(first))
        files = [first, *(first.with_name(f"{case_id}_{i:04d}{suffix}") for i in range(1, len(self.modality)))]
        labels = self.folder / f"labels{FOLDERS[split]}" / f"{case_id}{suffix}"
        return (*files, labels) if split == "train" or labels.is_file() else tuple(files)

    def settings(self, case: RawCase) -> list[Any]:
        """What dataset.json says of the objects, and of what was annotated in this case."""
        return [self.objects, self.annotated.get(case.id)] if self.objects or case.id in self.annotated else []

    def read(self, case: RawCase) -> RawVolume:
        """Image, and where there is a label map the map and its objects."""
        first, rest = case.files[0], case.files[len(self.modality) :]
        image, affine = volumes.read_channels(case.files[: len(self.modality)])
        if not rest:
            return RawVolume(image, affine)
        semantic = volumes.read_mask(rest[0], first)
        if semantic.max() > len(self.semantic_classes):
            raise UserError(f"{rest[0]}: label {semantic.max()} has no name in {self.file}")
        names = [name for name in self.annotated.get(case.id, self.semantic_classes) if name != IGNORE]
        annotated = tuple(label for label, name in enumerate(self.semantic_classes) if name in names)
        if IGNORE in self.semantic_classes and (semantic == self.semantic_classes.index(IGNORE) + 1).any():
            names = []
        known = tuple(index for index, name in enumerate(self.classes) if name in names)
        if not known:
            return RawVolume(image, affine, semantic=semantic, semantic_annotated=annotated)
        instances, labels, specks = self._instances(semantic, known, rest[0])
        return RawVolume(image, affine, instances, labels, known, semantic, annotated, specks)

    def _instances(
        self, semantic: np.ndarray, known: tuple[int, ...], path: Path
    ) -> tuple[np.ndarray, dict[int, int], int]:
        """Mask of the objects, the class of each, and the number of components that are none, of classes ``known``."""
        instances = np.zeros(semantic.shape, dtype=np.uint16)
        labels: dict[int, int] = {}
        specks = 0
        regions = dict(enumerate(ndimage.find_objects(semantic), start=1))
        for index in known:
            value = self.semantic_classes.index(self.classes[index]) + 1
            region = regions.get(value)
            if region is None:
                continue
            components, number = ndimage.label(semantic[region] == value, structure=np.ones((3, 3, 3)))
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
        labels = [name for name in self.semantic_classes if name != IGNORE]
        if unknown := [name for name in objects if name not in labels]:
            raise UserError(f"{self.file}: objects has {unknown[0]!r}; expected names among {labels}")
        return objects

    def _annotations(self, annotated: Any) -> dict[str, list[str]]:
        if not isinstance(annotated, dict) or not all(isinstance(names, list) for names in annotated.values()):
            raise UserError(f"{self.file}: annotated must be {{case: [names of labels], ...}}, got {annotated!r}")
        for case_id, names in annotated.items():
            if unknown := [name for name in names if name not in self.semantic_classes]:
                raise UserError(f"{self.file}: annotated of {case_id} has {unknown[0]!r}, which is no label")
        return annotated


def _without_background(file: Path, labels: Any) -> Any:
    """Labels of either version as {"1": name, ...}; what is neither stays as it is, to be refused for what it is."""
    if not isinstance(labels, dict):
        return labels
    if "background" in labels:
        if any(isinstance(value, list) for value in labels.values()):
            raise UserError(f"{file}: labels has regions of several values ({labels}); one value per name is read")
        return {str(value): name for name, value in labels.items() if name != "background"}
    return {key: name for key, name in labels.items() if key != "0"}
