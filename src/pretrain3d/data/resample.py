"""Resampling with aligned edges: of images with anti-aliasing, of label maps without losing a small object."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import ndimage, sparse

from pretrain3d.config import UserError
from pretrain3d.geometry import Frame

TIE = 1e-6  # voxels; rounding of a box that ends in the middle of one


def resample_image(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(X, Y, Z) -> float32 of another shape over the same extent: separable cubic, widened where it shrinks.

    The result stays within the range of the input; a constant stays that constant.
    """
    out = image.astype(np.float32)
    for axis, size in enumerate(shape):
        if size != out.shape[axis]:
            out = _along(out, _weights(out.shape[axis], size, _cubic, 2.0), axis)
    return np.clip(out, np.float32(image.min()), np.float32(image.max()))


def resample_labels(mask: np.ndarray, frame: Frame, keep_all: bool) -> np.ndarray:
    """A label map on the cached grid: in each voxel the label that covers most of it.

    Args:
        mask: (X, Y, Z) labels from 0, reoriented and cropped as ``frame`` says, not resampled.
        frame: its ``cached_shape`` is the result's.
        keep_all: a label reaches as far along each axis as it did, to the nearest voxel, and none vanishes.

    Returns:
        (x, y, z) uint8, or uint16 for labels above 255.

    Raises:
        UserError: with ``keep_all``, two labels need the same single voxel.
    """
    dtype = np.uint8 if mask.max() < 2**8 else np.uint16
    shape = frame.cached_shape
    if shape == mask.shape:
        return mask.astype(dtype)
    mask = np.ascontiguousarray(mask.astype(dtype, copy=False))
    boxes = ndimage.find_objects(mask)
    weights = [_weights(a, b, _linear, 1.0) for a, b in zip(mask.shape, shape, strict=True)]
    out = np.zeros(shape, dtype=dtype)
    best = np.zeros(shape, dtype=np.float32)  # share of the voxel covered by the label in `out`
    total = np.zeros(shape, dtype=np.float32)  # and by any label
    crops: dict[int, tuple[slice, ...]] = {}
    for index, box in enumerate(boxes):
        if box is not None:
            label = index + 1
            crops[label] = tuple(_reach(w, part) for w, part in zip(weights, box, strict=True))
            share = _coverage(mask[box] == label, box, weights, crops[label])
            total[crops[label]] += share
            better = share > best[crops[label]]
            best[crops[label]][better] = share[better]
            out[crops[label]][better] = label
    out[best < 1 - total] = 0  # where the background covers more; ties go to the object
    if keep_all:
        _restore_ends(out, mask, boxes, crops, weights)
    return out


def _restore_ends(
    out: np.ndarray,
    mask: np.ndarray,
    boxes: list[tuple[slice, ...]],
    crops: dict[int, tuple[slice, ...]],
    weights: list[sparse.csr_array],
) -> None:
    """Where a label ends short of its box, it takes the voxel there that it covers most, unless it is another's last.

    What is thin along one axis covers less than half of every voxel, however long it is along the others.
    """
    counts = np.bincount(out.reshape(-1), minlength=max(crops, default=0) + 1)
    for label, crop in crops.items():
        share: np.ndarray | None = None
        for axis, part in enumerate(boxes[label - 1]):
            for end in _ends(part, out.shape[axis] / mask.shape[axis]):
                plane = tuple(slice(end, end + 1) if other == axis else crop[other] for other in range(3))
                if (out[plane] == label).any():
                    continue
                if share is None:
                    share = _coverage(mask[boxes[label - 1]] == label, boxes[label - 1], weights, crop)
                _take_voxel(out[plane], share.take([end - crop[axis].start], axis), label, counts)
        if not counts[label]:
            raise UserError(f"instance {label} has no voxel of its own at this spacing; use a finer spacing_mm")


def _take_voxel(out: np.ndarray, share: np.ndarray, label: int, counts: np.ndarray) -> None:
    """Gives a label the voxel that it covers most, of those that are not another's last; ``counts`` go along."""
    for flat in np.argsort(-share, axis=None, kind="stable")[: np.count_nonzero(share)]:
        place = np.unravel_index(flat, share.shape)
        owner = int(out[place])
        if owner == 0 or counts[owner] > 1:
            out[place] = label
            counts[label] += 1
            counts[owner] -= 1
            return


def _ends(part: slice, factor: float) -> tuple[int, int]:
    """The first and the last voxel of the result that stand for voxels ``part`` of the input."""
    low, high = part.start * factor, part.stop * factor
    first, last = math.ceil(low - 0.5 - TIE), math.floor(high - 0.5 + TIE)  # whose centres lie between the ends
    return (first, last) if first <= last else (math.floor((low + high) / 2),) * 2


def _coverage(
    part: np.ndarray, box: tuple[slice, ...], weights: list[sparse.csr_array], crop: tuple[slice, ...]
) -> np.ndarray:
    """How much of each voxel of ``crop`` (of the result) is covered by ``part`` of the voxels of ``box``, 0..1."""
    share = part.astype(np.float32)
    for axis in range(3):
        share = _along(share, weights[axis][crop[axis]][:, box[axis]], axis)
    return share


def _reach(weights: sparse.csr_array, part: slice) -> slice:
    """The rows with weight on input voxels ``part``."""
    rows = np.flatnonzero(np.diff(weights[:, part].indptr))
    return slice(int(rows[0]), int(rows[-1]) + 1)


def _along(array: np.ndarray, weights: sparse.csr_array, axis: int) -> np.ndarray:
    moved = np.moveaxis(array, axis, 0)
    result = weights @ np.ascontiguousarray(moved).reshape(moved.shape[0], -1)
    return np.moveaxis(result.reshape(-1, *moved.shape[1:]), 0, axis)


def _weights(size: int, new_size: int, kernel: Callable[[np.ndarray], np.ndarray], radius: float) -> sparse.csr_array:
    """(new_size, size) rows that sum to 1: voxel ``i`` of the result has its centre at ``(i + 0.5) * size / new_size``.

    Shrinking widens the kernel by the same factor: what would alias is averaged instead.
    """
    step = size / new_size
    width = max(step, 1.0)
    centers = (np.arange(new_size) + 0.5) * step
    first = np.floor(centers - radius * width).astype(np.int64)
    columns = first[:, None] + np.arange(int(np.ceil(2 * radius * width)) + 2)
    values = kernel((columns + 0.5 - centers[:, None]) / width)
    inside = (columns >= 0) & (columns < size)  # beyond the edge there is nothing: the rest is scaled up
    values = np.where(inside, values, 0.0)
    values /= values.sum(axis=1, keepdims=True)
    rows = np.repeat(np.arange(new_size), columns.shape[1])
    keep = (values != 0).reshape(-1)
    matrix = (values.reshape(-1)[keep].astype(np.float32), (rows[keep], columns.reshape(-1)[keep]))
    return sparse.csr_array(matrix, shape=(new_size, size))


def _linear(x: np.ndarray) -> np.ndarray:
    return np.clip(1 - np.abs(x), 0, None)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2. Source: Keys 1981, equation 15."""
    x = np.abs(x)
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
