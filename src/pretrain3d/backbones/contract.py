"""What every backbone promises to the objectives, the detectors and the transfer files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from torch import Tensor, nn

from pretrain3d.config import UserError, by_text
from pretrain3d.registry import CONTRACTS, check_promises

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Level:
    """One level of a feature pyramid.

    Attributes:
        channels: of the features.
        stride: image voxels per feature voxel along x, y, z.
        tokens: the places are tokens of a Transformer: those that are wholly hidden are dropped and 0 in the output.
    """

    channels: int
    stride: Triple
    tokens: bool = False


class Backbone(Protocol):
    """An image to a list of features, finest first.

    A backbone that begins with an embedding of patches also has ``embed(image) -> (B, C, x, y, z)``, with the channels
    and stride of the finest level, and ``encode(embedded) -> features``; ``encode(embed(image))`` is what a call does.
    A level of tokens is the only one; ``forward`` then takes a third argument ``num_visible``, an int or None
    (`tokens.TokenBackbone.forward`), and ``make_stack(depth)`` builds more blocks of the same kind, a module from
    (B, C, x, y, z) with every place filled to (B, x y z, C), with positions of its own: a decoder's.

    One whose ``masking`` is ``"sparse"``, which S3D needs, keeps hidden voxels out of every level: with ``keep`` its
    norms are over the active places of `sparse.active_voxels`, all others are 0. One with learned positions may have
    an argument ``image_size`` and ``position_weights``, names of weights (C, x, y, z) that a transfer interpolates.

    Attributes:
        levels: channels and stride of each output, finest first.
        in_channels: of the image.
        size_multiple: the image size along x, y, z must be a multiple of it.
        arguments: plain values; ``type(backbone)(**arguments)`` builds the same network.
        runtime_arguments: names in ``arguments`` that change how the network runs, not what its weights mean;
            weights move freely between networks that differ only there.
        input_weights: names of the weights whose second dimension is the channel of the image.
    """

    levels: tuple[Level, ...]
    in_channels: int
    size_multiple: Triple
    arguments: dict[str, Any]
    runtime_arguments: frozenset[str]
    input_weights: tuple[str, ...]

    def __call__(self, image: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        """Features of an image.

        Args:
            image: (B, C, X, Y, Z).
            keep: (B, 1, X, Y, Z) bool, False = hidden: such voxels change no feature. ``None`` = everything visible.
                A backbone with ``takes_slices = True`` also takes an image of size 1 along one axis, whatever its
                ``size_multiple`` there, as in `convolution.slice_axis`. One with ``takes_stem = True`` has a module
                ``stem``, and a third argument may take its place.

        Returns:
            per level (B, channels, X / stride x, Y / stride y, Z / stride z).
        """

    def layers(self) -> list[tuple[nn.Module, ...]]:
        """The stages of a CNN or the blocks of a Transformer, first to last, each with all modules that belong to it.

        What is in none of them is the stem: all of it comes before the first layer.
        """


def check_backbone(backbone: Any) -> None:
    """Refuses a network that cannot be used as a backbone, before anything is computed with it.

    Raises:
        UserError: an attribute or method of `Backbone` is missing, or its levels make no pyramid; names it.
    """
    check_promises(backbone, Backbone, "backbone")
    where, levels = f"the backbone {type(backbone).__name__}", tuple(backbone.levels)
    for level in levels:
        if not isinstance(level, Level) or not isinstance(level.stride, tuple) or len(level.stride) != 3:
            raise UserError(f"{where}: a level is {level}; expected Level(channels, (x, y, z)) ({CONTRACTS})")
    for fine, coarse in pairwise(levels):
        if fine.stride == coarse.stride or any(c % f for f, c in zip(fine.stride, coarse.stride, strict=True)):
            raise UserError(
                f"{where}: its level of stride {fine.stride} is followed by one of {coarse.stride}; levels are finest "
                f"first, each stride a multiple of the one before ({CONTRACTS})"
            )
    multiple = tuple(backbone.size_multiple)
    if not levels or len(multiple) != 3 or any(m % s for m, s in zip(multiple, levels[-1].stride, strict=True)):
        coarsest = levels[-1].stride if levels else "none"
        raise UserError(f"{where}: size_multiple is {multiple} and the coarsest stride {coarsest}; an image is to be a "
                        f"multiple of it ({CONTRACTS})")  # fmt: skip


def check_first_features(backbone: nn.Module) -> None:
    """Has the network refuse, in its next forward pass, features that are not those of its declared levels."""

    def look(network: Any, inputs: tuple[Any, ...], features: Any) -> None:
        handle.remove()
        image = inputs[0]
        size = image.shape[2:]  # 1 along an axis: a slice, which no stride divides
        steps = [[1 if n == 1 else s for n, s in zip(size, level.stride, strict=True)] for level in network.levels]
        expected = [
            (len(image), level.channels, *(n // s for n, s in zip(size, step, strict=True)))
            for level, step in zip(network.levels, steps, strict=True)
        ]
        listed = isinstance(features, (list, tuple))
        found = [tuple(feature.shape) for feature in features] if listed else type(features).__name__
        if found != expected:
            raise UserError(
                f"the backbone {type(network).__name__} gives {found} for an image {tuple(image.shape)}; its levels "
                f"say {expected} ({CONTRACTS})"
            )

    handle = backbone.register_forward_hook(look)


def check_image(image: Tensor, in_channels: int, size_multiple: Sequence[int]) -> None:
    """Refuses an image that the backbone cannot take.

    Args:
        image: (B, C, X, Y, Z).
        in_channels: what C must be.
        size_multiple: (3,) what X, Y, Z must be multiples of.

    Raises:
        UserError: names the size or the channels, and what would be right.
    """
    size = tuple(image.shape[2:])
    if image.shape[1] != in_channels:
        raise UserError(f"the image has {image.shape[1]} channel(s); this backbone takes {in_channels}")
    if any(s % m for s, m in zip(size, size_multiple, strict=True)):
        raise UserError(
            f"the image or patch size is {by_text(size)}; this backbone needs a multiple of {by_text(size_multiple)}"
        )


def check_more_than_a_voxel(image: Tensor, size_multiple: Sequence[int]) -> None:
    """Refuses an image that an instance norm of the coarsest level would have nothing to compare with.

    Raises:
        UserError: (B, C, X, Y, Z) is a single voxel there.
    """
    if tuple(image.shape[2:]) == tuple(size_multiple):
        size = by_text(size_multiple)
        raise UserError(f"an image or patch of {size} is one voxel on the coarsest level; double at least one axis")


def check_sizes(name: str, **sizes: Any) -> None:
    """Refuses a size below 1 and an empty list among the arguments of a backbone.

    Args:
        name: of the backbone, for the error.
        sizes: whole numbers, lists of them, or lists of lists, by the name of the argument.

    Raises:
        UserError: names the argument and its value.
    """
    for key, value in sizes.items():
        if not _positive(value):
            raise UserError(f"{name}: {key} is {value}; every number must be 1 or more")


def _positive(value: Any) -> bool:
    if isinstance(value, Sequence):
        return len(value) > 0 and all(_positive(entry) for entry in value)
    return bool(value >= 1)


def check_drop_path(name: str, rate: float) -> None:
    """Refuses a rate of stochastic depth at which nothing would be left.

    Raises:
        UserError: it is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise UserError(f"{name}: drop_path is {rate}; it must be 0 or more and below 1")


def triple(value: int | Sequence[int]) -> Triple:
    """One number for all axes, or one per axis."""
    x, y, z = (value,) * 3 if isinstance(value, int) else value
    return int(x), int(y), int(z)
