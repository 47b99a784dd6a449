"""Slice-wise masked autoencoder: the same 3D weights, but every slice is reconstructed from itself alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain3d.config import UserError
from pretrain3d.objectives import inpainting
from pretrain3d.objectives.contract import Backbone, Decoder, PyramidLevel
from pretrain3d.objectives.corruptions import host_rng
from pretrain3d.objectives.hidden import HiddenBlocks, checked_block, hidden_losses, hidden_pictures
from pretrain3d.objectives.masking import slice_mask


class SliceMAE(HiddenBlocks):
    """A sample is the stack of slices of its patch across an axis drawn at random; the stack becomes the batch.

    In every slice the same share of square blocks is hidden, each by a draw of its own, and no slice sees another one.
    The loss is `mae.MAE`'s. The backbone gets images of size 1 along the axis, and takes such a slice for a volume that
    does not change along it (`backbones.convolution.slice_axis`): kernels act by their sum over the axis, strides along
    it do nothing. So every weight learns, whichever axis is drawn, and the weights fit volumes as they are.

    Args:
        levels, in_channels, patch_size, decoder: see `contract.Method`.
        ratio: share of blocks that are hidden, in (0, 1).
        block: side of a block in voxels, (3,) or one number; ``None`` = `masking.block_size` of the patch.

    Raises:
        UserError: a mask that hides nothing or everything; a slice that is a single voxel at the coarsest level; a
            backbone that takes no slices.

    Source: the slice-wise arm of the detection pretraining study: blocks of 16 x 16 in slices of 160 x 160, ratio 0.75.
    How its 3D kernels meet a slice is not published; with zeros around the slice only the central plane of a kernel
    would learn, and its other planes would enter fine-tuning as they were drawn.
    """

    compilable = False  # how many samples have which axis

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        in_channels: int,
        patch_size: Sequence[int],
        decoder: Decoder,
        ratio: float = 0.75,
        block: int | tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__("slice_mae", patch_size, ratio, block)
        for axis in range(3):
            across = [1 if other == axis else size for other, size in enumerate(patch_size)]
            checked_block("slice_mae", across, ratio, self.block)
            if all(size <= step for size, step in zip(across, levels[-1].stride, strict=True)):
                raise UserError(
                    f"slice_mae: a slice of {across} of data.patch_size {list(patch_size)} is a single voxel at the "
                    f"coarsest level of the backbone, whose stride is {list(levels[-1].stride)}; take a larger patch"
                )
        self.decoder = decoder(levels, in_channels)

    @staticmethod
    def check_backbone(backbone: Any) -> None:
        """See `contract.Method`."""
        if not getattr(backbone, "takes_slices", False):
            raise UserError(
                f"slice_mae: the backbone {type(backbone).__name__} takes no single slices; "
                "take resenc_xs, resenc_s or resenc_l"
            )

    def prepare(self, batch: dict[str, Any], generator: Sequence[torch.Generator]) -> dict[str, Any]:
        """Draws axis and masks; see `contract.Method.prepare`.

        Returns:
            ``inputs``, ``targets``, ``keep`` and ``inside`` as `HiddenBlocks.prepare`, of volumes; ``axes``, for each
            sample the axis along which its slices are stacked.
        """
        image = batch["image"]
        axes = [int(host_rng(draws).integers(3)) for draws in generator]
        masks = [
            slice_mask(image.shape[2:], self.block, self.ratio, axis, draws)
            for axis, draws in zip(axes, generator, strict=True)
        ]
        keep = torch.stack(masks).to(image.device)  # (B, 1, X, Y, Z)
        return {"inputs": image, "targets": image, "keep": keep, "inside": batch["inside"], "axes": axes}

    def forward(self, backbone: Backbone, prepared: dict[str, Any]) -> dict[str, Tensor]:
        """Returns: ``reconstruction`` (B, C, X, Y, Z), in normalised intensities."""
        inputs, keep, axes = prepared["inputs"], prepared["keep"], prepared["axes"]
        rows: dict[int, Tensor] = {}
        for axis in sorted(set(axes)):  # slices across one axis have one shape
            members = [row for row, other in enumerate(axes) if other == axis]
            seen, shown = (fold(torch.stack([t[row] for row in members]), axis) for t in (inputs, keep))
            predicted = self.decoder(backbone(seen, shown))[0]  # (B S, C, X, Y, Z), size 1 along the axis
            rows |= dict(zip(members, unfold(predicted, axis, len(members)), strict=True))
        return {"reconstruction": torch.stack([rows[row] for row in range(len(axes))])}

    def loss(self, outputs: dict[str, Tensor], prepared: dict[str, Any]) -> dict[str, Tensor]:
        """Mean squared error over the hidden voxels inside the volume; see `hidden.hidden_losses`.

        ``inpainting_linear`` sees what the network sees: it fills each slice from itself alone.
        """
        in_paint = partial(_linear_in_slices, axes=prepared["axes"])
        return hidden_losses(outputs["reconstruction"], prepared, self.training, in_paint=in_paint)

    def pictures(self, outputs: dict[str, Tensor], prepared: dict[str, Any]) -> dict[str, np.ndarray]:
        """``original``, ``masked``, ``reconstructed``: a slice of the first sample; see `hidden.hidden_pictures`."""
        return hidden_pictures(outputs["reconstruction"], prepared, prepared["axes"][0])


def _linear_in_slices(image: Tensor, visible: Tensor, axes: Sequence[int]) -> Tensor:
    """`inpainting.linear` of each slice: (B, C, X, Y, Z), (B, 1, X, Y, Z) bool, (B) axes -> (B, C, X, Y, Z)."""
    filled = [
        unfold(inpainting.linear(fold(image[row, None], axis), fold(visible[row, None], axis)), axis, 1)
        for row, axis in enumerate(axes)
    ]
    return torch.cat(filled)


def fold(volumes: Tensor, axis: int) -> Tensor:
    """(B, C, X, Y, Z) -> the slices across a spatial axis, (B S, C, X, Y, Z) with size 1 along it."""
    return volumes.movedim(axis + 2, 1).flatten(0, 1).unsqueeze(axis + 2)


def unfold(slices: Tensor, axis: int, batch_size: int) -> Tensor:
    """The inverse of `fold`."""
    return slices.squeeze(axis + 2).unflatten(0, (batch_size, -1)).movedim(1, axis + 2)
