"""The search for anchor sizes, and for the pyramid levels that carry them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain3d.backbones.contract import Triple
from pretrain3d.detection.anchors import mean_best_iou
from pretrain3d.detection.necks import chosen_levels

PER_AXIS = 3  # sizes per axis: 27 anchors per position
DOUBLING: tuple[Triple, ...] = ((1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8))  # four levels, as most backbones have them
MAX_BOXES = 1500  # more are thinned out, evenly along their volume
WIDTHS = (0.7, 0.25, 0.08, 0.02)  # of the line searches, in logarithms of a size; each begins where the last one ended
POINTS = 7  # tried per line search
STARTS = 12  # random ones: three of the boxes, each on a random level
KICKS = 12  # random restarts from the best sizes so far
KICK = 0.4  # their standard deviation, in logarithms of a size
ENOUGH = 1e-5  # an improvement of the mean IoU that is worth another round
LEAST = 0.5  # voxels of a size that a search starts from


def search_anchors(sizes: Tensor, scales: Sequence[Triple] = DOUBLING) -> list[list[float]]:
    """Three anchor sizes per axis (27 anchors per position) that overlap boxes of the given sizes best.

    Maximises the mean over boxes of the best IoU with any anchor of any level at the same centre, as nnDetection does
    by random evolution. Here one size after the other is moved to the best place along its line, over ever shorter
    lines, until none moves; that is done from quantiles of the boxes, from some of the boxes themselves and from
    disturbed copies of the best result. The same boxes give the same anchors.

    Args:
        sizes: (N, 3) voxels, N >= 1.
        scales: stride of each level relative to the finest, along x, y, z.

    Returns:
        Three ascending lists of voxels, for the finest level.
    """
    sizes = sizes[torch.argsort(sizes.prod(dim=1), stable=True)]
    search = _Search(sizes[:: math.ceil(len(sizes) / MAX_BOXES)].float(), scales)
    quantiles = torch.quantile(search.boxes, torch.tensor([1 / 6, 1 / 2, 5 / 6]), dim=0).T  # (3 axes, 3)
    starts = [quantiles / scale[:, None] for scale in search.scales[:3]]
    generator = torch.Generator().manual_seed(0)
    for _ in range(STARTS):
        which = torch.randint(len(search.boxes), (PER_AXIS,), generator=generator)
        level = torch.randint(len(scales), (PER_AXIS,), generator=generator)
        starts.append((search.boxes[which] / search.scales[level]).T)
    found = [search.climb(start.clamp(min=LEAST), WIDTHS) for start in starts]
    best, score = max(found, key=lambda result: result[1])
    for _ in range(KICKS):
        kicked = best * torch.exp(KICK * torch.randn(best.shape, generator=generator))
        moved, reached = search.climb(kicked.clamp(min=LEAST), WIDTHS[1:])
        if reached > score:
            best, score = moved, reached
    return [[float(f"{value:.3g}") for value in sorted(axis)] for axis in best.tolist()]


def plan_levels(strides: Sequence[Triple], sizes: Tensor) -> tuple[int, ...]:
    """Indices of the pyramid levels that predict boxes.

    nnDetection's choice (`necks.chosen_levels`), and one level more at the fine end when along some axis half of the
    objects are shorter than a step of the finest one; never the first level.

    Args:
        strides: of the pyramid, finest first.
        sizes: (N, 3) voxels of the objects, N >= 1.
    """
    levels = chosen_levels(None, len(strides))
    finest = torch.tensor(strides[levels[0]], dtype=torch.float32)
    if levels[0] > 1 and bool((sizes.float().quantile(0.5, dim=0) < finest).any()):
        return (levels[0] - 1, *levels)
    return levels


def relative_strides(strides: Sequence[Triple], levels: Sequence[int]) -> list[Triple]:
    """Strides of the chosen levels relative to the finest of them."""
    first = strides[levels[0]]
    return [tuple(s // f for s, f in zip(strides[index], first, strict=True)) for index in levels]  # type: ignore[misc]


def all_anchors(sizes: Tensor, scales: Sequence[Triple]) -> Tensor:
    """(C, 3 axes, n) candidate sizes -> (C, n^3 L, 3): every combination on every level."""
    x, y, z = sizes.unbind(dim=1)  # (C, n)
    shape = (len(sizes), x.shape[1], x.shape[1], x.shape[1])
    grid = torch.stack(
        [x[:, :, None, None].expand(shape), y[:, None, :, None].expand(shape), z[:, None, None, :].expand(shape)], -1
    )
    base = grid.flatten(1, 3)  # (C, n^3, 3)
    return torch.cat([base * torch.tensor(scale, dtype=base.dtype) for scale in scales], dim=1)


class _Search:
    """Line searches over one size at a time."""

    def __init__(self, boxes: Tensor, scales: Sequence[Triple]) -> None:
        self.boxes = boxes  # (N, 3)
        self.volumes = boxes.prod(dim=1)
        self.scales = torch.tensor(scales, dtype=torch.float32)  # (L, 3)

    def climb(self, sizes: Tensor, widths: Sequence[float]) -> tuple[Tensor, float]:
        """(3, 3) sizes (axis, anchor) moved while the mean best IoU grows; and that IoU."""
        sizes = sizes.clone()
        score = float(mean_best_iou(all_anchors(sizes[None], self.scales.long().tolist()), self.boxes))
        for width in widths:
            factors = torch.linspace(-width, width, POINTS).exp()
            improved = True
            while improved:
                before = score
                for axis in range(3):
                    for index in range(PER_AXIS):
                        score = self._move(sizes, axis, index, factors, score)
                improved = score > before + ENOUGH
        return sizes, score

    def _move(self, sizes: Tensor, axis: int, index: int, factors: Tensor, score: float) -> float:
        """Puts one size at the best of its candidates; the mean best IoU then."""
        candidates = sizes[axis, index] * factors
        others = sizes[axis, torch.arange(PER_AXIS) != index]
        best = self._best(axis, torch.cat([others, candidates]), sizes)
        # the anchors that this size has no part in serve every candidate alike
        rest, moved = best[: len(others)].amax(dim=0), best[len(others) :]
        means = torch.maximum(moved, rest).mean(dim=1)  # (POINTS,)
        chosen = int(means.argmax())
        if float(means[chosen]) > score:
            sizes[axis, index] = candidates[chosen]
            return float(means[chosen])
        return score

    def _best(self, axis: int, values: Tensor, sizes: Tensor) -> Tensor:
        """(C,) sizes along one axis -> (C, N): each box's best IoU with an anchor that has this size there."""
        second, third = (other for other in range(3) if other != axis)
        along = values[:, None] * self.scales[:, axis]  # (C, L)
        b = (sizes[second] * self.scales[:, second, None])[:, :, None].expand(-1, -1, PER_AXIS).flatten(1)  # (L, 9)
        c = (sizes[third] * self.scales[:, third, None])[:, None, :].expand(-1, PER_AXIS, -1).flatten(1)
        area = torch.minimum(b[..., None], self.boxes[:, second]) * torch.minimum(c[..., None], self.boxes[:, third])
        shared = torch.minimum(along[..., None], self.boxes[:, axis])[:, :, None] * area  # (C, L, 9, N)
        both_volumes = (along[..., None] * (b * c))[..., None] + self.volumes
        return shared.div_(both_volumes.sub_(shared)).flatten(1, 2).amax(dim=1)
