"""Crops of a region: where they lie, how they overlap, and their voxels. Positions are first voxels, in the region."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def grid_positions(size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Crops of ``size`` side by side, ``grid`` of them along each axis -> (N, 3) int64, the last axis fastest."""
    axes = [torch.arange(count) * side for count, side in zip(grid, size, strict=True)]
    return torch.cartesian_prod(*axes)


def random_positions(region: Sequence[int], size: Sequence[int], number: int, generator: torch.Generator) -> Tensor:
    """Uniform over all places within the region.

    Args:
        region, size: (3,) voxels of the region and of a crop.
        number: of crops.
        generator: on the CPU: crops are cut by host numbers.

    Returns:
        (number, 3) int64.
    """
    low = torch.zeros(number, 3, dtype=torch.long)
    return _uniform(low, low + torch.tensor(region) - torch.tensor(size), generator)


def partner_positions(
    positions: Tensor, region: Sequence[int], size: Sequence[int], generator: torch.Generator
) -> Tensor:
    """For each crop another one, at most half a side away along each axis, uniform over the places in the region.

    So at least half of a pair is shared along each axis, an eighth of the volume.

    Args:
        positions: (N, 3) of the first crops.
        region, size, generator: see `random_positions`.

    Returns:
        (N, 3) int64.
    """
    reach = torch.tensor(size) // 2
    last = torch.tensor(region) - torch.tensor(size)
    return _uniform((positions - reach).clamp(min=0), torch.minimum(positions + reach, last), generator)


def _uniform(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers from ``low`` to ``high``, both included."""
    drawn = torch.rand(low.shape, generator=generator, dtype=torch.float64)
    return low + (drawn * (high - low + 1)).long()


def overlaps(targets: Tensor, bases: Tensor, size: Sequence[int]) -> Tensor:
    """The share of each target's voxels that each base holds.

    Args:
        targets: (T, 3) positions.
        bases: (N, 3) positions.
        size: (3,) voxels of every crop.

    Returns:
        (T, N) float32; where the bases tile the region every row sums to 1.
    """
    sides = torch.tensor(size)
    apart = (targets[:, None] - bases[None]).abs()  # (T, N, 3)
    return (sides - apart).clamp(min=0).prod(dim=-1).float() / float(sides.prod())


def cut(image: Tensor, positions: Tensor, size: Sequence[int]) -> Tensor:
    """The voxels of some crops: (C, X, Y, Z), (V, 3) on the CPU -> (V, C, x, y, z), copies."""
    x, y, z = size
    places = positions.tolist()
    return torch.stack([image[:, i : i + x, j : j + y, k : k + z] for i, j, k in places])
