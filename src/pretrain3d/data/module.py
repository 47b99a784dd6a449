"""The Lightning side of the data: who trains on which cases, in which order, on which process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain3d.config import UserError
from pretrain3d.data import intensity as intensities
from pretrain3d.data.augment import Augmentation
from pretrain3d.data.batch import collate, generator, is_raw
from pretrain3d.data.normalise import normalisation_for
from pretrain3d.data.patches import PatchDataset
from pretrain3d.data.spatial import SpatialSettings
from pretrain3d.data.splits import fold_cases
from pretrain3d.data.store import Case, Store

Pool = Literal["train", "pretrain", "all"]


class GlobalBatches:
    """Endless sample indices for one process: of every global batch, each ``world_size``-th sample from ``rank`` on.

    The order is that of the natural numbers, so a run is continued by starting at the number of samples it has seen,
    and the union over processes is what one process with the global batch would see. Has no length on purpose.
    """

    def __init__(self, first: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.first, self.batch_size, self.rank, self.world_size = first, batch_size, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        index = self.first
        while True:
            stop = index + self.batch_size * self.world_size
            yield list(range(index + self.rank, stop, self.world_size))
            index = stop


class _CaseNames(Dataset[dict[str, str]]):
    def __init__(self, case_ids: Sequence[str]):
        self.case_ids = list(case_ids)

    def __len__(self) -> int:
        return len(self.case_ids)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"case_id": self.case_ids[index]}


class DataModule(lightning.LightningDataModule):
    """Patches for training, whole cases (or fixed patches) for validation, whole cases for test and prediction.

    Several processes need ``Trainer(use_distributed_sampler=False)``: samples are dealt out here. Endless training
    batches need ``max_steps`` and ``val_check_interval`` with ``check_val_every_n_epoch=None``.

    Args:
        store: folder that `prepare` wrote.
        fold, num_folds: which part of the training cases is validated on (a store with its own split ignores both).
        patch_size: voxels; None: the plan's.
        batch_size: per process and step; a global batch is this times the number of processes.
        num_workers: processes that read; the samples do not depend on it.
        seed: of all draws, >= 0.
        intensity: normalisation scheme, as in the plan; None: the plan's.
        foreground: share of patches placed on objects, see `data.patches.PatchSampler`.
        flip_axes: axes mirrored at random; 0 is left-right.
        augment: ``{"spatial": ..., "intensity": ...}``, each True (default), False or changed values, see
            `data.spatial.SpatialSettings` and `data.intensity.DEFAULTS`; False: nothing, not even flips.
        pool: cases trained on: "train" (the labelled training fold), "pretrain" (the unlabelled ones) or "all" (both);
            never test cases.
        label_fraction: of the labelled training cases that is used; smaller ones are subsets of larger ones.
        validation: "volumes" (whole cases) or "patches" (the same ones every time, not augmented).
        num_val_patches: over all processes.
        val_fraction: of the unlabelled cases, held out for validation where the pool has them (at least one, by group).

    Attributes:
        store, classes, in_channels, patch_size: for building the model.
        train_ids, val_ids, test_ids: case ids.

    Raises:
        UserError: a store, fold, pool or setting that does not work.
    """

    def __init__(
        self,
        store: str,
        fold: int = 0,
        num_folds: int = 5,
        patch_size: Sequence[int] | None = None,
        batch_size: int = 2,
        num_workers: int = 2,
        seed: int = 0,
        intensity: dict[str, Any] | str | None = None,
        foreground: float = 0.5,
        flip_axes: Sequence[int] = (0, 1, 2),
        augment: dict[str, Any] | bool = True,
        pool: Pool = "train",
        label_fraction: float = 1.0,
        validation: Literal["volumes", "patches"] = "volumes",
        num_val_patches: int = 32,
        val_fraction: float = 0.1,
    ):
        super().__init__()
        self.store = Store(Path(store))
        self.seed = _at_least(0, "seed", seed)
        self.batch_size = _at_least(1, "batch_size", batch_size)
        self.num_workers = _at_least(0, "num_workers", num_workers)
        self.foreground = foreground
        self.num_val_patches = _at_least(1, "num_val_patches", num_val_patches)
        self.validation = _one_of(("volumes", "patches"), "validation", validation)
        plan = self.store.plan
        self.patch_size = _patch_size(plan["patch_size"] if patch_size is None else patch_size)
        self.spatial, self.intensities = _augmentation(augment, tuple(flip_axes))
        self.train_ids, self.val_ids, self.test_ids = _cases_of_pool(
            self.store, fold, num_folds, pool, label_fraction, val_fraction, seed
        )
        scheme = plan["intensity"] if intensity is None else intensity
        if not isinstance(scheme, dict):
            raise UserError(
                f"data.intensity={scheme}: expected null (the plan's) or {{scheme: ct | zscore | window, ...}}"
            )
        self.normalisation = normalisation_for(self.store, scheme, fold, num_folds)
        self._channels = len(self.normalisation(next(iter(self.store.cases.values()))).low)
        self.augmentation = Augmentation()

    @property
    def classes(self) -> list[str]:
        """Names of the classes, by label."""
        return list(self.store.classes)

    @property
    def in_channels(self) -> int:
        """Channels of the network's input: the image's, or one per window (`data.normalise`)."""
        return self._channels

    def volume(self, case_id: str) -> tuple[Tensor, Case]:
        """A whole case: (C, X, Y, Z) float32, normalised, on the CPU; and what the store knows about it."""
        case = self.store.cases[case_id]
        raw = self.store.read(case_id, "image", (0, 0, 0), case.shape)
        return self.normalisation(case)(torch.from_numpy(raw)), case

    def pad_value(self, case_id: str) -> tuple[float, ...]:
        """Per channel, the normalised intensity that stands for outside the volume."""
        normalisation = self.normalisation(self.store.cases[case_id])
        return tuple(normalisation(torch.tensor(normalisation.pad_value).view(-1, 1, 1, 1)).flatten().tolist())

    def train_dataloader(self) -> DataLoader:
        """Batches from the trainer's current step on, without end."""
        rank, world_size = self._process()
        first = 0
        if self.trainer is not None:
            first = self.trainer.global_step * self.trainer.accumulate_grad_batches * self.batch_size * world_size
        dataset = self._patches(self.train_ids, self.seed, self.spatial, self.intensities)
        return DataLoader(
            dataset,
            batch_sampler=GlobalBatches(first, self.batch_size, rank, world_size),
            num_workers=self.num_workers,
            collate_fn=collate,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader:
        """Whole cases, or fixed patches; each on one process only."""
        if self.validation == "volumes":
            return self._volumes(self.val_ids)
        rank, world_size = self._process()
        still = SpatialSettings(flip_axes=(), rotation_p=0.0, scale_p=0.0)
        dataset = self._patches(self.val_ids, 0, still, {})  # seed 0: the same patches for all runs
        indices = list(range(rank, self.num_val_patches, world_size))
        batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, pin_memory=torch.cuda.is_available())

    def test_dataloader(self) -> DataLoader:
        """Whole test cases, each on one process only."""
        return self._volumes(self.test_ids)

    def predict_dataloader(self) -> DataLoader:
        """Same as `test_dataloader`."""
        return self._volumes(self.test_ids)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Raw patches become a batch on the device; names of cases pass."""
        return self.augmentation(batch) if is_raw(batch) else batch

    def _patches(
        self, case_ids: Sequence[str], seed: int, settings: SpatialSettings, drawn: dict[str, dict[str, Any]]
    ) -> PatchDataset:
        return PatchDataset(
            self.store, case_ids, self.patch_size, seed, self.normalisation, self.foreground, settings, drawn
        )

    def _volumes(self, case_ids: Sequence[str]) -> DataLoader:
        rank, world_size = self._process()
        return DataLoader(_CaseNames(case_ids[rank::world_size]), batch_size=None)

    def _process(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


def _at_least(least: int, name: str, value: int) -> int:
    if value < least:
        raise UserError(f"data.{name}={value}: at least {least}")
    return value


def _one_of(known: tuple[str, ...], name: str, value: str) -> str:
    if value not in known:
        raise UserError(f"data.{name}={value}: expected {' or '.join(known)}")
    return value


def _patch_size(value: Sequence[int]) -> tuple[int, int, int]:
    if len(value) != 3 or any(int(size) != size or size < 1 for size in value):
        raise UserError(f"data.patch_size={list(value)}: expected three numbers of voxels")
    return int(value[0]), int(value[1]), int(value[2])


def _augmentation(
    node: dict[str, Any] | bool, flip_axes: tuple[int, ...]
) -> tuple[SpatialSettings, dict[str, dict[str, Any]]]:
    if isinstance(node, bool):
        node = {"spatial": node, "intensity": node}
        flip_axes = flip_axes if node["spatial"] else ()
    for key in node:
        if key not in ("spatial", "intensity"):
            raise UserError(f"data.augment has no {key!r}; it has spatial, intensity")
    settings = SpatialSettings.from_config(node.get("spatial"), flip_axes)
    return settings, intensities.settings_from_config(node.get("intensity"))


def _cases_of_pool(
    store: Store, fold: int, num_folds: int, pool: Pool, label_fraction: float, val_fraction: float, seed: int
) -> tuple[list[str], list[str], list[str]]:
    """Case ids to train on, to validate on, to test on."""
    for name, value in (("label_fraction", label_fraction), ("val_fraction", val_fraction)):
        if not 0 < value <= 1:
            raise UserError(f"data.{name}={value}: expected more than 0 and at most 1")
    _one_of(("train", "pretrain", "all"), "pool", pool)
    parts = fold_cases(store, fold, num_folds)
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
        raise UserError(f"data.pool={pool}: {store.path} has no case left to train on")
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
