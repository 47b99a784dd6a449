"""A volume -> the store's form: reoriented to RAS, cropped to the body, resampled. Intensities stay as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.data.body import body_by_contrast, body_mask, body_on_grid, crop_to
from pretrain3d.data.fingerprint import CT_RANGE, Histogram, Moments, image_moments
from pretrain3d.data.identity import signature
from pretrain3d.data.readers.contract import RawVolume
from pretrain3d.data.resample import resample_image, resample_labels
from pretrain3d.geometry import Frame

MARGIN_MM = 5.0
MAX_SIDE = 4096  # cached voxels per axis; more is a mistyped spacing
MAX_VOXELS = 2**31  # in all, 8 GiB per channel; so are more


@dataclass(frozen=True, eq=False)
class Cached:
    """A volume in the store's form: RAS, cropped to the body, resampled.

    Attributes:
        frame: from its voxels to those of the input file and to mm.
        image: (C, X, Y, Z) int16 or float32, raw intensities.
        maps: label maps (X, Y, Z) by name, as far as the volume has them: "instances", "semantic".
        body: (X, Y, Z) bool, the patient.
        signature: of the whole image as it was read, see `identity.signature`.
        moments: per channel, of the whole image as it was read, see `fingerprint.image_moments`.
    """

    frame: Frame
    image: np.ndarray
    maps: dict[str, np.ndarray]
    body: np.ndarray
    signature: str
    moments: tuple[Moments, ...]


def prepare_volume(volume: RawVolume, where: Path, modality: list[str], spacing_mm: tuple[float, ...]) -> Cached:
    """Brings a volume into the form that networks are trained on; a file to be predicted takes the same way.

    Args:
        volume: in the input file's axes.
        where: the file, for errors.
        modality: per channel.
        spacing_mm: of the cached voxels (R, A, S).

    Raises:
        UserError: another number of channels, voxels that are not finite, an empty image, or far too many voxels.
    """
    image = _usable(volume, where, modality)
    try:
        frame = Frame.of_file(volume.affine, image.shape[1:])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    oriented = frame.orient(image)
    input_spacing = frame.input_spacing_mm
    body, step = body_mask(oriented, modality, input_spacing)
    raw_maps = {"instances": volume.instances, "semantic": volume.semantic}
    maps = {name: frame.orient(labels) for name, labels in raw_maps.items() if labels is not None}
    start, stop = crop_to(body, step, oriented.shape[1:], list(maps.values()), input_spacing, MARGIN_MM)
    region = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    frame = frame.cropped(start, stop)
    frame = frame.resampled(_cached_shape(frame.crop_shape, input_spacing, spacing_mm, where))
    cached = np.stack([resample_image(channel[region], frame.cached_shape) for channel in oriented])
    if image.dtype == np.int16:
        cached = np.rint(cached).astype(np.int16)
    cached_maps = {
        name: resample_labels(labels[region], frame, keep_all=name == "instances") for name, labels in maps.items()
    }
    cached_body = body_on_grid(body, step, start, frame.factor, frame.cached_shape)
    seen = body_by_contrast(oriented[0], body, step) if modality[0] == "CT" else body
    return Cached(frame, cached, cached_maps, cached_body, signature(oriented, seen, step), image_moments(oriented))


def _usable(volume: RawVolume, where: Path, modality: list[str]) -> np.ndarray:
    """The image as it is stored: int16 for CT in whole numbers, else float32."""
    image = volume.image
    if len(image) != len(modality):
        raise UserError(f"{where}: {len(image)} channels; {len(modality)} are needed: {', '.join(modality)}")
    for index, channel in enumerate(image):
        place = f"{where}" if len(image) == 1 else f"{where}: channel {index} ({modality[index]})"
        if image.dtype.kind == "f" and not np.isfinite(channel).all():
            raise UserError(f"{place}: {int((~np.isfinite(channel)).sum())} voxels are NaN or infinite")
        if channel.min() == channel.max():
            raise UserError(f"{place}: the image is empty, every voxel is {channel.flat[0]:g}")
    for labels in (volume.instances, volume.semantic):
        assert labels is None or labels.shape == image.shape[1:], (labels.shape, image.shape)
    low, high = float(image.min()), float(image.max())
    if max(-low, high) > float(np.finfo(np.float32).max):
        raise UserError(f"{where}: values from {low:g} to {high:g}, which float32 does not hold")
    is_ct = set(modality) == {"CT"}
    whole = image.dtype.kind in "iu" or np.array_equal(np.rint(image), image)
    if is_ct and whole and np.iinfo(np.int16).min <= low and high <= np.iinfo(np.int16).max:
        return image.astype(np.int16, copy=False)
    return image.astype(np.float32, copy=False)


def _cached_shape(
    shape: tuple[int, ...], input_spacing: np.ndarray, spacing_mm: tuple[float, ...], where: Path
) -> tuple[int, ...]:
    size = tuple(max(round(n * a / b), 1) for n, a, b in zip(shape, input_spacing, spacing_mm, strict=True))
    if max(size) > MAX_SIDE or math.prod(size) > MAX_VOXELS:
        raise UserError(
            f"{where}: {size} voxels at spacing_mm={list(spacing_mm)} are too many; are the file's own of "
            f"{np.round(input_spacing, 3).tolist()} mm right?"
        )
    return size


def image_histograms(
    image: np.ndarray, foreground: dict[str, np.ndarray], modality: list[str]
) -> dict[str, tuple[Histogram, ...]]:
    """Per foreground (X, Y, Z) bool: one histogram for each channel of a cached (C, X, Y, Z) image."""
    clips = [CT_RANGE if name == "CT" else None for name in modality]
    return {
        name: tuple(Histogram.of(channel[mask], clip) for channel, clip in zip(image, clips, strict=True))
        for name, mask in foreground.items()
    }
