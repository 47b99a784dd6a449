"""Maps of organs as targets of patches: which voxels, which classes count, and where to find the rare ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pretrain3d.config import UserError
from pretrain3d.data.batch import generator
from pretrain3d.data.case import Case
from pretrain3d.data.store import Store

LATERAL = re.compile(r"(?i:(?<![a-z])(?:left|right))|(?:Left|Right)|[ _.-][LRlr]$|^[LRlr][ _.-]")
VOXELS = 256  # remembered per organ and case, to place patches on


class SemanticMaps:
    """The maps of the cases of one store, read by region.

    Args:
        store: to read from.
        cases: each has a map.

    Raises:
        UserError: a case without one.
    """

    def __init__(self, store: Store, cases: Sequence[Case]) -> None:
        missing = [case.id for case in cases if not case.has_semantic]
        if missing:
            raise UserError(f"{store.path}: case {missing[0]} has no semantic map ({len(missing)} cases have none)")
        self.store = store
        self.mirrored = mirror_table(store.semantic_classes, store.mirror_classes)
        self._lookup = np.concatenate([[0], self.mirrored + 1]).astype(
            np.uint8 if len(self.mirrored) < 256 else np.int16
        )
        self._voxels: dict[str, list[np.ndarray]] = {}

    def read(
        self, case: Case, start: tuple[int, ...], stop: tuple[int, ...], mirror: bool
    ) -> tuple[Tensor, np.ndarray]:
        """The voxels ``[start, stop)``.

        Args:
            case: of the store.
            start, stop: three voxels each, inside the volume.
            mirror: the patch will be mirrored left to right: lateral organs are exchanged (the voxels stay in place).

        Returns:
            (x, y, z) uint8 or int16, 0 = background, 1 + index into the store's semantic classes; and (K,) bool, the
            classes that were annotated.
        """
        labels = self.store.read(case.id, "semantic", start, stop)
        annotated = annotated_organs(case, len(self.mirrored))
        if mirror:
            return torch.from_numpy(self._lookup[labels]), annotated[self.mirrored]
        return torch.from_numpy(labels.astype(self._lookup.dtype)), annotated

    def voxel(self, case: Case, rng: np.random.Generator) -> np.ndarray | None:
        """A voxel (3,) of one of the annotated organs of a case, drawn uniformly; ``None`` where it has none."""
        if case.id not in self._voxels:
            self._voxels[case.id] = self._sample(case)
        organs = self._voxels[case.id]
        if not organs:
            return None
        voxels = organs[rng.integers(len(organs))]
        return voxels[rng.integers(len(voxels))]

    def _sample(self, case: Case) -> list[np.ndarray]:
        """Per annotated organ that occurs, (n, 3) of its voxels: the same ones in every process."""
        labels = self.store.read(case.id, "semantic", (0, 0, 0), case.shape).ravel()
        filled = np.flatnonzero(np.concatenate([[False], annotated_organs(case, len(self.mirrored))])[labels])
        of_filled = labels[filled]
        rng = generator(0, 0, f"organs of {case.id}")
        chosen = []
        for label in np.unique(of_filled):
            voxels = filled[of_filled == label]
            if len(voxels) > VOXELS:
                voxels = rng.choice(voxels, VOXELS, replace=False)
            chosen.append(np.stack(np.unravel_index(voxels, case.shape), axis=1))
        return chosen


def annotated_organs(case: Case, num_classes: int) -> np.ndarray:
    """(K,) bool: the semantic classes whose absence in the case's map means something."""
    if case.semantic_annotated is None:
        return np.ones(num_classes, dtype=bool)
    annotated = np.zeros(num_classes, dtype=bool)
    annotated[list(case.semantic_annotated)] = True
    return annotated


def unpaired_sides(names: Sequence[str], mirror_classes: dict[str, str]) -> list[str]:
    """The classes that are left or right by their name and have no counterpart on the other side."""
    others = [names[other] for other in mirror_table(names, mirror_classes)]
    return [name for name, other in zip(names, others, strict=True) if LATERAL.search(name) and other == name]


def mirror_table(names: Sequence[str], mirror_classes: dict[str, str]) -> np.ndarray:
    """(K,) int64: the class that each class becomes when left and right are exchanged; both names must be known."""
    index = {name: label for label, name in enumerate(names)}
    table = np.arange(len(names))
    for name, other in mirror_classes.items():
        if name in index and other in index:
            table[index[name]], table[index[other]] = index[other], index[name]
    return table
