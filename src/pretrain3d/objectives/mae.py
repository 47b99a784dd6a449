"""Masked autoencoder for convolutional networks: hide blocks of the image, predict their intensities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain3d.config import UserError
from pretrain3d.objectives.contract import Backbone, Decoder, PyramidLevel
from pretrain3d.objectives.hidden import checked_block, hidden_losses, hidden_pictures
from pretrain3d.objectives.masking import block_mask


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
        self.block = checked_block("mae", patch_size, ratio, block)
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
        """Mean squared error over the hidden voxels inside the volume; see `hidden.hidden_losses`."""
        return hidden_losses(outputs["reconstruction"], prepared, self.training)

    def pictures(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """``original``, ``masked``, ``reconstructed``; see `hidden.hidden_pictures`."""
        return hidden_pictures(outputs["reconstruction"], prepared)
