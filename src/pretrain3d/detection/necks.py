"""Between a backbone's levels and the detector's heads: feature pyramids, from one level too, and equal channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain3d.backbones.contract import Level, Triple, triple
from pretrain3d.backbones.convolution import Conv3d
from pretrain3d.config import UserError, by_text

MIN_CHANNELS = 8
GROUP_CHANNELS = 8  # per group of the channel mapper's norm
FINEST_STRIDE, COARSEST_STRIDE = 2, 32  # where a pyramid from a single level ends


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

    def forward(self, features: Sequence[Tensor | None], finest: int | None = None) -> dict[int, Tensor]:
        """One (B, c, X, Y, Z) map per backbone level, finest first -> the output levels by index.

        Levels finer than ``finest`` are left out and may be None; None for ``finest`` gives all output levels.
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


class ChannelMapper(nn.Module):
    """The wanted levels with equal channels: 1x1x1 conv and group norm (8 channels per group), no activation.

    Args:
        levels: finest first.
        outputs: indices of the levels to return, ascending.
        channels: of every output.
    """

    def __init__(self, levels: Sequence[Level], outputs: Sequence[int], channels: int) -> None:
        super().__init__()
        self.outputs = tuple(outputs)
        self.maps = nn.ModuleList(
            nn.Sequential(
                Conv3d(levels[index].channels, channels, kernel_size=1),
                nn.GroupNorm(num_groups(channels, GROUP_CHANNELS), channels),
            )
            for index in self.outputs
        )

    def forward(self, features: Sequence[Tensor | None]) -> list[Tensor]:
        """One map per level, None where it is not among the outputs -> (B, channels, X, Y, Z) per output level."""
        return [layer(features[index]) for layer, index in zip(self.maps, self.outputs, strict=True)]


class SimplePyramid(nn.Module):
    """A pyramid from the single level of a Transformer: transposed convs up, max pooling down.

    Its levels are those of `pyramid_levels`. Only levels from ``finest`` to ``coarsest`` are made, so that no
    parameter is dead.

    Args:
        level: the backbone's.
        finest, coarsest: indices into `pyramid_levels`.

    Source: Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection", section 3; there each
    finer level has transposed convs of its own, here it is made from the next coarser one.
    """

    def __init__(self, level: Level, finest: int, coarsest: int) -> None:
        super().__init__()
        self.levels = pyramid_levels([level])
        self.base = next(i for i, other in enumerate(self.levels) if other.stride == tuple(level.stride))
        self.finest, self.coarsest = finest, coarsest
        self.up = nn.ModuleDict()
        for index in range(self.base, finest, -1):
            coarse, fine = self.levels[index], self.levels[index - 1]
            step = _relative_stride(fine.stride, coarse.stride)
            layers: list[nn.Module] = [nn.ConvTranspose3d(coarse.channels, fine.channels, step, stride=step)]
            if index < self.base:
                layers = [nn.GroupNorm(1, coarse.channels), nn.GELU(), *layers]
            self.up[str(index)] = nn.Sequential(*layers)

    def forward(self, features: list[Tensor], finest: int | None = None) -> list[Tensor | None]:
        """[(B, C, X, Y, Z)] -> one map per level, finest first; None for levels finer than ``finest``.

        Raises:
            UserError: the map cannot be halved as often as the coarsest level needs.
        """
        (base,) = features
        self._check(base.shape[2:])
        first = self.finest if finest is None else finest
        maps: list[Tensor | None] = [None] * (self.coarsest + 1)
        current = base
        for index in range(self.base, first - 1, -1):
            if index < self.base:
                current = self.up[str(index + 1)](current)
            if index <= self.coarsest:
                maps[index] = current
        for index in range(self.base + 1, self.coarsest + 1):
            base = F.max_pool3d(base, kernel_size=2)
            maps[index] = base
        return maps

    def _check(self, size: Sequence[int]) -> None:
        last = self.base
        while last < self.coarsest and all(n % 2 ** (last + 1 - self.base) == 0 for n in size):
            last += 1
        if last < self.coarsest:
            image = [n * s for n, s in zip(size, self.levels[self.base].stride, strict=True)]
            needed = self.levels[self.coarsest].stride
            raise UserError(
                f"the image or patch size is {by_text(image)}; the detector's coarsest level needs a multiple of "
                f"{by_text(needed)}. Change data.patch_size, or leave coarse levels out: "
                f"+module.detector.detection_levels={list(range(min(1, last), last + 1))}"
            )


def pyramid_levels(levels: Sequence[Level]) -> tuple[Level, ...]:
    """The levels that a detector works on: the backbone's, or those of `SimplePyramid` when the backbone has one.

    From the single level the stride is halved (per axis, while it is even) down to 2, with half the channels each, and
    doubled up to 32 with the same channels: the strides 2 to 32 for tokens of 4, 8 or 16 voxels.
    """
    if len(levels) > 1:
        return tuple(levels)
    (level,) = levels
    result = [Level(level.channels, triple(level.stride))]
    while max(result[0].stride) > FINEST_STRIDE and any(s % 2 == 0 for s in result[0].stride):
        stride = triple([s // 2 if s % 2 == 0 else s for s in result[0].stride])
        result.insert(0, Level(_level_channels(result[0].channels, 1), stride))
    while max(result[-1].stride) < COARSEST_STRIDE:
        result.append(Level(level.channels, triple([2 * s for s in result[-1].stride])))
    return tuple(result)


def chosen_levels(wanted: Sequence[int] | None, num_levels: int) -> tuple[int, ...]:
    """Indices of the levels that predict boxes; by default the last four (five of seven), but never the first.

    Raises:
        UserError: not ascending indices of levels that are there.
    """
    if wanted is None:
        return tuple(range(min(max(1, num_levels - 4), 2, num_levels - 1), num_levels))
    chosen = tuple(int(index) for index in wanted)
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= num_levels:
        raise UserError(
            f"detector.detection_levels is {list(wanted)}; expected ascending indices between 0 and {num_levels - 1}"
            f" (there are {num_levels} levels)"
        )
    return chosen


def num_groups(channels: int, per_group: int) -> int:
    """The most groups of at least ``per_group`` channels that divide them; one where there are fewer."""
    return max(n for n in range(1, max(channels // per_group, 1) + 1) if channels % n == 0)


def _level_channels(channels: int, halvings: int) -> int:
    """Channels of a level that lies ``halvings`` levels below the finest full one (negative: above it)."""
    return channels if halvings <= 0 else max(channels >> halvings, min(MIN_CHANNELS, channels))


def _relative_stride(fine: Sequence[int], coarse: Sequence[int]) -> Triple:
    """Per-axis factor between two levels; a backbone's strides divide each other."""
    assert all(c % f == 0 for f, c in zip(fine, coarse, strict=True)), f"strides {fine} do not divide {coarse}"
    return triple([c // f for f, c in zip(fine, coarse, strict=True)])
