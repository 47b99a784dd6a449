"""One list of boxes per volume from the boxes of overlapping tiles and mirrored views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain3d import boxes as box_ops
from pretrain3d.detection.contract import Detections

BORDER = 1.0  # voxels; a box that ends this close to an inner tile border may go on behind it
CUT_WEIGHT = 0.5
COVERED = 0.5  # part of a cut box inside a whole one that makes it the same object
AGREE = 0.5  # IoU, within what two tiles share, that makes two cut boxes the same object
COMPARABLE = 0.5  # of the better one's rank; weaker parts do not move the borders of a joined box


@dataclass
class TileDetections:
    """What one view predicts, over all tiles of a volume; boxes in volume voxels.

    Attributes:
        found: boxes, scores and labels.
        weights: (N,) trust in the place of each box within its tile.
        cut: (N,) bool, the box ends at a border of its tile that is not a border of the volume.
        tiles: (N, 6) the tile that each box was seen in.
    """

    found: Detections
    weights: Tensor
    cut: Tensor
    tiles: Tensor


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


def unflip(boxes: Tensor, patch_size: tuple[int, int, int], axes: tuple[int, ...]) -> Tensor:
    """Boxes seen in a patch mirrored along ``axes``, in the patch as it was: [a, b) becomes [S - b, S - a)."""
    columns = list(boxes.float().unbind(dim=-1))
    for axis in axes:
        low, high = columns[axis], columns[axis + 3]
        columns[axis], columns[axis + 3] = patch_size[axis] - high, patch_size[axis] - low
    return torch.stack(columns, dim=-1)


def merge_tiles(view: TileDetections, iou_threshold: float, max_per_class: int) -> tuple[Detections, Tensor]:
    """The boxes of one view without duplicates: class-wise NMS that prefers boxes from the middle of their tile.

    Boxes are ranked by score * weight, those cut by an inner tile border at half of it, and keep their own score. A cut
    box that lies for more than half inside a better-ranked whole box of its class is that object again, seen in part,
    and goes even where the IoU is small. Cut boxes of several tiles that agree on what these tiles share are parts of
    one object, which no tile may show whole, and become the box around them.

    Returns:
        The kept detections, best score first, and their weights.
    """
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
        joined = _join_parts(boxes, rank, view.tiles, cut, max_per_class)
        members = torch.cat([members[~view.cut[members]], joined])
        kept.append(members[box_ops.nms(boxes[members], rank[members], iou_threshold, max_per_class)])
    index = torch.cat(kept)
    index = index[torch.sort(found.scores[index], descending=True, stable=True).indices]
    return Detections(boxes[index], found.scores[index], found.labels[index]), weights[index]


def _part_of_whole(boxes: Tensor, rank: Tensor, cut: Tensor) -> Tensor:
    """(N,) bool: cut boxes that a better-ranked whole box covers for the most part."""
    parts, wholes = cut.nonzero()[:, 0], (~cut).nonzero()[:, 0]
    drop = torch.zeros_like(cut)
    for chunk in parts.split(256):
        shared = box_ops.intersection(boxes[chunk][:, None], boxes[wholes][None])  # (n, m)
        covered = shared > COVERED * box_ops.area(boxes[chunk])[:, None]
        drop[chunk] = (covered & (rank[wholes][None] >= rank[chunk][:, None])).any(dim=1)
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


def merge_views(
    views: list[Detections], weights: list[Tensor], method: str, iou_threshold: float, max_per_class: int
) -> Detections:
    """One list from several views: "clustering" normalised by their number, or the class-wise "nms" of all.

    A single view is returned as it is.
    """
    if len(views) == 1:
        return views[0]
    found = Detections.concatenate(views)
    if method == "clustering":
        expected = torch.full_like(found.scores, len(views))
        found = Detections(
            *box_ops.weighted_box_clustering(
                found.boxes, found.scores, found.labels, torch.cat(weights), expected, iou_threshold
            )
        )
    else:
        found = found[box_ops.batched_nms(found.boxes, found.scores, found.labels, iou_threshold)]
    rank_in_class = (found.labels[:, None] == found.labels[None]).tril().sum(dim=1)  # 1 = the best of its class
    return found[rank_in_class <= max_per_class]
