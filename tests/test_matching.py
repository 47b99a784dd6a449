"""Matching against a slow loop written from the definition, and its rules one by one."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain3d.evaluation.matching import THRESHOLDS, box_iou, match

Case = dict[str, np.ndarray]


def random_cases(
    seed: int, cases: int, boxes: int, objects: int, classes: int
) -> tuple[dict[str, Case], dict[str, Case]]:
    """Predictions are jittered objects (all on a quarter-voxel grid, so sums are exact) with many equal scores."""
    rng = np.random.default_rng(seed)
    predictions, targets = {}, {}
    for index in range(cases):
        start = rng.integers(0, 160, (rng.integers(0, objects + 1), 3)) / 4
        true = np.hstack([start, start + rng.integers(8, 80, start.shape) / 4])
        labels = rng.integers(0, classes, len(true))
        num = int(rng.integers(0, boxes + 1)) if len(true) else 3
        source = rng.integers(0, max(len(true), 1), num)
        base = true[source] if len(true) else np.tile([0.0, 0, 0, 9, 9, 9], (num, 1))
        found = base + rng.integers(-12, 13, (num, 6)) // rng.integers(1, 14, (num, 1)) / 4
        found[:, 3:] = np.maximum(found[:, 3:], found[:, :3] + 0.25)
        of_class = np.where(rng.random(num) < 0.8, labels[source] if len(true) else 0, rng.integers(0, classes, num))
        predictions[f"case{index}"] = {"boxes": found, "scores": rng.integers(0, 30, num) / 30, "labels": of_class}
        targets[f"case{index}"] = {"boxes": true, "labels": labels}
    return predictions, targets


def slow_iou(a: np.ndarray, b: np.ndarray) -> float:
    overlap = 1.0
    for axis in range(3):
        overlap *= max(0.0, min(a[axis + 3], b[axis + 3]) - max(a[axis], b[axis]))
    volumes = [float(np.prod(box[3:] - box[:3])) for box in (a, b)]
    return overlap / (sum(volumes) - overlap)


def slow_match(found: Case, true: Case, label: int, threshold: float, limit: int) -> list[tuple[float, bool]]:
    """(score, hit) of one case and class, best first."""
    ranked = [i for i in np.argsort(-found["scores"], kind="stable") if found["labels"][i] == label][:limit]
    free = [j for j in range(len(true["labels"])) if true["labels"][j] == label]
    result = []
    for i in ranked:
        best, best_iou = None, threshold
        for j in free:
            iou = slow_iou(found["boxes"][i], true["boxes"][j])
            if iou >= best_iou:
                best, best_iou = j, iou
        if best is not None:
            free.remove(best)
        result.append((float(found["scores"][i]), best is not None))
    return result


def test_thresholds_are_the_17_decimals() -> None:
    assert [f"{t:.2f}" for t in THRESHOLDS][:3] == ["0.10", "0.15", "0.20"] and len(THRESHOLDS) == 17
    assert THRESHOLDS[4] == 0.3 and THRESHOLDS[-1] == 0.9


@pytest.mark.parametrize("seed", range(4))
def test_matches_equal_the_slow_loop(seed: int) -> None:
    predictions, targets = random_cases(seed, cases=6, boxes=40, objects=8, classes=2)
    matches = match(predictions, targets, ["a", "b"], max_per_case=15)
    for label, one in enumerate(matches.per_class):
        for index, case_id in enumerate(matches.case_ids):
            assert one.objects[index] == (targets[case_id]["labels"] == label).sum()
            for column, threshold in enumerate(THRESHOLDS):
                expected = slow_match(predictions[case_id], targets[case_id], label, threshold, 15)
                mine = one.case == index
                assert list(zip(one.scores[mine], one.hits[mine, column], strict=True)) == expected
        assert (np.diff(one.scores) <= 0).all()
    assert matches.pooled().hits.any(axis=0).all(), "the cases must reach every threshold"


def test_iou_of_half_open_boxes() -> None:
    a = np.array([[0, 0, 0, 2, 2, 2]])
    b = np.array([[0, 0, 0, 2, 2, 2], [1, 0, 0, 3, 2, 2], [2, 0, 0, 4, 2, 2], [5, 5, 5, 5, 5, 5]])
    np.testing.assert_array_equal(box_iou(a, b), [[1, 1 / 3, 0, 0]])
    assert box_iou(b[3:], b[3:]) == 0


def test_an_iou_on_the_threshold_is_a_hit() -> None:
    boxes = np.array([[0.0, 0, 0, 3, 1, 1]])  # 3 of 10 voxels
    targets = {"a": {"boxes": np.array([[0.0, 0, 0, 10, 1, 1]]), "labels": np.array([0])}}
    predictions = {"a": {"boxes": boxes, "scores": np.array([1.0]), "labels": np.array([0])}}
    hits = match(predictions, targets, ["x"]).per_class[0].hits[0]
    assert hits[THRESHOLDS <= 0.3].all() and not hits[THRESHOLDS > 0.3].any()


def test_a_second_hit_is_a_false_positive_and_the_best_free_object_is_taken() -> None:
    true = np.array([[0.0, 0, 0, 4, 4, 4], [2.0, 0, 0, 6, 4, 4]])
    found = np.array([[0.0, 0, 0, 4, 4, 4], [0.0, 0, 0, 4, 4, 4], [0.0, 0, 0, 4, 4, 4]])
    targets = {"a": {"boxes": true, "labels": np.zeros(2, int)}}
    predictions = {"a": {"boxes": found, "scores": np.array([0.9, 0.8, 0.7]), "labels": np.zeros(3, int)}}
    one = match(predictions, targets, ["x"]).per_class[0]
    assert one.hits[:, 0].tolist() == [True, True, False]  # the second takes the neighbour (IoU 1/3)
    assert one.hits[:, 10].tolist() == [True, False, False]


def test_a_class_counts_only_where_it_is_annotated() -> None:
    box = np.array([[0.0, 0, 0, 4, 4, 4]])
    found = {"boxes": box, "scores": np.array([0.5]), "labels": np.array([1])}
    targets = {
        "a": {"boxes": np.zeros((0, 6)), "labels": np.zeros(0, int), "annotated": (0,)},
        "b": {"boxes": np.zeros((0, 6)), "labels": np.zeros(0, int), "annotated": (0, 1)},
        "c": {"boxes": np.zeros((0, 6)), "labels": np.zeros(0, int)},
    }
    one = match(dict.fromkeys("abc", found), targets, ["x", "y"]).per_class[1]
    assert one.case.tolist() == [1, 2] and one.annotated.tolist() == [False, True, True]


def test_counts_before_counts_predictions_of_each_case() -> None:
    predictions, targets = random_cases(5, cases=4, boxes=20, objects=4, classes=1)
    one = match(predictions, targets, ["x"]).per_class[0]
    ends = np.array([0, 3, 3, len(one.case)])
    chosen = one.hits[:, 0]
    for index in range(4):
        for column, end in enumerate(ends):
            assert one.counts_before(ends)[index, column] == (one.case[:end] == index).sum()
            assert one.counts_before(ends, chosen)[index, column] == (chosen & (one.case == index))[:end].sum()


def test_of_equally_good_objects_the_last_is_found() -> None:
    objects = np.array([[0.0, 0, 0, 4, 1, 1], [2, 0, 0, 6, 1, 1]])  # IoU 0.6 each
    targets = {"x": {"boxes": objects, "labels": np.zeros(2, int)}}
    found = {"x": {"boxes": np.array([[1.0, 0, 0, 5, 1, 1]]), "scores": np.ones(1), "labels": np.zeros(1, int)}}
    matches = match(found, targets, ["a"])
    assert matches.per_class[0].found[0, matches.at(0.5)] == 1
