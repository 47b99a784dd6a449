"""Feature pyramids between a backbone's levels and the detector's heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pretrain3d.backbones.convolution import Conv3d

if TYPE_CHECKING:
    from pretrain3d.backbones.contract import Level

MIN_CHANNELS = 8


class FPN(nn.Module):
    """Feature pyramid: 1x1x1 lateral convs, top-down sum through transposed convs, 3x3x3 output convs, no norm.

    The top-down path starts at the coarsest level of the backbone and stops at the finest one in ``outputs``; finer
    levels are never computed, and only the levels in ``outputs`` get an output conv, so that no parameter is dead.
    Levels finer than ``full_from`` halve the channels per level (at least `MIN_CHANNELS`): they are large.

    Args:
        levels: the backbone's levels, finest first.
        outputs: indices of the levels to return, ascending.
        channels: channels of the levels from ``full_from`` on.
        full_from: finest level with the full number of channels.
        plain: levels among ``outputs`` that are returned without their output conv.

    Source: Lin et al. 2017, "Feature Pyramid Networks"; transposed convs and halved fine levels as nnDetection's U-FPN,
    which also computes output convs that nothing uses.
    """

    def __init__(
        self, levels: Sequence[Level], outputs: Sequence[int], channels: int, full_from: int, plain: Sequence[int] = ()
    ) -> None:
        super().__init__()
        assert list(outputs) == sorted(set(outputs)) and 0 <= outputs[0] <= outputs[-1] < len(levels), outputs
        self.outputs = tuple(outputs)
        self.finest = self.outputs[0]
        self.channels = tuple(_level_channels(channels, full_from - index) for index in range(len(levels)))
        self.lateral = nn.ModuleDict()
        self.up = nn.ModuleDict()
        self.output = nn.ModuleDict()
        for index in range(self.finest, len(levels)):
            width = self.channels[index]
            self.lateral[str(index)] = Conv3d(levels[index].channels, width, kernel_size=1)
            if index > self.finest:
                step = _relative_stride(levels[index - 1].stride, levels[index].stride)
                self.up[str(index)] = nn.ConvTranspose3d(width, self.channels[index - 1], step, stride=step)
        for index in self.outputs:
            width = self.channels[index]
            convolve = index not in plain
            self.output[str(index)] = Conv3d(width, width, kernel_size=3, padding=1) if convolve else nn.Identity()

    def forward(self, features: list[Tensor], finest: int | None = None) -> dict[int, Tensor]:
        """One (B, c, X, Y, Z) map per backbone level, finest first -> the output levels by index.

        Levels finer than ``finest`` are left out; None gives all output levels.
        """
        maps: dict[int, Tensor] = {}
        above: Tensor | None = None
        last = self.finest if finest is None else finest
        for index in range(len(features) - 1, last - 1, -1):
            merged = self.lateral[str(index)](features[index])
            if above is not None:
                merged = merged + self.up[str(index + 1)](above)
            if index in self.outputs:
                maps[index] = self.output[str(index)](merged)
            above = merged
        return maps


def _level_channels(channels: int, halvings: int) -> int:
    """Channels of a level that lies ``halvings`` levels below the finest full one (negative: above it)."""
    return channels if halvings <= 0 else max(channels >> halvings, min(MIN_CHANNELS, channels))


def _relative_stride(fine: Sequence[int], coarse: Sequence[int]) -> tuple[int, int, int]:
    """Per-axis factor between two levels; a backbone's strides divide each other."""
    assert all(c % f == 0 for f, c in zip(fine, coarse, strict=True)), f"strides {fine} do not divide {coarse}"
    x, y, z = (c // f for f, c in zip(fine, coarse, strict=True))
    return x, y, z
