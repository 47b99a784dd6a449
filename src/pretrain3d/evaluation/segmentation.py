"""How well organs are found, voxel by voxel: Dice and volumes of whole cases, per class, over all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain3d.evaluation.protocol import mean_of_present
from pretrain3d.evaluation.statistics import SAMPLES, intervals, plain_and_drawn
from pretrain3d.parallel import all_sum

KEYS = ("dice", "volume_error", "trivial_dice")  # of `scores`, in its order


class SegmentationScores:
    """Means over cases, fed case by case; each case by one process only.

    Args:
        classes: names of the classes of each data set.

    Attributes:
        names: of all classes, those of several sets as "<set>/<class>".
    """

    def __init__(self, classes: Mapping[str, Sequence[str]]) -> None:
        several = len(classes) > 1
        self.names = [f"{part}/{name}" if several else name for part, names in classes.items() for name in names]
        self.first = np.cumsum([0, *map(len, classes.values())]).tolist()
        self.reset()

    def reset(self) -> None:
        """Forgets all cases."""
        self._sums = torch.zeros(self.first[-1], 3, 2)  # per class and score: sum and number of cases

    def update(self, index: int, found: Tensor, labels: Tensor, annotated: np.ndarray) -> np.ndarray:
        """Adds one whole case.

        Args:
            index: of its data set.
            found: (K, X, Y, Z) bool, which voxels each class of the set is said to have.
            labels: (X, Y, Z) integers, 0 = background, 1 + class.
            annotated: (K,) bool, the classes that are scored; voxels of the others do not count.

        Returns:
            (all classes, 3) the `scores` of the case, nan where there are none.
        """
        of_case = torch.full(self._sums.shape[:2], torch.nan)
        unknown = torch.isin(labels, torch.from_numpy(np.flatnonzero(~annotated) + 1).to(labels.dtype))
        if unknown.any():
            found, labels = found[:, ~unknown], labels[~unknown]
        for row in np.flatnonzero(annotated).tolist():
            of_case[self.first[index] + row] = torch.tensor(scores(found[row], labels == row + 1))
        self._sums += torch.stack([of_case.nan_to_num(), (~of_case.isnan()).float()], -1)
        return of_case.numpy()

    def compute(self, device: torch.device | str = "cpu") -> dict[str, float]:
        """Of all processes' cases; nan where there is none.

        Args:
            device: where the processes exchange numbers.

        Returns:
            ``dice``, ``volume_error`` and ``trivial_dice`` (see `scores`), means over the classes of the means over
            their cases; and "dice/<class>", of several sets "dice/<set>/<class>".
        """
        sums = all_sum(self._sums.to(device)).double().cpu()
        means = sums[..., 0] / sums[..., 1]  # (K, 3), nan without a case
        overall = means.nanmean(0)
        values = {key: float(overall[column]) for column, key in enumerate(KEYS)}
        return values | {f"dice/{name}": float(value) for name, value in zip(self.names, means[:, 0], strict=True)}


def summarise(
    cases: Sequence[np.ndarray], names: Sequence[str], groups: Sequence[str], samples: int = SAMPLES
) -> dict[str, dict[str, Any]]:
    """What `SegmentationScores.compute` gives of whole cases, with 95 % bootstrap intervals.

    Args:
        cases: of each its (K, 3) scores, as `SegmentationScores.update` returns them.
        names: of the K classes.
        groups: one name per case; cases of a group (a patient) are drawn together.
        samples: of the bootstrap.

    Returns:
        {"metrics": {key: {"value", "low", "high"}}, "per_class": {class: {key: {...}}}} of `KEYS`.
    """
    weights = plain_and_drawn(len(cases), samples, groups=groups)  # (1 + S, cases)
    values = np.stack(cases).astype(float)  # (cases, K, 3)
    known = ~np.isnan(values)
    total, count = (np.einsum("sc,ckn->skn", weights, part) for part in (np.where(known, values, 0.0), known))
    means = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    per_class = {
        name: {key: means[:, row, column] for column, key in enumerate(KEYS)} for row, name in enumerate(names)
    }
    everywhere = np.where(np.isnan(means), means[:1], means)  # (1 + S, K, 3): the mean is over the same classes in all
    overall = {key: mean_of_present(list(everywhere[..., column].T)) for column, key in enumerate(KEYS)}
    return intervals(overall, per_class)


def scores(found: Tensor, true: Tensor) -> tuple[float, float, float]:
    """Of one class in one case, from bools of one shape, a value per voxel.

    Returns:
        Dice, 2 |A and B| / (|A| + |B|), nan where both are empty, 0 where only the truth is; the relative error of the
        volume, | |A| - |B| | / |B|, nan where the truth is empty; and the Dice of an answer that knows nothing and says
        yes everywhere, which no constant answer exceeds, nan where the truth is empty.
    """
    size, volume, both = int(found.sum()), int(true.sum()), int((found & true).sum())
    dice = 2 * both / (size + volume) if size + volume else float("nan")
    if not volume:
        return dice, float("nan"), float("nan")
    return dice, abs(size - volume) / volume, 2 * volume / (volume + true.numel())
