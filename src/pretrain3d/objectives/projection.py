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
    """A perceptron whose hidden layers are normalised over the batch, in training and in evaluation.

    Args:
        channels: of the pooled features.
        hidden: width of every hidden layer.
        embedding: of the output.
        hidden_layers: their number.

    Source: the heads of SimCLR (Chen et al., 2020) and VoCo (Wu et al., 2024; two hidden layers, later one). nnssl
    normalises each sample over its channels instead. Then the large part that the features of all images share stays,
    all cosines begin near 1, and VoCo with a teacher was seen to collapse within 20 steps.
    """

    def __init__(self, channels: int, hidden: int, embedding: int, hidden_layers: int = 2) -> None:
        layers: list[nn.Module] = []
        for inputs in [channels, *[hidden] * (hidden_layers - 1)]:
            norm = nn.BatchNorm1d(hidden, affine=False, track_running_stats=False)
            layers += [nn.Linear(inputs, hidden), norm, nn.ReLU()]
        super().__init__(*layers, nn.Linear(hidden, embedding))

    def forward(self, features: Tensor) -> Tensor:
        """In full precision, whatever the rest runs in: it costs nothing, and cosines near 1 are told apart.

        Args:
            features: (..., channels), of the whole batch.

        Returns:
            (..., embedding) float32.
        """
        with torch.autocast(features.device.type, enabled=False):
            embeddings: Tensor = super().forward(features.float().flatten(0, -2))
        return embeddings.unflatten(0, features.shape[:-1])


def pooled_views(backbone: Backbone, views: Tensor) -> Tensor:
    """Every view through the backbone in one pass: (B, V, C, x, y, z) -> (B, V, channels) float32, pooled."""
    batch_size, num_views = views.shape[:2]
    return pooled(backbone(views.flatten(0, 1), None)).unflatten(0, (batch_size, num_views))
