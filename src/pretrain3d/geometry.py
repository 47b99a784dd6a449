"""Where a voxel is: the map between cached voxels, the input file's voxels and world millimetres.

Coordinates are continuous and half-open: voxel ``i`` covers ``[i, i + 1)``, so an object on voxels 3..5 is ``[3, 6)``
and every map below is exact (no half-voxel terms). World coordinates are RAS millimetres as nibabel gives them: the
affine takes voxel *centres*, hence the ``- 0.5`` in `Frame.to_world` and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from pretrain3d.config import UserError


@dataclass(frozen=True)
class Frame:
    """The chain input file -> RAS axes -> crop -> resampled (cached) volume, and back.

    Attributes:
        affine: (4, 4) float64, voxel centre of the input file -> RAS mm.
        shape: spatial shape of the input file.
        permutation: cached axis ``i`` is axis ``permutation[i]`` of the input file.
        flipped: whether cached axis ``i`` runs against that input axis.
        crop_start: first kept voxel of each (reoriented) axis.
        crop_shape: kept voxels of each (reoriented) axis, before resampling.
        cached_shape: spatial shape of the cached volume.
    """

    affine: np.ndarray
    shape: tuple[int, int, int]
    permutation: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]
    crop_start: tuple[int, int, int]
    crop_shape: tuple[int, int, int]
    cached_shape: tuple[int, int, int]

    @classmethod
    def of_file(cls, affine: np.ndarray, shape: tuple[int, ...]) -> Frame:
        """Reorients to the closest RAS axes; no crop, no resampling.

        Raises:
            UserError: the affine is not finite, is singular or does not end in 0, 0, 0, 1, or the image is not 3D.
        """
        affine = np.asarray(affine, dtype=np.float64)
        if len(shape) != 3 or min(shape) < 1:
            raise UserError(f"expected a 3D volume, got shape {tuple(shape)}")
        fine = affine.shape == (4, 4) and np.isfinite(affine).all() and np.array_equal(affine[3], [0, 0, 0, 1])
        if not fine or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise UserError(
                f"the affine is no invertible 4 x 4 matrix of finite numbers above 0, 0, 0, 1: {affine.tolist()}"
            )
        permutation, flipped = _closest_ras_axes(affine)
        oriented = tuple(int(shape[axis]) for axis in permutation)
        size = (int(shape[0]), int(shape[1]), int(shape[2]))
        return cls(affine, size, permutation, flipped, (0, 0, 0), oriented, oriented)  # type: ignore[arg-type]

    def cropped(self, start: tuple[int, ...], stop: tuple[int, ...]) -> Frame:
        """The frame after keeping ``[start, stop)`` of the reoriented voxels; to be called before `resampled`."""
        assert self.cached_shape == self.crop_shape, "crop before resampling"
        offset = tuple(int(a + b) for a, b in zip(self.crop_start, start, strict=True))
        size = tuple(int(b - a) for a, b in zip(start, stop, strict=True))
        return replace(self, crop_start=offset, crop_shape=size, cached_shape=size)  # type: ignore[arg-type]

    def resampled(self, cached_shape: tuple[int, ...]) -> Frame:
        """The frame after resampling the cropped volume to ``cached_shape`` (edges stay aligned)."""
        size = (int(cached_shape[0]), int(cached_shape[1]), int(cached_shape[2]))
        return replace(self, cached_shape=size)

    @property
    def factor(self) -> np.ndarray:
        """(3,) cached voxels per input voxel along each cached axis, as actually applied."""
        return np.asarray(self.cached_shape, dtype=np.float64) / np.asarray(self.crop_shape, dtype=np.float64)

    @property
    def spacing_mm(self) -> np.ndarray:
        """(3,) size of a cached voxel in mm along each cached axis."""
        return self.input_spacing_mm / self.factor

    @property
    def input_spacing_mm(self) -> np.ndarray:
        """(3,) size of an input voxel in mm along each *cached* axis (reoriented, not resampled)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)[list(self.permutation)]

    def orient(self, array: np.ndarray) -> np.ndarray:
        """Input-file axes (the last three) -> cached axes, without crop or resampling. A view."""
        lead = array.ndim - 3
        array = array.transpose(*range(lead), *(lead + axis for axis in self.permutation))
        return array[(..., *(slice(None, None, -1) if flip else slice(None) for flip in self.flipped))]

    def to_original(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 6) boxes in cached voxels -> (N, 6) float64 boxes in the input file's voxels and axis order."""
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 6)
        low = boxes[:, :3] / self.factor + np.asarray(self.crop_start)
        high = boxes[:, 3:] / self.factor + np.asarray(self.crop_start)
        out = np.empty_like(boxes)
        for axis, (source, flip) in enumerate(zip(self.permutation, self.flipped, strict=True)):
            size = self.shape[source]
            out[:, source] = size - high[:, axis] if flip else low[:, axis]
            out[:, source + 3] = size - low[:, axis] if flip else high[:, axis]
        return out

    def from_original(self, boxes: np.ndarray) -> np.ndarray:
        """The inverse of `to_original`: (N, 6) boxes in the input file's voxels -> (N, 6) float64 in cached voxels."""
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 6)
        out = np.empty_like(boxes)
        for axis, (source, flip) in enumerate(zip(self.permutation, self.flipped, strict=True)):
            size = self.shape[source]
            low, high = boxes[:, source], boxes[:, source + 3]
            out[:, axis] = size - high if flip else low
            out[:, axis + 3] = size - low if flip else high
        start = np.asarray(self.crop_start)
        out[:, :3] = (out[:, :3] - start) * self.factor
        out[:, 3:] = (out[:, 3:] - start) * self.factor
        return out

    def to_world(self, boxes: np.ndarray) -> dict[str, np.ndarray]:
        """(N, 6) boxes in cached voxels -> RAS mm.

        Returns:
            ``center_mm`` (N, 3), ``size_mm`` (N, 3) along the input file's axes, ``axes`` (3, 3) whose columns are the
            unit directions of those axes: a box of an oblique volume is not axis-aligned in the world.
        """
        boxes = self.to_original(boxes)
        center = (boxes[:, :3] + boxes[:, 3:]) / 2 - 0.5
        edge = np.linalg.norm(self.affine[:3, :3], axis=0)
        return {
            "center_mm": center @ self.affine[:3, :3].T + self.affine[:3, 3],
            "size_mm": (boxes[:, 3:] - boxes[:, :3]) * edge,
            "axes": self.affine[:3, :3] / edge,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and checkpoints."""
        return {**{key: list(value) for key, value in vars(self).items()}, "affine": self.affine.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Frame:
        """The inverse of `to_dict`."""
        plain = {key: tuple(value) for key, value in values.items() if key != "affine"}
        return cls(affine=np.asarray(values["affine"], dtype=np.float64), **plain)


def _closest_ras_axes(affine: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """For each of R, A, S: the input axis that points most along it (each used once), and if it points backwards."""
    from nibabel.orientations import io_orientation

    world, sign = io_orientation(affine).T  # of each input axis
    x, y, z = world.argsort().tolist()
    return (x, y, z), (bool(sign[x] < 0), bool(sign[y] < 0), bool(sign[z] < 0))


def occupied_planes(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per axis, the places along it where an (X, Y, Z) mask of integers from 0 is not all 0, ascending."""
    side = mask.max(axis=0)
    return np.flatnonzero(mask.max(axis=(1, 2))), np.flatnonzero(side.max(axis=1)), np.flatnonzero(side.max(axis=0))


def boxes_of_instances(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The exact box of every instance of a mask.

    Args:
        mask: (X, Y, Z) integers, 0 = background.

    Returns:
        ``ids`` (N,) int64 ascending and ``boxes`` (N, 6) float64, half-open.
    """
    planes = occupied_planes(mask)
    ids, boxes = [], []
    if not len(planes[0]):
        return np.zeros(0, dtype=np.int64), np.zeros((0, 6))
    for index, slices in enumerate(ndimage.find_objects(mask[np.ix_(*planes)])):
        if slices is not None:
            ids.append(index + 1)
            sides = list(zip(planes, slices, strict=True))
            boxes.append([plane[s.start] for plane, s in sides] + [plane[s.stop - 1] + 1 for plane, s in sides])
    return np.asarray(ids, dtype=np.int64), np.asarray(boxes, dtype=np.float64).reshape(-1, 6)


def boxes_of_slots(slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """`boxes_of_instances` for a batch, on the device and without waiting for it.

    Args:
        slots: (B, X, Y, Z) integers, 0 = background, 1..num_slots = the instance in that place of the batch.
        num_slots: N.

    Returns:
        ``boxes`` (B, N, 6) float32 half-open (zeros where an instance has no voxel) and ``present`` (B, N) bool.
    """
    batch, *spatial = slots.shape
    flat = slots.long()
    boxes = torch.zeros(batch, num_slots + 1, 6, device=slots.device)
    for axis, size in enumerate(spatial):
        position = torch.arange(size, device=slots.device)
        coordinate = position.view([size if a == axis else 1 for a in range(3)])
        key = (flat * size + coordinate).reshape(batch, -1)  # (B, XYZ) slot and coordinate
        seen = torch.zeros(batch, (num_slots + 1) * size, dtype=torch.bool, device=slots.device)
        seen.scatter_(1, key, torch.ones_like(key, dtype=torch.bool))
        seen = seen.view(batch, num_slots + 1, size)
        low = torch.where(seen, position, size).amin(dim=-1)
        high = torch.where(seen, position, -1).amax(dim=-1) + 1
        present = seen.any(dim=-1)
        boxes[..., axis] = torch.where(present, low, 0)
        boxes[..., axis + 3] = torch.where(present, high, 0)
    return boxes[:, 1:], present[:, 1:]


def flip_boxes(boxes: Tensor, shape: tuple[int, ...], axes: tuple[int, ...]) -> Tensor:
    """(..., 6) boxes after mirroring a volume of ``shape`` on ``axes``: ``[a, b)`` becomes ``[S - b, S - a)``."""
    boxes = boxes.clone()
    for axis in axes:
        low, high = boxes[..., axis].clone(), boxes[..., axis + 3].clone()
        boxes[..., axis] = shape[axis] - high
        boxes[..., axis + 3] = shape[axis] - low
    return boxes


def transform_boxes(boxes: Tensor, matrix: Tensor) -> Tensor:
    """The axis-aligned hull of boxes under an affine map, from all eight corners.

    Args:
        boxes: (N, 6).
        matrix: (3, 4), maps continuous coordinates ``p`` to ``matrix[:, :3] @ p + matrix[:, 3]``.

    Returns:
        (N, 6): the tightest box around the eight mapped corners.
    """
    linear = matrix[:, :3]
    center = (boxes[:, :3] + boxes[:, 3:]) / 2
    half = (boxes[:, 3:] - boxes[:, :3]) / 2
    center = center @ linear.T + matrix[:, 3]
    half = half @ linear.abs().T  # the extreme corner along each axis
    return torch.cat([center - half, center + half], dim=1)
