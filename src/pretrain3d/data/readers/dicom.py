"""A DICOM series, the slices of one volume in a folder of their own, read with SimpleITK (GDCM).

The geometry is that of the slices' positions: a slice's thickness says nothing about its distance to the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.data.readers import itk

MAGIC = b"DICM"  # behind a preamble of 128 bytes
ENDINGS = (".dcm", ".ima")  # of slices; names that end in a number, and any other, are common, too
POSITION, ORIENTATION, SERIES, MODALITY = "0020|0032", "0020|0037", "0020|000e", "0008|0060"
MAX_UNEVEN = 0.2  # slices by which one may lie off an even spacing; a missing one leaves others off by half or more
MAX_TURN = 1e-3  # by which the direction cosines of slices may differ


@dataclass(frozen=True)
class _Slice:
    """What a file says of itself, in LPS mm.

    Attributes:
        path: the file.
        series: its unique identifier, "" where it was removed.
        size, spacing: columns and rows, and their distances.
        position: (3,) centre of the first voxel.
        axes: (2, 3) directions along a row, and along a column.
    """

    path: Path
    series: str
    size: tuple[int, int]
    spacing: np.ndarray
    position: np.ndarray
    axes: np.ndarray


def is_series(folder: Path) -> bool:
    """Whether a folder itself, not a subfolder, holds DICOM files."""
    return folder.is_dir() and any(_is_dicom(path) for path in _files(folder))


def files(folder: Path) -> tuple[Path, ...]:
    """The DICOM files of a folder by name; what else lies there (a licence, a list) is none.

    Raises:
        UserError: a file is called as a slice and is none, such as the rest of a download that broke off.
    """
    found = []
    for path in _files(folder):
        if _is_dicom(path):
            found.append(path)
        elif path.suffix.lower() in ENDINGS or path.suffix[1:].isdigit():
            raise UserError(f"{path}: not a DICOM file, among the slices of {folder}; the file is damaged or no slice")
    return tuple(found)


def read_geometry(folder: Path) -> tuple[np.ndarray, tuple[int, ...]]:
    """Affine (4, 4), voxel centre -> RAS mm, and shape, from the headers of all slices.

    Raises:
        UserError: a slice is unreadable or no slice, there are several series or volumes in the folder, slices are
            missing, or SimpleITK is not installed.
    """
    slices = _sorted(folder)
    first, last = slices[0], slices[-1]
    affine = np.eye(4)
    affine[:3, :2] = (first.axes * first.spacing[:, None]).T
    affine[:3, 2] = (last.position - first.position) / (len(slices) - 1)
    affine[:3, 3] = first.position
    affine[:3] *= itk.RAS
    return affine + 0.0, (*first.size, len(slices))


def read_voxels(folder: Path) -> np.ndarray:
    """(X, Y, Z) voxels in the unit of the modality (CT: HU), by position; whole numbers as int16 where that holds them.

    Raises:
        UserError: as `read_geometry`, or the voxels of a slice cannot be unpacked.
    """
    layers = []
    for each in _sorted(folder):
        try:
            image = _reader(each.path).Execute()
        except RuntimeError as error:
            reason = itk.reason(error)
            raise UserError(f"{each.path}: cannot read the voxels, the file is damaged ({reason})") from error
        layers.append(np.asarray(itk.simple_itk(folder).GetArrayFromImage(image))[0].T)
    volume = np.stack(layers, axis=-1)
    short = np.iinfo(np.int16)
    fits = volume.dtype.kind in "iu" and short.min <= volume.min() and volume.max() <= short.max
    return volume.astype(np.int16, copy=False) if fits else volume


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name != "DICOMDIR" and p.is_file())


def _is_dicom(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(132)[128:] == MAGIC


def _reader(path: Path) -> Any:
    reader = itk.simple_itk(path).ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    return reader


def _sorted(folder: Path) -> list[_Slice]:
    """The slices of one volume by position.

    Raises:
        UserError: they are not the slices of one volume.
    """
    slices = [_slice(path) for path in files(folder)]
    if not slices:
        raise UserError(f"{folder}: a folder without DICOM slices; expected an image file or the folder of a series")
    if len(slices) < 2:
        raise UserError(f"{folder}: {len(slices)} DICOM slices; a volume needs two at least")
    first = slices[0]
    if (number := len({each.series for each in slices})) > 1:
        raise UserError(f"{folder}: slices of {number} series; give each series a folder of its own")
    for each in slices[1:]:
        same = each.size == first.size and np.allclose(each.spacing, first.spacing, rtol=MAX_TURN)
        if not same or np.abs(each.axes - first.axes).max() > MAX_TURN:
            raise UserError(f"{each.path}: another size, voxel size or direction than {first.path}; a series is one "
                            "volume, in a folder of its own")  # fmt: skip
    normal = np.cross(*first.axes)
    slices.sort(key=lambda each: float(each.position @ normal))
    _check_even(folder, slices, normal)
    return slices


def _check_even(folder: Path, slices: list[_Slice], normal: np.ndarray) -> None:
    """Refuses slices in the same place, and those that a line of even steps misses."""
    places = np.stack([each.position for each in slices])
    gaps = np.diff(places @ normal)
    usual = float(np.median(gaps))
    close, wide = int(gaps.argmin()), int(gaps.argmax())
    if gaps[close] <= MAX_UNEVEN * usual or usual <= 0:
        raise UserError(
            f"{slices[close].path} and {slices[close + 1].path} lie in the same place; expected one volume, not "
            "several in time or of several echoes"
        )
    even = places[0] + np.linspace(0, 1, len(places))[:, None] * (places[-1] - places[0])
    if np.linalg.norm(places - even, axis=1).max() > MAX_UNEVEN * usual:
        raise UserError(
            f"{folder}: its slices are not evenly spaced, {gaps[wide]:.4g} mm between {slices[wide].path.name} and "
            f"{slices[wide + 1].path.name}, {usual:.4g} mm elsewhere; a slice may be missing"
        )


def _slice(path: Path) -> _Slice:
    reader = _reader(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise UserError(f"{path}: not a readable DICOM image, or cut off ({itk.reason(error)})") from error
    size = reader.GetSize()
    modality = reader.GetMetaData(MODALITY).strip() if reader.HasMetaDataKey(MODALITY) else "image"
    if len(size) > 2 and size[2] > 1:
        raise UserError(f"{path}: a {modality} of {size[2]} frames; expected one slice per file, convert it to NIfTI")
    position, orientation = _numbers(reader, POSITION), _numbers(reader, ORIENTATION)
    if len(position) != 3 or len(orientation) != 6:
        raise UserError(f"{path}: a {modality} that does not say where it lies; expected a slice of a volume")
    if (parts := reader.GetNumberOfComponents()) > 1:
        raise UserError(f"{path}: every voxel is a vector of {parts} values; expected one value")
    series = reader.GetMetaData(SERIES).strip() if reader.HasMetaDataKey(SERIES) else ""
    spacing = np.array(reader.GetSpacing()[:2])
    return _Slice(path, series, (size[0], size[1]), spacing, position, orientation.reshape(2, 3))


def _numbers(reader: Any, key: str) -> np.ndarray:
    """The values of a tag, none where it is not there or holds no numbers."""
    try:
        return np.array([float(text) for text in reader.GetMetaData(key).split("\\")])
    except (RuntimeError, ValueError):
        return np.array([])
