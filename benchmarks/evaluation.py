"""AP and matching, beside MONAI's COCO metric on the same boxes.

Both must report the same AP (MONAI sums in float32, hence the tolerance); equality with pycocotools is a test. Times
are processor milliseconds.
"""

from __future__ import annotations

import sys

import numpy as np
from harness import Target, interleave, report, timed
from monai.apps.detection.metrics.coco import COCOMetric
from monai.apps.detection.metrics.matching import matching_batch
from monai.data.box_utils import box_iou

from pretrain3d.evaluation.average_precision import average_precision
from pretrain3d.evaluation.matching import THRESHOLDS, match

IMAGES, PREDICTIONS, OBJECTS = 200, 300, 50


def make(seed: int = 0) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]:
    """Objects of 8-40 voxels in 256^3; two predictions in three are a shifted object, the others lie anywhere."""
    rng = np.random.default_rng(seed)
    predictions, targets = {}, {}
    for index in range(IMAGES):
        start = rng.uniform(0, 216, (OBJECTS, 3))
        true = np.hstack([start, start + rng.uniform(8, 40, (OBJECTS, 3))])
        start = rng.uniform(0, 216, (PREDICTIONS, 3))
        anywhere = np.hstack([start, start + rng.uniform(8, 40, (PREDICTIONS, 3))])
        near = true[rng.integers(0, OBJECTS, PREDICTIONS)] + rng.normal(0, 2, (PREDICTIONS, 6))
        found = np.where(rng.random((PREDICTIONS, 1)) < 2 / 3, near, anywhere).astype(np.float32)
        found[:, 3:] = np.maximum(found[:, 3:], found[:, :3] + 1)
        labels = np.zeros(PREDICTIONS, np.int64)
        predictions[f"{index:03d}"] = {"boxes": found, "scores": rng.random(PREDICTIONS), "labels": labels}
        targets[f"{index:03d}"] = {"boxes": true.astype(np.float32), "labels": np.zeros(OBJECTS, np.int64)}
    return predictions, targets


def ours(predictions: dict, targets: dict) -> np.ndarray:
    matches = match(predictions, targets, ["object"])
    return average_precision(matches.per_class[0], np.ones((1, len(targets))))[0]


def theirs(predictions: dict, targets: dict) -> np.ndarray:
    levels = np.linspace(0.1, 0.9, len(THRESHOLDS))  # as it computes its own range, so that the two lists are one
    metric = COCOMetric(["object"], iou_list=levels, iou_range=(0.1, 0.9, 0.05), max_detection=[100], verbose=False)
    assert len(metric.iou_thresholds) == len(THRESHOLDS)
    results = matching_batch(
        iou_fn=box_iou,
        iou_thresholds=metric.iou_thresholds,
        pred_boxes=[entry["boxes"] for entry in predictions.values()],
        pred_classes=[entry["labels"] for entry in predictions.values()],
        pred_scores=[entry["scores"] for entry in predictions.values()],
        gt_boxes=[entry["boxes"] for entry in targets.values()],
        gt_classes=[entry["labels"] for entry in targets.values()],
    )
    values, _ = metric(results)
    return np.array([values[f"AP_IoU_{t:.2f}_MaxDet_100"] for t in THRESHOLDS])


def main() -> int:
    """Runs the benchmark; 1 when the target is missed."""
    predictions, targets = make()
    difference = np.abs(ours(predictions, targets) - theirs(predictions, targets)).max()
    if difference > 1e-3:
        print(f"the two do not measure the same: AP differs by {difference:.1e}")
        return 1
    results = interleave({
        "pretrain3d": timed(lambda: ours(predictions, targets), 1e3),
        "MONAI": timed(lambda: theirs(predictions, targets), 1e3),
    })  # fmt: skip
    return report(
        f"Evaluation: matching and AP; the APs differ by at most {difference:.1e}",
        "ms",
        f"{IMAGES} images x {PREDICTIONS} predictions x {OBJECTS} boxes, 1 class, {len(THRESHOLDS)} IoU thresholds",
        ("monai",),
        results,
        [Target("times as fast as MONAI", lambda m: m["MONAI"] / m["pretrain3d"], 20.0)],
    )


if __name__ == "__main__":
    sys.exit(main())
