"""The protocol: which numbers a run is judged by, from one matching. Keys as in docs/design.md section 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pretrain3d.evaluation.average_precision import average_precision, precision_recall, with_absent
from pretrain3d.evaluation.case_level import case_auroc, case_average_precision
from pretrain3d.evaluation.froc import froc_curve, froc_score
from pretrain3d.evaluation.matching import THRESHOLDS, Boxes, ClassMatches, Matches, match

FROC_THRESHOLDS = (0.10, 0.50)
MAP_THRESHOLDS = tuple(float(t) for t in THRESHOLDS if t <= 0.50)
CASE_KEYS = ("case_AUROC", "case_AP")
KEYS = ["mAP", *(f"AP@{t:.2f}" for t in THRESHOLDS), *(f"FROC@{t:.2f}" for t in FROC_THRESHOLDS), *CASE_KEYS]


def evaluate(predictions: Mapping[str, Boxes], targets: Mapping[str, Boxes], classes: Sequence[str]) -> dict[str, Any]:
    """All numbers of a set of cases: `summarise(match(predictions, targets, classes))`."""
    return summarise(match(predictions, targets, classes))


def summarise(matches: Matches) -> dict[str, Any]:
    """Numbers, curves and one row per case.

    Returns:
        the keys of `KEYS`; "per_class": {name: {same keys}}; "curves"; "cases". A value is null (None) without objects.
        curves, at IoU 0.10: {"froc": {"false_positives_per_case", "sensitivity"}, "froc_per_class": {class: {...}},
        "pr": {class: {"recall", "precision"}}}, and the same at IoU 0.50 as "froc@0.50" and so on; lists are empty
        without objects.
    """
    overall, per_class = values(matches, np.ones((1, len(matches.case_ids))))
    return {
        **{key: as_number(value[0]) for key, value in overall.items()},
        "per_class": {
            name: {key: as_number(value[0]) for key, value in row.items()} for name, row in per_class.items()
        },
        "curves": _curves(matches),
        "cases": case_rows(matches),
    }


def values(matches: Matches, weights: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """Every key for every weighting of the cases: overall, and per class.

    Args:
        weights: (S, C) how often each sample holds each case.

    Returns:
        {key: (S,)} and {class: {key: (S,)}}; nan without objects. Means are over the classes that have an object in
        any case, in every sample: see `with_absent`.
    """
    per_class, averaged = {}, []
    for name, one in zip(matches.classes, matches.per_class, strict=True):
        precision = average_precision(one, weights)
        per_class[name] = _ordered(_of_thresholds(matches, precision) | _curves_and_cases(matches, one, weights))
        averaged.append(_of_thresholds(matches, with_absent(one, precision)))
    mean = {key: mean_of_present([row[key] for row in averaged]) for key in averaged[0]}
    return _ordered(mean | _curves_and_cases(matches, matches.pooled(), weights)), per_class


def case_rows(matches: Matches) -> list[dict[str, Any]]:
    """One row per case at IoU 0.10: {"case", "objects", "predictions", "hits", "missed", "best_false_positive"}.

    `predictions` are those looked at (the 100 best of each annotated class), `best_false_positive` is a score or None.
    """
    pooled = matches.pooled()
    hits = pooled.hits[:, matches.at(0.10)]
    rows = []
    for index, case_id in enumerate(matches.case_ids):
        mine = pooled.case == index
        false, found = pooled.scores[mine & ~hits], int((mine & hits).sum())
        rows.append(
            {
                "case": case_id,
                "objects": int(pooled.objects[index]),
                "predictions": int(mine.sum()),
                "hits": found,
                "missed": int(pooled.objects[index]) - found,
                "best_false_positive": float(false[0]) if len(false) else None,
            }
        )
    return rows


def as_number(value: float) -> float | None:
    """A plain float, or None for nan: JSON has no nan."""
    return None if np.isnan(value) else float(value)


def _of_thresholds(matches: Matches, precision: np.ndarray) -> dict[str, np.ndarray]:
    """AP@t and mAP, (S,) each, of (S, T)."""
    row = {f"AP@{t:.2f}": precision[:, matches.at(t)] for t in THRESHOLDS}
    return row | {"mAP": precision[:, [matches.at(t) for t in MAP_THRESHOLDS]].mean(axis=1)}


def _curves_and_cases(matches: Matches, one: ClassMatches, weights: np.ndarray) -> dict[str, np.ndarray]:
    """What is defined for one class and for all pooled."""
    froc = {f"FROC@{t:.2f}": froc_score(one, matches.at(t), weights) for t in FROC_THRESHOLDS}
    return froc | dict(zip(CASE_KEYS, (case_auroc(one, weights), case_average_precision(one, weights)), strict=True))


def _ordered(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: row[key] for key in KEYS}


def mean_of_present(rows: list[np.ndarray]) -> np.ndarray:
    """The mean over classes (K of (S,)) of the values that are not nan; nan where there is none."""
    table = np.stack(rows)
    present = ~np.isnan(table)
    count = present.sum(axis=0)
    total = np.where(present, table, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(table.shape[1], np.nan), where=count > 0)


def _curves(matches: Matches) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for threshold, suffix in zip(FROC_THRESHOLDS, ("", "@0.50"), strict=True):
        column = matches.at(threshold)
        named = list(zip(matches.classes, matches.per_class, strict=True))
        result[f"froc{suffix}"] = _froc_points(matches.pooled(), column)
        result[f"froc_per_class{suffix}"] = {name: _froc_points(one, column) for name, one in named}
        result[f"pr{suffix}"] = {name: precision_recall(one, column) for name, one in named}
    return result


def _froc_points(one: ClassMatches, column: int) -> dict[str, list[float]]:
    if not one.objects.any():
        return {"false_positives_per_case": [], "sensitivity": []}
    false, sensitivity = froc_curve(one, column, np.ones((1, len(one.objects))))
    return {"false_positives_per_case": false[0].tolist(), "sensitivity": sensitivity[0].tolist()}
