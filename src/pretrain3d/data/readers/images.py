"""A folder of images without labels, for pretraining."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pretrain3d.config import UserError
from pretrain3d.data.readers import volumes
from pretrain3d.data.readers.contract import RawCase, RawVolume, Reader

LABELS = ("labels", "labelsTr", "labelsTs", "seg-lungs-LUNA16")  # folders of masks in layouts that people have at hand


class Images(Reader):
    """Every image file (`volumes.SUFFIXES`) and every DICOM series (a folder of slices) below a folder is a case of one
    channel; all are in the split "pretrain".

    Where ``modality`` has several entries, a case is the files ``<case>_0000``, ``<case>_0001``, ... of one folder, as
    nnU-Net names channels, or a file without such a number that holds all of them along its fourth axis.

    The files do not say what they show: `prepare` takes it as ``modality=CT``. The path below the folder is the case's
    id, with ``-`` for ``/``, and each is a group of its own, whatever patient a series names.

    Args:
        folder: searched with its subfolders.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        self.classes: list[str] = []
        self.mirror_classes: dict[str, str] = {}
        self.modality: list[str] = []
        self.semantic_classes: list[str] = []
        self.licence = ""

    def cases(self) -> list[RawCase]:
        """All images, by path."""
        paths = volumes.files_in(self.folder, "**/*")
        if not paths:
            raise UserError(f"{self.folder}: no image in it ({volumes.ENDINGS})")
        check_no_labels(self.folder, paths, ", or take reader=nndetection or nnunet")
        cases = []
        for path in paths:
            case_id = "-".join((*path.relative_to(self.folder).parts[:-1], volumes.stem(path)))
            cases.append(RawCase(case_id, "pretrain", case_id, (path,)))
        return _grouped(cases, len(self.modality)) if len(self.modality) > 1 else cases

    def read(self, case: RawCase) -> RawVolume:
        """The image alone."""
        return RawVolume(*volumes.read_channels(case.files, case.channels_in_file))


def check_no_labels(folder: Path, paths: Iterable[Path], otherwise: str = "") -> None:
    """Refuses masks among the files below a folder that are taken for images.

    Args:
        folder: that was given.
        paths: of the files in it.
        otherwise: what may be done besides giving the images' own folder.

    Raises:
        UserError: a file lies in a folder of labels.
    """
    for path in paths:
        if held := set(LABELS) & set(path.relative_to(folder).parts[:-1]):
            raise UserError(f"{path}: {held.pop()} holds labels, no images; give the images' own folder{otherwise}")


def _grouped(cases: list[RawCase], channels: int) -> list[RawCase]:
    """Cases of one channel each, ``<case>_0000`` and on, as cases of all channels; without a number it is one."""
    endings = [f"_{index:04d}" for index in range(channels)]
    groups: dict[str, list[RawCase]] = {}
    whole = []
    for case in cases:
        case_id = re.sub(r"_\d{4}$", "", case.id)
        if case_id == case.id:
            whole.append(replace(case, channels_in_file=channels))
        else:
            groups.setdefault(case_id, []).append(case)
    for case_id, group in groups.items():
        if [case.id for case in group] != [f"{case_id}{ending}" for ending in endings]:
            names = ", ".join(str(case.files[0]) for case in group)
            raise UserError(f"{names}: modality has {channels} entries, expected the files <case>{endings[0]} to "
                            f"{endings[-1]} of each case")  # fmt: skip
    grouped = [RawCase(name, "pretrain", name, tuple(c.files[0] for c in group)) for name, group in groups.items()]
    return sorted([*grouped, *whole], key=lambda case: case.id)
