"""From a backbone's features to one vector per image, and on to the space in which views are compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pretrain3d.objectives.contract import Backbone, PyramidLevel


def pooled_channels(levels: Sequence[PyramidLevel]) -> int:
    """Length of what `pooled` returns."""
    return sum(level.channels for level in levels)


def pooled(features: Sequence[Tensor]) -> Tensor:
    """The mean over space of every level, one behind the other: of a single-level network just its tokens' mean.

    Args:
        features: of the backbone, (B, C, X, Y, Z) per level.

    Returns:
        (B, sum of C) float32.
    """
    return torch.cat([level.float().mean(dim=(2, 3, 4)) for level in features], dim=1)


class Projector(nn.Sequential):
    """A perceptron with two hidden layers, each normalised per sample.

    Args:
        channels: of the pooled features.
        hidden: width of both hidden layers.
        embedding: of the output.

    Source: the head of VoCo (Wu et al., 2024). Its code normalises over the batch; nnssl's, over each sample, as here:
    an embedding then does not depend on what else is in the batch or on how many processes share it.
    """

    def __init__(self, channels: int, hidden: int, embedding: int) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, hidden), (hidden, hidden)):
            layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs, elementwise_affine=False), nn.ReLU()]
        super().__init__(*layers, nn.Linear(hidden, embedding))


def pooled_views(backbone: Backbone, views: Tensor) -> Tensor:
    """Every view through the backbone in one pass: (B, V, C, x, y, z) -> (B, V, channels) float32, pooled."""
    batch_size, num_views = views.shape[:2]
    return pooled(backbone(views.flatten(0, 1), None)).unflatten(0, (batch_size, num_views))


def project(projector: nn.Module, features: Tensor) -> Tensor:
    """The projector in full precision, whatever the rest runs in: it costs nothing, and cosines near 1 are told apart.

    Args:
        projector: acts on the last axis.
        features: (..., channels).

    Returns:
        (..., embedding) float32.
    """
    with torch.autocast(features.device.type, enabled=False):
        return projector(features.float())
