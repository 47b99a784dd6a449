"""Watches what the backbone's features are worth while it is pretrained, whatever the method."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from pretrain3d.data.probe import ProbePatches
from pretrain3d.evaluation.probe import probe
from pretrain3d.objectives.collapse import MIN_LEVEL_STD, MIN_STD, effective_rank, spread, warning
from pretrain3d.objectives.projection import pooled
from pretrain3d.parallel import all_gather, rank, world_size

PATCHES = 48  # that are looked at, over all processes


def through_shared_stem(sets: Sequence[Any], method: dict[str, Any]) -> list[Any]:
    """The data sets that pass the backbone's stem: all but those to which ``method`` gives stems of their own."""
    return [part for part in sets if part.name not in method.get("stems", ())] or list(sets)


class FeatureMonitor(Callback):
    """Logs, at every validation, numbers on the pooled features of the same patches of the store.

    Of several stores it is the first one with maps of organs, else the first, of those that pass the backbone's stem.

    ``val/feature_std``: see `collapse.spread`; ``val/effective_rank``: see `collapse.effective_rank`; with a warning in
    plain words when they, those of a single level, or those of a method's projected embeddings say that the network has
    collapsed; levels are counted from the finest, 1. Every few
    validations, where the store has maps of organs, ``val/probe_auroc``: how well the features at the nearest voxels of
    other patients tell which organ a voxel is of, 0.5 is chance. An organ counts where it was annotated, and supervised
    pretraining is asked about cases that it does not learn.

    The weights are those that would be exported, and each patch is as large as what the network sees in training.

    Args:
        probe_every_n_validations: 0: never.
    """

    def __init__(self, probe_every_n_validations: int) -> None:
        self.probe_every = probe_every_n_validations
        self.validations = 0
        self.patches: ProbePatches | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.validations += 1
        module: Any = pl_module
        if self.patches is None:
            self.patches = self._choose(trainer, module)
        features, at_voxels, organs = self._look(trainer, module, self.patches)
        values = {"feature_std": float(spread(features)), "effective_rank": float(effective_rank(features))}
        if not self._warn(trainer, "features", features):  # a dead level does not show beside healthy ones
            parts = features.split([level.channels for level in module.backbone.levels], dim=1)
            for number, part in enumerate(parts, start=1) if len(parts) > 1 else ():
                self._warn(trainer, f"features of level {number} of {len(parts)}", part, MIN_LEVEL_STD)
        embeddings = getattr(module.best_networks()[1], "embeddings", None)
        if embeddings is not None:  # what a contrastive loss collapses first
            self._warn(trainer, "embeddings", embeddings(features))
        if self.probe_every and self.validations % self.probe_every == 0 and self.patches.has_organs:
            area = probe(*asked(at_voxels, organs, self.patches))
            if area is not None:
                values["probe_auroc"] = area
        for name, value in values.items():
            module.log(f"val/{name}", value, sync_dist=True, batch_size=1)

    @staticmethod
    def _warn(trainer: Any, what: str, vectors: Tensor, min_std: float = MIN_STD) -> bool:
        """Whether these have collapsed."""
        text = warning(what, len(vectors), float(spread(vectors)), float(effective_rank(vectors)), min_std)
        if text and trainer.is_global_zero:
            warnings.warn(f"step {trainer.global_step}: {text}", stacklevel=2)
        return text is not None

    def _choose(self, trainer: Any, module: Any) -> ProbePatches:
        data = trainer.datamodule
        size = getattr(module.get_submodule(module.head_name), "view_size", data.patch_size)
        number = -(-PATCHES // world_size()) * world_size()
        sets = through_shared_stem(data.sets, module.note["module"]["method"])
        part = max(sets, key=lambda part: any(case.has_semantic for case in part.store.cases.values()))
        learned = part.train_ids if module.note["kind"] == "segmentation" else ()
        return ProbePatches(part.store, part.normalisation, size, part.val_ids, number, learned)

    @torch.no_grad()
    def _look(self, trainer: Any, module: Any, patches: ProbePatches) -> tuple[Tensor, Tensor, Tensor]:
        """Of all processes' patches: features (N, C), those at their voxels (N, V, C), and the organs there (N, V)."""
        backbone, _ = module.best_networks()
        mine = range(rank(), len(patches), world_size())
        whole, at_voxels, labels = [], [], []
        for start in range(0, len(mine), trainer.datamodule.batch_size):
            samples = [patches[index] for index in mine[start : start + trainer.datamodule.batch_size]]
            image = torch.stack([image for image, _, _ in samples]).to(module.device)
            places = torch.from_numpy(np.stack([places for _, places, _ in samples])).to(module.device)
            labels += [torch.from_numpy(organs) for _, _, organs in samples]
            with trainer.strategy.precision_plugin.val_step_context():
                levels = backbone(image, None)
            whole.append(pooled(levels))
            at_voxels.append(features_at(levels, [level.stride for level in backbone.levels], places))
        organs = torch.stack(labels).to(module.device)
        return all_gather(torch.cat(whole)), all_gather(torch.cat(at_voxels)), all_gather(organs)


def features_at(levels: Sequence[Tensor], strides: Sequence[Sequence[int]], places: Tensor) -> Tensor:
    """The features of the cells that hold some voxels, of all levels one behind the other.

    Args:
        levels: of the backbone, (B, C, X / stride x, Y / stride y, Z / stride z) each.
        strides: (3,) of each level.
        places: (B, V, 3) int64 voxels of the images.

    Returns:
        (B, V, sum of C) float32.
    """
    rows = torch.arange(len(places), device=places.device)[:, None]
    parts = []
    for level, stride in zip(levels, strides, strict=True):
        x, y, z = (places[..., axis] // step for axis, step in enumerate(stride))  # (B, V) each
        parts.append(level[rows, :, x, y, z].float())  # (B, V, C)
    return torch.cat(parts, dim=2)


def asked(at_voxels: Tensor, organs: Tensor, patches: ProbePatches) -> tuple[np.ndarray, ...]:
    """What `evaluation.probe.probe` takes, voxel by voxel.

    A voxel of an organ that was not annotated in its case says nothing about the others either.

    Args:
        at_voxels: (N, V, C) features of all patches.
        organs: (N, V) labels there, 0 = none.
        patches: which they are.
    """
    number, labels = organs.shape[1], organs.flatten().cpu().numpy()
    present = labels[:, None] == np.arange(1, patches.known.shape[1] + 1)
    known = patches.known.repeat(number, axis=0)
    known &= (labels == 0)[:, None] | (present & known).any(axis=1, keepdims=True)
    return at_voxels.flatten(0, 1).cpu().numpy(), present, known, patches.groups.repeat(number)
