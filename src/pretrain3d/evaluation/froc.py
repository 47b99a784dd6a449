"""FROC: sensitivity against false positives per case."""

from __future__ import annotations

import numpy as np

from pretrain3d.evaluation.matching import ClassMatches

FALSE_POSITIVES_PER_CASE = np.array([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8])


def froc_curve(matches: ClassMatches, column: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corners of the FROC curve at one IoU threshold.

    Predictions with the same score enter together, so the order of the cases does not matter. Only corners are given:
    before and after each score at which something was hit; between them the curve is straight.

    Args:
        column: the column of the IoU threshold in `matches.hits`.
        weights: (S, C) how often each sample holds each case.

    Returns:
        false positives per case and sensitivity, both (S, P), starting at (0, 0). Cases are those in which the class is
        annotated, with or without objects. Sensitivity is nan in a sample without objects.
    """
    weights = np.asarray(weights, np.float64)
    hits = matches.hits[:, column]
    stops = np.append(np.flatnonzero(np.diff(matches.scores)) + 1, len(hits))  # where each group of equal scores ends
    groups = np.unique(np.searchsorted(stops, np.flatnonzero(hits), side="right"))
    ends = np.stack([np.append(0, stops)[groups], stops[groups]], axis=1).ravel()  # before and after each group
    num_cases = weights @ matches.annotated
    num_objects = weights @ matches.objects
    false = weights @ matches.counts_before(ends, ~hits) / np.maximum(num_cases, 1)[:, None]
    true = weights @ matches.counts_before(ends, hits)
    sensitivity = np.divide(true, num_objects[:, None], out=np.full_like(true, np.nan), where=num_objects[:, None] > 0)
    start = np.where(num_objects > 0, 0.0, np.nan)[:, None]
    return np.hstack([np.zeros((len(weights), 1)), false]), np.hstack([start, sensitivity])


def froc_score(matches: ClassMatches, column: int, weights: np.ndarray) -> np.ndarray:
    """Mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4, 8 false positives per case, (S,).

    Linear between the points of the curve, constant beyond its last one; 0 without a hit, nan without objects.
    """
    false, sensitivity = froc_curve(matches, column, weights)
    rows = zip(false, sensitivity, strict=True)
    return np.array([np.interp(FALSE_POSITIVES_PER_CASE, x, y).mean() for x, y in rows])
