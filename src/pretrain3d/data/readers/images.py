"""A folder of NIfTI images without labels, for pretraining."""

from __future__ import annotations

from pathlib import Path

from pretrain3d.config import UserError
from pretrain3d.data.readers import nifti
from pretrain3d.data.readers.contract import RawCase, RawVolume, Reader


class Images(Reader):
    """Every NIfTI file below a folder is a case of one channel; all are in the split "pretrain".

    The files do not say what they show: `prepare` takes it as ``modality=CT``. The path below the folder is the case's
    id, with ``-`` for ``/``, and each is a group of its own.

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
        paths = nifti.files_in(self.folder, "**/*")
        if not paths:
            raise UserError(f"{self.folder}: no .nii or .nii.gz file in it")
        cases = []
        for path in paths:
            case_id = "-".join((*path.relative_to(self.folder).parts[:-1], nifti.stem(path)))
            cases.append(RawCase(case_id, "pretrain", case_id, (path,)))
        return cases

    def read(self, case: RawCase) -> RawVolume:
        """The image alone."""
        image, affine = nifti.read_image(case.files[0])
        return RawVolume(image[None], affine)
