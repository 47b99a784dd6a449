"""Flip, rotation and scaling: drawn in the worker, applied on the device in one resampling step.

A transform maps patch coordinates to volume coordinates, both continuous and half-open (voxel ``i`` covers
``[i, i + 1)``, its centre is ``i + 0.5``): ``v = center + linear @ (u - patch / 2)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain3d.config import UserError


@dataclass(frozen=True)
class SpatialSettings:
    """What may be drawn.

    Attributes:
        flip_axes: axes that are mirrored, each with probability ``flip_p``.
        rotation_degrees: one angle per axis from ``[-x, x]``, together with probability ``rotation_p``. Angles are in
            mm: an object keeps its shape whatever the spacing.
        scale: source voxels per patch voxel, the same on all axes, with probability ``scale_p``: at 1.4 objects look
            1.4 times smaller. Below and above 1 are equally likely.

    Source: nnDetection v0.1 ``base_more``, which rotates in voxels instead.
    """

    flip_axes: tuple[int, ...] = (0, 1, 2)
    flip_p: float = 0.5
    rotation_degrees: float = 30.0
    rotation_p: float = 0.2
    scale: tuple[float, float] = (0.7, 1.4)
    scale_p: float = 0.2

    @classmethod
    def from_config(cls, config: dict[str, Any] | bool | None, flip_axes: tuple[int, ...]) -> SpatialSettings:
        """``None`` or True: the defaults; False: flips only; a dict: the defaults with some values replaced.

        Raises:
            UserError: an unknown key, an axis that does not exist, a range or probability that is none.
        """
        if any(axis not in (0, 1, 2) for axis in flip_axes):
            raise UserError(f"flip_axes={list(flip_axes)}: axes are 0, 1 and 2")
        if config is False:
            return cls(flip_axes=flip_axes, rotation_p=0.0, scale_p=0.0)
        values = checked_node("augment.spatial", config)
        known = {field.name for field in fields(cls)} - {"flip_axes"}
        for key in values:
            if key not in known:
                raise UserError(f"augment.spatial has no {key!r}; it has {', '.join(sorted(known))}")
        if "scale" in values:
            values["scale"] = checked_range("augment.spatial.scale", values["scale"], above=0.0)
        angle = values.get("rotation_degrees", 0.0)
        if type(angle) not in (int, float) or not 0 <= angle < np.inf:
            raise UserError(f"augment.spatial.rotation_degrees={angle}: expected an angle of 0 or more")
        for key in ("flip_p", "rotation_p", "scale_p"):
            if key in values:
                checked_probability(f"augment.spatial.{key}", values[key])
        return cls(flip_axes=flip_axes, **values)


def checked_node(name: str, config: Any) -> dict[str, Any]:
    """The changes that a config makes to defaults: none for ``None`` and True. Raises UserError for no dict."""
    if config is None or config is True:
        return {}
    if not isinstance(config, Mapping):
        raise UserError(f"{name}={config}: expected true, false or {{key: value, ...}}")
    return dict(config)


def checked_range(name: str, value: Any, above: float) -> tuple[float, float]:
    """``[low, high]`` from a config. Raises UserError if it is none or reaches down to ``above``."""
    try:
        low, high = (float(bound) for bound in value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}={value}: expected two numbers, [low, high]") from error
    if not above < low <= high:
        raise UserError(f"{name}={value}: expected [low, high] with low <= high and low > {above}")
    return low, high


def checked_probability(name: str, value: Any) -> float:
    """A probability from a config. Raises UserError if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UserError(f"{name}={value}: expected a probability from 0 to 1")
    return float(value)


def around_one(rng: np.random.Generator, low: float, high: float) -> float:
    """A factor from ``[low, high]``: below 1 in half of the draws when the range holds 1, whatever its skew."""
    if low < 1 < high:
        return float(rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high))
    return float(rng.uniform(low, high))


@dataclass(frozen=True)
class Linear:
    """One drawn transform: ``matrix`` (3, 3) float64, which axes are mirrored, whether voxels must be resampled."""

    matrix: np.ndarray
    flips: tuple[bool, bool, bool]
    resample: bool


def draw(rng: np.random.Generator, settings: SpatialSettings, spacing_mm: np.ndarray) -> Linear:
    """Draws flip, rotation (about the axes 0, 1, 2 in turn, in mm) and scale."""
    mirrored = rng.random(3) < settings.flip_p
    flips = tuple(bool(mirrored[axis]) and axis in settings.flip_axes for axis in range(3))
    matrix = np.diag(np.where(flips, -1.0, 1.0))
    rotate, scale = rng.random(2) < (settings.rotation_p, settings.scale_p)
    if rotate:
        angles = np.deg2rad(rng.uniform(-settings.rotation_degrees, settings.rotation_degrees, size=3))
        spacing = np.asarray(spacing_mm, dtype=np.float64)
        matrix = (_rotation(angles) * spacing / spacing[:, None]) @ matrix  # mm -> voxels on both sides
    if scale:
        matrix = matrix * around_one(rng, *settings.scale)
    return Linear(matrix, (flips[0], flips[1], flips[2]), bool(rotate or scale))


def _rotation(angles: np.ndarray) -> np.ndarray:
    """(3,) radians -> (3, 3): the product of the rotations about axes 0, 1 and 2."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def source_region(
    linear: Linear, center: np.ndarray, patch: np.ndarray, shape: np.ndarray
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The part of the volume that the patch is made of: ``start`` and ``stop``, three voxels each, inside the volume.

    Without resampling it is the patch itself (cut by the volume); else the voxels that trilinear interpolation at the
    patch's voxel centres touches.
    """
    if linear.resample:
        half = np.abs(linear.matrix) @ ((patch - 1) / 2)  # to the outermost voxel centres
        start, stop = np.floor(center - half - 0.5), np.floor(center + half - 0.5) + 2
    else:
        start, stop = center - patch / 2, center + patch / 2
    start = np.clip(start, 0, shape - 1)
    stop = np.clip(stop, start + 1, shape)
    return tuple(int(value) for value in start), tuple(int(value) for value in stop)


def place(source: Tensor, offset: tuple[int, ...], flips: tuple[bool, ...], out: Tensor) -> None:
    """Writes (..., x, y, z) ``source`` at ``offset`` of the unmirrored patch, mirrored, into ``out`` (..., X, Y, Z)."""
    axes = [axis - 3 for axis in range(3) if flips[axis]]
    window: list[Any] = [...]
    for axis in range(3):
        start, stop = offset[axis], offset[axis] + source.shape[axis - 3]
        size = out.shape[axis - 3]
        window.append(slice(size - stop, size - start) if flips[axis] else slice(start, stop))
    out[tuple(window)] = source.flip(axes) if axes else source


def coordinates(matrix: list[list[float]], patch: tuple[int, ...], device: torch.device) -> Tensor:
    """(3, X, Y, Z) float32 source coordinates of the patch's voxel centres; ``matrix`` acts on ``u - patch / 2``."""
    axes = []
    for axis, size in enumerate(patch):
        view = [size if other == axis else 1 for other in range(3)]
        axes.append((torch.arange(size, device=device, dtype=torch.float32) + (0.5 - size / 2)).view(view))
    rows = [row[0] * axes[0] + row[1] * axes[1] + (row[2] * axes[2] + row[3]) for row in matrix]
    return torch.stack(rows)


def sample_linear(source: Tensor, points: Tensor) -> Tensor:
    """Trilinear values of (C, x, y, z) at (3, X, Y, Z) half-open coordinates; beyond the edge the nearest voxel counts.

    Returns:
        (C, X, Y, Z).
    """
    size = source.shape[1:]
    grid = torch.empty_like(points)  # by axis, seen as by voxel: writing x, y and z beside each other is slow
    for place, axis in enumerate((2, 1, 0)):  # grid_sample wants z y x
        torch.mul(points[axis], 2, out=grid[place]).div_(size[axis]).sub_(1)
    by_voxel = grid.movedim(0, -1)[None]
    return F.grid_sample(source[None], by_voxel, mode="bilinear", padding_mode="border", align_corners=False)[0]


def sample_nearest(source: Tensor, points: Tensor, inside: Tensor) -> Tensor:
    """The voxel of (x, y, z) that holds each of the (3, X, Y, Z) coordinates, 0 where not ``inside`` (X, Y, Z)."""
    x, y, z = (points[axis].int().clamp_(0, source.shape[axis] - 1) for axis in range(3))
    place = x.mul_(source.shape[1]).add_(y).mul_(source.shape[2]).add_(z)  # in the flat source: one number, not three
    return source.reshape(-1).index_select(0, place.view(-1)).view(inside.shape).mul_(inside)


def points_inside(points: Tensor, low: list[float], high: list[float]) -> Tensor:
    """(X, Y, Z) bool: which of the (3, X, Y, Z) points lie in ``[low, high)``."""
    inside = torch.ones(points.shape[1:], dtype=torch.bool, device=points.device)
    for axis in range(3):
        inside &= (points[axis] >= low[axis]) & (points[axis] < high[axis])
    return inside
