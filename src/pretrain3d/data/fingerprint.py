"""Intensity statistics of one case that can be merged over cases: histograms on a grid shared by all of them.

Bin edges are the multiples of a power of two (1 for integer data), so histograms of different cases nest and a merged
one is exact: the 0.5 percentile of a training fold needs no voxel to be read again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

CT_RANGE = (-1024, 3071)
MAX_BINS = 4096


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation (population) of one channel.

    Attributes:
        mean, std: raw intensities.
    """

    mean: float
    std: float

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Of ``values`` of any shape, finite, at least one."""
        return cls(float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64)))


def image_moments(image: np.ndarray) -> tuple[Moments, ...]:
    """Per channel of a (C, X, Y, Z) image, over the smallest box of all voxels other than 0 (nnU-Net's crop)."""
    used = (image != 0).any(axis=0)
    ends = [np.flatnonzero(used.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    box = tuple(slice(int(end[0]), int(end[-1]) + 1) for end in ends)
    return tuple(Moments.of(channel[box]) for channel in image)


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of voxel values of one channel.

    Attributes:
        width: bin width, a power of two.
        start: bin ``i`` covers ``[(start + i) * width, (start + i + 1) * width)``.
        counts: (bins,) int64.
        integer: values are whole numbers and the width is 1, so a bin holds exactly one value.
        mean: exact mean of the voxels, not of the bins.
        std: exact standard deviation (population).
    """

    width: float
    start: int
    counts: np.ndarray
    integer: bool
    mean: float
    std: float

    @classmethod
    def of(cls, values: np.ndarray, clip: tuple[float, float] | None = None) -> Histogram:
        """Counts ``values`` (any shape, finite), clipped to ``clip`` first."""
        values = np.asarray(values).reshape(-1)
        if values.size == 0:
            return cls(1.0, 0, np.zeros(0, dtype=np.int64), True, 0.0, 0.0)
        if clip is not None:
            values = np.clip(values, *clip)
        low, high = float(values.min()), float(values.max())
        integer = np.issubdtype(values.dtype, np.integer) and high - low < 2 * MAX_BINS
        width = 1.0 if integer else _bin_width(low, high)
        start = math.floor(low / width)
        index = np.floor(values / width).astype(np.int64) - start
        moments = Moments.of(values)
        return cls(width, start, np.bincount(index), bool(integer), moments.mean, moments.std)

    @property
    def total(self) -> int:
        """Number of voxels."""
        return int(self.counts.sum())

    @property
    def values(self) -> np.ndarray:
        """(bins,) the value that stands for each bin: the value itself for integers, else the middle."""
        return (self.start + np.arange(len(self.counts)) + (0.0 if self.integer else 0.5)) * self.width

    def percentile(self, percent: float) -> float:
        """The smallest bin value with at least ``percent`` % of the voxels at or below it."""
        assert self.total > 0, "percentile of an empty histogram"
        need = percent / 100 * self.total
        index = int(np.searchsorted(np.cumsum(self.counts), need - 1e-9))
        return float(self.values[min(index, len(self.counts) - 1)])

    def clipped_moments(self, low: float, high: float) -> tuple[float, float]:
        """Mean and standard deviation of the voxels after clipping them to ``[low, high]``."""
        values = np.clip(self.values, low, high)
        mean = float((values * self.counts).sum() / self.total)
        return mean, math.sqrt(float(((values - mean) ** 2 * self.counts).sum() / self.total))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "counts": self.counts.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Histogram:
        """The inverse of `to_dict`."""
        return cls(**{**values, "counts": np.asarray(values["counts"], dtype=np.int64)})


def merge(histograms: list[Histogram]) -> Histogram:
    """The histogram of all voxels together, on the coarsest grid among them; empty ones do not count."""
    histograms = [h for h in histograms if h.total]
    if not histograms:
        return Histogram.of(np.zeros(0))
    width = max(h.width for h in histograms)
    starts = [np.floor((h.start + np.arange(len(h.counts))) * h.width / width).astype(np.int64) for h in histograms]
    first = min(int(s[0]) for s in starts)
    counts = np.zeros(max(int(s[-1]) for s in starts) - first + 1, dtype=np.int64)
    for histogram, index in zip(histograms, starts, strict=True):
        np.add.at(counts, index - first, histogram.counts)
    total = float(counts.sum())
    mean = sum(h.mean * h.total for h in histograms) / total
    square = sum((h.std**2 + h.mean**2) * h.total for h in histograms) / total
    integer = all(h.integer for h in histograms)
    return Histogram(width, first, counts, integer, mean, math.sqrt(max(square - mean**2, 0.0)))


def _bin_width(low: float, high: float) -> float:
    """The smallest power of two that needs at most `MAX_BINS` bins, and is not finer than float32 at these values."""
    finest = max(abs(low), abs(high)) * 2.0**-22
    return 2.0 ** math.ceil(math.log2(max((high - low) / (MAX_BINS - 1), finest, 1e-30)))


def target_spacing(spacings_mm: np.ndarray, shapes: np.ndarray) -> tuple[float, ...]:
    """The spacing that a data set is resampled to: the median per axis, finer on a coarse axis with few slices.

    An axis whose median is more than three times that of the others, and which has fewer than a third of their voxels,
    takes its 10th percentile instead (not below the others' finer one): thin slices exist and keep their detail.

    Args:
        spacings_mm: (cases, 3).
        shapes: (cases, 3) voxels.

    Source: Isensee et al. 2021 (nnU-Net), supplement; nnDetection v0.1 uses the same rule.
    """
    spacing = np.median(spacings_mm, axis=0)
    size = np.median(shapes, axis=0)
    worst = int(np.argmax(spacing))
    others = [axis for axis in range(3) if axis != worst]
    if spacing[worst] > 3 * spacing[others].min() and size[worst] * 3 < size[others].min():
        spacing[worst] = max(np.percentile(spacings_mm[:, worst], 10), spacing[others].min())
    return tuple(float(round(value, 4)) for value in spacing)
