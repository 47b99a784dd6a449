"""Average precision by COCO's 101-point rule, in float64, for any number of case weightings at once."""

from __future__ import annotations

import numpy as np

from pretrain3d.evaluation.matching import ClassMatches, batches

RECALLS = np.linspace(0.0, 1.0, 101)
_LEVELS = np.append(RECALLS, [np.inf, np.inf])


def average_precision(matches: ClassMatches, weights: np.ndarray) -> np.ndarray:
    """AP of one class: the mean, over 101 recalls, of the best precision at that recall or beyond.

    A case of weight w counts as w copies of it, so that bootstrap samples need no second matching.

    Args:
        weights: (S, C) how often each sample holds each case; ones for the plain value.

    Returns:
        (S, T): AP per sample and IoU threshold; nan where a sample holds no object of the class.

    Source: Lin et al., Microsoft COCO (2014), as in pycocotools (equal to 1e-9). Recall stays float64: in float32 k/n
        misses a recall level it reaches. Classes without objects are left out of means, not counted as -1.
    """
    weights = np.asarray(weights, np.float64)
    num_objects = weights @ matches.objects  # (S,)
    result = np.zeros((len(weights), matches.hits.shape[1]))
    found = np.flatnonzero(matches.hits.any(axis=1))
    counts = matches.counts_before(found + 1)  # (C, F)
    columns = [np.flatnonzero(matches.hits[found, column]) for column in range(result.shape[1])]
    for rows in batches(len(weights), len(found)):
        seen = weights[rows] @ counts  # (s, F): predictions up to and with each of these
        weight = weights[rows][:, matches.case[found]]
        for column, here in enumerate(columns):
            result[rows, column] = _from_hits(weight[:, here], seen[:, here], num_objects[rows])
    result[num_objects == 0] = np.nan
    return result


def with_absent(matches: ClassMatches, precision: np.ndarray) -> np.ndarray:
    """`average_precision` (S, T) for a mean over classes: where a sample holds no object, the value of the whole set.

    So every sample is a mean over the same classes; without this, samples that lack a hard class would be better ones.
    A class without any object stays nan.
    """
    absent = np.isnan(precision)
    if not absent.any() or not matches.objects.any():
        return precision
    return np.where(absent, average_precision(matches, np.ones((1, len(matches.objects)))), precision)


def _from_hits(found: np.ndarray, seen: np.ndarray, num_objects: np.ndarray) -> np.ndarray:
    """AP from the hits alone (precision is best at a hit, and recall changes only there).

    Args:
        found: (S, H) weight of each hit, in descending score.
        seen: (S, H) weight of all predictions up to and with it.
        num_objects: (S,).
    """
    true = found.cumsum(axis=1)  # (S, H)
    precision = np.divide(true, seen, out=np.zeros_like(true), where=seen > 0)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = _levels_reached(true / np.maximum(num_objects, 1)[:, None])  # by this hit or an earlier one
    new = np.diff(reached, axis=1, prepend=0)
    return np.einsum("sh,sh->s", new, precision) / len(RECALLS)


def _levels_reached(recall: np.ndarray) -> np.ndarray:
    """How many of `RECALLS` are at most `recall`, exactly as a search would find, in fewer passes."""
    near = (recall * 100).astype(np.intp)  # off by one at most, by rounding
    return near + (_LEVELS[near] <= recall) + (_LEVELS[near + 1] <= recall)


def precision_recall(matches: ClassMatches, column: int) -> dict[str, list[float]]:
    """The 101-point curve of one class at one IoU threshold: {"recall", "precision"}; empty without objects."""
    total = int(matches.objects.sum())
    if total == 0:
        return {"recall": [], "precision": []}
    hits = np.flatnonzero(matches.hits[:, column])
    precision = np.arange(1, len(hits) + 1) / (hits + 1)
    precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)  # 0 beyond the last recall reached
    first = np.searchsorted(np.arange(1, len(hits) + 1) / total, RECALLS, side="left")
    return {"recall": RECALLS.tolist(), "precision": precision[first].tolist()}
