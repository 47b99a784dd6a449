"""Anchor sizes of OpenKBP's organs and LUNA16's nodules: the mean best IoU and the time, beside nnDetection's search.

nnDetection v0.1 searches by evolution: nevergrad's TwoPointsDE, whole numbers from (4, 8, 16) per axis, 5,000
evaluations in each of 3 restarts (of which its code keeps the last one *evaluated*; here the best counts). Times are
processor seconds.

    python benchmarks/anchors.py STORE annotations.csv
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

import numpy as np
import torch
from harness import Target, report
from torch import Tensor

from pretrain3d.config import UserError
from pretrain3d.data.store import Store
from pretrain3d.detection.anchors import mean_best_iou
from pretrain3d.planning.anchors import DOUBLING, all_anchors, search_anchors

EVALUATIONS, RESTARTS = 5000, 3
LUNA_SPACING_MM = (0.703125, 0.703125, 1.25)  # of MONAI's LUNA16 bundle


def organ_sizes(path: Path) -> Tensor:
    """(N, 3) voxels of all training objects of a store."""
    boxes = [case.boxes for case in Store(path).cases.values() if case.split in ("train", "val")]
    boxes = np.concatenate(boxes)
    return torch.from_numpy(boxes[:, 3:] - boxes[:, :3])


def nodule_sizes(path: Path) -> Tensor:
    """(N, 3) voxels of LUNA16's nodules: cubes around spheres of the annotated diameter."""
    with open(path, newline="", encoding="utf-8") as file:
        text = file.read()
    rows = csv.DictReader(text.splitlines(), delimiter="\t" if "\t" in text.splitlines()[0] else ",")
    diameters = torch.tensor([float(row["diameter_mm"]) for row in rows])
    return diameters[:, None] / torch.tensor(LUNA_SPACING_MM)


def quality(sizes: list[list[float]], boxes: Tensor) -> float:
    return float(mean_best_iou(all_anchors(torch.tensor(sizes)[None], DOUBLING), boxes))


def theirs(boxes: Tensor) -> list[list[float]]:
    """The best of three evolutions."""
    try:
        import nevergrad
    except ImportError as error:
        raise UserError("this benchmark's peer is nevergrad; install it: pip install nevergrad") from error

    def cost(**values: int) -> float:
        sizes = [[float(values[f"{axis}{i}"]) for i in range(3)] for axis in "xyz"]
        return -quality(sizes, boxes)

    best, found = 0.0, [[4.0, 8.0, 16.0]] * 3
    for _ in range(RESTARTS):
        scalars = {
            f"{axis}{i}": nevergrad.p.Scalar(init=start, lower=1).set_integer_casting()
            for axis in "xyz"
            for i, start in enumerate((4, 8, 16))
        }
        optimizer = nevergrad.optimizers.TwoPointsDE(nevergrad.p.Instrumentation(**scalars), budget=EVALUATIONS)
        _, values = optimizer.minimize(cost).value
        if cost(**values) < best:
            best = cost(**values)
            found = [[float(values[f"{axis}{i}"]) for i in range(3)] for axis in "xyz"]
    return found


def main() -> int:
    """Runs the benchmark; 1 when a target is missed."""
    store, annotations = (Path(argument) for argument in sys.argv[1:3])
    status = 0
    for name, boxes in (("organs", organ_sizes(store)), ("nodules", nodule_sizes(annotations))):
        results: dict[str, list[float]] = {}
        seconds: dict[str, list[float]] = {}
        for owner, search in (("ours", search_anchors), ("TwoPointsDE", theirs)):
            start = time.process_time()
            found = search(boxes)
            seconds[owner] = [time.process_time() - start]
            results[owner] = [quality(found, boxes)]
        inputs = f"{len(boxes)} {name}, 27 anchors on 4 levels"
        at_least = Target("ours minus theirs", lambda m: m["ours"] - m["TwoPointsDE"], 0.0)
        status |= report(f"Anchors of {name}: mean best IoU", "", inputs, ("nevergrad",), results, [at_least])
        quick = Target("seconds of ours", lambda m: m["ours"], 30.0, at_most=True)
        status |= report(f"Anchors of {name}: time", "s", inputs, ("nevergrad",), seconds, [quick])
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
