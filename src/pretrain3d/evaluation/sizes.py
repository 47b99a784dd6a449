"""AP by the size of the objects in mm^3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.evaluation.average_precision import average_precision, with_absent
from pretrain3d.evaluation.matching import Boxes, ClassMatches, Matches
from pretrain3d.evaluation.protocol import MAP_THRESHOLDS, mean_of_present
from pretrain3d.evaluation.statistics import SAMPLES, Groups, Numbers, bootstrap

SIZE_KEYS = ("mAP", "AP@0.10", "AP@0.50")


class Sizes:
    """Sizes of all objects and predictions of a matching.

    The size of an object is the volume of its mask, or of its box where no mask is known. That of a prediction is the
    volume of its box, shrunk by the share of its box that an object of the class fills (the median), so that both
    are on one scale.

    Args:
        matches: of `predictions` and `targets`.
        predictions: as for `match`.
        targets: as for `match`, with "spacing_mm" (3,), the size of a voxel of the boxes, and optionally "volumes_mm3"
            (N,), the volume of each object.

    Raises:
        UserError: a case without "spacing_mm".
    """

    def __init__(self, matches: Matches, predictions: Mapping[str, Boxes], targets: Mapping[str, Boxes]) -> None:
        self.matches = matches
        boxes = [_box_volumes(targets[i], targets[i], i) for i in matches.case_ids]
        volumes = [
            np.asarray(targets[i].get("volumes_mm3", v), float) for i, v in zip(matches.case_ids, boxes, strict=True)
        ]
        labels = np.concatenate([np.asarray(targets[i]["labels"], np.int64) for i in matches.case_ids])
        case = np.repeat(np.arange(len(volumes)), list(map(len, volumes)))
        self.first = np.cumsum([0, *map(len, volumes)])[:-1]  # of each case's objects in the lists below
        self.objects = np.concatenate(volumes)
        self.of_class = [
            (case[labels == label], self.objects[labels == label]) for label in range(len(matches.classes))
        ]
        filled = self.objects / np.concatenate(boxes)
        found = [_box_volumes(predictions[i], targets[i], i) for i in matches.case_ids]
        starts = np.cumsum([0, *map(len, found)])[:-1]
        everything = np.concatenate(found)
        self.predictions = []  # per class (N,), in the order of its matching
        for label, one in enumerate(matches.per_class):
            assert one.source is not None, "sizes need a matching made by `match`"
            share = np.median(filled[labels == label]) if (labels == label).any() else 1.0
            self.predictions.append(everything[starts[one.case] + one.source] * share)

    def default_edges(self) -> list[float]:
        """Thirds of the objects, rounded to two digits; fewer bins where the rounded edges coincide."""
        if not len(self.objects):
            return []
        return sorted({float(f"{edge:.2g}") for edge in np.quantile(self.objects, [1 / 3, 2 / 3])})

    def within(self, label: int, column: int, low: float, high: float) -> ClassMatches:
        """One class at one IoU threshold, as if there were only objects of ``low <= mm3 < high``.

        A prediction has the size of the object that it found, else its own: predictions of another size are neither
        hits nor false positives.

        Source: the area ranges of COCO (Lin et al., 2014), which ignore the same. There the matching is made anew for
            every range and prefers objects within it; here the one matching of all sizes serves every bin.
        """
        one = self.matches.per_class[label]
        assert one.found is not None
        found = one.found[:, column]
        size = self.predictions[label].copy()
        hit = found >= 0
        size[hit] = self.objects[self.first[one.case[hit]] + found[hit]]
        kept = (size >= low) & (size < high)
        case, volume = self.of_class[label]
        objects = np.bincount(case[(volume >= low) & (volume < high)], minlength=len(one.objects))
        return ClassMatches(one.case[kept], one.scores[kept], hit[kept, None], objects, one.annotated)

    def values(self, weights: np.ndarray, low: float, high: float) -> Numbers:
        """`SIZE_KEYS` of one bin, overall and per class, as `protocol.values` gives them."""
        per_class, averaged = {}, []
        for label, name in enumerate(self.matches.classes):
            ones = {t: self.within(label, self.matches.at(t), low, high) for t in MAP_THRESHOLDS}
            ap = {t: average_precision(one, weights) for t, one in ones.items()}
            per_class[name] = _keys(ap)
            averaged.append(_keys({t: with_absent(one, ap[t]) for t, one in ones.items()}))
        return {key: mean_of_present([row[key] for row in averaged]) for key in SIZE_KEYS}, per_class


def _keys(ap: Mapping[float, np.ndarray]) -> dict[str, np.ndarray]:
    """`SIZE_KEYS`, (S,) each, of the AP (S, 1) at each of `MAP_THRESHOLDS`."""
    return {"mAP": np.mean(list(ap.values()), axis=0)[:, 0], "AP@0.10": ap[0.10][:, 0], "AP@0.50": ap[0.50][:, 0]}


def by_size(
    matches: Matches,
    predictions: Mapping[str, Boxes],
    targets: Mapping[str, Boxes],
    edges_mm3: Sequence[float] = (),
    samples: int = SAMPLES,
    groups: Groups | None = None,
) -> dict[str, dict[str, Any]]:
    """Every bin with its objects, numbers and intervals; see `Sizes` and `statistics.bootstrap`.

    Args:
        edges_mm3: ascending bounds between bins; default thirds of the objects.

    Returns:
        {"0-1200": {"low_mm3", "high_mm3", "objects", "metrics", "per_class"}, ..., "8000-": {...}}; the last bin has no
        upper bound (None). Keys are `SIZE_KEYS`.

    Raises:
        UserError: edges that do not ascend from above 0, or a case without "spacing_mm".
    """
    sizes = Sizes(matches, predictions, targets)
    edges = list(edges_mm3) or sizes.default_edges()
    bounds = [0.0, *edges, np.inf]
    if not all(low < high for low, high in pairwise(bounds)):
        raise UserError(f"sizes={list(edges_mm3)}: expected ascending volumes in mm3, such as [500, 5000]")
    result = {}
    for low, high in pairwise(bounds):

        def numbers(_: Matches, weights: np.ndarray, low: float = low, high: float = high) -> Numbers:
            return sizes.values(weights, low, high)

        last = np.isinf(high)
        result[f"{low:g}-{'' if last else f'{high:g}'}"] = {
            "low_mm3": low,
            "high_mm3": None if last else high,
            "objects": int(((sizes.objects >= low) & (sizes.objects < high)).sum()),
            **bootstrap(matches, samples, groups=groups, numbers=numbers),
        }
    return result


def have_sizes(targets: Mapping[str, Boxes]) -> bool:
    """Whether the voxel size of every case is known."""
    return all("spacing_mm" in entry for entry in targets.values())


def _box_volumes(entry: Boxes, target: Boxes, case_id: str) -> np.ndarray:
    """(N,) mm3."""
    if "spacing_mm" not in target:
        raise UserError(f"case {case_id!r} has no spacing_mm in the targets, which sizes in mm3 need")
    boxes = np.asarray(entry["boxes"], np.float64).reshape(-1, 6)
    return (boxes[:, 3:] - boxes[:, :3]).prod(axis=1) * float(np.prod(target["spacing_mm"]))
