"""Multi-scale deformable attention in 3D: each query looks at a few learned points of every level.

Plain PyTorch: points are read by trilinear `grid_sample`, one call per level. Coordinates are relative: 0 and 1 are the
two ends of the image along an axis, so (i + 0.5) / n is the middle of voxel i of a level with n voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = Sequence[tuple[int, int, int]]


def sample_levels(values: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of features read between voxels, in float32.

    A point outside the image, or within half a voxel of its border, mixes with zeros.

    Args:
        values: per level (B, H, D, X, Y, Z): the features of H heads.
        locations: (B, Q, H, L, P, 3) relative coordinates along X, Y, Z.
        weights: (B, Q, H, L, P).

    Returns:
        (B, Q, H * D).

    Source: Zhu et al. 2021, "Deformable DETR", equation 3.
    """
    batch, count, heads, levels, points, _ = locations.shape
    assert len(values) == levels, f"{len(values)} maps for {levels} levels"
    with torch.autocast(locations.device.type, enabled=False):
        grid = (locations.float() * 2 - 1).flip(-1)  # grid_sample wants -1..1 and the last axis first
        grid = grid.permute(3, 0, 2, 1, 4, 5).reshape(levels, batch * heads, count, points, 1, 3)
        shares = weights.float().permute(3, 0, 2, 1, 4).reshape(levels, batch * heads, 1, count, points)
        total = torch.zeros((), device=locations.device)
        for value, place, share in zip(values, grid, shares, strict=True):
            read = F.grid_sample(value.float().flatten(0, 1), place, align_corners=False)  # (B * H, D, Q, P, 1)
            total = total + (read[..., 0] * share).sum(dim=-1)  # (B * H, D, Q)
    return total.view(batch, -1, count).transpose(1, 2)  # heads and their features are neighbours


class DeformableAttention(nn.Module):
    """Attention of queries to learned points around their reference point or box.

    Args:
        channels: of queries and memory, a multiple of ``heads``.
        heads: H.
        num_levels: L.
        points: P per head and level.
    """

    def __init__(self, channels: int, heads: int, num_levels: int, points: int) -> None:
        super().__init__()
        assert channels % heads == 0, f"{channels} channels for {heads} heads"
        self.heads, self.num_levels, self.points = heads, num_levels, points
        self.offsets = nn.Linear(channels, heads * num_levels * points * 3)
        self.weights = nn.Linear(channels, heads * num_levels * points)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.weights.bias)
        with torch.no_grad():  # every head starts in a direction of its own, its points one step apart
            steps = torch.arange(1, points + 1)[:, None] * _directions(heads)[:, None, None]  # (H, 1, P, 3)
            self.offsets.bias.copy_(steps.expand(heads, num_levels, points, 3).flatten())

    def forward(self, query: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes, voxels: Tensor) -> Tensor:
        """What the queries read.

        Args:
            query: (B, Q, C).
            reference: (B or 1, Q, 3) points, whose offsets count voxels of each level, or (B or 1, Q, 6) boxes as
                centre and size, whose offsets count parts of the box (P reaches its border). Relative, float32.
            memory: (B, S, C) the tokens of all levels, finest first, last axis fastest.
            shapes: voxels per axis of each level.
            voxels: (L, 3) the same as a float tensor on the device.

        Returns:
            (B, Q, C).
        """
        batch, count, _ = query.shape
        per_point = (batch, count, self.heads, self.num_levels, self.points)
        offsets = self.offsets(query).float().view(*per_point, 3)
        weights = self.weights(query).float().view(batch, count, self.heads, -1).softmax(dim=-1).view(per_point)
        around = reference[:, :, None, None, None]  # (B or 1, Q, 1, 1, 1, 3 or 6)
        if reference.shape[-1] == 3:
            locations = around + offsets / voxels[:, None]
        else:
            locations = around[..., :3] + offsets * (around[..., 3:] * (0.5 / self.points))
        tokens = self.value(memory).split([math.prod(shape) for shape in shapes], dim=1)
        maps = [
            part.view(batch, -1, self.heads, part.shape[-1] // self.heads).permute(0, 2, 3, 1).unflatten(-1, shape)
            for part, shape in zip(tokens, shapes, strict=True)
        ]
        return self.output(sample_levels(maps, locations, weights))


def _directions(count: int) -> Tensor:
    """(count, 3) directions spread over the sphere (a Fibonacci lattice), their largest coordinate 1."""
    index = torch.arange(count) + 0.5
    z = 1 - 2 * index / count
    angle = index * (math.pi * (1 + math.sqrt(5)))
    radius = (1 - z.square()).sqrt()
    points = torch.stack([radius * angle.cos(), radius * angle.sin(), z], dim=-1)
    return points / points.abs().amax(dim=-1, keepdim=True)
