"""What frozen features know: from the features of other patients' voxels, which organ is it?"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

NEIGHBOURS = 10
MIN_VOXELS = 3  # of a class and of none, for the class to count


def neighbour_votes(
    features: np.ndarray, present: np.ndarray, known: np.ndarray, groups: np.ndarray, neighbours: int = NEIGHBOURS
) -> np.ndarray:
    """The share of the nearest voxels of other patients that are of each class.

    Features are standardised per channel; the nearest are those with the largest cosine, for each class among the
    voxels of which it is known.

    Args:
        features: (N, C).
        present: (N, K) bool.
        known: (N, K) bool, False: the class was not annotated there, and ``present`` says nothing.
        groups: (N,) patient of each voxel.
        neighbours: that vote; fewer where there are not as many.

    Returns:
        (N, K) float64 from 0 to 1; NaN where there is no voxel of another patient.
    """
    features = np.asarray(features, dtype=np.float64)
    std = features.std(axis=0)
    scaled = (features - features.mean(axis=0)) / np.where(std > 0, std, 1.0)
    scaled /= np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-12)
    cosines = np.where(groups[:, None] == groups[None], -np.inf, scaled @ scaled.T)
    votes = np.full(present.shape, np.nan)
    for pattern in np.unique(known, axis=1).T:  # classes that are known of the same voxels ask the same ones
        classes = (known == pattern[:, None]).all(axis=0)
        near = np.where(pattern, cosines, -np.inf)
        order = np.argsort(-near, axis=1, kind="stable")[:, :neighbours]  # (N, neighbours)
        counts = np.isfinite(np.take_along_axis(near, order, axis=1))  # those of the same patient vote nothing
        found = (present[:, classes][order] & counts[..., None]).sum(axis=1)  # (N, classes)
        asked = counts.sum(axis=1)[:, None]
        votes[:, classes] = np.where(asked > 0, found / np.maximum(asked, 1), np.nan)
    return votes


def auroc(scores: np.ndarray, present: np.ndarray) -> float:
    """The probability that a voxel of the class scores above one of none; ties count half.

    Args:
        scores: (N,).
        present: (N,) bool, both kinds there.
    """
    positives = int(present.sum())
    ranks = rankdata(scores)[present]
    return float((ranks.sum() - positives * (positives + 1) / 2) / (positives * (len(present) - positives)))


def probe(features: np.ndarray, present: np.ndarray, known: np.ndarray, groups: np.ndarray) -> float | None:
    """Mean area under the ROC curve over the classes of which there are voxels, and voxels of none; 0.5 is chance.

    Args:
        features, present, known, groups: see `neighbour_votes`.

    Returns:
        None where no class can be judged or all voxels are of one patient.
    """
    votes = neighbour_votes(features, present, known, groups)
    judged = known & np.isfinite(votes)
    areas = [
        auroc(of_class[rows], there[rows])
        for of_class, there, rows in zip(votes.T, present.T, judged.T, strict=True)
        if MIN_VOXELS <= there[rows].sum() <= rows.sum() - MIN_VOXELS
    ]
    return float(np.mean(areas)) if areas else None
