"""S3D (SparK in 3D): hidden blocks stay empty through a sparse encoder and are filled with tokens on every level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain3d.config import UserError
from pretrain3d.objectives.contract import Backbone, Decoder, PyramidLevel
from pretrain3d.objectives.hidden import HiddenBlocks
from pretrain3d.sparse import active_voxels, masked_instance_norm


class Densify(nn.Module):
    """Sparse features to dense ones: a norm over the active voxels, a learned token elsewhere, a convolution.

    Args:
        channels: of the level.
        convolve: False leaves out the convolution (the level at the resolution of the image).
    """

    def __init__(self, channels: int, convolve: bool) -> None:
        super().__init__()
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(channels), std=0.02))
        self.project = nn.Conv3d(channels, channels, 3, padding=1) if convolve else nn.Identity()

    def forward(self, features: Tensor, active: Tensor) -> Tensor:
        """(B, C, x, y, z), 0 where not active; active (B, 1, x, y, z) bool -> (B, C, x, y, z)."""
        normed = masked_instance_norm(features, active)
        filled = torch.where(active, normed, self.token.to(normed.dtype).view(1, -1, 1, 1, 1))
        if filled.device.type != "cpu":
            return self.project(filled)
        with torch.autocast("cpu", enabled=False):  # bf16 kernel gradients can be garbage there: backbones.convolution
            return self.project(filled.float())


class S3D(HiddenBlocks):
    """A masked autoencoder whose encoder never mixes hidden with visible voxels.

    The backbone runs with ``masking: sparse``: the image is 0 in hidden places before the stem, every convolution's
    output is set to 0 there again, and norms are over visible voxels. A level whose voxels are larger than a mask block
    is active everywhere. `Densify` fills each level, a U-Net decoder predicts the normalised intensities.

    Args:
        levels, in_channels, patch_size, decoder: see `contract.Method`.
        ratio: share of blocks that are hidden, in (0, 1).
        block: side of a block in voxels, (3,) or one number; ``None`` = `masking.block_size` of the patch.

    Raises:
        UserError: a mask that hides nothing or everything; a backbone that is not sparse.

    Source: Tian et al., "Designing BERT for convolutional networks" (2023); in 3D Wald et al., "Revisiting MAE
    pre-training for 3D medical image segmentation" (2024), from which ratio 0.75, plain mean squared error and one
    3x3x3 convolution per level. The 3D reference code does not hide the image before the stem, so a shell of hidden
    voxels reaches the features; here, as in the 2D original, nothing does. Voxels outside the volume do not count.
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
        super().__init__("s3d", patch_size, ratio, block)
        self.strides = [tuple(level.stride) for level in levels]
        self.densify = nn.ModuleList(Densify(level.channels, set(level.stride) != {1}) for level in levels)
        self.decoder = decoder(levels, in_channels)

    @staticmethod
    def check_backbone(backbone: Any) -> None:
        """See `contract.Method`."""
        masking = getattr(backbone, "masking", None)
        if masking != "sparse":
            stated = f"masking={masking}" if masking else "no sparse masking"
            raise UserError(
                f"s3d: the backbone {type(backbone).__name__} has {stated}; "
                "take resenc_xs, resenc_s or resenc_l with +backbone.masking=sparse"
            )

    def forward(self, backbone: Backbone, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns: ``reconstruction`` (B, C, X, Y, Z), in normalised intensities."""
        features = backbone(prepared["inputs"], prepared["keep"])
        dense = [
            densify(level, active_voxels(prepared["keep"], stride))
            for densify, level, stride in zip(self.densify, features, self.strides, strict=True)
        ]
        return {"reconstruction": self.decoder(dense)[0]}
