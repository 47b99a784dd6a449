"""Does a case hold an object at all? A case's score is that of its highest detection, a case without one comes last."""

from __future__ import annotations

import numpy as np

from pretrain3d.evaluation.matching import ClassMatches


def case_scores(matches: ClassMatches) -> np.ndarray:
    """(C,) the highest score of each case, -inf without a prediction."""
    scores = np.full(len(matches.objects), -np.inf)
    np.maximum.at(scores, matches.case, matches.scores)
    return scores


def case_auroc(matches: ClassMatches, weights: np.ndarray) -> np.ndarray:
    """The probability that a case with an object scores higher than one without; ties count half.

    Only cases in which the class is annotated count.

    Args:
        weights: (S, C) how often each sample holds each case.

    Returns:
        (S,); nan in a sample without a case of either kind.
    """
    positive, negative = _in_descending_score(matches, weights)  # (S, G)
    above = positive.cumsum(axis=1) - positive  # positive cases with a higher score than this group's
    wins = ((above + 0.5 * positive) * negative).sum(axis=1)
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    return np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def case_average_precision(matches: ClassMatches, weights: np.ndarray) -> np.ndarray:
    """The sum, over distinct scores, of precision times the recall gained there (not interpolated).

    Arguments and result as in `case_auroc`, with which it shares when it is nan: a set in which every case holds an
    object would give 1 to any detector.
    """
    positive, negative = _in_descending_score(matches, weights)
    true, false = positive.cumsum(axis=1), negative.cumsum(axis=1)
    precision = np.divide(true, true + false, out=np.zeros_like(true), where=true + false > 0)
    total = true[:, -1]
    result = np.divide((precision * positive).sum(axis=1), total, out=np.full(len(total), np.nan), where=total > 0)
    result[false[:, -1] == 0] = np.nan
    return result


def _in_descending_score(matches: ClassMatches, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the cases with and without an object in each group of equal scores, (S, G) each, best group first."""
    scores = case_scores(matches)
    order = np.argsort(-scores, kind="stable")
    starts = np.append(0, np.flatnonzero(scores[order[1:]] != scores[order[:-1]]) + 1)
    weight = (np.asarray(weights, np.float64) * matches.annotated)[:, order]
    holds = matches.objects[order] > 0
    return np.add.reduceat(weight * holds, starts, axis=1), np.add.reduceat(weight * ~holds, starts, axis=1)
