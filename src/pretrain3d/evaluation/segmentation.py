"""How well organs are found, voxel by voxel: Dice and volumes of whole cases, per class, over all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pretrain3d.parallel import all_sum


class SegmentationScores:
    """Means over cases, fed case by case; each case by one process only.

    Args:
        classes: names of the classes of each data set.
    """

    def __init__(self, classes: Mapping[str, Sequence[str]]) -> None:
        self.classes = {name: list(names) for name, names in classes.items()}
        self.first = np.cumsum([0, *map(len, self.classes.values())]).tolist()
        self.reset()

    def reset(self) -> None:
        """Forgets all cases."""
        self._sums = torch.zeros(self.first[-1], 3, 2)  # per class and score: sum and number of cases

    def update(self, index: int, found: Tensor, labels: Tensor, annotated: np.ndarray) -> None:
        """Adds one whole case.

        Args:
            index: of its data set.
            found: (K, X, Y, Z) bool, which voxels each class of the set is said to have.
            labels: (X, Y, Z) integers, 0 = background, 1 + class.
            annotated: (K,) bool, the classes that are scored.
        """
        for row in np.flatnonzero(annotated).tolist():
            values = torch.tensor(scores(found[row], labels == row + 1))
            known = ~values.isnan()
            self._sums[self.first[index] + row] += torch.stack([values.nan_to_num(), known.float()], 1)

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
        values = {key: float(overall[column]) for column, key in enumerate(("dice", "volume_error", "trivial_dice"))}
        several = len(self.classes) > 1
        names = [f"{part}/{name}" if several else name for part, names in self.classes.items() for name in names]
        return values | {f"dice/{name}": float(value) for name, value in zip(names, means[:, 0], strict=True)}


def scores(found: Tensor, true: Tensor) -> tuple[float, float, float]:
    """Of one class in one case, from (X, Y, Z) bool each.

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
