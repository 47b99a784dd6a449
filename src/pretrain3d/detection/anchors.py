"""Anchor boxes on a pyramid, and how well a set of anchor sizes covers a set of boxes.

The centre of the anchors at position ``i`` of a level is ``(i + 0.5) * stride``: the middle of the half-open voxels
that the position stands for. nnDetection puts it at ``i * stride`` in coordinates that name voxel *centres*, which is
``i * stride + 0.5`` here: for strides above 1 its anchors lean to the low corner of their cell.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain3d.backbones.contract import Triple, triple
from pretrain3d.config import UserError


@dataclass(frozen=True)
class AnchorGrid:
    """All anchors of an image: levels finest first, positions with the last axis fastest, then the A sizes.

    Attributes:
        boxes: (M, 6) float32 voxels of the image.
        shapes: positions per axis of each level.
        strides: voxels per position of each level.
        per_position: A, the number of anchors per position (the same on every level).
    """

    boxes: Tensor
    shapes: tuple[Triple, ...]
    strides: tuple[Triple, ...]
    per_position: int


class Anchors:
    """Makes the anchor grid of an image shape once per device and keeps it.

    Args:
        base: anchor sizes in voxels on the finest level, either ``{"sizes": [xs, ys, zs]}`` (all combinations; three
            per axis give 27) or ``{"boxes": [[x, y, z], ...]}`` (exactly these).
        strides: stride per level, finest first. A level's sizes are the base sizes times its stride relative to the
            finest level's.

    Raises:
        UserError: the sizes are not three lists of, or not triples of, positive numbers.
    """

    def __init__(self, base: Mapping[str, Sequence[Sequence[float]]], strides: Sequence[Triple]) -> None:
        self.base = base_sizes(base)  # (A, 3)
        self.strides = tuple(strides)
        self._grids: dict[tuple[tuple[int, ...], torch.device], AnchorGrid] = {}

    @property
    def per_position(self) -> int:
        return len(self.base)

    def level_sizes(self) -> Tensor:
        """(L, A, 3) anchor sizes in voxels."""
        strides = torch.tensor(self.strides, dtype=torch.float32)
        return self.base[None] * (strides / strides[0])[:, None]

    def grid(self, image_shape: Sequence[int], device: torch.device) -> AnchorGrid:
        """The anchors of an image, float32 whatever autocast says; the image is a multiple of every stride."""
        key = (tuple(int(n) for n in image_shape), device)
        if key not in self._grids:
            self._grids[key] = self._make(key[0], device)
        return self._grids[key]

    def _make(self, image_shape: tuple[int, ...], device: torch.device) -> AnchorGrid:
        parts, shapes = [], []
        for stride, size in zip(self.strides, self.level_sizes(), strict=True):
            assert all(n % s == 0 for n, s in zip(image_shape, stride, strict=True)), f"{image_shape} / {stride}"
            shape = triple([n // s for n, s in zip(image_shape, stride, strict=True)])
            axes = [(torch.arange(n) + 0.5) * s for n, s in zip(shape, stride, strict=True)]
            center = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 1, 3)  # (positions, 1, 3)
            parts.append(torch.cat([center - size / 2, center + size / 2], dim=-1).reshape(-1, 6))
            shapes.append(shape)
        # inference mode would mark the cached tensor as unusable in a later training step
        with torch.inference_mode(False):
            stacked = torch.cat(parts).to(device=device, dtype=torch.float32, copy=True)
        return AnchorGrid(stacked, tuple(shapes), self.strides, self.per_position)


def base_sizes(base: Mapping[str, Sequence[Sequence[float]]] | None) -> Tensor:
    """``{"sizes": ...}`` or ``{"boxes": ...}`` of a config or plan -> (A, 3) float32 voxels.

    Raises:
        UserError: anything else; None is what a plan without objects has.
    """
    if base is None:
        raise UserError(
            "the store's plan has no anchors (anchors: null), as the store held no objects when it was made; if it "
            "holds some now, `pretrain3d plan STORE` plans them"
        )
    expected = "expected {sizes: [[x, ...], [y, ...], [z, ...]]} or {boxes: [[x, y, z], ...]} with positive voxels"
    try:
        (kind, values), *more = base.items()
        rows = [[float(value) for value in row] for row in values]
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"anchors: {base!r} is not readable; {expected}") from None
    shaped = len(rows) == 3 if kind == "sizes" else kind == "boxes" and all(len(row) == 3 for row in rows)
    positive = all(rows) and all(0 < value < float("inf") for row in rows for value in row)
    if more or not (rows and shaped and positive):
        raise UserError(f"anchors: {dict(base)!r} is wrong; {expected}")
    return torch.tensor(list(itertools.product(*rows)) if kind == "sizes" else rows, dtype=torch.float32)


def mean_best_iou(anchor_sizes: Tensor, box_sizes: Tensor) -> Tensor:
    """How well anchors fit boxes when their centres coincide: mean over boxes of the best anchor's IoU.

    Args:
        anchor_sizes: (..., A, 3) voxels; leading dimensions are several candidate sets.
        box_sizes: (N, 3) voxels, N >= 1.

    Returns:
        (...) values in [0, 1].
    """
    return best_iou(anchor_sizes, box_sizes).mean(dim=-1)


def best_iou(anchor_sizes: Tensor, box_sizes: Tensor) -> Tensor:
    """(..., A, 3) and (N, 3) voxels -> (..., N): IoU of each box with its best anchor at the same centre."""
    anchor_sizes, box_sizes = anchor_sizes.float(), box_sizes.float()
    a, b = anchor_sizes[..., :, None, :], box_sizes[:, :]  # (..., A, 1, 3), (N, 3)
    shared = torch.minimum(a[..., 0], b[..., 0])
    for axis in (1, 2):
        shared = shared * torch.minimum(a[..., axis], b[..., axis])  # (..., A, N)
    union = anchor_sizes.prod(dim=-1)[..., None] + box_sizes.prod(dim=-1) - shared
    return (shared / union).amax(dim=-2)
