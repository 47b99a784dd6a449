"""Anchor sizes of OpenKBP's organs and LUNA16's nodules: the mean best IoU and the time, beside nnDetection's search.

nnDetection v0.1 searches by evolution: nevergrad's TwoPointsDE, whole numbers from (4, 8, 16) per axis, 5,000
evaluations in each of 3 restarts (of which its code keeps the last one *evaluated*; here the best counts). Times are
processor seconds. Needs nevergrad, and the folder that PRETRAIN3D_TESTDATA names: ``data/openkbp`` and
``data/luna16_froc`` in it.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import Target, interleave, not_run, report, timed
from torch import Tensor

from pretrain3d.data.fingerprint import target_spacing
from pretrain3d.data.readers.openkbp import OpenKbp
from pretrain3d.detection.anchors import mean_best_iou
from pretrain3d.geometry import boxes_of_instances
from pretrain3d.planning.anchors import DOUBLING, all_anchors, search_anchors

EVALUATIONS, RESTARTS = 5000, 3
LUNA_SPACING_MM = (0.703125, 0.703125, 1.25)  # of MONAI's LUNA16 bundle


def organ_sizes(folder: Path) -> Tensor:
    """(N, 3) voxels, of the spacing that `prepare` would choose, of all organs outside the test set."""
    reader = OpenKbp(folder)
    sizes, spacings, shapes = [], [], []
    for case in reader.cases():
        if case.split in ("train", "val"):
            volume = reader.read(case)
            spacings.append(np.linalg.norm(volume.affine[:3, :3], axis=0))  # its axes lie along the world's
            shapes.append(volume.image.shape[1:])
            boxes = boxes_of_instances(volume.instances)[1]
            sizes.append((boxes[:, 3:] - boxes[:, :3]) * spacings[-1])
    return torch.from_numpy(np.concatenate(sizes) / target_spacing(np.array(spacings), np.array(shapes))).float()


def nodule_sizes(path: Path) -> Tensor:
    """(N, 3) voxels of LUNA16's nodules: cubes around spheres of the annotated diameter."""
    with path.open(newline="", encoding="utf-8") as file:
        diameters = torch.tensor([float(row["diameter_mm"]) for row in csv.DictReader(file)])
    return diameters[:, None] / torch.tensor(LUNA_SPACING_MM)


def quality(sizes: list[list[float]], boxes: Tensor) -> float:
    return float(mean_best_iou(all_anchors(torch.tensor(sizes)[None], DOUBLING), boxes))


def theirs(boxes: Tensor) -> list[list[float]]:
    """The best of three evolutions."""
    import nevergrad

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


def measured(
    search: Callable[[Tensor], list[list[float]]], boxes: Tensor, qualities: list[float]
) -> Callable[[], float]:
    """A measurement of a search's seconds, which notes how good its result is."""
    return timed(lambda: qualities.append(quality(search(boxes), boxes)))


def main() -> int:
    """Runs the benchmark; 1 when a target is missed, 2 without the data or the peer."""
    folder = os.environ.get("PRETRAIN3D_TESTDATA")
    if not folder:
        return not_run("set PRETRAIN3D_TESTDATA to the folder of real data, with data/openkbp and data/luna16_froc")
    if importlib.util.find_spec("nevergrad") is None:
        return not_run("the peer is nevergrad; install it: pip install nevergrad")
    torch.set_num_threads(1)
    data = Path(folder) / "data"
    annotations = data / "luna16_froc/official/annotations.csv"
    status = 0
    for name, boxes in (("organs", organ_sizes(data)), ("nodules", nodule_sizes(annotations))):
        results: dict[str, list[float]] = {"ours": [], "TwoPointsDE": []}
        seconds = interleave({
            "ours": measured(search_anchors, boxes, results["ours"]),
            "TwoPointsDE": measured(theirs, boxes, results["TwoPointsDE"]),
        })  # fmt: skip
        inputs = f"{len(boxes)} {name}, 27 anchors on 4 levels"
        at_least = Target("ours minus theirs", lambda m: m["ours"] - m["TwoPointsDE"], 0.0)
        status |= report(f"Anchors of {name}: mean best IoU", "", inputs, ("nevergrad",), results, [at_least])
        quick = Target("seconds of ours", lambda m: m["ours"], 30.0, at_most=True)
        status |= report(f"Anchors of {name}: time", "s", inputs, ("nevergrad",), seconds, [quick])
    return status


if __name__ == "__main__":
    sys.exit(main())
