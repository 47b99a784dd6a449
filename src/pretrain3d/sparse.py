"""Features of a partly hidden image: which voxels of a level count, and a norm over them alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_instance_norm(
    features: Tensor, active: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Instance norm whose mean and variance come from the active voxels; 0 elsewhere.

    Args:
        features: (B, C, X, Y, Z), 0 where not active.
        active: (B, 1, X, Y, Z) bool.
        weight, bias: (C,); ``None`` for 1 and 0.
        eps: added to the variance.

    Source: Tian et al., "Designing BERT for convolutional networks" (2023), section 3.1.
    """
    on = active.float()
    count = on.sum((2, 3, 4), keepdim=True).clamp(min=1.0)
    x = features.float()
    mean = (x * on).sum((2, 3, 4), keepdim=True) / count
    centred = (x - mean) * on
    variance = centred.square().sum((2, 3, 4), keepdim=True) / count
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight.view(1, -1, 1, 1, 1)
    normed = centred * scale
    if bias is not None:
        normed = (normed + bias.view(1, -1, 1, 1, 1)) * on
    return normed.to(features.dtype)


def active_voxels(keep: Tensor, stride: Sequence[int]) -> Tensor:
    """Which voxels of a level are active under a mask of the image.

    A level whose voxels mix visible and hidden image voxels is coarser than the mask (or not aligned with it): it is
    fully active in that sample.

    Args:
        keep: (B, 1, X, Y, Z) bool, False = hidden.
        stride: (3,) of the level.

    Returns:
        (B, 1, X / stride x, Y / stride y, Z / stride z) bool.
    """
    kernel = tuple(stride)
    seen = keep.float()
    some = F.max_pool3d(seen, kernel, kernel) > 0
    every = -F.max_pool3d(-seen, kernel, kernel) > 0
    mixed = (some != every).flatten(1).any(1).view(-1, 1, 1, 1, 1)
    return some | mixed


def visible_cells(keep: Tensor, stride: Sequence[int]) -> Tensor:
    """Which cells of a grid (tokens, say) have a visible voxel.

    Args:
        keep: (B, 1, X, Y, Z) bool, False = hidden.
        stride: (3,) voxels of a cell.

    Returns:
        (B, 1, X / stride x, Y / stride y, Z / stride z) bool.
    """
    x, y, z = stride
    return keep.unflatten(4, (-1, z)).unflatten(3, (-1, y)).unflatten(2, (-1, x)).any(7).any(5).any(3)
