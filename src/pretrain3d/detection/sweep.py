"""Which merging suits a detector, and where to cut its scores: chosen on validation cases, kept with the weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pretrain3d.config import UserError, suggestion
from pretrain3d.detection.merge import METHODS, Merging, TileDetections, ViewDetections, merge_tiles, merge_views
from pretrain3d.evaluation.froc import FALSE_POSITIVES_PER_CASE
from pretrain3d.evaluation.matching import Boxes, Matches, match
from pretrain3d.evaluation.protocol import KEYS, values

IOUS = (1e-5, 0.1, 0.2, 0.3, 0.4, 0.5)
GRID: dict[str, tuple[Any, ...]] = {  # searched in this order
    "tile_iou": IOUS,
    "method": METHODS,
    "view_iou": IOUS,
    "min_score": (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    "min_size": (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
}
ROUNDS = 2
GAIN = 1e-6  # what a setting must win by to replace the one that stands
HIT_IOU = 0.10  # of the operating points
DEFAULT = Merging()

Tiled = dict[tuple[float, float], dict[str, list[ViewDetections]]]  # by what tiles depend on, by case


@dataclass(frozen=True)
class SweepCase:
    """A validation case: what the network found in it, not merged, and its objects.

    Attributes:
        views: of all views and networks, boxes in cached voxels.
        target: "boxes" (M, 6) in the same voxels, "labels" (M,), "annotated" (class indices).
    """

    views: list[TileDetections]
    target: Boxes


@dataclass
class Sweep:
    """What a sweep found.

    Attributes:
        metric: what it maximised.
        merging: the best settings.
        value: the metric with them.
        value_before: the metric with the settings that it started from.
        operating: the row of `operating_points` for the wanted rate, with the best settings.
        operating_points: the rows for the usual rates.
        trials: one row per evaluation: the settings and the value.
    """

    metric: str
    merging: Merging
    value: float
    value_before: float
    operating: dict[str, float]
    operating_points: list[dict[str, float]]
    trials: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint; without the trials."""
        values = {name: getattr(self, name) for name in ("metric", "value", "value_before", "operating")}
        return {**values, "operating_points": self.operating_points, "merging": self.merging.to_dict()}


def check_metric(metric: str) -> None:
    """Raises `UserError` unless ``metric`` is a key of `evaluation.protocol.KEYS`."""
    if metric not in KEYS:
        raise UserError(f"metric={metric} is unknown{suggestion(metric, KEYS) or '.'} Known: {', '.join(KEYS)}")


def sweep(
    cases: Mapping[str, SweepCase],
    classes: Sequence[str],
    metric: str = "mAP",
    false_positives: float = 1.0,
    start: Merging = DEFAULT,
    fixed: Collection[str] = (),
) -> Sweep:
    """Coordinate search over `GRID`: one setting after the other, twice at most. A tie leaves a setting as it is.

    The cases must not be those that are reported: what is chosen on a case flatters it.

    Args:
        cases: validation cases by id.
        classes: names of the classes; labels index into them.
        metric: a key of `evaluation.protocol.KEYS`, overall.
        false_positives: per case, of the operating point.
        start: where the search begins, and what it is compared with.
        fixed: settings of `GRID` that stay as they are in ``start``.

    Raises:
        UserError: an unknown metric, one that these cases do not define, or no case has an object.
    """
    check_metric(metric)
    if not any(len(case.target["labels"]) for case in cases.values()):
        raise UserError(f"none of the {len(cases)} validation cases has an object to find; a sweep needs some")
    targets = {case_id: case.target for case_id, case in cases.items()}
    seen: dict[Merging, float] = {}
    tiled: Tiled = {}

    def evaluated(merging: Merging) -> float:
        if merging not in seen:
            matches = match(_predictions(cases, merging, tiled), targets, classes)
            seen[merging] = float(values(matches, np.ones((1, len(cases))))[0][metric][0])
            if np.isnan(seen[merging]):
                raise UserError(f"{metric} is not defined on these {len(cases)} validation cases; take another metric")
        return seen[merging]

    best = start
    for _ in range(ROUNDS):
        before = best
        for name, options in GRID.items():
            for option in () if name in fixed else options:
                candidate = replace(best, **{name: option})
                if evaluated(candidate) > evaluated(best) + GAIN:
                    best = candidate
        if best == before:
            break
    trials = [{**merging.to_dict(), metric: value} for merging, value in seen.items()]
    rates = [false_positives, *FALSE_POSITIVES_PER_CASE]
    operating, *points = operating_points(match(_predictions(cases, best, tiled), targets, classes), rates)
    return Sweep(metric, best, seen[best], evaluated(start), operating, points, trials)


def operating_points(matches: Matches, rates: Sequence[float]) -> list[dict[str, float]]:
    """For every rate of false positives per case the score from which on boxes are kept, and what is then found.

    Classes are pooled, a hit is an IoU of at least `HIT_IOU`. The threshold lies halfway between the last score that is
    kept and the first that is not, so that it is no case's own; 0 where everything may be kept.

    Returns:
        rows ``{"false_positives_per_case", "threshold", "sensitivity", "measured"}``, the last being the false
        positives per case that there really are.
    """
    pooled, column = matches.pooled(), matches.at(HIT_IOU)
    scores, hits = pooled.scores, pooled.hits[:, column]
    num_cases, num_objects = max(int(pooled.annotated.sum()), 1), int(pooled.objects.sum())
    false = np.append(0, (~hits).cumsum())  # after the n best
    ends = np.flatnonzero(np.append(np.diff(scores, prepend=math.inf) != 0, True))  # equal scores go together
    rows = []
    for rate in rates:
        kept = int(ends[np.flatnonzero(false[ends] <= rate * num_cases)[-1]])
        above = float(scores[kept - 1]) if kept else 1.0 + 1e-6
        threshold = (above + float(scores[kept])) / 2 if kept < len(scores) else 0.0
        rows.append({
            "false_positives_per_case": float(rate),
            "threshold": threshold,
            "sensitivity": float(hits[:kept].sum() / num_objects) if num_objects else 0.0,
            "measured": float(false[kept] / num_cases),
        })  # fmt: skip
    return rows


def measure_at(threshold: float, matches: Matches) -> dict[str, float | None]:
    """What the boxes from a score on find, classes pooled, a hit being an IoU of at least `HIT_IOU`.

    Returns:
        ``{"threshold", "sensitivity", "false_positives_per_case"}``; sensitivity None without objects.
    """
    pooled = matches.pooled()
    hits = pooled.hits[pooled.scores >= threshold, matches.at(HIT_IOU)]
    objects = int(pooled.objects.sum())
    return {
        "threshold": threshold,
        "sensitivity": float(hits.sum() / objects) if objects else None,
        "false_positives_per_case": float((~hits).sum() / max(int(pooled.annotated.sum()), 1)),
    }


def _predictions(cases: Mapping[str, SweepCase], merging: Merging, tiled: Tiled) -> dict[str, Boxes]:
    """What `merge.merge` gives. Nearly all of its time goes into the tiles, once for what of `GRID` they need."""
    key = (merging.tile_iou, merging.min_score)
    if key not in tiled:
        tiled[key] = {case_id: [merge_tiles(view, merging) for view in case.views] for case_id, case in cases.items()}
    merged = {case_id: merge_views(views, merging) for case_id, views in tiled[key].items()}
    return {
        case_id: {"boxes": found.boxes.numpy(), "scores": found.scores.numpy(), "labels": found.labels.numpy()}
        for case_id, found in merged.items()
    }
