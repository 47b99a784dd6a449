"""AP by size against greedy matching and the AP rule, both as loops."""

from __future__ import annotations

import numpy as np
import pytest
from test_matching import Case, random_cases, slow_iou

from pretrain3d.config import UserError
from pretrain3d.evaluation.matching import match
from pretrain3d.evaluation.protocol import evaluate
from pretrain3d.evaluation.sizes import Sizes, by_size, have_sizes

SPACING = np.array([0.5, 1.0, 2.0])


def sized_cases(seed: int, masks: bool = True) -> tuple[dict[str, Case], dict[str, Case]]:
    """Distinct scores (AP depends on the order of equal ones); voxels of 1 mm3; masks fill 40 to 90 % of their box."""
    predictions, targets = random_cases(seed, cases=6, boxes=30, objects=7, classes=2)
    rng = np.random.default_rng(seed)
    for name, entry in targets.items():
        predictions[name]["scores"] = rng.random(len(predictions[name]["labels"]))
        entry["spacing_mm"] = SPACING
        if masks:
            entry["volumes_mm3"] = volumes(entry["boxes"]) * rng.uniform(0.4, 0.9, len(entry["labels"]))
    return predictions, targets


def volumes(boxes: np.ndarray) -> np.ndarray:
    return np.array([np.prod(box[3:] - box[:3]) for box in boxes])


def slow_found(found: Case, true: Case, label: int, threshold: float) -> list[tuple[int, int | None]]:
    """(prediction, object or None), best first."""
    free = [j for j in range(len(true["labels"])) if true["labels"][j] == label]
    result = []
    for i in [i for i in np.argsort(-found["scores"], kind="stable") if found["labels"][i] == label]:
        best, best_iou = None, threshold
        for j in free:
            iou = slow_iou(found["boxes"][i], true["boxes"][j])
            if iou >= best_iou:
                best, best_iou = j, iou
        if best is not None:
            free.remove(best)
        result.append((int(i), best))
    return result


def slow_ap(rows: list[tuple[float, bool]], num_objects: int) -> float | None:
    """101 recalls, the best precision at each or beyond."""
    if not num_objects:
        return None
    rows = sorted(rows, reverse=True)
    points, hits = [], 0
    for count, (_, hit) in enumerate(rows, 1):
        hits += hit
        points.append((hits / num_objects, hits / count))
    levels = np.linspace(0, 1, 101)
    return float(np.mean([max((p for r, p in points if r >= level), default=0.0) for level in levels]))


@pytest.mark.parametrize(("seed", "masks"), [(0, True), (1, True), (2, False)])
def test_equals_the_slow_loops(seed: int, masks: bool) -> None:
    predictions, targets = sized_cases(seed, masks)
    edges = [300.0, 1500.0]
    result = by_size(match(predictions, targets, ["a", "b"]), predictions, targets, edges, samples=0)
    assert list(result) == ["0-300", "300-1500", "1500-"]
    size_of = {name: entry.get("volumes_mm3", volumes(entry["boxes"])) for name, entry in targets.items()}
    for (low, high), entry in zip([(0, 300), (300, 1500), (1500, np.inf)], result.values(), strict=True):
        assert entry["objects"] == sum(int(((low <= size) & (size < high)).sum()) for size in size_of.values()) > 0
        for label, name in enumerate("ab"):
            filled = [
                size / box
                for case, true in targets.items()
                for size, box, of in zip(size_of[case], volumes(true["boxes"]), true["labels"], strict=True)
                if of == label
            ]
            for key, threshold in (("AP@0.10", 0.10), ("AP@0.50", 0.50)):
                rows, objects = [], 0
                for case, true in targets.items():
                    inside = (low <= size_of[case]) & (size_of[case] < high)
                    objects += int((inside & (true["labels"] == label)).sum())
                    boxes = volumes(predictions[case]["boxes"]) * np.median(filled)
                    for i, j in slow_found(predictions[case], true, label, threshold):
                        size = boxes[i] if j is None else size_of[case][j]
                        if low <= size < high:
                            rows.append((float(predictions[case]["scores"][i]), j is not None))
                expected = slow_ap(rows, objects)
                value = entry["per_class"][name][key]["value"]
                assert value == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_one_bin_is_the_plain_number() -> None:
    predictions, targets = sized_cases(3)
    plain = evaluate(predictions, targets, ["a", "b"])
    bins = by_size(match(predictions, targets, ["a", "b"]), predictions, targets, [1e9], samples=20)
    for key in ("mAP", "AP@0.10", "AP@0.50"):
        row = bins["0-1e+09"]["metrics"][key]
        assert row["value"] == pytest.approx(plain[key], abs=1e-12) and row["low"] <= row["value"] <= row["high"]
    assert bins["1e+09-"]["metrics"]["mAP"]["value"] is None and bins["1e+09-"]["high_mm3"] is None


def test_an_object_at_the_edge_is_in_the_upper_bin() -> None:
    box = np.array([[0.0, 0, 0, 2, 2, 2]])
    found = {"x": {"boxes": box, "scores": np.ones(1), "labels": np.zeros(1, int)}}
    targets = {"x": {"boxes": box, "labels": np.zeros(1, int), "spacing_mm": np.ones(3)}}
    bins = by_size(match(found, targets, ["a"]), found, targets, [8.0], samples=0)
    assert [entry["objects"] for entry in bins.values()] == [0, 1]
    assert [entry["metrics"]["mAP"]["value"] for entry in bins.values()] == [None, 1.0]


def test_default_bins_are_thirds() -> None:
    predictions, targets = sized_cases(1)
    matches = match(predictions, targets, ["a", "b"])
    objects = [entry["objects"] for entry in by_size(matches, predictions, targets, samples=0).values()]
    assert len(objects) == 3 and max(objects) - min(objects) <= 2
    empty = {name: {**entry, "boxes": np.zeros((0, 6)), "labels": np.zeros(0, int), "volumes_mm3": np.zeros(0)}
             for name, entry in targets.items()}  # fmt: skip
    only = by_size(match(predictions, empty, ["a", "b"]), predictions, empty, samples=0)
    assert list(only) == ["0-"] and only["0-"]["metrics"]["mAP"]["value"] is None


def test_mistakes_are_named() -> None:
    predictions, targets = sized_cases(1)
    matches = match(predictions, targets, ["a", "b"])
    for edges in ([5.0, 5.0], [9.0, 3.0], [0.0, 3.0], [np.nan], [np.inf]):
        with pytest.raises(UserError, match="expected ascending volumes"):
            by_size(matches, predictions, targets, edges)
    assert have_sizes(targets)
    del targets["case3"]["spacing_mm"]
    assert not have_sizes(targets)
    with pytest.raises(UserError, match="case 'case3' has no spacing_mm"):
        Sizes(matches, predictions, targets)
