"""The Lightning side of the data: who trains on which cases, in which order, on which process."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any, Literal

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain3d.config import UserError
from pretrain3d.data import intensity as intensities
from pretrain3d.data.augment import Augmentation
from pretrain3d.data.batch import GlobalBatches, collate, is_raw
from pretrain3d.data.case import Case
from pretrain3d.data.identity import data_hash
from pretrain3d.data.patches import PatchDataset
from pretrain3d.data.sets import DataSet, LabelMap, Labels, PatchMixture, Pool, open_stores, same_channels, set_names
from pretrain3d.data.spatial import SpatialSettings

STILL = SpatialSettings(flip_axes=(), rotation_p=0.0, scale_p=0.0)  # patches as they lie in the volume
NO_CASE = ""  # name of the case of a process that has none: Lightning wants something of each


class DataModule(lightning.LightningDataModule):
    """Patches for training, whole cases or fixed patches for validation; any whole case for who asks.

    Several processes need ``Trainer(use_distributed_sampler=False)``: samples are dealt out here. Endless training
    batches need ``max_steps`` and ``val_check_interval`` with ``check_val_every_n_epoch=None``.

    Args:
        store: folder that `prepare` wrote, or several: then a training sample comes from a set of n cases with a
            probability proportional to sqrt(n), and a case is named ``<set>/<case>``.
        fold, num_folds: which part of the training cases is validated on; a store with folds of its own ignores
            num_folds, one with a validation split both.
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
        validation: "volumes" (whole cases) or "patches" (the same ones every time, not augmented); `fit` gives what the
            module validates on.
        num_val_patches: over all processes; at least one for each.
        val_fraction: of the unlabelled cases, held out for validation where the pool has them (at least one, by group).
        labels: what is learned voxel by voxel, see `data.sets.DataSet`.

    Attributes:
        sets: what the run takes of each store.
        store, normalisation: of the first set.
        classes, label_classes, in_channels, patch_size: for building the model.
        train_ids, val_ids, test_ids: case ids.

    Raises:
        UserError: a store, fold, pool or setting that does not work.
    """

    def __init__(
        self,
        store: str | list[str],
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
        labels: Labels | None = None,
    ):
        super().__init__()
        stores = open_stores(store)
        self.store = stores[0]
        self.seed = _at_least(0, "seed", seed, "")
        self.batch_size = _at_least(1, "batch_size", batch_size)
        self.num_workers = _at_least(0, "num_workers", num_workers)
        self.foreground = foreground
        self.num_val_patches = _at_least(1, "num_val_patches", num_val_patches)
        self.validation = validation
        plan = self.store.plan
        self.patch_size = _patch_size(plan["patch_size"] if patch_size is None else patch_size)
        self.spatial, self.intensities = _augmentation(augment, tuple(flip_axes))
        self.pool = pool
        pools = (pool, label_fraction, val_fraction)
        self.labels = labels
        self.sets = [
            DataSet(name, one, fold, num_folds, intensity, *pools, seed, labels)
            for name, one in zip(set_names(stores), stores, strict=True)
        ]
        self.normalisation = self.sets[0].normalisation
        self.in_channels = same_channels(self.sets)
        self.train_ids, self.val_ids, self.test_ids = (
            self._named([getattr(part, f"{split}_ids") for part in self.sets]) for split in ("train", "val", "test")
        )
        self.augmentation = Augmentation()

    @property
    def classes(self) -> list[str]:
        """Names of the classes, by label."""
        return [name for part in self.sets for name in part.store.classes]

    @property
    def label_classes(self) -> dict[str, list[str]]:
        """Names of what is learned voxel by voxel, by set."""
        return {part.name: list(part.label_classes) for part in self.sets}

    @property
    def data_hash(self) -> str:
        """One hash of all that the stores hold."""
        return (
            self.store.data_hash if len(self.sets) == 1 else data_hash({p.name: p.store.data_hash for p in self.sets})
        )

    def volume(self, case_id: str) -> tuple[Tensor, Case]:
        """A whole case: (C, X, Y, Z) float32, normalised, on the CPU; and what its store knows about it."""
        part, case = self._find(case_id)
        raw = part.store.read(case.id, "image", (0, 0, 0), case.shape)
        return part.normalisation(case)(torch.from_numpy(raw)), case

    def pad_value(self, case_id: str) -> tuple[float, ...]:
        """Per channel, the normalised intensity that stands for outside the volume."""
        part, case = self._find(case_id)
        return part.normalisation(case).padding

    def label_map(self, case_id: str) -> LabelMap:
        """What a whole case teaches voxel by voxel; only with ``labels``."""
        part, case = self._find(case_id)
        assert self.labels is not None
        return part.label_map(case, self.labels)

    def case(self, case_id: str) -> Case:
        """What its store knows about a case."""
        return self._find(case_id)[1]

    def fixed_patches(self, case_id: str, first: int, number: int) -> dict[str, Any]:
        """A batch of patches of one case on the CPU, uniform over the volume, not augmented, the same for all runs.

        Args:
            case_id: of a training, validation or test case.
            first: sample index of the first one; every draw depends on it and on the case alone.
            number: of patches.
        """
        part, case = self._find(case_id)
        dataset = PatchDataset(part.store, [case.id], self.patch_size, 0, part.normalisation, 0.0, STILL, {})
        return self.augmentation(collate([dataset[index] for index in range(first, first + number)]))

    def set_of(self, case_id: str) -> int:
        """The index of the set that a case belongs to."""
        return self.sets.index(self._find(case_id)[0])

    def _find(self, case_id: str) -> tuple[DataSet, Case]:
        if len(self.sets) == 1:
            return self.sets[0], self.store.cases[case_id]
        name = max((part.name for part in self.sets if case_id.startswith(f"{part.name}/")), key=len)
        part = next(part for part in self.sets if part.name == name)
        return part, part.store.cases[case_id.removeprefix(f"{name}/")]

    def _named(self, ids: Sequence[Sequence[str]]) -> list[str]:
        """The ids of all sets in one list, of each set in turn: the first few are of all."""
        if len(self.sets) == 1:
            return list(ids[0])
        named = [[f"{part.name}/{case_id}" for case_id in own] for part, own in zip(self.sets, ids, strict=True)]
        return [case_id for case_id in chain.from_iterable(zip_longest(*named)) if case_id is not None]

    def setup(self, stage: str) -> None:
        """Called by Lightning; a detector cannot be trained where nothing is annotated.

        Raises:
            UserError: such a training.
        """
        if stage != "fit" or self.trainer is None or not hasattr(self.trainer.lightning_module, "detector"):
            return
        if not any(self.case(case_id).annotated for case_id in self.train_ids):
            raise UserError(
                f"data.pool={self.pool}: none of the {len(self.train_ids)} training cases is annotated, a detector "
                "learns nothing from them; data.pool=train trains on those that are"
            )

    def train_dataloader(self) -> DataLoader:
        """Batches from the trainer's current step on, without end."""
        rank, world_size = self._process()
        first = 0
        if self.trainer is not None:
            first = self.trainer.global_step * self.trainer.accumulate_grad_batches * self.batch_size * world_size
        dataset = self._patches("train", self.seed, self.spatial, self.intensities)
        return DataLoader(
            dataset,
            batch_sampler=GlobalBatches(first, self.batch_size, rank, world_size),
            num_workers=self.num_workers,
            collate_fn=collate,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader:
        """Whole cases, or fixed patches; each on one process only. A process without a case sees `NO_CASE`."""
        rank, world_size = self._process()
        if self.validation == "volumes":
            cases = [{"case_id": case_id} for case_id in self.val_ids[rank::world_size] or [NO_CASE]]
            return DataLoader(cases, batch_size=None)  # type: ignore[arg-type]  # a list has all that is asked of it
        dataset = self._patches("val", 0, STILL, {})  # seed 0: the same patches for all runs
        indices = list(range(rank, max(self.num_val_patches, world_size), world_size))
        batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, pin_memory=torch.cuda.is_available())

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Raw patches become a batch on the device; names of cases pass."""
        return self.augmentation(batch) if is_raw(batch) else batch

    def _patches(
        self, split: str, seed: int, settings: SpatialSettings, drawn: dict[str, dict[str, Any]]
    ) -> Dataset[dict[str, Any]]:
        parts = {
            part.name: PatchDataset(
                part.store, getattr(part, f"{split}_ids"), self.patch_size, seed, part.normalisation, self.foreground,
                settings, drawn, semantic=self.labels == "semantic",
            )
            for part in self.sets
        }  # fmt: skip
        return PatchMixture(parts, seed) if len(parts) > 1 else parts[self.sets[0].name]

    def _process(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


def _at_least(least: int, name: str, value: int, section: str = "data.") -> int:
    if value < least:
        raise UserError(f"{section}{name}={value}: at least {least}")
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
