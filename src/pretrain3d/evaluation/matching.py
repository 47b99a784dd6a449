"""Which predictions hit which objects: greedy matching, once for all IoU thresholds. NumPy only, float64."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# rounded, so that an IoU of exactly 3/10 reaches the threshold 0.30
THRESHOLDS = np.round(np.linspace(0.10, 0.90, 17), 2)
MAX_PER_CASE = 100
BATCH = 2**18  # numbers that a calculation over many samples holds at once

Boxes = Mapping[str, np.ndarray]  # one case: "boxes" (N, 6), "labels" (N,), "scores" (N,) or "annotated" (classes)


@dataclass(frozen=True)
class ClassMatches:
    """All that AP and FROC need to know of one class, N predictions in descending score, C cases, T thresholds.

    Attributes:
        case: (N,) int, the index of each prediction's case.
        scores: (N,) float64, descending; equal scores keep the order of the cases.
        hits: (N, T) bool, True where the prediction is the one that found an object at that IoU threshold.
        objects: (C,) int, objects per case.
        annotated: (C,) bool, cases in which the class was annotated; predictions of other cases are left out above.
        source: (N,) int, the place of each prediction in its case's list; None where a matching does not say.
        found: (N, T) int, the place, in its case's list, of the object that it found at that IoU threshold, -1 without.
    """

    case: np.ndarray
    scores: np.ndarray
    hits: np.ndarray
    objects: np.ndarray
    annotated: np.ndarray
    source: np.ndarray | None = None
    found: np.ndarray | None = None

    def of_cases(self, chosen: np.ndarray) -> ClassMatches:
        """Only the `chosen` cases, (C,) bool."""
        kept = chosen[self.case]
        return ClassMatches(
            case=(chosen.cumsum() - 1)[self.case[kept]],
            scores=self.scores[kept],
            hits=self.hits[kept],
            objects=self.objects[chosen],
            annotated=self.annotated[chosen],
            source=None if self.source is None else self.source[kept],
            found=None if self.found is None else self.found[kept],
        )

    def counts_before(self, ends: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """How many (of the `chosen`, (N,) bool) of the first `ends` predictions lie in each case.

        Args:
            ends: (P,) ascending positions in the sorted predictions.

        Returns:
            (C, P) float64. Cases with weights `w` (S, C) then give `w @ counts`, exactly.
        """
        positions = np.arange(len(self.case)) if chosen is None else np.flatnonzero(chosen)
        column = np.searchsorted(ends, positions, side="right")  # the first end behind the position
        width = len(ends) + 1
        flat = np.bincount(self.case[positions] * width + column, minlength=len(self.objects) * width)
        return flat.reshape(-1, width).cumsum(axis=1)[:, :-1].astype(np.float64)


@dataclass(frozen=True)
class Matches:
    """The matching of a whole set of cases: what every metric and every resampling starts from."""

    classes: list[str]
    case_ids: list[str]
    per_class: list[ClassMatches]
    thresholds: np.ndarray

    def at(self, threshold: float) -> int:
        """The column of an IoU threshold in `hits`."""
        column = int(np.argmin(np.abs(self.thresholds - threshold)))
        assert abs(self.thresholds[column] - threshold) < 1e-9, f"{threshold} is not among {self.thresholds}"
        return column

    def of_cases(self, case_ids: Collection[str]) -> Matches:
        """Only these cases, in the order of `self.case_ids`."""
        chosen = np.array([case_id in case_ids for case_id in self.case_ids], bool)
        kept = [case_id for case_id in self.case_ids if case_id in case_ids]
        return Matches(self.classes, kept, [one.of_cases(chosen) for one in self.per_class], self.thresholds)

    def pooled(self) -> ClassMatches:
        """All classes as one, for FROC. A case counts when at least one class is annotated in it."""
        scores = np.concatenate([m.scores for m in self.per_class])
        order = np.argsort(-scores, kind="stable")
        return ClassMatches(
            case=np.concatenate([m.case for m in self.per_class])[order],
            scores=scores[order],
            hits=np.concatenate([m.hits for m in self.per_class])[order],
            objects=np.sum([m.objects for m in self.per_class], axis=0),
            annotated=np.any([m.annotated for m in self.per_class], axis=0),
        )


class _Unit(NamedTuple):
    """One case and class: predictions best first, objects, and their places in the case's lists."""

    boxes: np.ndarray
    scores: np.ndarray
    source: np.ndarray
    objects: np.ndarray
    places: np.ndarray


def batches(samples: int, width: int) -> Iterator[slice]:
    """Slices of samples of which each has `width` numbers, so that the numbers of one slice stay in the cache."""
    size = max(1, BATCH // max(width, 1))
    return (slice(start, min(start + size, samples)) for start in range(0, samples, size))


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of every pair of half-open boxes: (N, 6) and (M, 6) -> (N, M) float64; 0 where both have no volume."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    overlap = np.ones((len(a), len(b)))
    for axis in range(3):
        start = np.maximum(a[:, None, axis], b[None, :, axis])
        stop = np.minimum(a[:, None, axis + 3], b[None, :, axis + 3])
        overlap *= np.maximum(stop - start, 0.0)
    union = (a[:, 3:] - a[:, :3]).prod(axis=1)[:, None] + (b[:, 3:] - b[:, :3]).prod(axis=1)[None] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def match(
    predictions: Mapping[str, Boxes],
    targets: Mapping[str, Boxes],
    classes: Sequence[str],
    thresholds: np.ndarray = THRESHOLDS,
    max_per_case: int = MAX_PER_CASE,
) -> Matches:
    """Matches predictions to objects, per case and class.

    In descending score (stable), each prediction takes the best object that is still free and has an IoU of at least
    the threshold (of equally good ones the last, as pycocotools does); a second hit on an object is a false positive.

    Args:
        predictions: case id -> "boxes" (N, 6), "scores" (N,), "labels" (N,).
        targets: case id -> "boxes" (N, 6), "labels" (N,), optionally "annotated" (class indices; default all).
            Predictions of a class count only in the cases where it was annotated.
        classes: class names; labels index into them.
        thresholds: ascending IoU thresholds.
        max_per_case: predictions beyond the best so many of a case and class are not looked at.
    """
    assert set(predictions) == set(targets), "predictions and targets must hold the same cases"
    case_ids = sorted(targets)
    per_class = []
    for label in range(len(classes)):
        annotated = np.array([label in targets[i].get("annotated", range(len(classes))) for i in case_ids], bool)
        units = [_of_class(predictions[i], targets[i], label, max_per_case) for i in case_ids]
        per_class.append(_match_class(units, annotated, np.asarray(thresholds, np.float64)))
    return Matches(list(classes), case_ids, per_class, np.asarray(thresholds, np.float64))


def _of_class(prediction: Boxes, target: Boxes, label: int, limit: int) -> _Unit:
    mine = np.flatnonzero(np.asarray(prediction["labels"]) == label)
    scores = np.asarray(prediction["scores"], np.float64)[mine]
    best = np.argsort(-scores, kind="stable")[:limit]
    boxes = np.asarray(prediction["boxes"], np.float64).reshape(-1, 6)[mine[best]]
    places = np.flatnonzero(np.asarray(target["labels"]) == label)
    objects = np.asarray(target["boxes"], np.float64).reshape(-1, 6)[places]
    return _Unit(boxes, scores[best], mine[best], objects, places)


def _match_class(units: list[_Unit], annotated: np.ndarray, thresholds: np.ndarray) -> ClassMatches:
    """One class over all cases; see `match`."""
    objects = np.array([len(unit.objects) for unit in units], np.int64)
    sizes = np.where(annotated, [len(unit.scores) for unit in units], 0)
    case = np.repeat(np.arange(len(units)), sizes)
    scores = np.concatenate([unit.scores[:size] for unit, size in zip(units, sizes, strict=True)])
    source = np.concatenate([unit.source[:size] for unit, size in zip(units, sizes, strict=True)])
    rank = np.concatenate([np.arange(size) for size in sizes])

    pairs = []  # prediction, object (both numbered over all cases), IoU
    first_box, first_object = np.cumsum(sizes) - sizes, np.cumsum(objects) - objects
    for index in np.flatnonzero((sizes > 0) & (objects > 0)):
        iou = box_iou(units[index].boxes, units[index].objects)
        row, column = np.nonzero(iou >= thresholds[0])
        pairs.append((row + first_box[index], column + first_object[index], iou[row, column]))
    found = np.full((len(scores), len(thresholds)), -1, np.int64)
    if pairs:
        box, thing, overlap = (np.concatenate(part) for part in zip(*pairs, strict=True))
        _take(found, int(objects.sum()), box, thing, overlap, rank, thresholds)
    hits = found >= 0
    if hits.any():
        found[hits] = np.concatenate([unit.places for unit in units])[found[hits]]
    order = np.argsort(-scores, kind="stable")
    return ClassMatches(case[order], scores[order], hits[order], objects, annotated, source[order], found[order])


def _take(
    found: np.ndarray,
    num_objects: int,
    box: np.ndarray,
    thing: np.ndarray,
    overlap: np.ndarray,
    rank: np.ndarray,
    thresholds: np.ndarray,
) -> None:
    """Fills `found` (N, T). The k-th best object of each case's r-th prediction is looked at together in all cases:
    such a wave holds at most one pair of a case, so nothing in it can depend on anything else in it."""
    order = np.lexsort((-thing, -overlap, box))  # by prediction, then best object first, of equals the last
    box, thing, overlap = box[order], thing[order], overlap[order]
    choice = np.arange(len(box)) - np.searchsorted(box, box)  # k: 0 for the best object of each prediction
    wave = rank[box] * (choice.max(initial=0) + 1) + choice
    order = np.argsort(wave, kind="stable")
    box, thing, reached = box[order], thing[order], overlap[order, None] >= thresholds  # reached (P, T)
    bounds = np.flatnonzero(np.diff(wave[order], prepend=-1, append=-1))
    taken = np.zeros((num_objects, len(thresholds)), bool)
    for start, stop in pairwise(bounds):
        b, t = box[start:stop], thing[start:stop]
        hit = reached[start:stop] & ~taken[t] & (found[b] < 0)
        taken[t] |= hit
        found[b] = np.where(hit, t[:, None], found[b])
