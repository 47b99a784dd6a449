"""Residual encoder with instance norm, as in nnU-Net's ResEnc presets; `resenc_l` is the released ResEnc-L.

Weights are named as in released files, each tensor once: ``stem.conv``, ``stages.S.blocks.B.conv1.conv``, ``....norm``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain3d.backbones.contract import Level, by_text, check_image, check_sizes
from pretrain3d.backbones.convolution import Conv3d, slice_axis, without
from pretrain3d.config import UserError
from pretrain3d.sparse import active_voxels, masked_instance_norm

NORM_EPS = 1e-5
SLOPE = 0.01  # of LeakyReLU
MASKING = ("zero", "sparse")
Triple = tuple[int, int, int]


def triple(value: int | Sequence[int]) -> Triple:
    """One number for all axes, or one per axis."""
    x, y, z = (value,) * 3 if isinstance(value, int) else value
    return int(x), int(y), int(z)


class ConvBlock(nn.Module):
    """Convolution and instance norm, then LeakyReLU unless ``activate`` is False.

    Args:
        in_channels, out_channels: of the convolution.
        kernel: (3,) odd; padded to "same".
        stride: (3,).
        bias: of the convolution.
        activate: whether LeakyReLU follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Triple,
        stride: Triple,
        bias: bool = True,
        activate: bool = True,
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv = Conv3d(in_channels, out_channels, kernel, stride, padding, bias=bias)
        self.norm = nn.InstanceNorm3d(out_channels, eps=NORM_EPS, affine=True)
        self.activate = activate

    def forward(self, x: Tensor, active: Tensor | None = None, flat: int | None = None) -> Tensor:
        """From (B, C, X, Y, Z) to (B, out_channels, X', Y', Z').

        Args:
            x: the image.
            active: (B, 1, X', Y', Z') bool at the resolution of the output, ``None`` = all.
            flat: see `convolution.slice_axis`.
        """
        x = self.conv(x, flat)
        if active is None:
            x = self.norm(x)
        else:
            x = masked_instance_norm(x * active, active, self.norm.weight, self.norm.bias, NORM_EPS)
        return F.leaky_relu(x, SLOPE, inplace=True) if self.activate else x


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


class Stage(nn.Module):
    """The residual blocks of one level; the first one is strided."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        first = ResidualBlock(in_channels, out_channels, kernel, stride)
        rest = [ResidualBlock(out_channels, out_channels, kernel, (1, 1, 1)) for _ in range(num_blocks - 1)]
        self.blocks = nn.ModuleList([first, *rest])

    def forward(
        self, x: Tensor, active: Tensor | None = None, flat: int | None = None, checkpointing: bool = False
    ) -> Tensor:
        """Args: see `ConvBlock.forward`; ``checkpointing`` recomputes each block in the backward pass."""
        for block in self.blocks:
            x = checkpoint(block, x, active, flat, use_reentrant=False) if checkpointing else block(x, active, flat)
        return x


class ResEnc(nn.Module):
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

    runtime_arguments = frozenset({"masking", "checkpointing"})
    input_weights = ("stem.conv.weight",)
    takes_slices = True
    takes_stem = True

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
        super().__init__()
        kernels = [kernels] * len(channels) if isinstance(kernels, int) else kernels
        _check_stages(channels, blocks, strides, kernels, masking)
        stage_strides = [triple(s) for s in strides]
        stage_kernels = [triple(k) for k in kernels]
        self.arguments = {
            "channels": [int(c) for c in channels],
            "blocks": [int(b) for b in blocks],
            "strides": [list(s) for s in stage_strides],
            "kernels": [list(k) for k in stage_kernels],
            "in_channels": int(in_channels),
            "masking": masking,
            "checkpointing": bool(checkpointing),
        }
        self.in_channels = in_channels
        self.masking = masking
        self.checkpointing = checkpointing
        total = accumulate(stage_strides, lambda a, b: (a[0] * b[0], a[1] * b[1], a[2] * b[2]))
        self.levels = tuple(Level(int(c), s) for c, s in zip(channels, total, strict=True))
        self.size_multiple: Triple = self.levels[-1].stride

        self.stem = ConvBlock(in_channels, channels[0], stage_kernels[0], (1, 1, 1))
        inputs = [channels[0], *channels[:-1]]
        self.stages = nn.ModuleList(
            Stage(*stage) for stage in zip(inputs, channels, blocks, stage_kernels, stage_strides, strict=True)
        )

    def forward(
        self, image: Tensor, keep: Tensor | None = None, stem: Callable[..., Tensor] | None = None
    ) -> list[Tensor]:
        """See `contract.Backbone`.

        Args:
            stem: takes the place of the network's own, for data sets that have one of their own.

        Raises:
            UserError: channels or size do not fit.
        """
        flat = slice_axis(image)
        multiple = without(self.size_multiple, flat)
        check_image(image, self.in_channels, multiple)
        if tuple(image.shape[2:]) == multiple:
            size = by_text(multiple)
            raise UserError(f"an image or patch of {size} is one voxel on the coarsest level; double at least one axis")
        masks: list[Tensor | None] = [None] * len(self.levels)
        active = None
        if keep is not None:
            image = image.masked_fill(~keep, 0.0)  # not a product: a hidden NaN stays hidden
            if self.masking == "sparse":
                active = keep
                masks = [active_voxels(keep, without(level.stride, flat)) for level in self.levels]
        recompute = self.checkpointing and self.training and torch.is_grad_enabled()
        x = (stem or self.stem)(image, active, flat)  # (B, c0, X, Y, Z)
        features = []
        for stage, mask in zip(self.stages, masks, strict=True):
            x = stage(x, mask, flat, recompute)
            features.append(x)
        return features

    def layers(self) -> list[tuple[nn.Module, ...]]:
        """See `contract.Backbone`: the stages."""
        return [(stage,) for stage in self.stages]


def _check_stages(
    channels: Sequence[int],
    blocks: Sequence[int],
    strides: Sequence[int | Sequence[int]],
    kernels: Sequence[int | Sequence[int]],
    masking: str,
) -> None:
    counts = {"channels": len(channels), "blocks": len(blocks), "strides": len(strides), "kernels": len(kernels)}
    if len(set(counts.values())) != 1 or not channels:
        stated = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"resenc: one entry per stage is needed in channels, blocks, strides and kernels; got {stated}")
    check_sizes("resenc", channels=channels, blocks=blocks, strides=strides, kernels=kernels)
    if masking not in MASKING:
        raise UserError(f"resenc: masking is {masking!r}; it is one of {', '.join(MASKING)}")
    for kernel in kernels:
        if any(k % 2 == 0 for k in triple(kernel)):
            raise UserError(f"resenc: a kernel is {kernel}; kernels are odd")


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
