"""OpenKBP: head-and-neck planning CTs with seven contoured organs.

Source: Babier et al., "OpenKBP: the open-access knowledge-based planning grand challenge and dataset", Med. Phys. 2021;
github.com/ababier/open-kbp (MIT; images from TCIA).

Two forms of the same data are read:

- NIfTI: ``openkbp/`` (100 cases for detection) and ``openkbp_pretrain/`` (186 others), each with ``imagesTr`` and
  ``labels_oar`` (label maps of the organs) of files ``openkbp_pt_N.nii.gz``;
- as released: ``provided-data/{train,validation,test}-pats/pt_N/{ct,voxel_dimensions,Brainstem,...}.csv``, sparse
  arrays of 128 x 128 x 128.

The 100 are the cases with every contour at least 97.5 % inside the CT and the most organs contoured: all with six or
seven, filled up by number with five to 56, 12 and 32 of the original training, validation and test set. Everyone else
has contours cut by the field of view or missing, and is for pretraining.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.data.readers import volumes
from pretrain3d.data.readers.contract import RawCase, RawVolume, Reader, check_all_used

ORGANS = {  # class name -> file name, in the order of the label map: labels 1..7
    "brainstem": "Brainstem",
    "spinal_cord": "SpinalCord",
    "right_parotid": "RightParotid",
    "left_parotid": "LeftParotid",
    "esophagus": "Esophagus",
    "larynx": "Larynx",
    "mandible": "Mandible",
}
SPLITS = {"train": "train-pats", "val": "validation-pats", "test": "test-pats"}
LAST = {"train": 200, "val": 240, "test": 340}  # numbers of the patients: 1-200, 201-240, 241-340
# the 100 patients for detection
# fmt: off
DETECTION = frozenset((
    2, 4, 7, 13, 15, 17, 20, 21, 24, 26, 27, 30, 31, 34, 35, 39, 43, 54, 55, 59, 60, 61, 62, 66, 68, 72, 78, 82,
    83, 84, 87, 95, 96, 100, 106, 109, 112, 114, 115, 119, 122, 124, 126, 132, 139, 140, 141, 144, 155, 157,
    160, 168, 172, 182, 187, 193, 201, 206, 207, 215, 216, 222, 225, 230, 232, 233, 236, 238, 242, 247, 256,
    260, 265, 269, 274, 276, 277, 282, 283, 285, 286, 288, 291, 293, 294, 296, 299, 303, 304, 306, 307, 309,
    312, 319, 322, 332, 333, 334, 338, 339,
))
# fmt: on
# in the release but in neither NIfTI folder; left out here too, so that both forms are one data set
# fmt: off
LEFT_OUT = frozenset((
    8, 19, 23, 32, 44, 46, 56, 63, 69, 73, 75, 81, 85, 102, 107, 110, 117, 125, 134, 135, 138, 142, 145, 153,
    161, 174, 175, 179, 186, 191, 205, 217, 220, 223, 228, 234, 240, 241, 244, 252, 255, 259, 262, 266, 272,
    273, 281, 284, 313, 320, 325, 326, 330, 337,
))
# fmt: on
GRID = (128, 128, 128)
AIR_HU = -1024
MARGIN = 2  # voxels kept around the body, in the axial plane


class OpenKbp(Reader):
    """One box per organ label, however many components it has; an organ that was not contoured is not annotated.

    The 186 others are in the split "pretrain": they have no boxes, but their organs as the semantic map.
    Every organ that a map lacks was not contoured.

    Args:
        folder: holds ``openkbp`` and/or ``openkbp_pretrain``, or ``provided-data``.

    Raises:
        UserError: neither.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.name = "openkbp"
        self.classes = list(ORGANS)
        self.semantic_classes = list(ORGANS)
        self.mirror_classes = {"right_parotid": "left_parotid", "left_parotid": "right_parotid"}
        self.modality = ["CT"]
        self.licence = "MIT"
        self.nifti_folders = [f for f in (self.folder / "openkbp", self.folder / "openkbp_pretrain") if f.is_dir()]
        self.csv_folder = self.folder / "provided-data"
        if not self.nifti_folders and not self.csv_folder.is_dir():
            raise UserError(f"{folder}: expected openkbp/ and openkbp_pretrain/ (NIfTI), or provided-data/ (CSV) in it")

    def cases(self) -> list[RawCase]:
        """All cases, by patient number."""
        cases = self._nifti_cases() if self.nifti_folders else self._csv_cases()
        if not cases:
            raise UserError(f"{self.folder}: no patient in {[str(f) for f in self.nifti_folders] or self.csv_folder}")
        return sorted(cases, key=lambda case: _number(case.id))

    def _nifti_cases(self) -> list[RawCase]:
        cases = []
        for folder in self.nifti_folders:
            for image in volumes.files_in(folder / "imagesTr", "openkbp_pt_*"):
                case_id = volumes.stem(image).removeprefix("openkbp_")
                split = next((name for name, last in LAST.items() if _number(case_id) <= last), "test")
                split = split if folder.name == "openkbp" else "pretrain"
                cases.append(RawCase(case_id, split, case_id, (image, folder / "labels_oar" / image.name)))
        folders = [folder / kind for folder in self.nifti_folders for kind in ("imagesTr", "labels_oar")]
        check_all_used(folders, cases, "openkbp_pt_<N>.nii.gz in imagesTr, and organs of the same name in labels_oar")
        return cases

    def _csv_cases(self) -> list[RawCase]:
        cases = []
        for split, name in SPLITS.items():
            for folder in sorted((self.csv_folder / name).glob("pt_*")):
                number = _number(folder.name)
                if number in LEFT_OUT:
                    continue
                organs = [folder / f"{organ}.csv" for organ in ORGANS.values()]
                files = (
                    folder / "ct.csv",
                    folder / "voxel_dimensions.csv",
                    *(path for path in organs if path.is_file()),
                )
                cases.append(RawCase(folder.name, split if number in DETECTION else "pretrain", folder.name, files))
        return cases

    def geometry(self, case: RawCase) -> tuple[np.ndarray, tuple[int, ...]]:
        """From the header, or for CSV files from the whole CT (they have no header)."""
        if case.files[0].suffix != ".csv":
            return volumes.read_geometry(case.files[0])
        image, affine, _ = _read_ct(case.files[0], case.files[1])
        return affine, image.shape

    def read(self, case: RawCase) -> RawVolume:
        """CT and organs."""
        if case.files[0].suffix == ".csv":
            image, affine, crop = _read_ct(case.files[0], case.files[1])
            organs = np.zeros(GRID, dtype=np.int32)
            paths = {path.stem: path for path in case.files[2:]}
            for label, name in enumerate(ORGANS.values(), start=1):
                if name in paths:
                    organs.reshape(-1)[_read_sparse(paths[name])[0]] = label  # a voxel in two contours has the later
            organs = _oriented(organs)[crop]
        else:
            image, affine = volumes.read_image(case.files[0])
            organs = volumes.read_mask(case.files[1], case.files[0])
            if organs.max() > len(ORGANS):
                raise UserError(f"{case.files[1]}: label {organs.max()}, expected at most {len(ORGANS)}")
        present = (np.flatnonzero(np.bincount(organs.reshape(-1), minlength=len(ORGANS) + 1)[1:]) + 1).tolist()
        labels = {label: label - 1 for label in present}
        annotated = tuple(labels.values())
        if case.split == "pretrain":
            return RawVolume(image[None], affine, semantic=organs, semantic_annotated=annotated)
        return RawVolume(image[None], affine, organs, labels, annotated, organs, annotated)


def _number(name: str) -> int:
    digits = name.removeprefix("pt_")
    if not digits.isdecimal():
        raise UserError(f"{name}: not an OpenKBP patient, expected pt_N")
    return int(digits)


def _read_ct(path: Path, dimensions: Path) -> tuple[np.ndarray, np.ndarray, tuple[slice, ...]]:
    """(X, Y, Z) int16 HU along left, posterior and superior; affine; and the crop out of the whole grid."""
    index, values = _read_sparse(path)
    if values is None:
        raise UserError(f"{path}: has no column of intensities")
    grid = np.zeros(GRID, dtype=np.int16)
    # the release mixes 12 and 16 bits and its authors advise to clip; 0 is -1024 HU, and air where nothing is stored
    grid.reshape(-1)[index] = np.clip(values, 0, 4095)
    image = _oriented(grid) + np.int16(AIR_HU)
    occupied = [np.flatnonzero((image > AIR_HU).any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    if not len(occupied[0]):
        raise UserError(f"{path}: every voxel is air")
    margins = (MARGIN, MARGIN, 0)
    start = [max(int(where[0]) - margin, 0) for where, margin in zip(occupied, margins, strict=True)]
    stop = [min(int(where[-1]) + 1 + m, size) for where, m, size in zip(occupied, margins, GRID, strict=True)]
    crop = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    try:
        spacing = np.array(dimensions.read_text(encoding="utf-8").replace(",", " ").split(), dtype=np.float64)
    except (OSError, ValueError) as error:
        raise UserError(f"{dimensions}: not readable as three numbers ({error})") from error
    if spacing.shape != (3,) or not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise UserError(f"{dimensions}: expected three sizes in mm, got {spacing.tolist()}")
    affine = np.diag([*(spacing * (-1, -1, 1)), 1.0])  # left, posterior, superior in a RAS world
    affine[:3, 3] = affine[:3, :3] @ start
    return image[crop], affine, crop


def _oriented(grid: np.ndarray) -> np.ndarray:
    """Released axes: rows (posterior), columns (left), slices from the head down -> left, posterior, superior."""
    return grid.transpose(1, 0, 2)[:, :, ::-1]


def _read_sparse(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Flat indices into the grid, and the values at them (None: a mask)."""
    try:
        rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line]
        index = np.array([row[0] for row in rows], dtype=np.float64).astype(np.int64)
        values = None
        if rows and all(len(row) > 1 and row[1] for row in rows):
            values = np.array([row[1] for row in rows], dtype=np.float64)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as sparse CSV ({' '.join(str(error).split())})") from error
    if len(index) and not 0 <= index.min() <= index.max() < np.prod(GRID):
        raise UserError(f"{path}: index {index.max()} lies outside {GRID}")
    return index, values
