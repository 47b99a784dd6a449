"""Residual encoder with instance norm, as in nnU-Net's ResEnc presets; `resenc_l` is the released ResEnc-L.

Weights are named as in released files, each tensor once: ``stem.conv``, ``stages.S.blocks.B.conv1.conv``, ``....norm``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain3d.backbones.contract import Triple
from pretrain3d.backbones.convolution import without
from pretrain3d.backbones.stages import SLOPE, ConvBlock, StageBackbone


class ResidualBlock(nn.Module):
    """Two convolutions and a skip; a strided skip is average pooling, then a 1x1 convolution where channels change.

    Source: He et al., "Bag of tricks" (2019), ResNet-D.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.conv1 = ConvBlock(in_channels, out_channels, kernel, stride)
        self.conv2 = ConvBlock(out_channels, out_channels, kernel, (1, 1, 1), activate=False)
        self.stride = stride
        self.skip = (
            ConvBlock(in_channels, out_channels, (1, 1, 1), (1, 1, 1), bias=False, activate=False)
            if in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor, active: Tensor | None = None, flat: int | None = None) -> Tensor:
        """Args: see `ConvBlock.forward`."""
        stride = without(self.stride, flat)
        skip = F.avg_pool3d(x, stride, stride) if stride != (1, 1, 1) else x
        if self.skip is not None:
            skip = self.skip(skip, active, flat)
        x = self.conv2(self.conv1(x, active, flat), active, flat)
        return F.leaky_relu(x + skip, SLOPE, inplace=True)


class ResEnc(StageBackbone):
    """The encoder; fulfils `contract.Backbone`.

    Args:
        in_channels: of the image.
        channels: per stage.
        blocks: residual blocks per stage.
        strides: of each stage, one number or one per axis; the first is usually 1.
        kernels: of each stage, odd, one number or one per axis; also one number for all stages.
        masking: what ``keep`` does: "zero" sets hidden voxels to 0 before the stem; "sparse" also keeps them out of
            every norm and sets their places to 0 after every convolution.
        checkpointing: recompute activations in the backward pass: less memory, about a third more time.

    Raises:
        UserError: lists of different lengths, a size below 1, an unknown masking, an even kernel.
    """

    def __init__(
        self,
        channels: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[int | Sequence[int]],
        kernels: int | Sequence[int | Sequence[int]] = 3,
        in_channels: int = 1,
        masking: str = "zero",
        checkpointing: bool = False,
    ) -> None:
        super().__init__("blocks", blocks, channels, strides, kernels, in_channels, masking, checkpointing)

    def blocks_of(
        self, index: int, count: int, in_channels: int, out_channels: int, kernel: Triple, stride: Triple
    ) -> list[nn.Module]:
        """See `StageBackbone.blocks_of`."""
        first = ResidualBlock(in_channels, out_channels, kernel, stride)
        return [first, *(ResidualBlock(out_channels, out_channels, kernel, (1, 1, 1)) for _ in range(count - 1))]


def resenc_xxs(in_channels: int = 1, masking: str = "zero", checkpointing: bool = False) -> ResEnc:
    """For patches of 24^3 and minutes of two CPU cores: four levels down to stride 8, 8 to 64 channels, 0.5 M."""
    return ResEnc((8, 16, 32, 64), (1, 1, 2, 2), (1, 2, 2, 2), 3, in_channels, masking, checkpointing)


def resenc_xs(in_channels: int = 1, masking: str = "zero", checkpointing: bool = False) -> ResEnc:
    """For two CPU cores: five levels down to stride 16, 8 to 96 channels, 1.4 M parameters."""
    return ResEnc((8, 16, 32, 64, 96), (1, 1, 2, 2, 2), (1, 2, 2, 2, 2), 3, in_channels, masking, checkpointing)


def resenc_s(in_channels: int = 1, masking: str = "zero", checkpointing: bool = False) -> ResEnc:
    """ResEnc-L's levels and channels with two blocks per stage (one in the first): 29.9 M parameters."""
    channels, strides = (32, 64, 128, 256, 320, 320), (1, 2, 2, 2, 2, 2)
    return ResEnc(channels, (1, 2, 2, 2, 2, 2), strides, 3, in_channels, masking, checkpointing)


def resenc_l(in_channels: int = 1, masking: str = "zero", checkpointing: bool = False) -> ResEnc:
    """The released ResEnc-L, 90,296,576 parameters.

    Source: Isensee et al., "nnU-Net revisited" (2024); Wald et al., "An OpenMind for 3D medical vision" (2024).
    """
    channels, strides = (32, 64, 128, 256, 320, 320), (1, 2, 2, 2, 2, 2)
    return ResEnc(channels, (1, 3, 4, 6, 6, 6), strides, 3, in_channels, masking, checkpointing)
