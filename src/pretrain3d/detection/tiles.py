"""A whole volume through a detector that sees patches: distinct tiles, mirrored views."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain3d import boxes as box_ops
from pretrain3d.backbones.contract import Triple, triple
from pretrain3d.config import UserError, by_text
from pretrain3d.detection.contract import MIN_SIZE, Detections
from pretrain3d.detection.merge import TileDetections, center_weight, is_cut
from pretrain3d.devices import is_out_of_memory
from pretrain3d.geometry import flip_boxes

LATERAL_AXIS = 0  # of RAS volumes: flipping it swaps left and right


def tile_starts(shape: Sequence[int], patch_size: Sequence[int], overlap: float) -> list[Triple]:
    """First voxels of the fewest tiles that cover a volume with at least the wanted overlap, each one distinct.

    Tiles are spread evenly and lie inside the volume; along an axis on which the patch is the larger one there is a
    single tile at 0. 256^3 with patch 128^3 and overlap 0.5 gives 27 tiles, 160^3 gives 8.

    Args:
        shape: of the volume.
        patch_size: of a tile.
        overlap: part of a tile that the next one along an axis shares with it, in [0, 1).

    Raises:
        UserError: the overlap is outside [0, 1).
    """
    check_tiling(overlap)
    per_axis = []
    for size, patch in zip(shape, patch_size, strict=True):
        last = max(size - patch, 0)
        step = max(patch - int(overlap * patch), 1)
        count = math.ceil(last / step) + 1
        per_axis.append([round(index * last / max(count - 1, 1)) for index in range(count)])
    return [(x, y, z) for x, y, z in itertools.product(*per_axis)]


def check_tiling(overlap: float, batch_size: int = 1, mirror_axes: Sequence[int] = ()) -> None:
    """Raises UserError for an overlap, a number of tiles or an axis that does not exist; see `predict_views`."""
    if not 0 <= overlap < 1:
        raise UserError(f"overlap is {overlap}; expected a number from 0 (tiles side by side) to below 1")
    if batch_size < 1:
        raise UserError(f"tile_batch is {batch_size}; expected at least 1")
    if not {int(axis) for axis in mirror_axes} <= {0, 1, 2}:
        raise UserError(f"mirror_axes is {list(mirror_axes)}; expected some of 0, 1, 2")


@torch.no_grad()
def predict_views(
    predict_patches: Callable[[Tensor], list[Detections]],
    image: Tensor,
    patch_size: Sequence[int],
    overlap: float = 0.5,
    batch_size: int = 1,
    pad_value: float | Sequence[float] = 0.0,
    mirror_axes: Sequence[int] = (),
    mirror_classes: Mapping[int, int] | None = None,
    device: torch.device | str | None = None,
) -> list[TileDetections]:
    """Detections of a whole volume, not merged yet: one entry for every combination of mirrored axes.

    A volume smaller than the patch is padded on both sides. Memory on the device is that of one batch of tiles.

    Args:
        predict_patches: (b, C, *patch_size) patches -> one `Detections` per patch, patch voxels.
        image: (C, X, Y, Z) normalised; may stay on the CPU.
        patch_size: of a tile, voxels.
        overlap: see `tile_starts`.
        batch_size: most tiles per call of ``predict_patches``.
        pad_value: normalised value outside the volume, one for all channels or one per channel.
        mirror_axes: spatial axes (0, 1, 2) to mirror; each doubles the number of views.
        mirror_classes: label -> label of the other body side, swapped in views mirrored along axis 0 (right to left);
            one direction is enough.
        device: where tiles go before ``predict_patches``; None: where the image is.

    Returns:
        Boxes in voxels of ``image``, inside it, on the CPU.

    Raises:
        UserError: an axis, overlap or batch size that does not exist, or no memory left for a batch of tiles.
    """
    check_tiling(overlap, batch_size, mirror_axes)
    axes = tuple(sorted({int(axis) for axis in mirror_axes}))
    patch = triple(patch_size)
    padded, before = _pad(image, patch, pad_value)
    shape = triple(padded.shape[1:])
    starts = tile_starts(shape, patch, overlap)
    views = [subset for n in range(len(axes) + 1) for subset in itertools.combinations(axes, n)]
    parts: list[list[TileDetections]] = [[] for _ in views]
    with _memory_named(batch_size, patch):
        for first in range(0, len(starts), batch_size):
            group = starts[first : first + batch_size]
            tiles = _tiles(padded, patch, group).to(device or image.device, non_blocking=True)
            for view, collected in zip(views, parts, strict=True):
                flipped = tiles.flip([axis + 2 for axis in view]) if view else tiles
                for start, found in zip(group, predict_patches(flipped), strict=True):
                    collected.append(_to_volume(found.cpu(), view, mirror_classes or {}, patch, start, shape))
    return [_inside(_joined(collected), before, triple(image.shape[1:])) for collected in parts]


@contextmanager
def _memory_named(batch_size: int, patch: Triple) -> Iterator[None]:
    """Running out of memory within it becomes a `UserError` that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        less = "a lower tile_batch, " if batch_size > 1 else ""
        raise UserError(
            f"out of memory with tiles of {by_text(patch)}, {batch_size} at once: try {less}precision bf16, or smaller "
            "tiles (module.tile_size)"
        ) from error


def _pad(image: Tensor, patch: Triple, value: float | Sequence[float]) -> tuple[Tensor, Triple]:
    """The image padded to at least the patch, and the voxels added before its first one."""
    missing = [max(p - n, 0) for p, n in zip(patch, image.shape[1:], strict=True)]
    before = triple([m // 2 for m in missing])
    if not any(missing):
        return image, before
    widths = [w for m, b in zip(reversed(missing), reversed(before), strict=True) for w in (b, m - b)]
    values = [float(value)] * len(image) if isinstance(value, (int, float)) else [float(v) for v in value]
    assert len(values) == len(image), f"{len(values)} pad values for {len(image)} channels"
    return torch.stack([F.pad(channel, widths, value=v) for channel, v in zip(image, values, strict=True)]), before


def _tiles(image: Tensor, patch: Triple, starts: list[Triple]) -> Tensor:
    """(b, C, *patch) tiles from their starts."""
    return torch.stack([image[:, x : x + patch[0], y : y + patch[1], z : z + patch[2]] for x, y, z in starts])


def _to_volume(
    found: Detections, view: tuple[int, ...], swap: Mapping[int, int], patch: Triple, start: Triple, shape: Triple
) -> TileDetections:
    """One tile's detections, mirrored back and moved to their place in the (padded) volume."""
    boxes = flip_boxes(found.boxes, patch, view)
    labels = _swapped(found.labels, swap) if LATERAL_AXIS in view else found.labels
    offset = torch.tensor([*start, *start], dtype=torch.float32)
    return TileDetections(
        Detections(boxes + offset, found.scores.float(), labels),
        weights=center_weight(boxes, patch),
        cut=is_cut(boxes, patch, start, shape),
        tile=torch.zeros(len(boxes), dtype=torch.long),
        extents=(offset + torch.tensor([0, 0, 0, *patch]))[None],
    )


def _swapped(labels: Tensor, swap: Mapping[int, int]) -> Tensor:
    """Labels with left and right exchanged; the mapping holds in both directions."""
    result = labels.clone()
    for one, other in swap.items():
        result[labels == one] = other
        result[labels == other] = one
    return result


def _joined(parts: list[TileDetections]) -> TileDetections:
    """All tiles of one view, numbered in their order."""
    counts = torch.tensor([len(part.found) for part in parts])
    return TileDetections(
        Detections.concatenate([part.found for part in parts]),
        weights=torch.cat([part.weights for part in parts]),
        cut=torch.cat([part.cut for part in parts]),
        tile=torch.arange(len(parts)).repeat_interleave(counts),
        extents=torch.cat([part.extents for part in parts]),
    )


def _inside(view: TileDetections, before: Triple, shape: Triple) -> TileDetections:
    """Boxes moved from the padded to the given volume and cut to it; what lay in the padding alone is no detection."""
    offset = torch.tensor([*before, *before], dtype=torch.float32)
    boxes = box_ops.clip(view.found.boxes - offset, shape)
    moved = replace(view, found=Detections(boxes, view.found.scores, view.found.labels), extents=view.extents - offset)
    return moved[box_ops.not_smaller(boxes, MIN_SIZE)]
