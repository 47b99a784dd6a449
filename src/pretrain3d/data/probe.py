"""The patches on which a network is watched: the same ones for all runs on a store, with their organs where known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pretrain3d.data.batch import generator
from pretrain3d.data.case import Case
from pretrain3d.data.normalise import Normalisation
from pretrain3d.data.store import Store

MIN_SHARE = 0.01  # of a patch's voxels, for an organ to count as there


class ProbePatches:
    """``number`` patches by index, dealt evenly to cases, at random places; not augmented.

    They come from all cases with a map of organs, test cases excepted; from ``otherwise`` where there is none.

    Args:
        store: to read from.
        normalisation: case -> how its intensities are normalised.
        patch_size: (3,) voxels.
        otherwise: case ids.
        number: of patches.

    Attributes:
        has_organs: whether the patches come with organs.
        groups: (number,) int64, patches of one patient have the same.
    """

    def __init__(
        self,
        store: Store,
        normalisation: Callable[[Case], Normalisation],
        patch_size: Sequence[int],
        otherwise: Sequence[str],
        number: int,
    ) -> None:
        self.store = store
        self.normalisation = normalisation
        self.patch = np.asarray(patch_size, dtype=np.int64)
        cases = [case for case in store.cases.values() if case.has_semantic and case.split != "test"]
        self.has_organs = bool(cases)
        cases = cases or [store.cases[case_id] for case_id in otherwise]
        order = generator(0, 0, "probe cases").permutation(len(cases))
        self.cases = [cases[order[index % len(cases)]] for index in range(number if cases else 0)]
        names = sorted({case.group for case in self.cases})
        self.groups = np.asarray([names.index(case.group) for case in self.cases], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> tuple[Tensor, np.ndarray]:
        """The image (C, X, Y, Z) float32, normalised, padded where the volume is smaller; and (K,) bool, organs."""
        case = self.cases[index]
        shape = np.asarray(case.shape)
        room = np.maximum(shape - self.patch, 0)
        start = generator(0, index, "probe place").integers(room + 1)
        stop = np.minimum(start + self.patch, shape)
        region = tuple(int(value) for value in start), tuple(int(value) for value in stop)
        normalisation = self.normalisation(case)
        image = normalisation(torch.from_numpy(self.store.read(case.id, "image", *region)))
        pads = normalisation(torch.tensor(normalisation.pad_value).view(-1, 1, 1, 1))  # (C, 1, 1, 1)
        padded = pads.expand(-1, *self.patch.tolist()).clone()
        padded[:, : image.shape[1], : image.shape[2], : image.shape[3]] = image
        return padded, self._organs(case, *region)

    def _organs(self, case: Case, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray:
        num_classes = len(self.store.semantic_classes)
        if not self.has_organs:
            return np.zeros(num_classes, dtype=bool)
        organs = self.store.read(case.id, "semantic", start, stop)
        counts = np.bincount(organs.ravel().astype(np.int64), minlength=num_classes + 1)[1 : num_classes + 1]
        return counts >= MIN_SHARE * self.patch.prod()
