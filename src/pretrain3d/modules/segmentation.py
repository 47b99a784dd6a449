"""Supervised pretraining: a segmentation method on any backbone, trained on patches, validated on whole volumes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain3d.data.module import NO_CASE
from pretrain3d.detection.tiles import check_tiling
from pretrain3d.evaluation.segmentation import SegmentationScores
from pretrain3d.modules.base import BaseModule
from pretrain3d.modules.pretraining import build_method
from pretrain3d.modules.volumes import predict_volume
from pretrain3d.objectives.segmentation import slices


class SegmentationModule(BaseModule):
    """Lightning's side of `objectives.segmentation.Segmentation`.

    Args:
        backbone: see `BaseModule`.
        method: ``{"name": "supervised", ...}``.
        label_classes: names of what is learned voxel by voxel, by data set.
        patch_size: (3,) voxels of a training patch; also the tile of the inference.
        note, optimizer, schedule, warmup_steps, ema: see `BaseModule`.
        overlap: share of a tile that its neighbour repeats, in [0, 1).
        tile_batch: tiles predicted at once; bounds the memory of the inference.
    """

    method: Any  # a Segmentation

    def __init__(
        self,
        backbone: nn.Module,
        method: dict[str, Any],
        label_classes: dict[str, list[str]],
        patch_size: tuple[int, int, int],
        note: dict[str, Any],
        optimizer: dict[str, Any],
        schedule: str = "poly",
        warmup_steps: int = 0,
        ema: float | None = None,
        overlap: float = 0.5,
        tile_batch: int = 4,
    ) -> None:
        check_tiling(overlap, tile_batch)
        make_stem = (lambda: copy.deepcopy(backbone.stem)) if getattr(backbone, "takes_stem", False) else None
        head = build_method(backbone, method, patch_size, classes=label_classes, make_stem=make_stem)
        super().__init__(backbone, head, "method", note, optimizer, schedule, warmup_steps, ema)
        self.patch_size = tuple(patch_size)
        self.overlap = overlap
        self.tile_batch = tile_batch
        self.scores = SegmentationScores(label_classes)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        prepared = self.method.prepare(batch)
        outputs = self.method(self.backbone, prepared)
        with torch.autocast(batch["image"].device.type, enabled=False):
            losses = self.method.loss(outputs, prepared)
        return self.finish_losses(losses, batch, "train")

    def predict_logits(self, image: Tensor, index: int, pad_value: tuple[float, ...] = (0.0,)) -> Tensor:
        """(n, X, Y, Z) float32 logits of the classes of one data set, with softmax outputs background first.

        Args:
            image: (C, X, Y, Z) float32, normalised; tiles of it go to the device.
            index: of the data set.
            pad_value: (C,) normalised intensity outside the volume.
        """
        backbone, method = self.best_networks()

        def predict_patches(patches: Tensor) -> Tensor:
            prepared = {"inputs": patches, "sets": [index] * len(patches)}
            return method.of_set(method(backbone, prepared)["logits"][0], index)

        return predict_volume(
            predict_patches, image, self.patch_size, self.overlap, self.tile_batch, pad_value, self.device
        )

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """One whole case of the validation fold."""
        self.check_pending()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if batch["case_id"] == NO_CASE:
            return {}
        image, labels, found, _ = self.score_case(data, batch["case_id"])
        return {"pictures": slices(image[0], labels, found)} if batch_idx == 0 else {}

    def score_case(self, data: Any, case_id: str) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
        """Predicts a whole case and adds it to `scores`.

        Args:
            data: the `DataModule` that has the case.
            case_id: of the case.

        Returns:
            (C, X, Y, Z) image, (X, Y, Z) labels, (K, X, Y, Z) bool where each class of its set was found, and what
            `SegmentationScores.update` returns.
        """
        image, _ = data.volume(case_id)
        truth, index = data.label_map(case_id), data.set_of(case_id)
        found = self.method.found(self.predict_logits(image, index, data.pad_value(case_id)))
        return image, truth.labels, found, self.scores.update(index, found, truth.labels, truth.annotated)

    def on_validation_epoch_end(self) -> None:
        values = self.scores.compute(self.device)
        self.scores.reset()
        for key, value in values.items():
            self.log(f"val/{key}", value, prog_bar=key == "dice", rank_zero_only=False)
