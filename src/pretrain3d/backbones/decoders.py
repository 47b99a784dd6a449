"""Decoders from a pyramid back to the image grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain3d.backbones.contract import Level
from pretrain3d.backbones.convolution import Conv3d, slice_axis
from pretrain3d.backbones.stages import ConvBlock
from pretrain3d.config import UserError
from pretrain3d.registry import CONTRACTS

NORM_EPS = 1e-6


class UNetDecoder(nn.Module):
    """Transposed convolutions, concatenated skips and one convolution block per level, as in the released ResEnc U-Net.

    Args:
        levels: of the backbone, finest first.
        out_channels: of the output.
        outputs: at so many of the finest levels, less than there are levels. The released networks have a head at
            every level but the coarsest, and their 102,348,965 parameters count them, although pretraining uses only
            the finest.

    Raises:
        AssertionError: a level's stride is no multiple of the next finer one's.
    """

    def __init__(self, levels: Sequence[Level], out_channels: int, outputs: int = 1) -> None:
        super().__init__()
        ups, blocks, heads = [], [], []
        for fine, coarse in pairwise(levels):
            assert all(c % f == 0 for c, f in zip(coarse.stride, fine.stride, strict=True)), (fine, coarse)
            x, y, z = (c // f for c, f in zip(coarse.stride, fine.stride, strict=True))
            ups.append(nn.ConvTranspose3d(coarse.channels, fine.channels, (x, y, z), (x, y, z)))
            blocks.append(ConvBlock(2 * fine.channels, fine.channels, (3, 3, 3), (1, 1, 1)))
            heads.append(Conv3d(fine.channels, out_channels, 1))
        self.ups = nn.ModuleList(ups)  # finest first, like the levels
        self.blocks = nn.ModuleList(blocks)
        self.heads = nn.ModuleList(heads[:outputs])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """From the features of each level to the outputs, finest first.

        Args:
            features: per level (B, channels, X / stride x, Y / stride y, Z / stride z); of single slices (see
                `convolution.slice_axis`) too, and then so is the output.

        Returns:
            (B, out_channels, X / stride x, Y / stride y, Z / stride z) each, at the strides of the finest levels.
        """
        x, flat = features[-1], slice_axis(features[0])
        outputs: list[Tensor] = []
        for index in reversed(range(len(self.ups))):
            up = self.ups[index](x) if flat is None else _up_slices(self.ups[index], x, flat)
            x = torch.cat([up, features[index]], 1)  # (B, 2 c, ...) at the finer level
            x = self.blocks[index](x, flat=flat)
            if index < len(self.heads):
                outputs.insert(0, self.heads[index](x, flat))
        return outputs


def _up_slices(up: nn.Module, x: Tensor, flat: int) -> Tensor:
    """Up-sampled slices: of each, the mean of those that the transposed convolution would make of it."""
    assert isinstance(up, nn.ConvTranspose3d)
    stride = [step for axis, step in enumerate(up.stride) if axis != flat]
    plane = F.conv_transpose2d(x.squeeze(flat + 2), up.weight.mean(flat + 2), up.bias, stride)
    return plane.unsqueeze(flat + 2)


class LightDecoder(nn.Module):
    """From the coarsest level alone: per level a convolution block to the next finer one's channels, then tri-linear.

    Args:
        levels: of the backbone, finest first.
        out_channels: of the output, at the stride of the finest level.

    Source: the restoring head of Tang et al.'s SwinUNETR pretraining (2022), with the channels of the backbone's own
    levels as in nnssl: 0.10 TFLOP at 160^3 on ResEnc-L, an eighth of the U-Net decoder.
    """

    def __init__(self, levels: Sequence[Level], out_channels: int) -> None:
        super().__init__()
        pairs = list(pairwise(levels))[::-1]  # coarsest first
        self.factors = [
            tuple(float(c // f) for c, f in zip(coarse.stride, fine.stride, strict=True)) for fine, coarse in pairs
        ]
        self.blocks = nn.ModuleList(
            ConvBlock(coarse.channels, fine.channels, (3, 3, 3), (1, 1, 1)) for fine, coarse in pairs
        )
        self.head = Conv3d(levels[0].channels, out_channels, 1)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """From the features, finest first, to one output of `out_channels` at the resolution of the finest."""
        x = features[-1]
        for block, factor in zip(self.blocks, self.factors, strict=True):
            x = F.interpolate(block(x), scale_factor=factor, mode="trilinear")
        return [self.head(x)]


class PatchDecoder(nn.Module):
    """Transposed convolutions from one level to the image, with a norm over the channels and GELU between them.

    The stride is undone by its prime factors, 8 as 2, 2, 2. The channels fall geometrically towards twice those of the
    output, in multiples of 8.

    Args:
        channels, stride: of the level.
        out_channels: of the output.

    Source: Wald et al., "Primus" (2025): 864 channels at stride 8 -> 112 -> 16 -> 1.
    """

    def __init__(self, channels: int, stride: Sequence[int], out_channels: int) -> None:
        super().__init__()
        factors = [prime_factors(s) for s in stride]
        count = max(1, *map(len, factors))
        steps = list(zip(*[[1] * (count - len(f)) + f for f in factors], strict=True))  # count x (x, y, z)
        fall = (channels / (2 * out_channels)) ** (1 / count)
        inner = [max(8, round(channels / fall**step / 8) * 8) for step in range(1, count)]
        widths = [channels, *inner, out_channels]
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(*pair, step, step) for pair, step in zip(pairwise(widths), steps, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=NORM_EPS) for width in inner)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """From the features of the finest level to one output at the resolution of the image.

        Args:
            features: the finest first: (B, channels, X / stride x, Y / stride y, Z / stride z).

        Returns:
            (B, out_channels, X, Y, Z).
        """
        x = self.ups[0](features[0])
        for norm, up in zip(self.norms, self.ups[1:], strict=True):
            x = up(F.gelu(norm(x.movedim(1, -1))).movedim(-1, 1))
        return [x]


class TokenDecoder(nn.Module):
    """Transformer blocks over all tokens, then `PatchDecoder`.

    Args:
        stack: the blocks, with positions of their own: (B, C, x, y, z) -> (B, x y z, C).
        level: of the tokens.
        out_channels: of the output.
    """

    def __init__(self, stack: nn.Module, level: Level, out_channels: int) -> None:
        super().__init__()
        self.stack = stack
        self.patches = PatchDecoder(level.channels, level.stride, out_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """[(B, C, x, y, z)], every place filled -> [(B, out_channels, X, Y, Z)]."""
        tokens = self.stack(features[0])  # (B, N, C)
        return self.patches([tokens.transpose(1, 2).unflatten(2, features[0].shape[2:])])


def image_decoder(
    backbone: Any,
    levels: Sequence[Level],
    out_channels: int,
    blocks: int = 0,
    outputs: int = 1,
    skips: bool = True,
) -> nn.Module:
    """A decoder whose first output has the resolution of the image, for any backbone.

    One level: `PatchDecoder`, after ``blocks`` Transformer blocks of the backbone's kind. More: `UNetDecoder` (without
    ``skips`` `LightDecoder`), followed by `PatchDecoder` where the finest level is not at the resolution of the image.

    Args:
        backbone: whose kind of blocks to use.
        levels: of its features, finest first.
        out_channels: of the output.
        blocks: number of Transformer blocks; only for a backbone of tokens.
        outputs: at so many of the finest levels, less than there are levels; more than 1 only where the finest level is
            at the resolution of the image.
        skips: False: a pyramid is decoded from its coarsest level alone, to one output.
    """
    finest = levels[0]
    assert outputs == 1 or (skips and set(finest.stride) == {1} and outputs < len(levels)), outputs
    if blocks:
        if not hasattr(backbone, "make_stack"):
            raise UserError(f"the backbone {type(backbone).__name__} has tokens, but no make_stack(depth) for the "
                            f"decoder's blocks ({CONTRACTS})")  # fmt: skip
        return TokenDecoder(backbone.make_stack(blocks), finest, out_channels)
    if len(levels) == 1:
        return PatchDecoder(finest.channels, finest.stride, out_channels)
    pyramid: Callable[..., nn.Module] = partial(UNetDecoder, outputs=outputs) if skips else LightDecoder
    if set(finest.stride) == {1}:
        return pyramid(levels, out_channels)
    coarse = pyramid(levels, finest.channels)
    return nn.Sequential(coarse, PatchDecoder(finest.channels, finest.stride, out_channels))


def prime_factors(number: int) -> list[int]:
    """In falling order: 12 -> [3, 2, 2], 1 -> []."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors[::-1]
