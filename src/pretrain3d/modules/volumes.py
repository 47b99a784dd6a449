"""Outputs of a network for a whole volume, from tiles that overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pretrain3d.detection.tiles import check_tiling, tile_starts

SIGMA = 1 / 8  # of the weight of a tile's voxels, in tiles
LEAST = 1e-3  # of the weight at the centre


@torch.no_grad()
def predict_volume(
    predict_patches: Callable[[Tensor], Tensor],
    image: Tensor,
    patch_size: Sequence[int],
    overlap: float = 0.5,
    batch_size: int = 1,
    pad_value: Sequence[float] = (0.0,),
    device: torch.device | str | None = None,
) -> Tensor:
    """The mean over tiles, in which the middle of a tile counts more than its edge.

    Memory on the device is that of one batch of tiles. A volume smaller than the patch is padded at its end.

    Args:
        predict_patches: (b, C, *patch_size) -> (b, n, *patch_size).
        image: (C, X, Y, Z) normalised; may stay on the CPU.
        patch_size: of a tile, voxels.
        overlap: see `tile_starts`.
        batch_size: most tiles per call.
        pad_value: (C,) normalised values outside the volume, or one for all channels.
        device: where tiles go; None: where the image is.

    Returns:
        (n, X, Y, Z) float32 on the CPU.

    Raises:
        UserError: an overlap or a batch size that does not work.

    Source: the Gaussian weights of nnU-Net.
    """
    check_tiling(overlap, batch_size)
    padded = _padded(image, patch_size, pad_value)
    starts = tile_starts(padded.shape[1:], patch_size, overlap)
    weight = tile_weight(patch_size)
    total = weights = torch.zeros(0)
    for first in range(0, len(starts), batch_size):
        windows = [
            tuple(slice(s, s + size) for s, size in zip(start, patch_size, strict=True))
            for start in starts[first : first + batch_size]
        ]
        tiles = torch.stack([padded[(slice(None), *window)] for window in windows])
        outputs = predict_patches(tiles.to(device or image.device, non_blocking=True)).float().cpu()
        if first == 0:
            total, weights = torch.zeros(outputs.shape[1], *padded.shape[1:]), torch.zeros(padded.shape[1:])
        for window, output in zip(windows, outputs, strict=True):
            total[(slice(None), *window)] += output * weight
            weights[window] += weight
    x, y, z = image.shape[1:]
    return (total / weights)[:, :x, :y, :z]


def tile_weight(patch_size: Sequence[int]) -> Tensor:
    """(X, Y, Z): a Gaussian about the middle of a tile, 1 there and at least `LEAST`."""
    x, y, z = (
        torch.exp(-0.5 * ((torch.arange(size) - (size - 1) / 2) / (SIGMA * size)).square()) for size in patch_size
    )
    return (x[:, None, None] * y[:, None] * z).clamp(min=LEAST)


def _padded(image: Tensor, patch_size: Sequence[int], pad_value: Sequence[float]) -> Tensor:
    """The image, at least as large as the patch."""
    if all(size >= patch for size, patch in zip(image.shape[1:], patch_size, strict=True)):
        return image
    shape = [max(size, patch) for size, patch in zip(image.shape[1:], patch_size, strict=True)]
    padded = torch.tensor(pad_value, dtype=image.dtype, device=image.device).view(-1, 1, 1, 1)
    padded = padded.expand(len(image), *shape).clone()
    padded[:, : image.shape[1], : image.shape[2], : image.shape[3]] = image
    return padded
