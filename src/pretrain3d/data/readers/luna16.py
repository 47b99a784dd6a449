"""LUNA16: 888 chest CTs with the nodules of at least 3 mm that three of four radiologists accepted.

    subset0 ... subset9/<seriesuid>.mhd, .raw      the CTs; each of the ten is the test set of one official fold
    annotations.csv                                seriesuid, coordX, coordY, coordZ (centre, LPS mm), diameter_mm

Fold k tests on subset k, validates on the next one and trains on the other eight: what is reported took no part in any
choice. (nnDetection trains on nine and validates on subset k itself: `splits_final.json` can say so.) A case is named
as its series, as `predict format=luna16` and `score protocol=luna16` name it; docs/data.md goes from here to the CPM.

The files do not say which series are of one patient. Not every subset need be there.

Source: Setio et al., Validation, comparison, and combination of algorithms for automatic detection of pulmonary nodules
in computed tomography images: the LUNA16 challenge (2017); luna16.grand-challenge.org; CC BY 4.0, of LIDC-IDRI.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.data.readers import volumes
from pretrain3d.data.readers.contract import RawCase, RawVolume, Reader, check_all_used
from pretrain3d.delimited import read_table

SUBSETS = 10
COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm")
RAS = np.array([-1.0, -1.0, 1.0])  # of LPS


class Nodule(NamedTuple):
    """A row of annotations.csv.

    Attributes:
        line: of the file.
        center_mm: (3,) RAS.
        diameter_mm: above 0.
    """

    line: int
    center_mm: np.ndarray
    diameter_mm: float


class Luna16(Reader):
    """One class; a nodule is the ball of its diameter, in voxels whose centres lie in it.

    Args:
        folder: holds annotations.csv and some of subset0 to subset9.

    Raises:
        UserError: no such folder of LUNA16, or annotations.csv cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.name = "luna16"
        self.classes = ["nodule"]
        self.mirror_classes: dict[str, str] = {}
        self.modality = ["CT"]
        self.semantic_classes: list[str] = []
        self.licence = "CC BY 4.0"
        self.file = self.folder / "annotations.csv"
        if not self.file.is_file() or not self._subsets():
            raise UserError(f"{folder}: expected annotations.csv and folders subset0 to subset{SUBSETS - 1} in it")
        self.nodules = _read_nodules(self.file)

    def cases(self) -> list[RawCase]:
        """All series that are there, by subset and name."""
        subsets = self._subsets()
        paths = [path for folder in subsets.values() for path in volumes.files_in(folder)]
        cases = [RawCase(volumes.stem(path), "train", volumes.stem(path), (path,)) for path in paths]
        check_all_used(subsets.values(), cases, "<seriesuid>.mhd and the .raw or .zraw that it names")
        if not cases:
            raise UserError(f"{self.folder}: no <seriesuid>.mhd in {', '.join(path.name for path in subsets.values())}")
        return cases

    def folds(self) -> list[dict[str, list[str]]]:
        """Fold k as above, of the subsets that are there; none where fewer than three are."""
        series = self._series()
        there = list(series)
        if len(there) < 3:
            return []
        folds = []
        for test in range(SUBSETS):
            val = min((i for i in there if i != test), key=lambda i: (i - test) % SUBSETS)
            train = [name for i in there if i not in (test, val) for name in series[i]]
            folds.append({"train": train, "val": series[val], "test": series.get(test, [])})
        return folds

    def remarks(self) -> list[str]:
        """Subsets and annotated series that are not there."""
        said = []
        series = self._series()
        if missing := [f"subset{i}" for i in range(SUBSETS) if i not in series]:
            official = "the folds are of the others" if self.folds() else "too few are there for the official folds"
            said.append(f"{self.folder}: {', '.join(missing)} not there; {official}")
        if lost := sorted(set(self.nodules).difference(*series.values())):
            count = sum(len(self.nodules[name]) for name in lost)
            said.append(f"{self.file}: {len(lost)} of {len(self.nodules)} series with nodules are not there, and so "
                        f"{count} nodules; the first {lost[0]}")  # fmt: skip
        return said

    def settings(self, case: RawCase) -> list[Any]:
        """The nodules of the case."""
        return [[*nodule.center_mm.tolist(), nodule.diameter_mm] for nodule in self.nodules.get(case.id, [])]

    def _subsets(self) -> dict[int, Path]:
        return {i: folder for i in range(SUBSETS) if (folder := self.folder / f"subset{i}").is_dir()}

    def _series(self) -> dict[int, list[str]]:
        """The series of each subset that is there and not empty."""
        found = {i: [volumes.stem(path) for path in volumes.files_in(folder)] for i, folder in self._subsets().items()}
        return {i: names for i, names in found.items() if names}

    def read(self, case: RawCase) -> RawVolume:
        """The CT, and a mask of its nodules."""
        image, affine = volumes.read_image(case.files[0])
        nodules = self.nodules.get(case.id, [])
        mask = draw_balls(image.shape, affine, [(n.center_mm, n.diameter_mm) for n in nodules])
        counts = np.bincount(mask.reshape(-1), minlength=len(nodules) + 1)[1:]
        for nodule, count in zip(nodules, counts, strict=True):
            if not count:
                where = (nodule.center_mm * RAS).round(2).tolist()
                raise UserError(f"{self.file} line {nodule.line}: the nodule at {where} lies outside {case.files[0]}, "
                                "or others cover it")  # fmt: skip
        return RawVolume(image[None], affine, mask, dict.fromkeys(range(1, len(nodules) + 1), 0), (0,))


def draw_balls(shape: tuple[int, ...], affine: np.ndarray, balls: list[tuple[np.ndarray, float]]) -> np.ndarray:
    """Balls of the world as instances of a mask.

    A voxel is in a ball if its centre is; a ball has at least the voxel that holds its own centre, and nothing outside
    the volume. Where balls meet, the smaller one is seen.

    Args:
        shape: (X, Y, Z).
        affine: (4, 4) voxel centre -> mm.
        balls: centre (3,) and diameter, in mm.

    Returns:
        (X, Y, Z) uint8 or uint16: 1 + index of the ball, else 0.
    """
    mask = np.zeros(shape, np.uint8 if len(balls) < 2**8 else np.uint16)
    inverse = np.linalg.inv(affine[:3, :3])
    size = np.asarray(shape)
    for index in sorted(range(len(balls)), key=lambda i: -balls[i][1]):
        center_mm, diameter_mm = balls[index]
        center = inverse @ (center_mm - affine[:3, 3])  # voxels
        middle = np.floor(center + 0.5).astype(np.int64)
        if (middle < 0).any() or (middle >= size).any():
            continue
        reach = diameter_mm / 2 * np.linalg.norm(inverse, axis=1)  # of the ball along each voxel axis
        start = np.maximum(np.floor(center - reach), 0).astype(np.int64)
        stop = np.minimum(np.ceil(center + reach) + 1, size).astype(np.int64)
        region = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        offsets = np.moveaxis(np.mgrid[region], 0, -1) - center
        inside = ((offsets @ affine[:3, :3].T) ** 2).sum(axis=-1) <= (diameter_mm / 2) ** 2
        mask[region][inside] = index + 1
        mask[tuple(middle)] = index + 1
    return mask


def _read_nodules(path: Path) -> dict[str, list[Nodule]]:
    """The nodules of each series.

    Raises:
        UserError: a value that is none, or a nodule listed twice; names the line.
    """
    table = read_table(path, COLUMNS)
    *axes, diameters = (table.numbers(name) for name in COLUMNS[1:])
    points = np.stack(axes, axis=1) * RAS
    nodules: dict[str, list[Nodule]] = {}
    for line, series, point, diameter in zip(
        table.lines, table.column("seriesuid"), points, diameters.tolist(), strict=True
    ):
        if diameter <= 0:
            raise UserError(f"{path} line {line}: diameter_mm is {diameter:g}; expected mm above 0")
        known = nodules.setdefault(series, [])
        for other in known:
            if np.array_equal(point, other.center_mm):
                raise UserError(f"{path} line {line}: the nodule was listed in line {other.line} already")
        known.append(Nodule(line, point, diameter))
    return nodules
