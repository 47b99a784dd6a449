"""Pretraining by reconstruction: any method of `PRETRAINING` that hides voxels and predicts them."""

from __future__ import annotations

from typing import Any

from pretrain3d.data.batch import torch_generator
from pretrain3d.modules.pretraining import PretrainingModule

PURPOSES = {"train": "mask", "val": "validation mask"}


class ReconstructionModule(PretrainingModule):
    """Lightning's side of a reconstruction method; arguments as `PretrainingModule`."""

    def prepare(self, method: Any, batch: dict[str, Any], stage: str) -> dict[str, Any]:
        """Masks are drawn on the batch's device, from one generator per sample."""
        seed = self.note["seed"] if stage == "train" else 0
        device = batch["image"].device
        generators = [torch_generator(seed, index, PURPOSES[stage], device) for index in batch["sample_index"]]
        return method.prepare(batch, generators)
