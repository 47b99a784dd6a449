"""Assigning 50 boxes to 337 thousand and to 1 million anchors (ATSS), beside MONAI's matcher: time and peak memory.

With 9 anchors per position both must match the same anchors. With 27, MONAI stops at as many candidates per level as
the level has positions (64 of 108 on the coarsest), so only the tests' slow oracle can judge. Times are processor
milliseconds of one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from harness import Target, interleave, report, timed
from monai.apps.detection.utils.ATSS_matcher import ATSSMatcher
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pretrain3d.detection.anchors import AnchorGrid, Anchors
from pretrain3d.detection.assign import atss

PATCH, STRIDES, BOXES, CANDIDATES = (128, 128, 128), (4, 8, 16, 32), 50, 4
SIZES = {"337k": [[4, 8, 12], [4, 8, 12], [6]], "1M": [[4, 8, 12]] * 3}  # 9 and 27 anchors per position


def make_boxes(seed: int = 0) -> Tensor:
    """Objects of 4-24 voxels anywhere in the patch."""
    generator = torch.Generator().manual_seed(seed)
    low = 104 * torch.rand(BOXES, 3, generator=generator)
    return torch.cat([low, low + 4 + 20 * torch.rand(BOXES, 3, generator=generator)], dim=1)


def ours(grid: AnchorGrid, boxes: Tensor) -> Tensor:
    valid = torch.ones(1, len(boxes), dtype=torch.bool)
    return atss(grid, boxes[None], valid, CANDIDATES).matches(len(grid.boxes))[0]


def theirs(grid: AnchorGrid, boxes: Tensor) -> Tensor:
    matcher = ATSSMatcher(num_candidates=CANDIDATES, center_in_gt=False)
    positions = [x * y * z for x, y, z in grid.shapes]
    return matcher.compute_matches(boxes, grid.boxes, positions, grid.per_position)[1]


def peak_mib(run: Callable[[], Tensor]) -> Callable[[], float]:
    """Highest sum of live tensor memory that the call allocated, from the allocator's own events."""

    def measure() -> float:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            run()
        live = peak = 0
        for event in record.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        return peak / 2**20

    return measure


def main() -> int:
    """Runs the benchmark; 1 when a target is missed or the results differ."""
    torch.set_num_threads(1)
    boxes = make_boxes()
    grids = {
        name: Anchors({"sizes": sizes}, [(s, s, s) for s in STRIDES]).grid(PATCH, torch.device("cpu"))
        for name, sizes in SIZES.items()
    }
    if not torch.equal(ours(grids["337k"], boxes), theirs(grids["337k"], boxes).clamp(min=-1)):
        print("the matched anchors differ from MONAI's")
        return 1
    runs = {
        f"{name}{owner}": (lambda grid=grid, match=match: match(grid, boxes))
        for name, grid in grids.items()
        for owner, match in (("", ours), (" monai", theirs))
    }
    inputs = f"{BOXES} boxes, " + " and ".join(str(len(grid.boxes)) for grid in grids.values()) + " anchors"
    times = interleave({name: timed(run, 1e3) for name, run in runs.items()})
    memory = interleave({name: peak_mib(run) for name, run in runs.items()})
    status = [
        report(
            "ATSS, time",
            "ms",
            inputs,
            ("monai",),
            times,
            [Target(f"{name}: times MONAI's speed", _ratio(name), 80) for name in grids],
        ),
        report(
            "ATSS, peak memory",
            "MiB",
            inputs,
            ("monai",),
            memory,
            [Target(f"{name}: MONAI's memory divided by ours", _ratio(name), 20) for name in grids],
        ),
    ]
    return max(status)


def _ratio(name: str) -> Callable[..., float]:
    return lambda medians: medians[f"{name} monai"] / medians[name]


if __name__ == "__main__":
    sys.exit(main())
