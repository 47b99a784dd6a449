"""Which anchors train on which box: adaptive training sample selection (ATSS).

Source: Zhang et al. 2020, "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training
Sample Selection", algorithm 1, as used by nnDetection: per level the ``k * A`` anchors closest to a box are candidates
(at most all anchors of the level; MONAI 1.6 stops at the number of *positions*), and those whose IoU reaches the mean
plus the standard deviation of all candidates of that box are positive, wherever their centres lie.

All A anchors of a position share its centre, so the ``k * A`` closest anchors are those of the k closest positions, and
these lie in a window of k + 2 positions per axis around the box. Only that window is ever looked at: time and memory
hardly depend on the number of anchors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain3d import boxes as box_ops
from pretrain3d.detection.anchors import AnchorGrid


@dataclass(frozen=True)
class Assignment:
    """Candidate pairs of a batch, P per image; an anchor is positive in at most one of them.

    Attributes:
        anchor: (B, P) int64 index into the anchor grid.
        box: (B, P) int64 index of the box within its image.
        positive: (B, P) bool.
        iou: (B, P) float32 of the pair.
    """

    anchor: Tensor
    box: Tensor
    positive: Tensor
    iou: Tensor

    def matches(self, num_anchors: int) -> Tensor:
        """(B, M) int64: index of the matched box per anchor, -1 for background."""
        dense = torch.full((len(self.anchor), num_anchors), -1, dtype=torch.long, device=self.anchor.device)
        return dense.scatter_reduce_(1, self.anchor, torch.where(self.positive, self.box, -1), "amax")


@torch.no_grad()
def atss(grid: AnchorGrid, boxes: Tensor, valid: Tensor, num_candidates: int = 4) -> Assignment:
    """Assigns the boxes of a batch without waiting for the device.

    Positions at equal distance are taken in their order on the grid, an anchor that several boxes claim goes to the one
    with the highest IoU (the first of equal ones), and a pair without overlap is never positive.

    Args:
        grid: the anchors.
        boxes: (B, N, 6), padded.
        valid: (B, N) bool, False = padding.
        num_candidates: k, positions per level and box.
    """
    batch, count = valid.shape
    boxes = boxes.float()
    anchor = torch.cat(_candidates(grid, box_ops.centers(boxes), num_candidates), dim=-1)  # (B, N, C)
    overlap = box_ops.aligned_iou(boxes[:, :, None], grid.boxes[anchor])
    # float64: equal IoUs, as of a box in the middle of its candidates, must reach their own mean
    threshold = overlap.double().mean(dim=-1) + _deviation(overlap.double())  # (B, N)
    positive = (overlap >= threshold[..., None]) & (overlap > 0) & valid[..., None]
    index = torch.arange(count, device=boxes.device)[:, None].expand(positive.shape)
    anchor, index, overlap, positive = (x.reshape(batch, -1) for x in (anchor, index, overlap, positive))
    return Assignment(anchor, index, _resolve(anchor, index, overlap, positive, len(grid.boxes), count), overlap)


def _candidates(grid: AnchorGrid, centers: Tensor, num_candidates: int) -> list[Tensor]:
    """Per level the (B, N, k * A) anchor indices closest to each (B, N, 3) centre."""
    result = []
    offset = 0
    sizes = torch.arange(grid.per_position, device=centers.device)
    for shape, stride in zip(grid.shapes, grid.strides, strict=True):
        index, distance = [], []
        for axis in range(3):
            width = min(num_candidates + 2, shape[axis])
            position = centers[..., axis] / stride[axis] - 0.5  # in units of grid positions
            first = (position - num_candidates / 2).floor().long().clamp(0, shape[axis] - width)
            window = first[..., None] + torch.arange(width, device=centers.device)  # (B, N, width)
            index.append(window)
            distance.append(((window + 0.5) * stride[axis] - centers[..., axis, None]).square())
        squared = _outer_sum(*distance)  # (B, N, width^3), positions in grid order
        flat = _outer_sum(index[0] * (shape[1] * shape[2]), index[1] * shape[2], index[2])
        nearest = squared.sort(dim=-1, stable=True).indices[..., : min(num_candidates, squared.shape[-1])]
        chosen = flat.gather(-1, nearest)[..., None] * grid.per_position + sizes
        result.append(chosen.flatten(-2) + offset)
        offset += shape[0] * shape[1] * shape[2] * grid.per_position
    return result


def _outer_sum(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """(..., a), (..., b), (..., c) -> (..., a * b * c), the last axis fastest."""
    return (x[..., :, None, None] + y[..., None, :, None] + z[..., None, None, :]).flatten(-3)


def _deviation(values: Tensor) -> Tensor:
    """Unbiased standard deviation over the last axis; 0 for a single value."""
    centered = values - values.mean(dim=-1, keepdim=True)
    return (centered.square().sum(dim=-1) / max(values.shape[-1] - 1, 1)).sqrt()


def _resolve(anchor: Tensor, box: Tensor, overlap: Tensor, positive: Tensor, num_anchors: int, count: int) -> Tensor:
    """Leaves each anchor positive for one box only.

    Non-negative floats order like their bits, so IoU and box index fit one integer whose maximum is the winner.
    """
    key = overlap.contiguous().view(torch.int32).long() * count + (count - 1 - box)
    key = torch.where(positive, key, -1)
    best = torch.full((len(anchor), num_anchors), -1, dtype=torch.long, device=anchor.device)
    best = best.scatter_reduce_(1, anchor, key, "amax")
    return positive & (key == best.gather(1, anchor))
