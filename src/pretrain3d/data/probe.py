"""The patches on which a network is watched: the same ones for all runs on a store, with organs of some voxels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pretrain3d.data.batch import generator
from pretrain3d.data.case import Case
from pretrain3d.data.normalise import Normalisation
from pretrain3d.data.semantic import annotated_organs
from pretrain3d.data.store import Store

VOXELS = 16  # of a patch that are asked about: half of them on its organs in turn, the others anywhere


class ProbePatches:
    """``number`` patches by index, dealt evenly to cases, at random places; not augmented.

    They come from all cases with a map of organs, test cases and ``learned`` excepted; from ``otherwise`` where there
    is none.

    Args:
        store: to read from.
        normalisation: case -> how its intensities are normalised.
        patch_size: (3,) voxels.
        otherwise: case ids.
        number: of patches.
        learned: case ids whose maps the network is trained on.

    Attributes:
        has_organs: whether there are maps of organs.
        known: (number, K) bool, which organs were annotated in the case of a patch.
        groups: (number,) int64, patches of one patient have the same.
    """

    def __init__(
        self,
        store: Store,
        normalisation: Callable[[Case], Normalisation],
        patch_size: Sequence[int],
        otherwise: Sequence[str],
        number: int,
        learned: Sequence[str] = (),
    ) -> None:
        self.store = store
        self.normalisation = normalisation
        self.patch = np.asarray(patch_size, dtype=np.int64)
        out = {*learned, *(case.id for case in store.cases.values() if case.split == "test")}
        cases = [case for case in store.cases.values() if case.has_semantic and case.id not in out]
        self.has_organs = bool(cases)
        cases = cases or [store.cases[case_id] for case_id in otherwise]
        order = generator(0, 0, "probe cases").permutation(len(cases))
        self.cases = [cases[order[index % len(cases)]] for index in range(number if cases else 0)]
        names = sorted({case.group for case in self.cases})
        self.groups = np.asarray([names.index(case.group) for case in self.cases], dtype=np.int64)
        num_classes = len(store.semantic_classes)
        known = np.array([annotated_organs(case, num_classes) for case in self.cases], dtype=bool)
        self.known = known.reshape(len(self.cases), num_classes)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """A patch and what is asked about it.

        Returns:
            the image (C, X, Y, Z) float32, normalised, padded where the volume is smaller; voxels of it, (V, 3) int64;
            and the organ at each, (V,) int64, 0 = none, 1.. = the store's.
        """
        case = self.cases[index]
        shape = np.asarray(case.shape)
        room = np.maximum(shape - self.patch, 0)
        start = generator(0, index, "probe place").integers(room + 1)
        stop = np.minimum(start + self.patch, shape)
        region = tuple(int(value) for value in start), tuple(int(value) for value in stop)
        normalisation = self.normalisation(case)
        image = normalisation(torch.from_numpy(self.store.read(case.id, "image", *region)))
        padded = torch.tensor(normalisation.padding).view(-1, 1, 1, 1).expand(-1, *self.patch.tolist()).clone()
        padded[:, : image.shape[1], : image.shape[2], : image.shape[3]] = image
        organs = np.zeros(stop - start, dtype=np.int64)
        if self.has_organs:
            organs = self.store.read(case.id, "semantic", *region).astype(np.int64)
        places = _places(organs, generator(0, index, "probe voxels"))
        return padded, places, organs[tuple(places.T)]


def _places(organs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(x, y, z) labels -> (`VOXELS`, 3) int64."""
    places = rng.integers(organs.shape, size=(VOXELS, 3))
    there = np.unique(organs)
    there = there[there > 0]
    for row in range(VOXELS // 2 if len(there) else 0):
        voxels = np.flatnonzero(organs == there[row % len(there)])
        places[row] = np.unravel_index(voxels[rng.integers(len(voxels))], organs.shape)
    return places
