"""Which voxels are hidden: exact, seeded, one convention. ``keep`` is True where a voxel is visible."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

REFERENCE_CELLS = 10  # blocks of 16 in patches of 160


def block_size(patch_size: Sequence[int]) -> tuple[int, int, int]:
    """Side of a mask block: 16 in patches of 160, in proportion for others.

    Per axis the power of two nearest to a tenth of the patch: 160 -> 16, 128 -> 16, 96 -> 8, 80 -> 8, 64 -> 8, 48 -> 4.
    Powers of two so that a block is a whole number of voxels on every pyramid level that is finer than the mask.

    Args:
        patch_size: (3,) voxels.
    """
    x, y, z = (_nearest_power(size / REFERENCE_CELLS) for size in patch_size)
    return x, y, z


def _nearest_power(value: float) -> int:
    powers = [2**exponent for exponent in range(1, 10)]
    return min(powers, key=lambda power: abs(power - value))


def hidden_cells(num_cells: int, ratio: float) -> int:
    """How many of ``num_cells`` are hidden: the whole part of the product, free of binary rounding."""
    return int(ratio * num_cells + 1e-9)


def block_mask(
    shape: Sequence[int], block: Sequence[int], ratio: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Hides the same number of blocks in every sample, drawn without replacement.

    The grid of blocks starts at voxel 0. Where a block does not divide the patch, the last one of that axis is cut and
    counts as one cell like the others, so no voxel is left out of the draw (the reference code drops that rim).

    Args:
        shape: (3,) voxels of the patch.
        block: (3,) voxels of a block.
        ratio: share of blocks to hide, in (0, 1).
        generators: one per sample; the mask of a sample depends on its own generator alone.

    Returns:
        (B, 1, X, Y, Z) bool, True = visible, on the generators' device.
    """
    grid = [math.ceil(size / side) for size, side in zip(shape, block, strict=True)]
    num_cells = math.prod(grid)
    num_hidden = hidden_cells(num_cells, ratio)
    masks = []
    for generator in generators:
        order = torch.randperm(num_cells, generator=generator, device=generator.device)
        keep = torch.ones(num_cells, dtype=torch.bool, device=generator.device)
        keep[order[:num_hidden]] = False
        masks.append(keep.view(1, *grid))
    keep = torch.stack(masks)  # (B, 1, cells x, cells y, cells z)
    for axis, side in enumerate(block):
        keep = keep.repeat_interleave(side, dim=axis + 2)
    x, y, z = shape
    return keep[:, :, :x, :y, :z].contiguous()  # (B, 1, X, Y, Z)


def slice_mask(
    shape: Sequence[int], block: Sequence[int], ratio: float, axis: int, generator: torch.Generator
) -> Tensor:
    """Hides the same number of blocks in every slice across ``axis``, each slice by a draw of its own.

    Args:
        shape, block, ratio: see `block_mask`; the side of a block along ``axis`` is not used.
        axis: along which the slices are stacked.
        generator: of the sample.

    Returns:
        (1, X, Y, Z) bool, True = visible, on the generator's device.
    """
    across = [other for other in range(3) if other != axis]
    grid = [math.ceil(shape[other] / block[other]) for other in across]
    num_cells = math.prod(grid)
    order = torch.rand(shape[axis], num_cells, generator=generator, device=generator.device).argsort(1)
    keep = torch.ones_like(order, dtype=torch.bool).scatter_(1, order[:, : hidden_cells(num_cells, ratio)], False)
    keep = keep.unflatten(1, grid)  # (slices, cells, cells)
    for dim, other in enumerate(across, start=1):
        keep = keep.repeat_interleave(block[other], dim=dim).narrow(dim, 0, shape[other])
    return keep.movedim(0, axis)[None].contiguous()  # (1, X, Y, Z)
