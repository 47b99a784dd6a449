"""What the convolutional backbones share: a stem, then stages of blocks with instance norm, every voxel mask kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain3d.backbones.contract import Level, Triple, check_image, check_more_than_a_voxel, check_sizes, triple
from pretrain3d.backbones.convolution import Conv3d, slice_axis, without
from pretrain3d.config import UserError
from pretrain3d.sparse import active_voxels, masked_instance_norm

NORM_EPS = 1e-5
SLOPE = 0.01  # of LeakyReLU
MASKING = ("zero", "sparse")


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


class Stage(nn.Module):
    """The blocks of one level, each called as a `ConvBlock`; the first one is strided."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self, x: Tensor, active: Tensor | None = None, flat: int | None = None, checkpointing: bool = False
    ) -> Tensor:
        """Args: see `ConvBlock.forward`; ``checkpointing`` recomputes each block in the backward pass."""
        for block in self.blocks:
            x = checkpoint(block, x, active, flat, use_reentrant=False) if checkpointing else block(x, active, flat)
        return x


class StageBackbone(nn.Module):
    """A CNN whose stages are the levels; fulfils `contract.Backbone`.

    Args:
        count: name of the argument that says how many blocks or convolutions a stage has.
        counts: its value, per stage.
        channels, strides, kernels, in_channels, masking, checkpointing: see `resenc.ResEnc`.
        bias: of the stem's convolution.

    Raises:
        UserError: lists of different lengths, a size below 1, an unknown masking, an even kernel.
    """

    runtime_arguments = frozenset({"masking", "checkpointing"})
    input_weights = ("stem.conv.weight",)
    takes_slices = True
    takes_stem = True

    def __init__(
        self,
        count: str,
        counts: Sequence[int],
        channels: Sequence[int],
        strides: Sequence[int | Sequence[int]],
        kernels: int | Sequence[int | Sequence[int]],
        in_channels: int,
        masking: str,
        checkpointing: bool,
        bias: bool = True,
    ) -> None:
        super().__init__()
        kernels = [kernels] * len(channels) if isinstance(kernels, int) else kernels
        name = type(self).__name__.lower()
        _check_stages(name, masking, **{"channels": channels, count: counts, "strides": strides, "kernels": kernels})
        stage_strides = [triple(s) for s in strides]
        stage_kernels = [triple(k) for k in kernels]
        self.arguments = {
            "channels": [int(c) for c in channels],
            count: [int(c) for c in counts],
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

        self.stem = ConvBlock(in_channels, channels[0], stage_kernels[0], (1, 1, 1), bias)
        inputs = [channels[0], *channels[:-1]]
        stages = zip(counts, inputs, channels, stage_kernels, stage_strides, strict=True)
        self.stages = nn.ModuleList(Stage(self.blocks_of(index, *stage)) for index, stage in enumerate(stages))

    @abstractmethod
    def blocks_of(
        self, index: int, count: int, in_channels: int, out_channels: int, kernel: Triple, stride: Triple
    ) -> list[nn.Module]:
        """The blocks of stage ``index``, each called as a `ConvBlock`."""

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
        check_more_than_a_voxel(image, multiple)
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


def _check_stages(name: str, masking: str, **lists: Sequence[int | Sequence[int]]) -> None:
    if len({len(values) for values in lists.values()}) != 1 or not lists["channels"]:
        *names, last = lists
        stated = ", ".join(f"{key} {len(values)}" for key, values in lists.items())
        raise UserError(f"{name}: one entry per stage is needed in {', '.join(names)} and {last}; got {stated}")
    check_sizes(name, **lists)
    if masking not in MASKING:
        raise UserError(f"{name}: masking is {masking!r}; it is one of {', '.join(MASKING)}")
    for kernel in lists["kernels"]:
        if any(k % 2 == 0 for k in triple(kernel)):
            raise UserError(f"{name}: a kernel is {kernel}; kernels are odd")
