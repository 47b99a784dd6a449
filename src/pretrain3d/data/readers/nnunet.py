"""The raw layout of nnU-Net: images and label maps of organs; for supervised pretraining, no objects to detect.

    dataset.json                 channel_names {"0": "CT", ...}, labels {"background": 0, name: 1, ...} (version 2), or
                                 modality {"0": "CT", ...}, labels {"0": "background", "1": name, ...} (version 1)
    imagesTr/<case>_0000.nii.gz [, _0001 ...]    one file per channel
    labelsTr/<case>.nii.gz                       label maps
    imagesTs, labelsTs                           test cases, the labels optional

Beyond it, all optional keys of dataset.json: ``"groups": {case: patient}``, ``"mirror_classes": {name: name}``,
``"licence"``, and ``"annotated": {case: [names]}`` for cases in which only some labels were drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain3d.config import UserError
from pretrain3d.data.readers import nifti
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
        self.classes: list[str] = []
        channels: Any = description.get("channel_names", description.get("modality"))
        self.modality = names_by_number(self.file, "channel_names", channels, 0)
        labels = _without_background(self.file, description.get("labels"))
        self.semantic_classes = classes_by_number(self.file, "labels", labels, 1)
        self.mirror_classes = mirror_pairs(self.file, description.get("mirror_classes", {}), self.semantic_classes)
        self.licence = text_of(self.file, description, ("licence", "license"), "")
        self.groups = groups_of(self.file, description)
        self.annotated = self._annotations(description.get("annotated", {}))

    def cases(self) -> list[RawCase]:
        """Training and test cases, by name."""
        cases = []
        for split, ending in (("train", "Tr"), ("test", "Ts")):
            for first in nifti.files_in(self.folder / f"images{ending}", "*_0000.nii*"):
                case_id = nifti.stem(first).removesuffix("_0000")
                suffix = first.name.removeprefix(f"{case_id}_0000")
                files = [first.with_name(f"{case_id}_{index:04d}{suffix}") for index in range(len(self.modality))]
                labels = self.folder / f"labels{ending}" / f"{case_id}{suffix}"
                if split == "train" or labels.is_file():
                    files.append(labels)
                cases.append(RawCase(case_id, split, self.groups.get(case_id, case_id), tuple(files)))
        check_all_used(
            [self.folder / f"{kind}{ending}" for kind in ("images", "labels") for ending in ("Tr", "Ts")], cases,
            f"images <case>_0000 to _{len(self.modality) - 1:04d} (channel_names of dataset.json), and label maps "
            "<case> with the ending of their image",
        )  # fmt: skip
        if not cases:
            raise UserError(f"{self.folder}: no image imagesTr/<case>_0000.nii.gz or imagesTs/<case>_0000.nii.gz")
        for key, named in (("groups", self.groups), ("annotated", self.annotated)):
            check_known(self.file, key, named, (case.id for case in cases))
        return sorted(cases, key=lambda case: case.id)

    def read(self, case: RawCase) -> RawVolume:
        """Image, and the label map where there is one."""
        first, rest = case.files[0], case.files[len(self.modality) :]
        image, affine = nifti.read_channels(case.files[: len(self.modality)])
        if not rest:
            return RawVolume(image, affine)
        semantic = nifti.read_mask(rest[0], first)
        if semantic.max() > len(self.semantic_classes):
            raise UserError(f"{rest[0]}: label {semantic.max()} has no name in {self.file}")
        names = self.annotated.get(case.id, self.semantic_classes)
        annotated = tuple(label for label, name in enumerate(self.semantic_classes) if name in names and name != IGNORE)
        return RawVolume(image, affine, semantic=semantic, semantic_annotated=annotated)

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
