"""The raw layout of nnDetection: images, instance masks and a JSON per case with the class of each instance.

    dataset.json                          labels {"0": name, ...}, modalities {"0": "CT", ...}
    [raw_splitted/]imagesTr/<case>_0000.nii.gz [, _0001 ...]    one file per channel
    [raw_splitted/]labelsTr/<case>.nii.gz, <case>.json          ids 1..N; {"instances": {"1": 0, "2": 1}}
    [raw_splitted/]imagesTs, labelsTs                           test cases, the labels optional

Any ending of `volumes.SUFFIXES` will do, the same for a case's image and masks. Beyond nnDetection's layout, optional:
``imagesUn`` (images without labels, for pretraining), ``organsTr``, ``organsTs`` and ``organsUn`` (``<case>.nii.gz``,
label maps whose names are ``"organs": {"1": name, ...}`` of dataset.json), and the keys ``"groups": {case: patient}``,
``"mirror_classes": {name: name}``, of classes or organs, and ``"licence"``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

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
from pretrain3d.geometry import boxes_of_instances

FOLDERS = {"train": "Tr", "test": "Ts", "pretrain": "Un"}


class NnDetection(Reader):
    """Reads the layout above.

    Args:
        folder: holds dataset.json, or is the ``raw_splitted`` below it.

    Raises:
        UserError: no dataset.json, or it lacks or contradicts something.
    """

    def __init__(self, folder: Path) -> None:
        folder = Path(folder)
        self.root = folder / "raw_splitted" if (folder / "raw_splitted").is_dir() else folder
        self.file = _description_file(folder)
        description = read_json(self.file)
        self.name = text_of(self.file, description, ("name", "task"), folder.resolve().name)
        self.classes = classes_by_number(self.file, "labels", description.get("labels"), 0)
        self.modality = names_by_number(self.file, "modalities", description.get("modalities"), 0)
        organs = description.get("organs")
        self.semantic_classes = [] if organs is None else classes_by_number(self.file, "organs", organs, 1)
        self.mirror_classes = mirror_pairs(
            self.file, description.get("mirror_classes", {}), self.classes, self.semantic_classes
        )
        self.licence = text_of(self.file, description, ("licence", "license"), "")
        self.groups = groups_of(self.file, description)

    def cases(self) -> list[RawCase]:
        """Training, test and unlabelled cases, by name."""
        cases = []
        for split, ending in FOLDERS.items():
            images = volumes.files_in(self.root / f"images{ending}")
            for first in (path for path in images if volumes.stem(path).endswith("_0000")):
                case_id = volumes.stem(first).removesuffix("_0000")
                cases.append(RawCase(case_id, split, self.groups.get(case_id, case_id), self._files(first, split)))
        folders = [self.root / f"{kind}{end}" for kind in ("images", "labels", "organs") for end in FOLDERS.values()]
        organs = ", organs with organs in dataset.json" if not self.semantic_classes else ""
        check_all_used(
            folders, cases, f"images <case>_0000 to _{len(self.modality) - 1:04d} (modalities of dataset.json), and "
            f"masks <case> with the ending of their image{organs}",
        )  # fmt: skip
        if not cases:
            raise UserError(f"{self.root}: no image imagesTr/<case>_0000.nii.gz, imagesTs/... or imagesUn/...")
        check_known(self.file, "groups", self.groups, (case.id for case in cases))
        return sorted(cases, key=lambda case: case.id)

    def _files(self, first: Path, split: str) -> tuple[Path, ...]:
        """The channels, then what there is of mask, JSON and organ map (a training case must have the first two)."""
        case_id, ending = volumes.stem(first).removesuffix("_0000"), FOLDERS[split]
        suffix = first.name.removeprefix(f"{case_id}_0000")
        channels = [first.with_name(f"{case_id}_{index:04d}{suffix}") for index in range(len(self.modality))]
        files = [*channels]
        labels = [self.root / f"labels{ending}" / f"{case_id}{end}" for end in (suffix, ".json")]
        if split == "train" or (split == "test" and any(path.is_file() for path in labels)):
            files += labels
        organs = self.root / f"organs{ending}" / f"{case_id}{suffix}"
        return (*files, organs) if self.semantic_classes and organs.is_file() else tuple(files)

    def read(self, case: RawCase) -> RawVolume:
        """Image, instances with their classes, and the organ map where there is one."""
        first, rest = case.files[0], list(case.files[len(self.modality) :])
        image, affine = volumes.read_channels(case.files[: len(self.modality)])
        semantic = None
        if rest and rest[-1].parent.name.startswith("organs"):
            path = rest.pop()
            semantic = volumes.read_mask(path, first)
            if semantic.max() > len(self.semantic_classes):
                raise UserError(f"{path}: label {semantic.max()} has no name under organs in {self.file}")
        if not rest:
            return RawVolume(image, affine, semantic=semantic)
        mask = volumes.read_mask(rest[0], first)
        labels = self._labels(rest[1], mask, rest[0])
        return RawVolume(image, affine, mask, labels, tuple(range(len(self.classes))), semantic)

    def _labels(self, path: Path, mask: np.ndarray, mask_path: Path) -> dict[int, int]:
        instances: Any = read_json(path).get("instances")
        pairs = instances.items() if isinstance(instances, dict) else [("", instances)]
        if not all(str(key).isdigit() and type(value) in (int, str) and str(value).isdigit() for key, value in pairs):
            raise UserError(f'{path}: expected {{"instances": {{"1": 0, ...}}}}, got {instances!r}')
        labels = {int(key): int(value) for key, value in pairs}
        found = set(boxes_of_instances(mask)[0].tolist())
        if found != labels.keys():
            only_mask, only_json = sorted(found - labels.keys()), sorted(labels.keys() - found)
            raise UserError(f"{path}: its ids are not those of {mask_path}: only in the mask {only_mask}, "
                            f"only in the JSON {only_json}")  # fmt: skip
        for key, value in labels.items():
            if not 0 <= value < len(self.classes):
                raise UserError(f"{path}: instance {key} has class {value}, {self.file} has 0..{len(self.classes) - 1}")
        return labels


def _description_file(folder: Path) -> Path:
    """dataset.json, in the folder or above its ``raw_splitted``."""
    candidates = [folder, folder.parent] if folder.name == "raw_splitted" else [folder]
    for path in (candidate / "dataset.json" for candidate in candidates):
        if path.is_file():
            return path
    raise UserError(f"{folder}: no dataset.json; reader=nndetection needs it (for plain images: reader=images)")
