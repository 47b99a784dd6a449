"""Suppression of 20,000 clustered boxes, one class and five, beside MONAI's; the kept indices must be equal.

Times are processor seconds of one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from harness import Target, interleave, report, timed
from monai.data import box_utils
from torch import Tensor

from pretrain3d import boxes as box_ops

BOXES, CLUSTERS, CLASSES, THRESHOLD = 20_000, 400, 5, 0.5


def make(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """About 50 jittered boxes around each of 400 objects of 4-20 voxels in 256^3, with scores and labels."""
    generator = torch.Generator().manual_seed(seed)
    center = 10 + 236 * torch.rand(CLUSTERS, 3, generator=generator)
    size = 4 + 16 * torch.rand(CLUSTERS, 3, generator=generator)
    owner = torch.arange(BOXES) % CLUSTERS
    center = center[owner] + 0.15 * size[owner] * torch.randn(BOXES, 3, generator=generator)
    size = size[owner] * torch.exp(0.15 * torch.randn(BOXES, 3, generator=generator))
    scores = torch.rand(BOXES, generator=generator)
    return torch.cat([center - size / 2, center + size / 2], dim=1), scores, torch.arange(BOXES) // 7 % CLASSES


def main() -> int:
    """Runs the benchmark; 1 when a target is missed or the results differ."""
    torch.set_num_threads(1)
    boxes, scores, labels = make()
    candidates: dict[str, Callable[[], Tensor]] = {
        "nms": lambda: box_ops.nms(boxes, scores, THRESHOLD),
        "nms monai": lambda: box_utils.non_max_suppression(boxes, scores, THRESHOLD),
        "batched": lambda: box_ops.batched_nms(boxes, scores, labels, THRESHOLD),
        "batched monai": lambda: box_utils.batched_nms(boxes, scores, labels, THRESHOLD),
    }
    kept = {name: run() for name, run in candidates.items()}
    for name in ("nms", "batched"):
        if not torch.equal(kept[name], kept[f"{name} monai"]):
            print(f"{name}: the kept boxes differ from MONAI's")
            return 1
    results = interleave({name: timed(run) for name, run in candidates.items()})
    return report(
        "non-maximum suppression",
        "s",
        f"{BOXES} boxes around {CLUSTERS} objects, IoU {THRESHOLD}; {len(kept['nms'])} kept, {len(kept['batched'])} of "
        f"{CLASSES} classes",
        ("monai",),
        results,
        [
            Target("one class: times MONAI's speed", lambda m: m["nms monai"] / m["nms"], 10),
            Target(f"{CLASSES} classes: times MONAI's speed", lambda m: m["batched monai"] / m["batched"], 80),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
