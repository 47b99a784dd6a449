"""Pretraining by reconstruction: any method of `PRETRAINING` that hides voxels and predicts them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain3d.data.batch import torch_generator
from pretrain3d.modules.pretraining import PretrainingModule

PURPOSES = {"train": "mask", "val": "validation mask"}
YARDSTICKS = ("mean_predictor", "inpainting_linear", "copy")  # what a method logs of guesses that need no network


class ReconstructionModule(PretrainingModule):
    """Lightning's side of a reconstruction method; arguments as `PretrainingModule`."""

    def prepare(self, method: Any, batch: dict[str, Any], stage: str) -> dict[str, Any]:
        """Masks are drawn on the batch's device, from one generator per sample."""
        seed = self.note["seed"] if stage == "train" else 0
        device = batch["image"].device
        generators = [torch_generator(seed, index, PURPOSES[stage], device) for index in batch["sample_index"]]
        return method.prepare(batch, generators)

    @torch.no_grad()
    def errors(self, batch: dict[str, Any]) -> dict[str, float]:
        """Errors of a batch that was not trained on, for a method with a ``measure``; the module is in eval mode.

        Masks are those of validation. The batch is moved to the module's device.

        Returns:
            ``network``: of the averaged weights where there are some. ``mean_predictor``: of the mean of what each
            sample shows. Of methods that hide blocks ``inpainting_linear``: see `objectives.inpainting.linear`; of
            those that corrupt the whole patch ``copy``: of the corrupted patch as it is, where the method logs it. All
            are the method's mean error over the same voxels of the whole batch.
        """
        batch = {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        losses, _, _ = self._losses(*self.best_networks(), batch, "val")
        found = {"network": losses.get("reconstruction", losses["loss"])}  # of several losses, that of intensities
        found |= {name: losses[name] for name in YARDSTICKS if name in losses}
        return {name: float(value) for name, value in found.items()}
