"""Everything but the network for a volume of 300^3: tiles, boxes to the volume, merging over tiles and views.

The stand-in for the network returns 100 boxes per tile at once, the most that the detectors return, either scattered
noise (the worst case: hardly anything overlaps) or jittered copies of 60 objects. MONAI has no such part: it stitches
the network's raw outputs before it decodes boxes. Times are processor seconds of one thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from harness import Target, interleave, report
from torch import Tensor

from pretrain3d.detection.contract import Detections
from pretrain3d.detection.merge import Merging, merge
from pretrain3d.detection.tiles import predict_views, tile_starts

SHAPE, PATCH, OVERLAP = (300, 300, 300), (128, 128, 128), 0.5
BOXES, CLASSES, OBJECTS = 100, 3, 60


def noise(seed: int = 0) -> Callable[[Tensor], list[Detections]]:
    """100 boxes of 4-18 voxels anywhere in the tile, new ones for every tile."""
    generator = torch.Generator().manual_seed(seed)

    def detect(patches: Tensor) -> list[Detections]:
        found = []
        for _ in range(len(patches)):
            low = torch.rand(BOXES, 3, generator=generator) * 110
            boxes = torch.cat([low, low + 4 + 14 * torch.rand(BOXES, 3, generator=generator)], dim=1)
            labels = torch.randint(0, CLASSES, (BOXES,), generator=generator)
            found.append(Detections(boxes, torch.rand(BOXES, generator=generator), labels))
        return found

    return detect


def objects(seed: int = 0) -> Callable[[Tensor], list[Detections]]:
    """100 boxes around the objects of the tile (which reads off the patch where it is), cut at its borders."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(OBJECTS, 3, generator=generator) * 260
    true = torch.cat([low, low + 4 + 36 * torch.rand(OBJECTS, 3, generator=generator)], dim=1)

    def detect(patches: Tensor) -> list[Detections]:
        found = []
        for patch in patches:
            place = int(patch[0, 0, 0, 0])  # voxel index of the tile's corner; mirrored ones see other objects, as many
            corner = torch.tensor([place // 300**2, place // 300 % 300, place % 300]).repeat(2)
            seen = ((true[:, :3] < corner[:3] + 128) & (true[:, 3:] > corner[:3])).all(dim=1).nonzero()[:, 0]
            owner = seen[torch.randint(0, max(len(seen), 1), (BOXES if len(seen) else 0,), generator=generator)]
            boxes = true[owner] - corner + 0.8 * torch.randn(len(owner), 6, generator=generator)
            boxes = boxes.clamp(0, 128)
            keep = (boxes[:, 3:] - boxes[:, :3] > 1).all(dim=1)
            scores = torch.rand(len(owner), generator=generator)
            found.append(Detections(boxes[keep], scores[keep], owner[keep] % CLASSES))
        return found

    return detect


def seconds(
    make: Callable[[], Callable[[Tensor], list[Detections]]], image: Tensor, axes: tuple[int, ...] = ()
) -> Callable[[], float]:
    def measure() -> float:
        detect, inside = make(), 0.0

        def timed(patches: Tensor) -> list[Detections]:
            nonlocal inside
            start = time.process_time()
            found = detect(patches)
            inside += time.process_time() - start
            return found

        start = time.process_time()
        merge(predict_views(timed, image, PATCH, OVERLAP, batch_size=4, mirror_axes=axes), Merging())
        return time.process_time() - start - inside

    return measure


def main() -> int:
    """Runs the benchmark; 1 when the target is missed."""
    torch.set_num_threads(1)
    image = torch.arange(300**3, dtype=torch.int32).view(1, *SHAPE).float()
    tiles = len(tile_starts(SHAPE, PATCH, OVERLAP))
    results = interleave({
        "noise": seconds(noise, image),
        "objects": seconds(objects, image),
        "objects, 8 views": seconds(objects, image, (0, 1, 2)),
    })  # fmt: skip
    return report(
        "tiles and merging, without the network",
        "s",
        f"{SHAPE[0]}^3, patch {PATCH[0]}^3, overlap {OVERLAP}: {tiles} tiles of {BOXES} boxes, {CLASSES} classes",
        (),
        results,
        [
            Target("noise", lambda m: m["noise"], 1.0, at_most=True),
            Target("objects", lambda m: m["objects"], 1.0, at_most=True),
            Target("8 mirrored views, per view", lambda m: m["objects, 8 views"] / 8, 1.0, at_most=True),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
