"""What can be said about hidden voxels without learning: the yardsticks of reconstruction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SWEEPS = 16  # per resolution
DAMPING = 0.8  # of a sweep; 1 would leave a checkerboard as it is


def visible_mean(image: Tensor, visible: Tensor) -> Tensor:
    """Mean of the visible voxels per sample and channel: (B, C, X, Y, Z), (B, 1, X, Y, Z) bool -> (B, C, 1, 1, 1)."""
    count = visible.sum((2, 3, 4), keepdim=True).clamp(min=1)
    return (image * visible).sum((2, 3, 4), keepdim=True) / count


@torch.no_grad()
def linear(image: Tensor, visible: Tensor, sweeps: int = SWEEPS) -> Tensor:
    """Tri-linear in-painting: visible voxels as they are, hidden ones the mean of their six neighbours.

    That is the discrete Laplace equation with the visible voxels as boundary values: linear interpolation between two
    points in one dimension, and its counterpart for hidden regions of any shape in three. Edges of the patch are
    mirrored. It is solved from coarse to fine: averages of the visible voxels at half the resolution are filled first
    and their tri-linear up-sampling is what a fixed number of sweeps starts from, so it is an approximation where
    hidden regions are wide, exact in the limit of many sweeps.

    Args:
        image: (B, C, X, Y, Z) float32; hidden voxels are not read. An axis of size 1 has no neighbours: its slices are
            filled in two dimensions.
        visible: (B, 1, X, Y, Z) bool.
        sweeps: relaxation steps at each resolution.

    Returns:
        (B, C, X, Y, Z) float32; 0 everywhere in a sample without visible voxels.
    """
    known = torch.where(visible, image, 0.0)
    size = known.shape[2:]
    if max(size) == 1:
        return known
    factor = [min(2, length) for length in size]
    share = F.avg_pool3d(visible.float(), factor, ceil_mode=True)  # (B, 1, X / 2, Y / 2, Z / 2), cut cells included
    coarse = F.avg_pool3d(known, factor, ceil_mode=True) / share.clamp(min=1e-6)
    coarse = linear(coarse, share > 0, sweeps)
    filled = torch.where(visible, known, F.interpolate(coarse, size, mode="trilinear"))
    for _ in range(sweeps):
        filled = torch.where(visible, known, torch.lerp(filled, _neighbour_mean(filled), DAMPING))
    return filled


def _neighbour_mean(image: Tensor) -> Tensor:
    """Mean of the six neighbours, a voxel at the edge being its own neighbour outside."""
    padded = F.pad(image, (1, 1, 1, 1, 1, 1), mode="replicate")
    inner = slice(1, -1)
    total = padded[:, :, :-2, inner, inner] + padded[:, :, 2:, inner, inner]
    total += padded[:, :, inner, :-2, inner] + padded[:, :, inner, 2:, inner]
    total += padded[:, :, inner, inner, :-2] + padded[:, :, inner, inner, 2:]
    return total / 6
