"""The data sets of a run: which cases of each are trained on, how they are normalised, and patches of all of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pretrain3d.config import UserError, by_text
from pretrain3d.data.batch import generator
from pretrain3d.data.case import Case
from pretrain3d.data.normalise import check_intensity, normalisation_for
from pretrain3d.data.patches import PatchDataset
from pretrain3d.data.semantic import annotated_organs
from pretrain3d.data.splits import fold_cases, fold_or_all
from pretrain3d.data.store import Store

Pool = Literal["train", "pretrain", "all"]
Labels = Literal["semantic", "objects"]


@dataclass(frozen=True)
class LabelMap:
    """What a whole case teaches voxel by voxel.

    Attributes:
        labels: (X, Y, Z) int16, 0 = background, 1 + index into the classes of its set.
        annotated: (K,) bool, the classes of its set that were annotated.
    """

    labels: Tensor
    annotated: np.ndarray


class DataSet:
    """One store as a run uses it.

    Args:
        name: of the set in this run.
        store: what `prepare` wrote.
        intensity: normalisation scheme, as in the plan; None: the store's plan.
        labels: what is learned voxel by voxel: "semantic" (maps of organs) or "objects" (the classes of the instance
            masks), cases without being left out, with a warning; None: nothing.
        fold, num_folds, pool, label_fraction, val_fraction, seed: see `data.module.DataModule`.

    Attributes:
        fold, num_folds: as given.
        train_ids, val_ids, test_ids: ids of the store's cases.
        normalisation: case -> `Normalisation`.
        label_classes: names of what is learned voxel by voxel.

    Raises:
        UserError: a fold, pool or setting that does not work, or no case with the labels.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        fold: int,
        num_folds: int,
        intensity: dict[str, Any] | str | None,
        pool: Pool,
        label_fraction: float,
        val_fraction: float,
        seed: int,
        labels: Labels | None,
    ) -> None:
        self.name, self.store = name, store
        self.fold, self.num_folds = fold, num_folds
        self.train_ids, self.val_ids, self.test_ids = cases_of_pool(
            store, fold, num_folds, pool, label_fraction, val_fraction, seed
        )
        self.label_classes: list[str] = []
        if labels is not None:
            self.label_classes = list(store.semantic_classes if labels == "semantic" else store.classes)
            if not self.label_classes:
                there = {"objects": store.classes, "semantic": store.semantic_classes}
                hint = next((f"; it has those of data.labels={kind}" for kind, names in there.items() if names), "")
                what = "maps of organs" if labels == "semantic" else "classes of objects"
                raise UserError(f"data.labels={labels}: {store.path} has no {what}{hint}")
            self._keep_labelled(labels, pool)
        scheme = store.plan["intensity"] if intensity is None else intensity
        if not isinstance(scheme, dict):
            raise UserError(
                f"data.intensity={scheme}: expected null (the plan's) or {{scheme: ct | zscore | window, ...}}"
            )
        check_intensity(scheme, f"{store.path / 'plan.yaml'}: intensity" if intensity is None else "data.intensity")
        self.intensity = scheme
        self.normalisation = normalisation_for(store, scheme, fold, num_folds)

    @property
    def in_channels(self) -> int:
        """Channels of the network's input: the image's, or one per window (`data.normalise`)."""
        return len(self.normalisation(next(iter(self.store.cases.values()))).low)

    def label_map(self, case: Case, labels: Labels) -> LabelMap:
        """Of a whole case of the set."""
        if labels == "semantic":
            semantic = self.store.read(case.id, "semantic", (0, 0, 0), case.shape)
            return LabelMap(
                torch.from_numpy(semantic.astype(np.int16)), annotated_organs(case, len(self.label_classes))
            )
        annotated = np.zeros(len(self.label_classes), dtype=bool)
        annotated[list(case.annotated)] = True
        if not case.has_instances:
            return LabelMap(torch.zeros(case.shape, dtype=torch.int16), annotated)
        mask = self.store.read(case.id, "instances", (0, 0, 0), case.shape)
        table = np.zeros(int(mask.max(initial=case.instances.max(initial=0))) + 1, dtype=np.int16)
        table[case.instances] = case.labels + 1
        return LabelMap(torch.from_numpy(table[mask]), annotated)

    def _keep_labelled(self, labels: Labels, pool: str) -> None:
        """Leaves out cases that could teach nothing; of the test cases silently, `test` says so."""
        cases = self.store.cases
        total = len(self.train_ids) + len(self.val_ids)
        self.train_ids, self.val_ids, self.test_ids = (
            [i for i in ids if (cases[i].has_semantic if labels == "semantic" else cases[i].annotated)]
            for ids in (self.train_ids, self.val_ids, self.test_ids)
        )
        what = "a semantic map" if labels == "semantic" else "an annotated class"
        if not self.train_ids or not self.val_ids:
            hint = "" if pool == "train" else " (data.pool=train: the annotated cases)"
            raise UserError(
                f"{self.store.path}: of pool={pool}, {len(self.train_ids)} training and {len(self.val_ids)} validation "
                f"cases have {what}; data.labels={labels} needs both{hint}"
            )
        left = [cases[case_id] for case_id in (*self.train_ids, *self.val_ids)]
        if len(left) < total:
            warnings.warn(
                f"{self.store.path}: {total - len(left)} of the {total} cases of pool={pool} lack {what}; left out",
                stacklevel=3,
            )
        for case in left if labels == "objects" else []:
            if len(case.labels) and not case.has_instances:
                raise UserError(f"{self.store.path}: case {case.id} has boxes only; data.labels=objects needs masks")


class PatchMixture(Dataset[dict[str, Any]]):
    """Raw patches of several data sets by global sample index.

    A set of n training cases is drawn with a probability proportional to sqrt(n), which is 1/sqrt(n) for each of its
    cases. Classes of all sets stand one after the other, in the order of the sets: two sets with the same organ have
    two classes.

    Args:
        parts: the patches of each set, by its name.
        seed: of the draws.

    Source: Ulrich et al., "MultiTalent" (2023).
    """

    def __init__(self, parts: dict[str, PatchDataset], seed: int) -> None:
        self.names, self.parts, self.seed = list(parts), list(parts.values()), seed
        masses = np.sqrt([len(part.sampler.cases) for part in self.parts])
        self.shares = masses / masses.sum()
        counts = {
            "annotated": [len(part.store.classes) for part in self.parts],
            "semantic_annotated": [len(part.store.semantic_classes) for part in self.parts],
        }
        self._first = {key: [0, *accumulate(of_parts)] for key, of_parts in counts.items()}
        self.with_mask = all(part.with_mask for part in self.parts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The raw sample ``index``, with classes among those of all sets and ``set_index``."""
        which = int(generator(self.seed, index, "data set").choice(len(self.parts), p=self.shares))
        sample = self.parts[which][index]
        lifted = {
            "set_index": which,
            "case_id": f"{self.names[which]}/{sample['case_id']}",
            "labels": sample["labels"] + self._first["annotated"][which],
            "annotated": self._among_all("annotated", which, sample["annotated"]),
        }
        if sample["semantic"] is not None:
            labels, first = sample["semantic"].short(), self._first["semantic_annotated"][which]
            lifted["semantic"] = labels + first * (labels > 0)
            key = "semantic_annotated"
            lifted[key] = self._among_all(key, which, sample[key])
        return {**sample, **lifted, "with_mask": self.with_mask}

    def _among_all(self, key: str, which: int, flags: np.ndarray) -> np.ndarray:
        """(K of the set,) bool -> (K of all sets,) bool."""
        first = self._first[key]
        result = np.zeros(first[-1], dtype=bool)
        result[first[which] : first[which + 1]] = flags
        return result


def set_names(stores: Sequence[Store]) -> list[str]:
    """A name for each store, its own; the second one of a name gets ``_2``, and so on."""
    names: list[str] = []
    for store in stores:
        number = 1
        while (name := store.name if number == 1 else f"{store.name}_{number}") in names:
            number += 1
        names.append(name)
    return names


def open_stores(paths: str | Sequence[str]) -> list[Store]:
    """The stores of a run.

    Raises:
        UserError: none is given, a folder is none, or one is given twice.
    """
    folders = [paths] if isinstance(paths, str) else list(paths)
    if not folders:
        raise UserError("data.store is an empty list; give the folder of a store")
    resolved = [Path(folder).resolve() for folder in folders]
    for position, folder in enumerate(resolved):
        if folder in resolved[:position]:
            raise UserError(f"data.store names {folders[position]} twice")
    return [Store(Path(folder)) for folder in folders]


def same_channels(sets: Sequence[DataSet]) -> int:
    """The number of input channels, which all sets share; says so where they differ in their voxels' size."""
    first = sets[0]
    for other in sets[1:]:
        if other.in_channels != first.in_channels:
            raise UserError(
                f"data.store: {first.name} has {first.in_channels} input channels and {other.name} "
                f"{other.in_channels}; one network needs the same number"
            )
        if not np.allclose(other.store.spacing_mm, first.store.spacing_mm, rtol=0.01):
            warnings.warn(
                f"data.store: the voxels of {first.name} are {by_text(first.store.spacing_mm)} mm and those of "
                f"{other.name} {by_text(other.store.spacing_mm)} mm; `pretrain3d prepare` with spacing_mm= makes them "
                "the same",
                stacklevel=3,
            )
    return first.in_channels


def cases_of_pool(
    store: Store, fold: int, num_folds: int, pool: Pool, label_fraction: float, val_fraction: float, seed: int
) -> tuple[list[str], list[str], list[str]]:
    """Case ids to train on, to validate on, to test on."""
    for name, value in (("label_fraction", label_fraction), ("val_fraction", val_fraction)):
        if not 0 < value <= 1:
            raise UserError(f"data.{name}={value}: expected more than 0 and at most 1")
    if pool == "pretrain" and label_fraction != 1:
        raise UserError(
            f"data.label_fraction={label_fraction} is a share of the labelled cases, of which data.pool=pretrain takes "
            "none; leave it at 1, or take data.pool=train or all"
        )
    parts = (fold_or_all if pool == "pretrain" else fold_cases)(store, fold, num_folds)
    train: list[str] = []
    val: list[str] = []
    if pool in ("train", "all"):
        kept = math.ceil(label_fraction * len(parts["train"]))
        order = generator(seed, 0, "label_fraction").permutation(len(parts["train"]))
        train += sorted(parts["train"][position] for position in order[:kept])
        val += parts["val"]
    if pool in ("pretrain", "all"):
        held_out = _held_out(store, parts["pretrain"], val_fraction)
        train += [case_id for case_id in parts["pretrain"] if case_id not in held_out]
        val += [case_id for case_id in parts["pretrain"] if case_id in held_out]
    if not train:
        others = [name for name in ("train", "pretrain") if parts[name]]
        kinds = " and ".join(name for name in ("val", "test") if parts[name])
        hint = f"; its cases are {others[0]}: data.pool={others[0]}" if others else f"; it has {kinds} cases only"
        raise UserError(f"data.pool={pool}: {store.path} has no case left to train on{hint}")
    return train, val, list(parts["test"])


def _held_out(store: Store, case_ids: Sequence[str], fraction: float) -> set[str]:
    """Whole groups of cases, the same ones for all seeds, until ``fraction`` of the cases is reached."""
    groups: dict[str, list[str]] = {}
    for case_id in case_ids:
        groups.setdefault(store.cases[case_id].group, []).append(case_id)
    if case_ids and len(groups) < 2:
        raise UserError(f"{store.path}: one group of unlabelled cases cannot be split into training and validation")
    held_out: set[str] = set()
    names = sorted(groups)
    for position in generator(0, 0, "val_fraction").permutation(len(names))[:-1]:
        if len(held_out) >= max(1, fraction * len(case_ids)):
            break
        held_out |= set(groups[names[position]])
    return held_out
