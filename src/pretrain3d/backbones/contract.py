"""What every backbone promises to the objectives, the detectors and the transfer files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from pretrain3d.config import UserError, by_text

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
    A level of tokens is then the only one, ``forward`` takes ``num_visible`` (`tokens.TokenBackbone.forward`), and
    ``make_stack(depth)`` builds more blocks of the same kind.

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
