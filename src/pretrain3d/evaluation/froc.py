"""FROC: sensitivity against false positives per case."""

from __future__ import annotations

import numpy as np

from pretrain3d.evaluation.matching import ClassMatches, batches

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
    return _Corners(matches, column).curve(weights)


def froc_sensitivity(
    matches: ClassMatches, column: int, weights: np.ndarray, rates: np.ndarray = FALSE_POSITIVES_PER_CASE
) -> np.ndarray:
    """Sensitivity at given false positives per case, (S, R): the curve of `froc_curve` read at `rates` (R,).

    Linear between the points of the curve, constant beyond its last one; 0 without a hit, nan without objects.
    """
    corners = _Corners(matches, column)
    result = np.empty((len(weights), len(rates)))
    for rows in batches(len(weights), corners.num_points):
        for row, x, y in zip(result[rows], *corners.curve(weights[rows]), strict=True):
            row[:] = np.interp(rates, x, y)
    return result


def froc_score(matches: ClassMatches, column: int, weights: np.ndarray) -> np.ndarray:
    """Mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4, 8 false positives per case, (S,); see `froc_sensitivity`."""
    return froc_sensitivity(matches, column, weights).mean(axis=1)


class _Corners:
    """What the corners of a curve count in each case, so that many samples need counting only once."""

    def __init__(self, matches: ClassMatches, column: int) -> None:
        hits = matches.hits[:, column]
        stops = np.append(np.flatnonzero(np.diff(matches.scores)) + 1, len(hits))  # ends of groups of equal scores
        groups = np.unique(np.searchsorted(stops, np.flatnonzero(hits), side="right"))
        ends = np.stack([np.append(0, stops)[groups], stops[groups]], axis=1).ravel()  # before and after each group
        self.false = matches.counts_before(ends, ~hits)  # (C, P)
        self.true = matches.counts_before(ends, hits)
        self.objects, self.annotated = matches.objects, matches.annotated
        self.num_points = len(ends)

    def curve(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `froc_curve`."""
        weights = np.asarray(weights, np.float64)
        num_cases, num_objects = weights @ self.annotated, weights @ self.objects  # (S,)
        false, sensitivity = np.zeros((2, len(weights), self.num_points + 1))
        np.divide(weights @ self.false, np.maximum(num_cases, 1)[:, None], out=false[:, 1:])
        np.divide(weights @ self.true, np.maximum(num_objects, 1)[:, None], out=sensitivity[:, 1:])
        sensitivity[num_objects == 0] = np.nan
        return false, sensitivity
