"""One list of boxes per volume from the boxes of overlapping tiles, mirrored views and the networks of an ensemble."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pretrain3d import boxes as box_ops
from pretrain3d.config import UserError
from pretrain3d.detection.contract import Detections

METHODS = ("clustering", "nms")
BORDER = 1.0  # voxels; a box that ends this close to an inner tile border may go on behind it
CUT_WEIGHT = 0.5
COVERED = 0.5  # part of a cut box inside a whole one that makes it the same object
AGREE = 0.5  # IoU, within what two tiles share, that makes two cut boxes the same object
COMPARABLE = 0.5  # of the better one's rank; weaker parts do not move the borders of a joined box
_TILES = 64  # tiles whose boxes are compared at once


@dataclass(frozen=True)
class Merging:
    """How the boxes of tiles and views become one list; what `detection.sweep` chooses.

    Attributes:
        method: of the views: "clustering" (weighted box clustering, scores do not rise with the number of views) or
            "nms" (the best of all views).
        tile_iou: boxes of one class that overlap more are the same object within a view.
        view_iou: the same between views.
        min_score: boxes below it take no part in the merging.
        min_size: shortest edge of a merged box, in voxels of the predicted volume; of an ensemble those of the finest.
        max_per_class: boxes kept per class.

    Raises:
        UserError: a value out of its range.
    """

    method: str = "clustering"
    tile_iou: float = 0.1
    view_iou: float = 0.5
    min_score: float = 0.0
    min_size: float = 0.0
    max_per_class: int = 100

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"merge method is {self.method!r}; expected {' or '.join(METHODS)}")
        for name in ("tile_iou", "view_iou", "min_score"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected a number from 0 to below 1")
        if not self.min_size >= 0 or self.max_per_class < 1:
            raise UserError(f"min_size is {self.min_size} (from 0), max_per_class {self.max_per_class} (from 1)")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for checkpoints and results; `Merging(**values)` is the inverse."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass
class TileDetections:
    """What one view predicts, over all tiles of a volume; boxes in volume voxels.

    Attributes:
        found: boxes, scores and labels.
        weights: (N,) trust in the place of each box within its tile.
        cut: (N,) bool, the box ends at a border of its tile that is not a border of the volume.
        tile: (N,) int64 the tile that each box was seen in.
        extents: (T, 6) the tiles.
    """

    found: Detections
    weights: Tensor
    cut: Tensor
    tile: Tensor
    extents: Tensor

    def __getitem__(self, index: Tensor) -> TileDetections:
        """The boxes that an index or a bool mask picks."""
        return TileDetections(self.found[index], self.weights[index], self.cut[index], self.tile[index], self.extents)


@dataclass
class ViewDetections:
    """What one view predicts of a volume, duplicates of tiles removed, and the (N,) trust in the place of each box."""

    found: Detections
    weights: Tensor


def center_weight(boxes: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """(N, 6) boxes in patch voxels -> (N,) trust: 1 in the middle half of the patch, down to 0.5 in its corners.

    With c the box centre relative to the patch's centre h: 1 - max(0, |c| / |h| - 0.5).

    Source: nnDetection v0.1.
    """
    half = torch.tensor(patch_size, dtype=torch.float32, device=boxes.device) / 2
    distance = (box_ops.centers(boxes) - half).norm(dim=-1) / half.norm()
    return 1.0 - (distance - 0.5).clamp(min=0)


def is_cut(boxes: Tensor, patch_size: tuple[int, int, int], start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """(N, 6) boxes in patch voxels -> (N,) bool: which end at a patch border with more of the volume behind it."""
    cut = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for axis in range(3):
        if start[axis] > 0:
            cut |= boxes[:, axis] < BORDER
        if start[axis] + patch_size[axis] < shape[axis]:
            cut |= boxes[:, axis + 3] > patch_size[axis] - BORDER
    return cut


def merge(views: list[TileDetections], merging: Merging) -> Detections:
    """The boxes of a volume from all its tiles and views; best first."""
    return merge_views([merge_tiles(view, merging) for view in views], merging)


def merge_tiles(view: TileDetections, merging: Merging) -> ViewDetections:
    """The boxes of one view without duplicates: class-wise NMS that prefers boxes from the middle of their tile.

    Within each tile the best score wins. Between tiles boxes are ranked by score * weight, those cut by an inner tile
    border at half of it, and keep their own score. A cut box that lies for more than half inside a better-ranked whole
    box of its class is that object again, seen in part, and goes even where the IoU is small. Cut boxes of several
    tiles that agree on what these tiles share are parts of one object, which no tile may show whole, and become the box
    around them.
    """
    view = view[view.found.scores >= merging.min_score]
    view = view[_best_of_tiles(view.found, view.tile, len(view.extents), merging.tile_iou)]
    found = view.found
    weights = torch.where(view.cut, view.weights * CUT_WEIGHT, view.weights)
    rank = found.scores * weights
    boxes = found.boxes.clone()
    kept = [torch.zeros(0, dtype=torch.long)]
    for label in found.labels.unique().tolist():
        members = (found.labels == label).nonzero()[:, 0]
        members = members[~_part_of_whole(boxes[members], rank[members], view.cut[members])]
        cut = members[view.cut[members]]
        cut = cut[torch.sort(rank[cut], descending=True, stable=True).indices]
        joined = _join_parts(boxes, rank, view.extents[view.tile], cut, merging.max_per_class)
        members = torch.cat([members[~view.cut[members]], joined])
        kept.append(members[box_ops.nms(boxes[members], rank[members], merging.tile_iou, merging.max_per_class)])
    index = torch.cat(kept)
    index = index[torch.sort(found.scores[index], descending=True, stable=True).indices]
    return ViewDetections(Detections(boxes[index], found.scores[index], found.labels[index]), weights[index])


def merge_views(views: list[ViewDetections], merging: Merging) -> Detections:
    """One list from several views (mirrored images, folds): clustering normalised by their number, or NMS of all."""
    found = Detections.concatenate([view.found for view in views])
    if merging.method == "clustering":
        origin = torch.cat([torch.full((len(view.found),), index) for index, view in enumerate(views)])
        weights = torch.cat([view.weights for view in views])
        found = Detections(
            *box_ops.weighted_box_clustering(
                found.boxes, found.scores, found.labels, weights, origin, len(views), merging.view_iou
            )
        )
    else:
        found = found[box_ops.batched_nms(found.boxes, found.scores, found.labels, merging.view_iou)]
    found = found[box_ops.not_smaller(found.boxes, merging.min_size)]
    rank_in_class = torch.zeros(len(found), dtype=torch.long)
    for label in found.labels.unique().tolist():
        members = found.labels == label
        rank_in_class[members] = torch.arange(int(members.sum()))
    return found[rank_in_class < merging.max_per_class]


def _best_of_tiles(found: Detections, tile: Tensor, num_tiles: int, iou_threshold: float) -> Tensor:
    """Indices that class-wise NMS by score keeps within each tile; many tiles at once."""
    order = torch.sort(found.scores, descending=True, stable=True).indices
    order = order[torch.sort(tile[order], stable=True).indices]  # by tile, best first
    counts = torch.bincount(tile, minlength=num_tiles)
    starts = counts.cumsum(0) - counts
    kept = [torch.zeros(0, dtype=torch.long)]
    for first in range(0, num_tiles, _TILES):
        some = counts[first : first + _TILES]
        slot = torch.arange(int(some.max()))
        present = slot < some[:, None]  # (T, M)
        index = order[(starts[first : first + _TILES, None] + slot).clamp(max=max(len(order) - 1, 0))]
        if not index.numel():
            continue
        boxes, labels = found.boxes[index], found.labels[index]
        suppresses = (box_ops.iou(boxes, boxes) > iou_threshold) & (labels[:, :, None] == labels[:, None])
        kept.append(index[box_ops.greedy_keep(suppresses, present)])
    return torch.cat(kept)


def _part_of_whole(boxes: Tensor, rank: Tensor, cut: Tensor) -> Tensor:
    """(N,) bool: cut boxes that a better-ranked whole box covers for the most part."""
    drop = torch.zeros_like(cut)
    if not cut.any() or cut.all():
        return drop
    axis = int((boxes[:, :3].amax(dim=0) - boxes[:, :3].amin(dim=0)).argmax())
    low, high = boxes[:, axis], boxes[:, axis + 3]
    parts, wholes = cut.nonzero()[:, 0], (~cut).nonzero()[:, 0]
    for chunk in parts[low[parts].argsort()].split(256):  # neighbours, which few of the wholes can touch
        near = wholes[(low[wholes] < high[chunk].max()) & (high[wholes] > low[chunk].min())]
        shared = box_ops.intersection(boxes[chunk][:, None], boxes[near][None])  # (n, m)
        covered = shared > COVERED * box_ops.area(boxes[chunk])[:, None]
        drop[chunk] = (covered & (rank[near][None] >= rank[chunk][:, None])).any(dim=1)
    return drop


def _join_parts(boxes: Tensor, rank: Tensor, tiles: Tensor, cut: Tensor, limit: int) -> Tensor:
    """Gathers the parts of each object around its best one, whose row of ``boxes`` becomes the box around all.

    Parts are followed from tile to tile. A part far below the best one's rank goes without moving any border.

    Args:
        boxes, rank, tiles: (N, 6), (N,), (N, 6); rows of ``boxes`` are overwritten.
        cut: indices of the cut boxes of one class, best first.
        limit: most objects.

    Returns:
        Indices of the best parts.
    """
    best: list[Tensor] = []
    while len(cut) and len(best) < limit:
        seed, cut = cut[:1], cut[1:]
        parts, newest = seed, seed
        while len(newest) and len(cut):
            agree = _agree(boxes[newest], tiles[newest], boxes[cut], tiles[cut])
            newest, cut = cut[agree & (rank[cut] >= COMPARABLE * rank[seed])], cut[~agree]
            parts = torch.cat([parts, newest])
        boxes[seed] = torch.cat([boxes[parts, :3].amin(dim=0), boxes[parts, 3:].amax(dim=0)])
        best.append(seed)
    return torch.cat(best) if best else cut


def _agree(boxes: Tensor, tiles: Tensor, others: Tensor, other_tiles: Tensor) -> Tensor:
    """(M,) bool: which of the M others, cut to the part that both tiles show, match one of the boxes cut likewise."""
    low = torch.maximum(tiles[:, None, :3], other_tiles[None, :, :3])
    high = torch.maximum(torch.minimum(tiles[:, None, 3:], other_tiles[None, :, 3:]), low)
    first, second = (
        torch.cat([box[..., :3].clamp(low, high), box[..., 3:].clamp(low, high)], dim=-1)
        for box in (boxes[:, None], others[None])
    )
    different = (tiles[:, None] != other_tiles[None]).any(dim=-1)
    return ((box_ops.aligned_iou(first, second) > AGREE) & different).any(dim=0)
