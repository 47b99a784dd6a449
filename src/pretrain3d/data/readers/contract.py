"""What a reader gives: cases, and the voxels of a case in the input file's own axes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.data.readers import volumes

NOTES = ("", ".json", ".txt", ".md", ".csv", ".tsv")  # endings of files that lie beside images and are none
MAX_NAMED = 3


@dataclass(frozen=True)
class RawCase:
    """A case as it lies on disk.

    Attributes:
        id: unique name; becomes a file name.
        split: "train" | "val" | "test" | "pretrain".
        group: the patient.
        files: every image and file the case is made of, the (first) image first; of a header not the files in which its
            voxels lie, of a DICOM series the folder.
        channels_in_file: of each image file; several lie along its fourth axis.
    """

    id: str
    split: str
    group: str
    files: tuple[Path, ...]
    channels_in_file: int = 1

    @property
    def sources(self) -> tuple[Path, ...]:
        """Every file that holds a part of `files`: while they are unchanged, so is the store's copy.

        Raises:
            UserError: a header, or a slice, is none.
        """
        return tuple(file for path in self.files for file in volumes.files_of(path))


@dataclass(frozen=True, eq=False)
class RawVolume:
    """The voxels of a case, in the input file's axes.

    Attributes:
        image: (C, X, Y, Z).
        affine: (4, 4) voxel centre -> RAS mm.
        instances: (X, Y, Z) instance ids, 0 = background; None when the case has no annotation of objects.
        labels: instance id -> class index, for exactly the ids in ``instances``.
        annotated: the classes that were annotated in this case.
        semantic: (X, Y, Z) labels of `Reader.semantic_classes` from 1; None when there is no map.
        semantic_annotated: indices into `Reader.semantic_classes` that were annotated in this case; None: all of them.
        specks: pieces of the annotation of objects that are too small, by a rule of the raw data, to be objects.
    """

    image: np.ndarray
    affine: np.ndarray
    instances: np.ndarray | None = None
    labels: dict[int, int] = field(default_factory=dict)
    annotated: tuple[int, ...] = ()
    semantic: np.ndarray | None = None
    semantic_annotated: tuple[int, ...] | None = None
    specks: int = 0


class Reader:
    """Base of all readers; a subclass takes the raw folder as its only argument and sets the attributes.

    Attributes:
        name: of the data set.
        classes: names of the objects' classes.
        mirror_classes: class -> class under a left-right mirror; symmetric, classes without a partner left out.
        modality: per channel, "CT", "MR", ...; empty where the files do not say.
        semantic_classes: names of labels 1.. of the semantic map, empty when there is none.
        licence: as the data set states it, "" unknown.
    """

    name: str
    classes: list[str]
    mirror_classes: dict[str, str]
    modality: list[str]
    semantic_classes: list[str]
    licence: str

    def cases(self) -> list[RawCase]:
        """All cases; reads no voxels.

        Raises:
            UserError: the folder is not what the reader reads.
        """
        raise AssertionError(f"{type(self).__name__} does not say its cases")

    def read(self, case: RawCase) -> RawVolume:
        """The voxels of a case.

        Raises:
            UserError: a file is missing, unreadable or inconsistent; names the file.
        """
        raise AssertionError(f"{type(self).__name__} does not read")

    def settings(self, case: RawCase) -> list[Any]:
        """What decides the result of `read` beside the case's files and the attributes above; plain values.

        A case is prepared again when it changes.
        """
        return []

    def folds(self) -> list[dict[str, list[str]]]:
        """The folds that the data set has by itself, as `data.splits.fold_cases` takes them; none: [].

        Of each the case ids under "train", "val" and, where the test cases change with the fold, "test".
        """
        return []

    def remarks(self) -> list[str]:
        """What is to be said of the data set as it lies there, such as parts that are missing."""
        return []

    def geometry(self, case: RawCase) -> tuple[np.ndarray, tuple[int, ...]]:
        """Affine and spatial shape of a case's image without its voxels.

        Raises:
            UserError: the file is missing or unreadable, or holds another number of channels; names the file.
        """
        return volumes.read_geometry(case.files[0], case.channels_in_file)


def check_all_used(folders: Iterable[Path], cases: Iterable[RawCase], expected: str) -> None:
    """Refuses data that no case uses, so that a misnamed file is not skipped; hidden files and notes may lie there.

    A subfolder counts if there are images in it.

    Args:
        folders: of images and labels; one that is missing holds nothing.
        cases: all of the data set.
        expected: what the files should be called.

    Raises:
        UserError: a file is in no case (names the first few), or a header is none.
    """
    used = {path for case in cases for path in case.sources}
    unused = [
        path
        for folder in folders
        for path in sorted(folder.glob("*"))
        if not path.name.startswith(".") and path not in used and _holds_data(path)
    ]
    if unused:
        more = f" and {len(unused) - MAX_NAMED} more" if len(unused) > MAX_NAMED else ""
        names = ", ".join(map(str, unused[:MAX_NAMED]))
        raise UserError(f"{names}{more}: no case uses {'it' if len(unused) == 1 else 'them'}; expected {expected}")


def _holds_data(path: Path) -> bool:
    return bool(volumes.files_in(path, "**/*")) if path.is_dir() else path.is_file() and path.suffix not in NOTES
