"""The detector as a Python object: load one or several checkpoints, predict image files or arrays.

from pretrain3d.api import Detector

detector = Detector("runs/det/checkpoints/last.ckpt")
found = detector.predict("scan.nii.gz", threshold="operating")
found.restored()["boxes"]                                          # (N, 6) in the file's own voxels and axes
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain3d.config import UserError
from pretrain3d.data.cached import Cached, image_histograms, prepare_volume
from pretrain3d.data.normalise import normalisation_of
from pretrain3d.data.oddity import oddities
from pretrain3d.data.readers import volumes
from pretrain3d.data.readers.contract import RawVolume
from pretrain3d.detection.ensemble import merge_members
from pretrain3d.detection.merge import TileDetections
from pretrain3d.geometry import Frame
from pretrain3d.modules.checkpoint import load_module
from pretrain3d.modules.detection import PRECISIONS
from pretrain3d.reporting.formats.found import Found
from pretrain3d.reporting.run_folder import RunFolder

MIN_SCORE = 0.05


class Detector:
    """One trained detector, or an ensemble (the folds of one configuration) whose boxes are merged once.

    Args:
        checkpoints: `.ckpt` files of `fit`, or run folders, of which the last checkpoint is taken; each holds all that
            prediction needs: classes, spacing, normalisation, tiles, and what `sweep` chose.
        device: None: a GPU if there is one.
        precision: "32", "bf16" or "fp16" arithmetic; None: as each was trained, "32" on a CPU without it, where the
            others are 20 to 50 times slower.
        mirror_axes: axes of mirrored views; None: as configured.
        overlap: share of a tile that its neighbour repeats; None: as configured.
        tile_batch: tiles predicted at once, which bounds the memory; None: as configured.

    Attributes:
        classes: names of the labels.

    Raises:
        UserError: a file that is no detector's, detectors that do not belong together, or a value out of its range.
    """

    def __init__(
        self,
        *checkpoints: str | Path,
        device: str | None = None,
        precision: str | None = None,
        mirror_axes: Sequence[int] | None = None,
        overlap: float | None = None,
        tile_batch: int | None = None,
    ) -> None:
        if not checkpoints:
            raise UserError("a detector needs at least one checkpoint")
        if precision not in (None, *PRECISIONS):
            raise UserError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
        if mirror_axes is not None and (
            not isinstance(mirror_axes, list | tuple)
            or not all(type(axis) is int and axis in (0, 1, 2) for axis in mirror_axes)
            or len(set(mirror_axes)) < len(mirror_axes)
        ):
            raise UserError(f"mirror_axes is {mirror_axes!r}; expected a list of some of 0, 1, 2")
        if overlap is not None and (type(overlap) not in (int, float) or not 0 <= overlap < 1):
            raise UserError(f"overlap is {overlap!r}; expected a number from 0 (tiles side by side) to below 1")
        if tile_batch is not None and (type(tile_batch) is not int or tile_batch < 1):
            raise UserError(f"tile_batch is {tile_batch!r}; expected a whole number from 1 on")
        where = _device(device)
        files = [
            RunFolder(Path(path)).checkpoint("last") if Path(path).is_dir() else Path(path) for path in checkpoints
        ]
        for index, file in enumerate(files):
            if file.resolve() in [other.resolve() for other in files[:index]]:
                raise UserError(f"{checkpoints[index]} is given twice")
        self.members: list[Any] = [load_module(file, "detection", where) for file in files]
        given = {"precision": precision, "overlap": overlap, "tile_batch": tile_batch,
                 "mirror_axes": None if mirror_axes is None else tuple(mirror_axes)}  # fmt: skip
        for member in self.members:
            for name, value in given.items():
                if value is not None:
                    setattr(member, name, value)
        _check_members(checkpoints, self.members)
        # boxes are merged in voxels of the first, which min_size counts: the finest, in whatever order they are given
        self.members.sort(key=lambda member: math.prod(member.note["preprocessing"]["spacing_mm"]))
        self.classes: list[str] = self.members[0].classes
        self.modality: list[str] = self.members[0].note["preprocessing"]["modality"]

    @property
    def operating_threshold(self) -> float:
        """The score from which on a validation case had the false positives that `sweep` was asked for.

        Raises:
            UserError: the checkpoint was not swept.
        """
        inference = self.members[0].note.get("inference")
        if inference is None:
            raise UserError(
                "threshold=operating: this checkpoint has no operating point; `pretrain3d sweep RUN` finds it"
            )
        return float(inference["operating"]["threshold"])

    def predict(
        self,
        image: str | Path | Sequence[str | Path] | np.ndarray,
        affine: np.ndarray | None = None,
        threshold: float | str = MIN_SCORE,
        keep_image: bool = False,
    ) -> Found:
        """The boxes of one image.

        Args:
            image: an image file (NIfTI, MetaImage, NRRD) or the folder of a DICOM series, one per channel or a file of
                shape (X, Y, Z, C), or an array (X, Y, Z) or (C, X, Y, Z) of raw intensities.
            affine: (4, 4) voxel centre -> RAS mm, with an array only.
            threshold: boxes below this score are left out; "operating": `operating_threshold`.
            keep_image: keeps what the network saw in ``Found.image``.

        Returns:
            boxes, scores and labels; ``odd`` says what makes the image unlikely to be what it is taken for.

        Raises:
            UserError: the image is unreadable or does not fit the detector; names it.
        """
        if threshold != "operating" and (not _is_number(threshold) or not 0 <= float(threshold) <= 1):
            raise UserError(f"threshold is {threshold!r}; expected a score from 0 to 1, or operating")
        least = self.operating_threshold if threshold == "operating" else float(threshold)
        volume, where = self._read(image, affine)
        prepared: dict[tuple[float, ...], Cached] = {}  # by spacing
        views: list[list[TileDetections]] = []
        frames: list[Frame] = []
        picture: np.ndarray | None = None
        for member in self.members:
            about = member.note["preprocessing"]
            spacing_mm = tuple(about["spacing_mm"])
            if spacing_mm not in prepared:
                prepared[spacing_mm] = prepare_volume(volume, where, self.modality, spacing_mm)
            normalised, pad_value = _normalised(prepared[spacing_mm], about)
            try:
                views.append(member.predict_views(normalised, pad_value))
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            frames.append(prepared[spacing_mm].frame)
            picture = normalised.numpy() if keep_image and picture is None else picture
        odd = oddities(None if isinstance(image, np.ndarray) else where, volume.image, self.modality)
        found = merge_members(views, frames, self.members[0].merging)
        boxes, scores, labels = (value.numpy() for value in (found.boxes, found.scores, found.labels))
        keep = scores.astype(np.float64) >= least
        return Found(frames[0], boxes[keep], scores[keep], labels[keep], picture, tuple(odd))

    def _read(self, image: Any, affine: np.ndarray | None) -> tuple[RawVolume, Path]:
        """The image as a raw volume, and what errors call it."""
        if isinstance(image, np.ndarray):
            if affine is None:
                raise UserError("an array needs its affine (4, 4): voxel centre -> RAS mm")
            voxels = image if image.ndim == 4 else image[None]
            if voxels.ndim != 4 or voxels.dtype.kind not in "iuf" or not voxels.size:
                raise UserError(f"an image is numbers (X, Y, Z) or (C, X, Y, Z), got {image.dtype} {image.shape}")
            try:
                return RawVolume(voxels, np.asarray(affine, np.float64)), Path("image")
            except (TypeError, ValueError):
                raise UserError(f"affine is {affine!r}; expected (4, 4) numbers, voxel centre -> RAS mm") from None
        files = list(image) if isinstance(image, list | tuple) else [image]
        for file in files:
            if not isinstance(file, str | Path):
                raise UserError(
                    f"an image is a file, a list of files (channels) or a numpy array, got a {type(file).__name__}"
                )
        if affine is not None:
            raise UserError("affine goes with an array; a file has its own")
        paths = [Path(file) for file in files]
        in_file = len(self.modality) if len(paths) == 1 else 1
        if len(paths) * in_file != len(self.modality):
            needed = ", ".join(self.modality)
            raise UserError(
                f"{paths[0] if paths else 'no file'}: {len(paths)} channels; {len(self.modality)} are needed: {needed}"
            )
        return RawVolume(*volumes.read_channels(paths, in_file)), paths[0]


def _device(name: str | None) -> torch.device:
    """A CPU or a GPU that is there; None: a GPU if there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError):
        raise UserError(f"device is {name!r}; expected cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}; expected cpu, cuda or cuda:0")
    number = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= number:
        raise UserError(f"device is {name!r}, but there is {f'only {number}' if number else 'no'} GPU here")
    return device


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _normalised(cached: Cached, about: dict[str, Any]) -> tuple[torch.Tensor, tuple[float, ...]]:
    """A prepared volume as the network was trained on it, and the value that stands for outside it."""
    body = image_histograms(cached.image, {"body": cached.body}, about["modality"])["body"]
    normalisation = normalisation_of(about["intensity"], len(about["modality"]))(body, cached.moments)
    return normalisation(torch.from_numpy(cached.image)), normalisation.padding


def _check_members(checkpoints: Sequence[str | Path], members: list[Any]) -> None:
    """An ensemble needs the same classes, channels and merge settings."""
    first = members[0]
    for path, member in zip(checkpoints[1:], members[1:], strict=True):
        for what, mine, other in (
            ("finds", member.classes, first.classes),
            ("is for", member.note["preprocessing"]["modality"], first.note["preprocessing"]["modality"]),
            ("merges with", member.merging.to_dict(), first.merging.to_dict()),
            ("has the operating point", _operating(member), _operating(first)),
        ):
            if mine != other:
                hint = "" if what in ("finds", "is for") else "; `pretrain3d sweep RUN RUN ...` makes them one"
                raise UserError(f"{path} {what} {mine}, {checkpoints[0]} {other}: they are no ensemble{hint}")


def _operating(member: Any) -> Any:
    return (member.note.get("inference") or {}).get("operating")
