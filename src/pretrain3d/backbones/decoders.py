"""Decoders from a pyramid back to the image grid."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pretrain3d.backbones.contract import Level
from pretrain3d.backbones.convolution import Conv3d
from pretrain3d.backbones.resenc import ConvBlock, triple


class UNetDecoder(nn.Module):
    """Transposed convolutions, concatenated skips and one convolution block per level, as in the released ResEnc U-Net.

    Args:
        levels: of the backbone, finest first.
        out_channels: of the output.
        kernels: of the convolution block at each level, finest first (the coarsest level's is not used); one number
            for all levels.
        deep_supervision: an output at every level but the coarsest. The released networks have these heads, and their
            102,348,965 parameters count them, although pretraining uses only the finest.

    Raises:
        AssertionError: a level's stride is no multiple of the next finer one's.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        out_channels: int,
        kernels: int | Sequence[int | Sequence[int]] = 3,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        kernels = [kernels] * len(levels) if isinstance(kernels, int) else kernels
        self.levels = tuple(levels)
        ups, blocks, heads = [], [], []
        for (fine, coarse), kernel in zip(pairwise(levels), kernels, strict=False):
            assert all(c % f == 0 for c, f in zip(coarse.stride, fine.stride, strict=True)), (fine, coarse)
            x, y, z = (c // f for c, f in zip(coarse.stride, fine.stride, strict=True))
            ups.append(nn.ConvTranspose3d(coarse.channels, fine.channels, (x, y, z), (x, y, z)))
            blocks.append(ConvBlock(2 * fine.channels, fine.channels, triple(kernel), (1, 1, 1)))
            heads.append(Conv3d(fine.channels, out_channels, 1))
        self.ups = nn.ModuleList(ups)  # finest first, like the levels
        self.blocks = nn.ModuleList(blocks)
        self.heads = nn.ModuleList(heads if deep_supervision else heads[:1])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """From the features of each level to the outputs, finest first: one, or with deep supervision one per level.

        Args:
            features: per level (B, channels, X / stride x, Y / stride y, Z / stride z).

        Returns:
            (B, out_channels, X / stride x, Y / stride y, Z / stride z) each, at the strides of the finest levels.
        """
        x = features[-1]
        outputs: list[Tensor] = []
        for index in reversed(range(len(self.ups))):
            x = torch.cat([self.ups[index](x), features[index]], 1)  # (B, 2 c, ...) at the finer level
            x = self.blocks[index](x)
            if index < len(self.heads):
                outputs.insert(0, self.heads[index](x))
        return outputs
