"""Several networks, one answer: all their views of a volume are merged once, as the views of one network are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pretrain3d.detection.contract import Detections
from pretrain3d.detection.merge import Merging, TileDetections, ViewDetections, merge_tiles, merge_views
from pretrain3d.geometry import Frame


def merge_members(members: Sequence[list[TileDetections]], frames: Sequence[Frame], merging: Merging) -> Detections:
    """The boxes of a volume from the networks of an ensemble.

    Every member may look at the volume at its own spacing: tiles are merged where they were predicted, then boxes go
    over the input file's voxels, exactly, to those of the first member, where all views of all members are merged.

    Args:
        members: per network, what it predicts in each of its views.
        frames: per network, of the volume that it was given; all of one input file.
        merging: of all.

    Returns:
        Boxes in the voxels of the first frame, best first.
    """
    views = []
    for member, frame in zip(members, frames, strict=True):
        for view in member:
            merged = merge_tiles(view, merging)
            views.append(merged if frame is frames[0] else _moved(merged, frame, frames[0]))
    return merge_views(views, merging)


def _moved(view: ViewDetections, source: Frame, target: Frame) -> ViewDetections:
    boxes = target.from_original(source.to_original(view.found.boxes.numpy()))
    found = Detections(torch.from_numpy(boxes).float(), view.found.scores, view.found.labels)
    return ViewDetections(found, view.weights)
