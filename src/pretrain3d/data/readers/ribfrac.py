"""RibFrac: chest CTs with rib fractures, each drawn as an instance of its own.

Source: ribfrac.grand-challenge.org (CC BY-NC 4.0); Yang et al., arXiv 2402.09372.

The archives may lie unpacked in any folders: files are known by their names, ``RibFracN-image.nii.gz`` and
``RibFracN-label.nii.gz``, whose values are 0 and the numbers of the fractures of the case. The released patients are 1
to 420 (training), 421 to 500 (validation) and 501 to 660 (test, without labels).
"""

from __future__ import annotations

import re
from pathlib import Path

from pretrain3d.config import UserError
from pretrain3d.data.readers import volumes
from pretrain3d.data.readers.contract import RawCase, RawVolume, Reader
from pretrain3d.geometry import boxes_of_instances

NAME = re.compile(r"(RibFrac(\d+))-(image|label)\.nii(?:\.gz)?")
LAST_LABELLED = 500


class RibFrac(Reader):
    """One class, "fracture"; the types that ``ribfrac-*-info*.csv`` has for some of them (-1: unknown) are not read.

    All patients with labels are in the split "train", to be dealt to folds; ``splits_final.json`` may name 421 to 500
    as what the only fold validates on. Those without labels are in the split "test".

    A label map lies on its image's voxels, whatever its own header says of their size and place: so do the challenge's
    scores take it.

    Args:
        folder: searched with its subfolders.

    Raises:
        UserError: no image in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.name = "ribfrac"
        self.classes = ["fracture"]
        self.mirror_classes: dict[str, str] = {}
        self.modality = ["CT"]
        self.semantic_classes: list[str] = []
        self.licence = "CC BY-NC 4.0"
        self.files: dict[str, dict[str, Path]] = {"image": {}, "label": {}}
        self.others: list[Path] = []
        for path in volumes.files_in(self.folder, "**/RibFrac*"):
            if path.is_file() and not NAME.fullmatch(path.name):
                self.others.append(path)
            elif match := NAME.fullmatch(path.name):
                known = self.files[match[3]].setdefault(match[1], path)
                if known != path:
                    raise UserError(f"{path}: {known} is a file of the same name; keep one of them")
        if not self.files["image"]:
            raise UserError(f"{folder}: no RibFrac<N>-image.nii.gz in it or below")

    def cases(self) -> list[RawCase]:
        """All patients, by number."""
        images, labels = self.files["image"], self.files["label"]
        if alone := sorted(labels.keys() - images.keys()):
            raise UserError(f"{labels[alone[0]]}: no {alone[0]}-image.nii.gz below {self.folder}, as of {len(alone)} "
                            "label maps; unpack the images too")  # fmt: skip
        cases = []
        for name in sorted(images, key=_number):
            labelled = _number(name) <= LAST_LABELLED or name in labels
            missing = images[name].with_name(f"{name}-label.nii.gz")  # to be named when its turn comes
            files = (images[name], labels.get(name, missing)) if labelled else (images[name],)
            cases.append(RawCase(name, "train" if _number(name) <= LAST_LABELLED else "test", name, files))
        return cases

    def remarks(self) -> list[str]:
        """Files whose names are nearly those of the data set."""
        if not self.others:
            return []
        return [f"{len(self.others)} image files RibFrac* are neither RibFrac<N>-image.nii.gz nor "
                f"RibFrac<N>-label.nii.gz, and not read; the first {self.others[0]}"]  # fmt: skip

    def read(self, case: RawCase) -> RawVolume:
        """CT, and its fractures where there are labels."""
        image, affine = volumes.read_image(case.files[0])
        if len(case.files) == 1:
            return RawVolume(image[None], affine)
        mask = volumes.read_mask(case.files[1], case.files[1])
        if mask.shape != image.shape:
            raise UserError(f"{case.files[1]}: shape {mask.shape} differs from {image.shape} of {case.files[0]}")
        labels = {int(fracture): 0 for fracture in boxes_of_instances(mask)[0]}
        return RawVolume(image[None], affine, mask, labels, (0,))


def _number(name: str) -> int:
    return int(name.removeprefix("RibFrac"))
