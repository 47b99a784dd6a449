"""The drawing board: a CT grid in RAS millimetres, smooth random fields, soft edges, tubes and branching trees.

Shapes are signed distances in mm, negative inside. A structure is painted with an edge as wide as a voxel, which is
what partial volume looks like, and everything is drawn in warped coordinates, so that no organ is a perfect ellipsoid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

Array = np.ndarray
WAVES = 4  # of a smooth field, per axis


class SmoothField:
    """A random field of long waves, cheap to evaluate on a grid and at points.

    Args:
        rng: where the waves come from.
        length_mm: the period of the longest wave.
        std: standard deviation of the field.
    """

    def __init__(self, rng: np.random.Generator, length_mm: float, std: float) -> None:
        index = np.arange(WAVES)
        self.waves = 2 * np.pi / length_mm * (0.4 + index * 0.6)
        self.phases = rng.uniform(0, 2 * np.pi, (3, WAVES))
        decay = 1.0 / (1.0 + index[:, None, None] + index[None, :, None] + index[None, None, :])
        coefficients = rng.standard_normal((WAVES, WAVES, WAVES)) * decay
        # a product of three cosines with random phases has mean square 1/8
        self.coefficients = coefficients * std / np.sqrt((coefficients**2).sum() / 8)

    def _cosines(self, axis: int, position_mm: Array) -> Array:
        return np.cos(np.multiply.outer(position_mm, self.waves) + self.phases[axis])

    def on_grid(self, axes: Sequence[Array]) -> Array:
        """The field on the grid of three coordinate vectors: (X, Y, Z) float32."""
        a, b, c = (self._cosines(i, axis) for i, axis in enumerate(axes))
        inner = np.tensordot(np.tensordot(a, self.coefficients, (1, 0)), b, (1, 1))  # (X, waves, Y)
        return np.tensordot(inner, c, (1, 1)).astype(np.float32)  # (X, Y, Z)

    def at(self, points: Array) -> Array:
        """The field at (N, 3) points: (N,)."""
        a, b, c = (self._cosines(i, points[:, i]) for i in range(3))
        return np.einsum("abc,na,nb,nc->n", self.coefficients, a, b, c)


class Canvas:
    """A CT volume being drawn. RAS: x to the patient's right, y forward, z up; voxel i lies at `origin + i * spacing`.

    Attributes:
        axes: the world coordinates in mm of the voxel centres, one vector per axis.
        x, y, z: (X, Y, Z) float32, the model coordinates in mm of each voxel (world, warped and divided by `scale`).
        hu: (X, Y, Z) float32, the picture so far.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        shape: tuple[int, int, int],
        spacing_mm: tuple[float, float, float],
        origin_mm: tuple[float, float, float],
        scale: float = 1.0,
        warp_mm: float = 3.0,
    ) -> None:
        self.shape = shape
        self.spacing_mm = np.asarray(spacing_mm, dtype=np.float64)
        self.origin_mm = np.asarray(origin_mm, dtype=np.float64)
        self.scale = scale
        self.edge_mm = float(np.prod(self.spacing_mm) ** (1 / 3))
        self.axes = [self.origin_mm[i] + np.arange(shape[i]) * self.spacing_mm[i] for i in range(3)]
        self._warp = [SmoothField(rng, 210.0, warp_mm) for _ in range(3)]
        grids = np.meshgrid(*(axis.astype(np.float32) for axis in self.axes), indexing="ij", sparse=True)
        self.x, self.y, self.z = (
            (grid + field.on_grid(self.axes)) / np.float32(scale) for grid, field in zip(grids, self._warp, strict=True)
        )
        self.hu = np.full(shape, -1000.0, dtype=np.float32)

    def world(self, points: Array) -> Array:
        """Model points (N, 3) to world mm: the inverse of the warp, by fixed-point iteration."""
        target = np.asarray(points, dtype=np.float64).reshape(-1, 3) * self.scale
        result = target
        for _ in range(3):
            result = target - np.stack([field.at(result) for field in self._warp], axis=1)
        return result

    def smooth_field(self, rng: np.random.Generator, length_mm: float, std: float) -> Array:
        """A smooth random field on this grid: (X, Y, Z) float32."""
        return SmoothField(rng, length_mm, std).on_grid(self.axes)

    def box(self, low_mm: Array, high_mm: Array) -> tuple[slice, slice, slice]:
        """The voxels whose centres lie between two world points, clipped to the volume; maybe empty."""
        start = np.ceil((np.asarray(low_mm) - self.origin_mm) / self.spacing_mm).astype(int)
        stop = np.floor((np.asarray(high_mm) - self.origin_mm) / self.spacing_mm).astype(int) + 1
        a, b, c = (slice(max(s, 0), max(min(e, n), max(s, 0))) for s, e, n in zip(start, stop, self.shape, strict=True))
        return a, b, c

    def cover(self, sdf: Array) -> Array:
        """How much of each voxel lies inside a signed distance: (X, Y, Z) in [0, 1]."""
        return np.clip(0.5 - sdf / np.float32(self.edge_mm), 0, 1)

    def paint(self, sdf: Array, hu: float | Array, strength: float = 1.0) -> None:
        """Fills the inside of `sdf` with `hu`, mixing at the edge."""
        self.hu += self.cover(sdf) * np.float32(strength) * (hu - self.hu)

    def tubes(self, segments: Array, sdf: Array | None = None, warped: bool = True) -> Array:
        """Signed distance of round tubes.

        Args:
            segments: (S, 8): both end points and both radii, mm.
            sdf: a distance to unite with, changed in place.
            warped: the end points are model coordinates; else world.
        """
        sdf = np.full(self.shape, 50.0, dtype=np.float32) if sdf is None else sdf
        if not len(segments):
            return sdf
        starts, ends = segments[:, :3], segments[:, 3:6]
        if warped:
            starts, ends = self.world(starts), self.world(ends)
        radii = segments[:, 6:8]
        # beyond `reach` of a tube the distance is left alone: nobody asks for it
        reach = radii.max(axis=1) + 2 * self.edge_mm
        low = np.minimum(starts, ends) - reach[:, None] - self.origin_mm
        high = np.maximum(starts, ends) + reach[:, None] - self.origin_mm
        first = np.maximum(np.ceil(low / self.spacing_mm).astype(int), 0)
        last = np.minimum(np.floor(high / self.spacing_mm).astype(int) + 1, self.shape)
        x, y, z = np.ix_(*(axis.astype(np.float32) for axis in self.axes))
        for i in np.flatnonzero((last > first).all(axis=1)):
            p, d, (r, s) = starts[i].tolist(), (ends[i] - starts[i]).tolist(), radii[i].tolist()
            a, b, c = box = tuple(slice(*side) for side in zip(first[i].tolist(), last[i].tolist(), strict=True))
            ax, ay, az = x[a] - p[0], y[:, b] - p[1], z[:, :, c] - p[2]
            length2 = max(d[0] ** 2 + d[1] ** 2 + d[2] ** 2, 1e-6)
            along = np.clip((ax * d[0] + ay * d[1] + az * d[2]) / length2, 0, 1)
            distance2 = (ax - along * d[0]) ** 2 + (ay - along * d[1]) ** 2 + (az - along * d[2]) ** 2
            np.minimum(sdf[box], np.sqrt(distance2) - (r + (s - r) * along), out=sdf[box])
        return sdf


def ellipsoid(canvas: Canvas, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> Array:
    """Approximate signed distance of an ellipsoid in model mm: exact on its surface."""
    (cx, cy, cz), (rx, ry, rz) = centre, radii
    q = np.sqrt(((canvas.x - cx) / rx) ** 2 + ((canvas.y - cy) / ry) ** 2 + ((canvas.z - cz) / rz) ** 2)
    return (q - 1) * np.float32(min(radii))


def smooth_max(a: Array, b: Array, radius: float) -> Array:
    """Intersection of two distances with a rounded edge."""
    h = np.maximum(radius - np.abs(a - b), 0)
    return np.maximum(a, b) + h * h / (4 * radius)


def chain(points: Array, radii: float | Array) -> Array:
    """(P, 3) points and their radii to the (P-1, 8) segments of one tube."""
    r = np.broadcast_to(np.asarray(radii, dtype=np.float64), (len(points),))
    return np.concatenate([points[:-1], points[1:], r[:-1, None], r[1:, None]], axis=1)


def tree(rng: np.random.Generator, root: Array, targets: Array, tip_mm: float, exponent: float = 0.36) -> Array:
    """A branching vessel tree from `root` to all `targets` (T, 3): segments (S, 8) for `Canvas.tubes`.

    Each branch feeds a set of targets, walks part of the way to their centre and splits the set in two. Its radius
    grows with the number of targets as in Murray's law (there: exponent 1/3).
    """
    segments: list[Array] = []
    pending = [(np.asarray(root, dtype=np.float64), np.asarray(targets, dtype=np.float64))]
    while pending:
        start, group = pending.pop()
        share = 1.0 if len(group) == 1 else rng.uniform(0.35, 0.6)
        end = start + share * (group.mean(axis=0) - start)
        length = float(np.linalg.norm(end - start))
        bend = 0.5 * (start + end) + rng.normal(0, 0.06 * length + 0.1, 3)
        radius = tip_mm * len(group) ** exponent
        segments.append(chain(np.stack([start, bend, end]), np.array([radius, 0.96 * radius, 0.9 * radius])))
        if len(group) > 1:
            spread = np.linalg.svd(group - group.mean(axis=0), full_matrices=False)[2][0]
            direction = spread + rng.normal(0, 0.25, 3)
            order = np.argsort(group @ direction)
            cut = int(np.clip(round(len(group) * rng.uniform(0.3, 0.7)), 1, len(group) - 1))
            pending += [(end, group[order[:cut]]), (end, group[order[cut:]])]
    return np.concatenate(segments)


def texture(rng: np.random.Generator, shape: tuple[int, ...], sigma: float | tuple[float, ...]) -> Array:
    """Correlated noise of standard deviation 1: white noise smoothed with `sigma` voxels."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap", truncate=3.0)
    return field / field.std()
