"""Boxes as plain tensors: overlap, coding, suppression and clustering.

A box is a row ``x1 y1 z1 x2 y2 z2`` in half-open voxels: an object on voxels 3..5 is ``[3, 6)``, columns ``i`` and
``i + 3`` belong to spatial axis ``i``, and the size is ``x2 - x1`` without any ``+ 1``. Everything is computed in
float32: in bf16 a box of 4-8 voxels at coordinates of 100-300 overlaps *itself* by only 0.75.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000.0 / 16.0)  # a decoded box is at most 62.5 times its anchor
_TINY = torch.finfo(torch.float32).tiny
_CHUNK = 320  # boxes whose mutual suppression is resolved at once
_ROWS = 64  # kept boxes compared at once: rows x columns stays inside the cache


def sizes(boxes: Tensor) -> Tensor:
    """(..., 6) boxes -> (..., 3) edge lengths in voxels."""
    boxes = boxes.float()
    return boxes[..., 3:] - boxes[..., :3]


def centers(boxes: Tensor) -> Tensor:
    """(..., 6) boxes -> (..., 3) continuous centres in voxels."""
    boxes = boxes.float()
    return (boxes[..., :3] + boxes[..., 3:]) * 0.5


def area(boxes: Tensor) -> Tensor:
    """(..., 6) boxes -> (...) volumes in voxels."""
    return sizes(boxes).prod(dim=-1)


def not_smaller(boxes: Tensor, edge: float) -> Tensor:
    """(..., 6) boxes -> (...) bool: no edge is shorter than so many voxels."""
    return (sizes(boxes) >= edge).all(dim=-1)


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Shared volume of broadcastable (..., 6) boxes, axis by axis so that no (..., 3) intermediate is made."""
    # one contiguous tensor per coordinate: (N, 1) against (1, M) then runs vectorised, with a stride of 6 it would not
    a, b = (boxes.float().movedim(-1, 0).contiguous() for boxes in (a, b))
    edges = [(torch.minimum(a[i + 3], b[i + 3]) - torch.maximum(a[i], b[i])).clamp(min=0) for i in range(3)]
    return edges[0] * edges[1] * edges[2]


def aligned_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of broadcastable boxes: (..., 6) with (..., 6) -> (...); two empty boxes have IoU 0."""
    shared = intersection(a, b)
    return shared / (area(a) + area(b) - shared).clamp(min=_TINY)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of all pairs: (N, 6) and (M, 6) -> (N, M); leading batch dimensions are allowed."""
    return aligned_iou(a[..., :, None, :], b[..., None, :, :])


def aligned_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU in [-1, 1] of broadcastable boxes: (..., 6) with (..., 6) -> (...).

    Source: Rezatofighi et al. 2019, "Generalized Intersection over Union", algorithm 1.
    """
    a, b = a.float(), b.float()
    shared = intersection(a, b)
    union = area(a) + area(b) - shared
    hull = torch.maximum(a[..., 3:], b[..., 3:]) - torch.minimum(a[..., :3], b[..., :3])
    hull_area = hull.prod(dim=-1)
    return shared / union.clamp(min=_TINY) - (hull_area - union) / hull_area.clamp(min=_TINY)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of all pairs: (N, 6) and (M, 6) -> (N, M)."""
    return aligned_giou(a[..., :, None, :], b[..., None, :, :])


def clip(boxes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(..., 6) boxes cut to the volume ``[0, shape)``; a box outside it becomes empty, not inverted."""
    assert len(shape) == 3, f"expected a 3D shape, got {tuple(shape)}"
    return torch.stack([boxes[..., i].float().clamp(0, shape[i % 3]) for i in range(6)], dim=-1)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes relative to anchors: (..., 6) -> (..., 6) deltas ``dx dy dz dw dh dd``.

    Shifts are in anchor sizes, scales are logarithms of size ratios; all weights are 1. Boxes need a positive size.

    Source: Ren et al. 2015, "Faster R-CNN", equation 2, with a third axis.
    """
    anchor_sizes = sizes(anchors)
    shift = (centers(boxes) - centers(anchors)) / anchor_sizes
    return torch.cat([shift, torch.log(sizes(boxes) / anchor_sizes)], dim=-1)


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Inverse of `encode`; the log scale is cut at `MAX_LOG_SCALE` so that no size overflows."""
    deltas = deltas.float()
    anchor_sizes = sizes(anchors)
    center = centers(anchors) + deltas[..., :3] * anchor_sizes
    half = 0.5 * anchor_sizes * deltas[..., 3:].clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat([center - half, center + half], dim=-1)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, max_keep: int | None = None) -> Tensor:
    """Greedy non-maximum suppression, vectorised and exact.

    A box is dropped when a better box that was itself kept overlaps it with IoU *above* the threshold (an equal IoU
    survives). Equal scores are taken in input order.

    Args:
        boxes: (N, 6), finite.
        scores: (N,), finite.
        iou_threshold: in [0, 1].
        max_keep: stop once this many boxes are kept (the best ones); None keeps all.

    Returns:
        Indices of the kept boxes, best first.
    """
    assert boxes.shape == (scores.shape[0], 6), f"{tuple(boxes.shape)} boxes, {tuple(scores.shape)} scores"
    wanted = len(scores) if max_keep is None else max_keep
    order = torch.sort(scores, descending=True, stable=True).indices
    boxes = boxes.detach().float()[order]
    # (7, N), best first: one contiguous row per coordinate and the volume
    rows = torch.cat([boxes.T, area(boxes)[None]])
    axis = _widest_axis(boxes)
    waiting = torch.arange(len(boxes), device=boxes.device)
    by_start = rows[axis].argsort()
    alive = torch.ones_like(waiting, dtype=torch.bool)
    kept: list[Tensor] = []
    count = 0
    while len(waiting) and count < wanted:
        chunk, waiting = waiting[:_CHUNK], waiting[_CHUNK:]
        alive[chunk] = False
        chunk = chunk[greedy_keep(_above(rows[:, chunk], rows[:, chunk], iou_threshold), alive.new_ones(len(chunk)))]
        kept.append(chunk)
        count += len(chunk)
        by_start = by_start[alive[by_start]]
        if len(waiting) and count < wanted:
            hit = _overlapped(rows[:, chunk], rows[:, by_start], axis, iou_threshold)
            alive[by_start[hit]] = False
            waiting = waiting[alive[waiting]]
    return order[torch.cat(kept)[:wanted]] if kept else order


def _widest_axis(boxes: Tensor) -> int:
    """The axis along which the fewest boxes can meet: the spread of the corners is largest against the mean size."""
    if not len(boxes):
        return 0
    spread = boxes[:, :3].std(dim=0, correction=0) / sizes(boxes).mean(dim=0).clamp(min=_TINY)
    return int(spread.argmax())


def _above(a: Tensor, b: Tensor, threshold: float) -> Tensor:
    """(7, n) and (7, m) coordinates with volumes -> (n, m) bool: ``iou > threshold``, the same arithmetic as `iou`."""
    x, y, z = (
        torch.minimum(a[i + 3, :, None], b[i + 3]).sub_(torch.maximum(a[i, :, None], b[i])).clamp_(min=0)
        for i in range(3)
    )
    shared = x.mul_(y).mul_(z)
    union = (a[6, :, None] + b[6]).sub_(shared).clamp_(min=_TINY)
    return shared.div_(union) > threshold


def greedy_keep(suppresses: Tensor, present: Tensor) -> Tensor:
    """(..., n) bool: which boxes survive when each drops the worse ones that it suppresses, from the best one on.

    ``keep = not suppressed by a kept better box`` is iterated from "all kept". After n rounds the n best boxes are
    right for good, so it ends, and its only fixed point is the greedy solution.

    Args:
        suppresses: (..., n, n) bool, [i, j]: box j would drop i; boxes are sorted, the best first.
        present: (..., n) bool, False = a filler, which neither drops a box nor survives.
    """
    suppresses = suppresses.tril(diagonal=-1).float()
    keep = present.float()
    while True:
        updated = ((suppresses @ keep[..., None])[..., 0] == 0).float() * present
        if torch.equal(updated, keep):
            return keep.bool()
        keep = updated


def _overlapped(kept: Tensor, others: Tensor, axis: int, threshold: float) -> Tensor:
    """(M,) bool: which of the (7, M) others, sorted by their start along the axis, has IoU > threshold with a kept box.

    IoU is at most the overlap ratio along any single axis, so a kept box [a, b) only needs the others that start in
    (a - (1 - t) * longest other, a + (1 - t) * (b - a)).
    """
    kept = kept[:, kept[axis].argsort()]
    start, length = kept[axis], (kept[axis + 3] - kept[axis]).clamp(min=0)
    longest = (others[axis + 3] - others[axis]).max().clamp(min=0)
    slack = 1.0 - threshold + 1e-3  # the margin covers float32 rounding
    first = torch.searchsorted(others[axis], start - slack * longest - 1e-3).tolist()
    last = torch.searchsorted(others[axis], start + slack * length + 1e-3, right=True).tolist()
    hit = torch.zeros(others.shape[1], dtype=torch.bool, device=others.device)
    for row in range(0, kept.shape[1], _ROWS):
        begin, end = first[row], max(last[row : row + _ROWS])  # `first` rises with the sorted starts
        if begin < end:
            hit[begin:end] |= _above(kept[:, row : row + _ROWS], others[:, begin:end], threshold).any(dim=0)
    return hit


def batched_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_keep: int | None = None
) -> Tensor:
    """`nms` within each class; boxes of different classes never suppress each other.

    Classes run one by one: shifting them apart in space, as is often done, costs the float32 precision that small boxes
    need.

    Args:
        boxes: (N, 6).
        scores: (N,).
        labels: (N,) integers.
        iou_threshold: in [0, 1].
        max_keep: the most boxes to keep, over all classes together.

    Returns:
        Indices of the kept boxes, best first over all classes.
    """
    kept = [torch.zeros(0, dtype=torch.long, device=boxes.device)]
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        kept.append(members[nms(boxes[members], scores[members], iou_threshold, max_keep)])
    indices = torch.cat(kept).sort().values  # input order first, so that equal scores keep it
    indices = indices[torch.sort(scores[indices], descending=True, stable=True).indices]
    return indices if max_keep is None else indices[:max_keep]


def weighted_box_clustering(
    boxes: Tensor, scores: Tensor, labels: Tensor, weights: Tensor, origin: Tensor, num_views: int, iou_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Fuses the boxes that several views (mirrored images, folds) predict for the same object.

    Within a class the best box b* gathers the cluster C of boxes with IoU(b, b*) above the threshold that no better
    cluster has; with v = IoU(b, b*) * weight the fused box is the mean of C weighted by v * score, and

        score = sum(v * score) / (sum(v) + m * mean(v))

    with m the number of views that have no box in C. A score is so a mean over all views, in which those that found
    nothing count as 0: running every view or fold twice changes neither scores nor boxes.

    Args:
        boxes: (N, 6) of all views together.
        scores: (N,) in [0, 1].
        labels: (N,) integers.
        weights: (N,) trust in each box, for instance lower near a tile's border.
        origin: (N,) int64 the view of each box, 0..num_views-1.
        num_views: all that were run, those that found nothing too.
        iou_threshold: in [0, 1).

    Returns:
        Boxes (M, 6), scores (M,) and labels (M,), best first.

    Source: Jaeger et al. 2018, "Retina U-Net", section 3.2, in the form of nnDetection v0.1 (without the area factor),
    which takes m = max(0, num_views - |C|): there a view with two boxes in C hides one that found nothing.
    """
    parts = [(boxes.new_zeros((0, 6)), scores.new_zeros(0), labels.new_zeros(0))]
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        fused = _cluster(boxes[members], scores[members], weights[members], origin[members], num_views, iou_threshold)
        parts.append((*fused, labels[members[: len(fused[1])]]))
    all_boxes, all_scores, all_labels = (torch.cat(part) for part in zip(*parts, strict=True))
    order = torch.sort(all_scores, descending=True, stable=True).indices
    return all_boxes[order], all_scores[order], all_labels[order]


def _cluster(
    boxes: Tensor, scores: Tensor, weights: Tensor, origin: Tensor, num_views: int, iou_threshold: float
) -> tuple[Tensor, Tensor]:
    """Boxes and scores of one class. The best boxes b* are those that NMS keeps; the others join the first they hit."""
    seeds = nms(boxes, scores, iou_threshold)
    owner = torch.zeros_like(origin)
    overlap = torch.ones_like(scores)
    waiting = torch.ones_like(scores, dtype=torch.bool).index_fill_(0, seeds, False).nonzero()[:, 0]
    for chunk in torch.arange(len(seeds), device=boxes.device).split(_CHUNK):
        shared = iou(boxes[waiting], boxes[seeds[chunk]])  # (waiting, seeds)
        hit, first = (shared > iou_threshold).max(dim=1)
        owner[waiting[hit]] = chunk[first[hit]]
        overlap[waiting[hit]] = shared.gather(1, first[:, None])[hit, 0]
        waiting = waiting[~hit]
    assert not len(waiting), "what suppression dropped lies above the threshold of a kept box"
    owner[seeds] = torch.arange(len(seeds), device=boxes.device)  # its own, even where it is empty
    votes = overlap.double() * weights
    gains = votes * scores
    sums = torch.zeros(len(seeds), 9, dtype=torch.float64, device=boxes.device)
    each = torch.cat([torch.stack([votes, torch.ones_like(votes), gains], dim=1), gains[:, None] * boxes], dim=1)
    total, count, gain, moments = sums.index_add_(0, owner, each).split([1, 1, 1, 6], dim=1)
    seen = torch.zeros(len(seeds), num_views, dtype=torch.bool, device=boxes.device)
    seen[owner, origin] = True
    missing = (~seen).sum(dim=1, keepdim=True)
    fused = torch.where(gain > 0, moments / gain, boxes[seeds].double())  # scores of 0 move nothing
    return fused.to(boxes.dtype), (gain / (total + missing * total / count))[:, 0].to(scores.dtype)
