"""Where the patient is in an image."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

BODY_HU = -500
COARSE_MM = 3.0  # the body is looked for on voxels of about this size: fast, and blind to noise
SMALL = 0.1  # components below this share of the largest one are not the body
BACKGROUND = 0.02  # share of voxels at the minimum that makes it a background
CONTRAST = 0.4  # of the range from the 1st to the 99th percentile: about -500 HU in a CT of the trunk or head


def body_mask(image: np.ndarray, modality: list[str], spacing_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The patient, with lungs and other holes filled.

    CT: above -500 HU, the largest component and those a tenth as large (arms), which leaves out most of the table.
    Others: what differs from the minimum, if enough voxels have it to be a background; else everything.

    Args:
        image: (C, X, Y, Z), reoriented to RAS. A CT channel decides where there is one, else all channels together.
        modality: per channel.
        spacing_mm: (3,) voxel size.

    Returns:
        Coarse (x, y, z) bool mask, and (3,) voxels of the image per voxel of the mask.
    """
    step = np.maximum(np.round(COARSE_MM / spacing_mm), 1).astype(int)
    coarse = image[:, :: step[0], :: step[1], :: step[2]]
    if "CT" in modality:
        mask = _large_components(coarse[modality.index("CT")] > BODY_HU)
    else:
        mask = np.logical_or.reduce([_above_background(channel) for channel in coarse])
    return _filled(mask), step


def body_by_contrast(image: np.ndarray, mask: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The body of a CT whose numbers are not HU (stored without its intercept, or scaled), so that -500 found no air.

    Args:
        image: (X, Y, Z) of the CT, in RAS axes.
        mask, step: from `body_mask`.

    Returns:
        (x, y, z) bool: ``mask`` where it leaves something out; else what is brighter than `CONTRAST`.
    """
    if not mask.all():
        return mask
    coarse = image[:: step[0], :: step[1], :: step[2]]
    low, high = np.percentile(coarse, (1, 99))
    return _filled(_large_components(coarse > low + CONTRAST * (high - low)))


def crop_to(
    mask: np.ndarray,
    step: np.ndarray,
    shape: tuple[int, ...],
    label_maps: list[np.ndarray],
    spacing_mm: np.ndarray,
    margin_mm: float,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The box around the coarse body and every labelled voxel.

    Args:
        mask: coarse body, from `body_mask`.
        step: from `body_mask`.
        shape: of the image.
        label_maps: (X, Y, Z) each; their non-zero voxels are inside the result.
        spacing_mm: (3,) voxel size.
        margin_mm: added around the body.

    Returns:
        ``start`` and ``stop`` of the fine voxels to keep.
    """
    start, stop = [], []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        where = np.flatnonzero(mask.any(axis=others))
        # a coarse voxel stands for `step` fine ones and the surface may lie up to one step before it
        margin = int(np.ceil(margin_mm / spacing_mm[axis])) + step[axis] - 1
        low, high = where[0] * step[axis] - margin, (where[-1] + 1) * step[axis] + margin
        for labels in label_maps:
            used = np.flatnonzero(labels.any(axis=others))
            if len(used):
                low, high = min(low, used[0]), max(high, used[-1] + 1)
        start.append(int(max(low, 0)))
        stop.append(int(min(high, shape[axis])))
    return tuple(start), tuple(stop)


def body_on_grid(
    mask: np.ndarray, step: np.ndarray, start: tuple[int, ...], factor: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """The coarse body on the cached grid: cached voxel ``i`` has its centre at ``start + (i + 0.5) / factor``."""
    index = []
    for axis in range(3):
        center = start[axis] + (np.arange(shape[axis]) + 0.5) / factor[axis]
        index.append(np.clip(np.floor(center).astype(int) // step[axis], 0, mask.shape[axis] - 1))
    return mask[np.ix_(*index)]


def _filled(mask: np.ndarray) -> np.ndarray:
    """Without holes; everything where there is nothing."""
    for z in range(mask.shape[2]):  # by axial slice: the windpipe leaves the volume, so lungs are no hole in 3D
        mask[:, :, z] = ndimage.binary_fill_holes(mask[:, :, z])
    return mask if mask.any() else np.ones_like(mask)


def _large_components(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(labels.reshape(-1))
    sizes[0] = 0
    return np.isin(labels, np.flatnonzero(sizes >= max(SMALL * sizes.max(), 1)))


def _above_background(channel: np.ndarray) -> np.ndarray:
    mask = channel > channel.min()
    return mask if (~mask).mean() >= BACKGROUND else np.ones_like(mask)
