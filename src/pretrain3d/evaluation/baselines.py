"""What a detector must beat: the mean box of each class, and thresholding with connected components. No network.

Both are fitted to training cases only and made as good as such a method reasonably gets: a weak baseline flatters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from pretrain3d.evaluation.average_precision import average_precision
from pretrain3d.evaluation.matching import box_iou, match

Prediction = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes (N, 6) float32, scores (N,) float32, labels (N,) int64
Volume = tuple[np.ndarray, np.ndarray, np.ndarray]  # image (X, Y, Z) raw intensities, boxes (N, 6), labels (N,)

NO_BOXES: Prediction = (np.zeros((0, 6), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


class MeanBoxBaseline:
    """One box per class, everywhere the same: the mean training box in fractions of the volume.

    It is strong where organs lie in standard places, and shows what an AP at a low IoU is worth there. All scores of a
    class are equal, so that AP, as COCO defines it, moves by a few hundredths with the order of the cases.
    """

    def __init__(self, num_classes: int) -> None:
        self.fractions = np.zeros((num_classes, 6))
        self.frequency = np.zeros(num_classes)  # share of the training cases with the class; the score

    def fit(
        self, shapes: Sequence[Sequence[int]], boxes: Sequence[np.ndarray], labels: Sequence[np.ndarray]
    ) -> MeanBoxBaseline:
        """Fits to training cases.

        Args:
            shapes: (X, Y, Z) of each case.
            boxes: (N, 6) voxels, per case.
            labels: (N,) class indices, per case.
        """
        sizes = [np.tile(np.asarray(shape, np.float64), 2) for shape in shapes]
        relative = [np.asarray(b, np.float64).reshape(-1, 6) / size for b, size in zip(boxes, sizes, strict=True)]
        pooled, of_box = np.concatenate(relative), np.concatenate([np.asarray(x, np.int64) for x in labels])
        for label in np.unique(of_box):
            self.fractions[label] = pooled[of_box == label].mean(axis=0)
            self.frequency[label] = np.mean([label in of_case for of_case in labels])
        return self

    def predict(self, shape: Sequence[int]) -> Prediction:
        """The mean box of every class seen in training, for a volume of `shape`."""
        labels = np.flatnonzero(self.frequency)
        boxes = self.fractions[labels] * np.tile(np.asarray(shape, np.float64), 2)
        return boxes.astype(np.float32), self.frequency[labels].astype(np.float32), labels.astype(np.int64)


@dataclass(frozen=True)
class Setting:
    """How the components of one class are made. Ends of the window are named, since smoothing shifts intensities."""

    low: str = "none"
    high: str = "none"
    smoothing: float = 1.0  # standard deviation in units of the finest spacing
    opening: int = 0  # rounds of erosion and dilation, which cut thin bridges (vessels, ribs)


@dataclass(frozen=True)
class _ClassModel:
    """Everything fitted for one class."""

    setting: Setting
    window: tuple[float, float]
    sides: np.ndarray  # (2, 3) least and greatest side of a component's box, voxels
    means: np.ndarray  # (2, F) of the features of other components and of objects
    deviations: np.ndarray  # (2, F)


class ThresholdBaseline:
    """Smoothing, an intensity window per class, connected components, size limits, a score from size and contrast.

    Window, smoothing and opening of each class come from a small search for the best AP@0.10 on training cases. The
    score is the log-likelihood ratio of two Gaussians with independent features (size, elongation, filling, intensity,
    contrast to the surroundings), of components that hit an object and of those that do not. Where a component lies is
    not used.

    Args:
        spacing_mm: voxel spacing of all volumes; smoothing is isotropic in mm.
        search_cases: training cases, evenly spread, on which settings are compared.
    """

    def __init__(self, spacing_mm: Sequence[float] = (1.0, 1.0, 1.0), search_cases: int = 12) -> None:
        self.relative_spacing = np.asarray(spacing_mm, np.float64) / min(spacing_mm)
        self.search_cases = search_cases
        self.models: dict[int, _ClassModel] = {}

    def fit(self, volumes: Iterable[Volume]) -> ThresholdBaseline:
        """Fits every class that has an object; see the class."""
        cases = list(volumes)
        present = {int(label) for _, _, labels in cases for label in labels}
        self.models = {label: self._fit_class(cases, label) for label in sorted(present)}
        return self

    def _fit_class(self, cases: list[Volume], label: int) -> _ClassModel:
        """Compares settings on cases of which two in three hold the class, if there are as many."""
        having = [index for index, (_, _, labels) in enumerate(cases) if label in labels]
        lacking = [index for index in range(len(cases)) if index not in having]
        few = max(self.search_cases * 2 // 3, self.search_cases - len(lacking))
        chosen = _spread(having, few)
        chosen += _spread(lacking, self.search_cases - len(chosen))
        boxes = np.concatenate([_boxes_of(case, label) for case in cases])
        return _Search([cases[index] for index in chosen], label, boxes, self.relative_spacing).best()

    def predict(self, image: np.ndarray) -> Prediction:
        """Components of a volume (X, Y, Z) of raw intensities, in its voxels."""
        boxes, scores, labels = ([part] for part in NO_BOXES)
        smoothed: dict[float, np.ndarray] = {}
        for label, model in self.models.items():
            width = model.setting.smoothing
            if width not in smoothed:
                smoothed[width] = smooth(image, width, self.relative_spacing)
            found, features = components(smoothed[width], model.window, model.setting.opening, model.sides)
            boxes.append(found.astype(np.float32))
            scores.append(_score(features, model.means, model.deviations).astype(np.float32))
            labels.append(np.full(len(found), label, np.int64))
        return np.concatenate(boxes), np.concatenate(scores), np.concatenate(labels)


def smooth(image: np.ndarray, width: float, relative_spacing: np.ndarray) -> np.ndarray:
    """Gaussian smoothing, isotropic in mm; `width` in units of the finest spacing. (X, Y, Z) float32."""
    image = np.asarray(image, np.float32)
    return ndimage.gaussian_filter(image, width / relative_spacing, truncate=3.0) if width else image


def components(
    image: np.ndarray, window: tuple[float, float], opening: int, sides: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Connected components of the voxels with low <= intensity <= high whose box has sides within limits.

    Args:
        image: (X, Y, Z).
        sides: (2, 3) least and greatest side, voxels.

    Returns:
        boxes (N, 6), features (N, 5): log voxels, log longest to shortest side, filling of the box, mean intensity, and
        its difference from the mean of the surroundings (the box and two voxels around it, without the component).
    """
    inside = (image >= window[0]) & (image <= window[1])
    if opening:
        inside = ndimage.binary_opening(inside, iterations=opening)
    numbered, count = ndimage.label(inside)
    if not count:
        return np.zeros((0, 6)), np.zeros((0, 5))
    boxes = np.array([[s.start for s in box] + [s.stop for s in box] for box in ndimage.find_objects(numbered)])
    size = boxes[:, 3:] - boxes[:, :3]
    kept = np.flatnonzero((size >= sides[0]).all(axis=1) & (size <= sides[1]).all(axis=1))
    boxes, size = boxes[kept], size[kept]
    flat = numbered.ravel()
    voxels = np.bincount(flat, minlength=count + 1)[1:][kept]
    total = np.bincount(flat, weights=image.ravel(), minlength=count + 1)[1:][kept]

    start, stop = np.maximum(boxes[:, :3] - 2, 0), np.minimum(boxes[:, 3:] + 2, image.shape)
    around = [image[tuple(map(slice, *ends))].sum(dtype=np.float64) for ends in zip(start, stop, strict=True)]
    rest = (stop - start).prod(axis=1) - voxels
    outside = (np.array(around) - total) / np.maximum(rest, 1)
    mean = total / voxels
    elongation = np.log(size.max(axis=1) / size.min(axis=1))
    features = np.stack([np.log(voxels), elongation, voxels / size.prod(axis=1), mean, mean - outside], axis=1)
    return boxes.astype(np.float64), features


def _score(features: np.ndarray, means: np.ndarray, deviations: np.ndarray) -> np.ndarray:
    """Log-likelihood ratio of object to other, squeezed into (0, 1) without running into ties as a sigmoid does."""
    scaled = (features[:, None] - means) / deviations  # (N, 2, F)
    log_likelihood = -(0.5 * scaled**2 + np.log(deviations)).sum(axis=2)
    ratio = log_likelihood[:, 1] - log_likelihood[:, 0]
    return 0.5 + 0.5 * ratio / (10.0 + np.abs(ratio))


def _boxes_of(case: Volume, label: int) -> np.ndarray:
    return np.asarray(case[1], np.float64).reshape(-1, 6)[np.asarray(case[2]) == label]


def _spread(items: list[int], number: int) -> list[int]:
    """At most `number` items, evenly spread."""
    if len(items) <= number:
        return items
    return [items[index * len(items) // number] for index in range(number)]


class _Search:
    """The search for one class's setting. Keeps the smoothed volumes of one width at a time."""

    def __init__(self, cases: list[Volume], label: int, boxes: np.ndarray, relative_spacing: np.ndarray) -> None:
        self.images = [image for image, _, _ in cases]
        self.objects = [_boxes_of(case, label) for case in cases]
        self.relative_spacing = relative_spacing
        size = boxes[:, 3:] - boxes[:, :3]
        self.sides = np.stack([np.maximum(np.floor(size.min(axis=0) * 0.6), 1), np.ceil(size.max(axis=0) * 1.5)])
        self.width = -1.0
        self.smoothed: list[np.ndarray] = []
        self.levels: dict[str, float] = {}

    def best(self) -> _ClassModel:
        """First the window at one smoothing, then smoothing and opening for the best two windows."""
        lows, highs = ("none", "half", "5", "20"), ("none", "half", "80", "95")
        first = [Setting(low, high) for low in lows for high in highs if (low, high) != ("none", "none")]
        tried = {setting: self._try(setting) for setting in first}
        windows = sorted(first, key=lambda setting: -tried[setting][0])[:2]
        for width in (1.0, 0.0, 2.0):
            for window in windows:
                for opening in (0, 1, 2):
                    setting = Setting(window.low, window.high, width, opening)
                    if setting not in tried:
                        tried[setting] = self._try(setting)
        return max(tried.values(), key=lambda result: result[0])[1]

    def _try(self, setting: Setting) -> tuple[float, _ClassModel]:
        """AP@0.10 of a setting on the search's cases, and its model."""
        if setting.smoothing != self.width:
            self._use_width(setting.smoothing)
        low = -np.inf if setting.low == "none" else self.levels[setting.low]
        high = np.inf if setting.high == "none" else self.levels[setting.high]
        found = [components(image, (low, high), setting.opening, self.sides) for image in self.smoothed]
        hit = [
            (box_iou(boxes, objects) >= 0.10).any(axis=1)
            for (boxes, _), objects in zip(found, self.objects, strict=True)
        ]
        means, deviations = _two_gaussians(np.concatenate([row for _, row in found]), np.concatenate(hit))
        predictions, targets = {}, {}
        for index, ((boxes, features), objects) in enumerate(zip(found, self.objects, strict=True)):
            scores = _score(features, means, deviations)
            predictions[str(index)] = {"boxes": boxes, "scores": scores, "labels": np.zeros(len(boxes), int)}
            targets[str(index)] = {"boxes": objects, "labels": np.zeros(len(objects), int)}
        matches = match(predictions, targets, ["object"], np.array([0.10])).per_class[0]
        value = average_precision(matches, np.ones((1, len(found))))[0, 0]
        return float(value), _ClassModel(setting, (low, high), self.sides, means, deviations)

    def _use_width(self, width: float) -> None:
        """Smooths the volumes and reads from the objects which intensities the names of a window stand for."""
        self.width = width
        self.smoothed = [smooth(image, width, self.relative_spacing) for image in self.images]
        inside, outside = [], []
        for image, objects in zip(self.smoothed, self.objects, strict=True):
            for box in objects:
                quarter = (box[3:] - box[:3]) / 4  # the inner half: a box's corners belong to what is around
                core = image[_slices(box[:3] + quarter, box[3:] - quarter, image.shape)]
                inside.append(core.ravel())
                margin = image[_slices(box[:3] - 3, box[3:] + 3, image.shape)]
                outside.append(margin.ravel())
        core, margin = np.concatenate(inside), np.concatenate(outside)
        self.levels = {name: float(np.percentile(core, int(name))) for name in ("5", "20", "80", "95")}
        self.levels["half"] = float(np.median(core) + np.median(margin)) / 2


def _slices(start: np.ndarray, stop: np.ndarray, shape: Sequence[int]) -> tuple[slice, ...]:
    """Whole voxels of [start, stop) inside the volume, at least one."""
    first = np.clip(np.floor(start), 0, np.array(shape) - 1).astype(int)
    last = np.clip(np.ceil(stop), first + 1, shape).astype(int)
    return tuple(slice(a, b) for a, b in zip(first, last, strict=True))


def _two_gaussians(features: np.ndarray, hit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and deviations (2, F) of the features of other components and of objects; alike where one has too few."""
    everything = features if len(features) > 1 else np.zeros((2, features.shape[1]))
    floor = np.maximum(everything.std(axis=0) * 0.05, 1e-3)
    groups = [part if len(part) > 1 else everything for part in (features[~hit], features[hit])]
    return np.stack([g.mean(axis=0) for g in groups]), np.maximum(np.stack([g.std(axis=0) for g in groups]), floor)
