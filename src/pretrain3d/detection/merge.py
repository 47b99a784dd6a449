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


@dataclass
class TileDetections:
    """What one view predicts, over all tiles of a volume; boxes in volume voxels.

    Attributes:
        found: boxes, scores and labels.
        weights: (N,) trust in the place of each box within its tile.
        cut: (N,) bool, the box ends at a border of its tile that is not a border of the volume.
    """

    found: Detections
    weights: Tensor
    cut: Tensor


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
    box that lies for more than half inside a better-ranked whole box of its class is that object again, seen in part, and
    goes even where the IoU is small.

    Returns:
        The kept detections, best score first, and their weights.
    """
    found = view.found
    weights = torch.where(view.cut, view.weights * CUT_WEIGHT, view.weights)
    rank = found.scores * weights
    kept = [torch.zeros(0, dtype=torch.long)]
    for label in found.labels.unique().tolist():
        members = (found.labels == label).nonzero()[:, 0]
        members = members[~_part_of_whole(found.boxes[members], rank[members], view.cut[members])]
        kept.append(members[box_ops.nms(found.boxes[members], rank[members], iou_threshold, max_per_class)])
    index = torch.cat(kept)
    index = index[torch.sort(found.scores[index], descending=True, stable=True).indices]
    return found[index], weights[index]


def _part_of_whole(boxes: Tensor, rank: Tensor, cut: Tensor) -> Tensor:
    """(N,) bool: cut boxes that a better-ranked whole box covers for the most part."""
    parts, wholes = cut.nonzero()[:, 0], (~cut).nonzero()[:, 0]
    drop = torch.zeros_like(cut)
    for chunk in parts.split(256):
        shared = box_ops.intersection(boxes[chunk][:, None], boxes[wholes][None])  # (n, m)
        covered = shared > COVERED * box_ops.area(boxes[chunk])[:, None]
        drop[chunk] = (covered & (rank[wholes][None] >= rank[chunk][:, None])).any(dim=1)
    return drop


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
