"""Plain encoder: convolutions with instance norm and no skip, the backbone of nnDetection and of nnU-Net's default."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pretrain3d.backbones.contract import Triple, triple
from pretrain3d.backbones.stages import ConvBlock, StageBackbone
from pretrain3d.config import UserError


class PlainConv(StageBackbone):
    """The encoder; fulfils `contract.Backbone`. As it stands it is that of the published Retina U-Nets, 14.0 M.

    The first convolution is the stem, so that it can be another one for every data set. Convolutions have no bias: the
    norm behind each would take it out again.

    Args:
        channels: per stage.
        convs: convolutions per stage, the stem being the first of the first stage.
        strides: of each stage, one number or one per axis; the first is 1. Its first convolution is strided.
        kernels, in_channels, masking, checkpointing: see `resenc.ResEnc`.

    Raises:
        UserError: lists of different lengths, a size below 1, a strided first stage, an unknown masking, an even
            kernel.

    Source: Baumgartner et al., "nnDetection" (2021), with LeakyReLU as in its later versions; Isensee et al., "nnU-Net"
    (2021), whose convolutions do have biases.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128, 256, 320, 320),
        convs: Sequence[int] = (2, 2, 2, 2, 2, 2),
        strides: Sequence[int | Sequence[int]] = (1, 2, 2, 2, 2, 2),
        kernels: int | Sequence[int | Sequence[int]] = 3,
        in_channels: int = 1,
        masking: str = "zero",
        checkpointing: bool = False,
    ) -> None:
        if strides and triple(strides[0]) != (1, 1, 1):
            raise UserError(f"plainconv: the stride of the first stage is {strides[0]}; it must be 1")
        super().__init__("convs", convs, channels, strides, kernels, in_channels, masking, checkpointing, bias=False)

    def blocks_of(
        self, index: int, count: int, in_channels: int, out_channels: int, kernel: Triple, stride: Triple
    ) -> list[nn.Module]:
        """See `StageBackbone.blocks_of`."""
        first = [ConvBlock(in_channels, out_channels, kernel, stride, bias=False)] if index else []  # 0: the stem
        rest = (ConvBlock(out_channels, out_channels, kernel, (1, 1, 1), bias=False) for _ in range(count - 1))
        return [*first, *rest]
