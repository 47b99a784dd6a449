"""Masked autoencoder for convolutional networks: hide blocks of the image, predict their intensities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain3d.config import UserError
from pretrain3d.objectives.contract import Backbone, Decoder, PyramidLevel
from pretrain3d.objectives.masking import block_mask, block_size, hidden_cells
from pretrain3d.parallel import all_sum


class MAE(nn.Module):
    """Hidden blocks are 0 in the input of the backbone; a decoder predicts the normalised intensities there.

    Args:
        levels: of the backbone, finest first; the finest must be at the resolution of the image.
        in_channels: of the image.
        patch_size: (3,) voxels.
        decoder: builds the decoder from the levels and the number of output channels.
        ratio: share of blocks that are hidden, in (0, 1).
        block: side of a block in voxels, (3,) or one number; ``None`` = `masking.block_size` of the patch.

    Raises:
        UserError: a backbone without full-resolution features, or a mask that hides nothing or everything.

    Source: He et al., "Masked autoencoders are scalable vision learners" (2022); on ResEnc-L Wald et al., "Revisiting
    MAE pre-training for 3D medical image segmentation" (2024). The target is the intensity itself, without
    normalisation per block. Unlike the reference code, voxels outside the volume do not count.
    """

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        in_channels: int,
        patch_size: Sequence[int],
        decoder: Decoder,
        ratio: float = 0.75,
        block: int | tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        if tuple(levels[0].stride) != (1, 1, 1):
            raise UserError(f"mae: the backbone's finest stride is {levels[0].stride}; features at stride 1 are needed")
        self.ratio = ratio
        if block is None:
            block = block_size(patch_size)
        self.block = (block,) * 3 if isinstance(block, int) else tuple(block)
        num_cells = int(np.prod([-(-size // side) for size, side in zip(patch_size, self.block, strict=True)]))
        if not 0 < hidden_cells(num_cells, ratio) < num_cells:
            raise UserError(
                f"mae: ratio {ratio} of the {num_cells} blocks of {self.block} in a patch of {tuple(patch_size)} "
                "leaves nothing to predict or nothing to see; ratio is between 0 and 1, 0.75 is usual"
            )
        self.decoder = decoder(levels, in_channels)

    def prepare(self, batch: dict[str, Any], generator: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Draws the mask; see `contract.Method.prepare`.

        Returns:
            ``inputs`` and ``targets`` (B, C, X, Y, Z), the whole image (the backbone hides what ``keep`` says);
            ``keep`` and ``inside`` (B, 1, X, Y, Z) bool, True = visible, True = inside the volume.
        """
        image = batch["image"]
        keep = block_mask(image.shape[2:], self.block, self.ratio, generator).to(image.device)
        return {"inputs": image, "targets": image, "keep": keep, "inside": batch["inside"]}

    def forward(self, backbone: Backbone, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns: ``reconstruction`` (B, C, X, Y, Z), in normalised intensities."""
        features = backbone(prepared["inputs"], prepared["keep"])
        return {"reconstruction": self.decoder(features)[0]}

    def loss(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean squared error over the hidden voxels inside the volume: one mean for the whole batch of all processes.

        Returns:
            ``loss``; and ``mean_predictor``, the same error when the mean of the visible voxels of each sample is
            predicted, which a network that learned anything is below.
        """
        targets = prepared["targets"].float()  # (B, C, X, Y, Z)
        scored = ~prepared["keep"] & prepared["inside"]  # (B, 1, X, Y, Z)
        error = outputs["reconstruction"].float() - targets
        trivial = visible_mean(targets, prepared["keep"] & prepared["inside"]) - targets
        sums = torch.stack(
            [
                error.square().mul(scored).sum(),
                trivial.square().mul(scored).sum(),
                scored.sum().float() * targets.shape[1],
            ]
        )
        if self.training:  # validation batches are not paired between processes
            sums = all_sum(sums)
        loss, mean_predictor = sums[:2] / sums[2].clamp(min=1.0)
        return {"loss": loss, "mean_predictor": mean_predictor.detach()}

    def pictures(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Central slices along z of the first sample's first channel, in normalised intensities.

        Returns:
            ``original``; ``masked`` (what the backbone sees, hidden voxels 0); ``reconstructed`` (the prediction where
            hidden, the original elsewhere): (X, Y) float32 each.
        """
        middle = prepared["targets"].shape[-1] // 2
        original = prepared["targets"][0, 0, :, :, middle].float()
        keep = prepared["keep"][0, 0, :, :, middle]
        predicted = outputs["reconstruction"][0, 0, :, :, middle].float()
        slices = {
            "original": original,
            "masked": original.masked_fill(~keep, 0.0),
            "reconstructed": torch.where(keep, original, predicted),
        }
        return {name: array.detach().cpu().numpy() for name, array in slices.items()}


def visible_mean(targets: Tensor, visible: Tensor) -> Tensor:
    """Mean of the visible voxels per sample and channel: (B, C, X, Y, Z), (B, 1, X, Y, Z) bool -> (B, C, 1, 1, 1)."""
    count = visible.sum((2, 3, 4), keepdim=True).clamp(min=1)
    return (targets * visible).sum((2, 3, 4), keepdim=True) / count
