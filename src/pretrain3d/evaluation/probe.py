"""What frozen features know: from the features of other patients' patches, does a patch hold an organ?"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

NEIGHBOURS = 10
MIN_PATCHES = 3  # with and without a class, for the class to count


def neighbour_votes(
    features: np.ndarray, present: np.ndarray, groups: np.ndarray, neighbours: int = NEIGHBOURS
) -> np.ndarray:
    """The share of the nearest patches of other patients that hold each class.

    Features are standardised per channel; the nearest are those with the largest cosine.

    Args:
        features: (N, C).
        present: (N, K) bool.
        groups: (N,) patient of each patch.
        neighbours: that vote; fewer where there are not as many.

    Returns:
        (N, K) float64 from 0 to 1; NaN where there is no patch of another patient.
    """
    features = np.asarray(features, dtype=np.float64)
    std = features.std(axis=0)
    scaled = (features - features.mean(axis=0)) / np.where(std > 0, std, 1.0)
    scaled /= np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-12)
    cosines = np.where(groups[:, None] == groups[None], -np.inf, scaled @ scaled.T)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :neighbours]  # (N, neighbours)
    counts = np.isfinite(np.take_along_axis(cosines, order, axis=1))  # those of the same patient vote nothing
    votes = (np.asarray(present)[order] & counts[..., None]).sum(axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return votes / counts.sum(axis=1)[:, None]


def auroc(scores: np.ndarray, present: np.ndarray) -> float:
    """The probability that a patch with the class scores above one without; ties count half.

    Args:
        scores: (N,).
        present: (N,) bool, both kinds there.
    """
    positives = int(present.sum())
    ranks = rankdata(scores)[present]
    return float((ranks.sum() - positives * (positives + 1) / 2) / (positives * (len(present) - positives)))


def probe(features: np.ndarray, present: np.ndarray, groups: np.ndarray) -> float | None:
    """Mean area under the ROC curve over the classes of which there are patches with and without; 0.5 is chance.

    Args:
        features, present, groups: see `neighbour_votes`.

    Returns:
        None where no class can be judged or all patches are of one patient.
    """
    votes = neighbour_votes(features, present, groups)
    judged = np.isfinite(votes).all(axis=1)
    votes, present = votes[judged], present[judged]
    areas = [
        auroc(votes[:, label], present[:, label])
        for label in range(present.shape[1])
        if MIN_PATCHES <= present[:, label].sum() <= len(present) - MIN_PATCHES
    ]
    return float(np.mean(areas)) if areas else None
