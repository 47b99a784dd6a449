"""Images, and what can be wrong with them: NIfTI through nibabel, ITK's formats through `itk`, series through `dicom`.

An image is a file, or the folder of a DICOM series.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from pretrain3d.config import UserError
from pretrain3d.data.readers import dicom, itk

SUFFIXES = (".nii.gz", ".nii", *itk.SUFFIXES)
ENDINGS = ", ".join((*SUFFIXES, "a folder of DICOM slices"))  # for messages
ROUNDING = 1e-3  # by which a scaled or resaved label may miss its number
MAX_SHIFT = 0.1  # voxels by which the corners of two files of one case may differ


def stem(path: Path) -> str:
    """The file name without its ending, one of `SUFFIXES`; of a series the folder's name."""
    name = path.name or path.resolve().name
    return next((name.removesuffix(s) for s in SUFFIXES if name.endswith(s)), name)


def files_in(folder: Path, pattern: str = "*") -> list[Path]:
    """The image files of a folder, sorted; hidden ones (left-overs of a download) are not data.

    A pattern that descends finds DICOM series, too, the folder itself among them; a subfolder whose own name ends in
    ``.nii`` is no file.

    Raises:
        UserError: an ending is not in lower case, as some systems write it.
    """
    found = sorted(p for p in folder.glob(pattern) if not p.name.startswith("."))
    for path in found:
        if path.name.lower().endswith(SUFFIXES) and not path.name.endswith(SUFFIXES) and path.is_file():
            raise UserError(f"{path}: its ending must be in lower case, one of {', '.join(SUFFIXES)}; rename it")
    if not pattern.startswith("**"):
        return [p for p in found if p.name.endswith(SUFFIXES)]
    folders = {folder, *(p for p in found if p.is_dir())}
    series = [p for p in folders if dicom.is_series(p)]
    return sorted([*series, *(p for p in found if p.name.endswith(SUFFIXES) and p not in folders)])


def files_of(path: Path) -> tuple[Path, ...]:
    """All files of an image: itself, and those in which the voxels of a header lie; the slices of a series.

    Raises:
        UserError: it should be a header, or a slice, and is none.
    """
    if path.is_dir():
        return dicom.files(path)
    return (path, *itk.data_files(path)) if path.suffix in itk.SUFFIXES else (path,)


def read_geometry(path: Path, channels: int = 1) -> tuple[np.ndarray, tuple[int, ...]]:
    """Affine and spatial shape, from the header.

    Args:
        path: of the image.
        channels: that the file holds along its fourth axis.

    Raises:
        UserError: missing, unreadable, not 3D, or of another number of channels.
    """
    affine, shape = _header(path)
    spatial = shape[:3] if len(shape) > 3 and math.prod(shape[3:]) == channels else shape  # (X, Y, Z, 1, C) is C, too
    if channels > 1 and len(spatial) == len(shape):
        raise UserError(f"{path}: expected {channels} channels, in files <case>_0000 to _{channels - 1:04d} or in one "
                        f"of shape (X, Y, Z, {channels}), got shape {shape}")  # fmt: skip
    if len(spatial) != 3 or min(spatial) < 1:
        raise UserError(f"{path}: expected a 3D volume, got shape {shape}")
    return affine, spatial


def read_image(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) voxels and affine. Integers stay integers unless the header scales them; the rest is float32.

    Raises:
        UserError: missing, unreadable, truncated, damaged (as far as a compressed file can tell) or not 3D.
    """
    image, affine = _read(path, 1)
    return image[0], affine


def read_channels(paths: Sequence[Path], channels_in_file: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(C, X, Y, Z) voxels of one file per channel, or of a file that holds several, and their affine.

    Raises:
        UserError: as `read_image` and `read_geometry`, or a channel has another shape or lies elsewhere than the first.
    """
    first, affine = _read(paths[0], channels_in_file)
    channels = [first]
    for path in paths[1:]:
        channel, channel_affine = _read(path, channels_in_file)
        check_same_grid(path, channel_affine, channel.shape[1:], paths[0])
        channels.append(channel)
    return np.concatenate(channels), affine


def read_mask(path: Path, image_path: Path) -> np.ndarray:
    """(X, Y, Z) uint8 or uint16 labels on the same grid as the image.

    Raises:
        UserError: unreadable, another shape or position than the image, or values that are not whole numbers from 0.
    """
    voxels, affine = read_image(path)
    check_same_grid(path, affine, voxels.shape, image_path)
    whole = np.rint(voxels) if voxels.dtype.kind == "f" else voxels
    low, high = float(whole.min()), float(whole.max())
    if not (np.isfinite([low, high]).all() and low >= 0 and high < 2**16):
        raise UserError(f"{path}: labels must be 0..65535, found {low:g}..{high:g}")
    if whole is not voxels and (off := np.abs(voxels - whole) > ROUNDING).any():
        raise UserError(f"{path}: labels must be whole numbers, found {voxels[off][0]:g}")
    return whole.astype(np.uint8 if high < 2**8 else np.uint16, copy=False)


def check_same_grid(path: Path, affine: np.ndarray, shape: tuple[int, ...], image_path: Path) -> None:
    """Compares a file's grid with that of the case's (first) image, which may hold channels along a fourth axis.

    Raises:
        UserError: the shape differs, or a corner lies elsewhere in the world.
    """
    other_affine, other_shape = _header(image_path)
    if tuple(shape) != other_shape[:3]:
        raise UserError(f"{path}: shape {tuple(shape)} differs from {other_shape[:3]} of {image_path}")
    shift = _shift(affine, other_affine, shape)
    if not shift <= _allowed(other_affine):
        raise UserError(f"{path}: lies elsewhere than {image_path}: their affines put a corner {shift:.3g} mm apart")


def has_two_positions(path: Path) -> bool:
    """Whether a NIfTI header places the voxels twice, differently: by its sform, which is taken, and by its qform.

    The position is nibabel's: the sform where its code is above 0, else the qform.

    Raises:
        UserError: missing or unreadable.
    """
    if path.is_dir() or path.suffix in itk.SUFFIXES:
        return False
    image = _open(path)
    header, shape = image.header, image.shape[:3]
    try:
        sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    except ValueError:  # a quaternion that is none; the sform is taken all the same
        return False
    if sform is None or qform is None:
        return False
    return not _shift(sform, qform, shape) <= _allowed(sform)


def _shift(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """The mm by which two affines put a corner of the volume apart, at most."""
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape], [1], indexing="ij")).reshape(4, -1)
    return float(np.linalg.norm(((affine - other) @ corners)[:3], axis=0).max())


def _allowed(affine: np.ndarray) -> float:
    """The mm by which a corner may lie elsewhere."""
    return MAX_SHIFT * float(np.linalg.norm(affine[:3, :3], axis=0).min())


def _header(path: Path) -> tuple[np.ndarray, tuple[int, ...]]:
    """Affine, and shape with all its axes."""
    if path.is_dir():
        affine, shape = dicom.read_geometry(path)
    elif path.suffix in itk.SUFFIXES:
        affine, shape = itk.read_geometry(path)
    else:
        image = _open(path)
        affine, shape = image.affine, image.shape
    return affine, tuple(int(size) for size in shape)


def _read(path: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """(C, X, Y, Z) voxels of one image, and affine."""
    affine, shape = read_geometry(path, channels)
    if path.is_dir():
        voxels = dicom.read_voxels(path)
    else:
        voxels = itk.read_voxels(path) if path.suffix in itk.SUFFIXES else _read_voxels(path)
    if voxels.dtype.kind not in "iuf":
        raise UserError(f"{path}: voxels of type {voxels.dtype} are not intensities; expected integers or floats")
    voxels = np.moveaxis(voxels.reshape(*shape, channels), -1, 0)
    return (voxels.astype(np.float32) if voxels.dtype.kind == "f" else voxels), affine


def _read_voxels(path: Path) -> np.ndarray:
    image = _open(path)
    try:
        return _checked_gzip(image, path) if path.name.endswith(".gz") else np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        raise UserError(f"{path}: cannot read the voxels, the file is damaged ({_one_line(error)})") from error


def _checked_gzip(image: Any, path: Path) -> np.ndarray:
    """The voxels of a compressed file, read on to its end: only there is the checksum, which nibabel never reaches."""
    with gzip.open(path) as stream:
        voxels = np.asanyarray(type(image).from_stream(stream).dataobj)
        while stream.read(2**20):
            pass
    return voxels


def _open(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return nib.load(path)
    except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        raise UserError(f"{path}: not a readable NIfTI file ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
