"""Average precision against pycocotools and against the rule written as loops."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from test_matching import Case, random_cases

from pretrain3d.evaluation.average_precision import average_precision, precision_recall
from pretrain3d.evaluation.matching import THRESHOLDS, match
from pretrain3d.evaluation.protocol import evaluate


def flat(box: np.ndarray) -> np.ndarray:
    """The same box with unit depth, for a 2D oracle."""
    return np.hstack([box[:, :2], np.zeros((len(box), 1)), box[:, 3:5], np.ones((len(box), 1))])


def coco_precision(predictions: dict[str, Case], targets: dict[str, Case], classes: int) -> np.ndarray:
    """pycocotools' AP per threshold and class, (T, K); nan for a class without objects."""
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is the oracle")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    truth, found = [], []
    for number, case_id in enumerate(sorted(targets), 1):
        for entry, rows in ((targets[case_id], truth), (predictions[case_id], found)):
            for index, box in enumerate(entry["boxes"]):
                size = box[3:5] - box[:2]
                row: dict[str, Any] = {
                    "id": len(rows) + 1, "image_id": number, "category_id": int(entry["labels"][index]) + 1,
                    "bbox": [*box[:2], *size], "area": float(size.prod()), "iscrowd": 0,
                }  # fmt: skip
                rows.append(row | ({"score": entry["scores"][index]} if "scores" in entry else {}))
    with contextlib.redirect_stdout(io.StringIO()):
        api = coco.COCO()
        api.dataset = {
            "images": [{"id": number} for number in range(1, len(targets) + 1)],
            "categories": [{"id": label + 1} for label in range(classes)],
            "annotations": truth,
        }
        api.createIndex()
        run = evaluation.COCOeval(api, api.loadRes(found), "bbox")
        run.params.iouThrs = THRESHOLDS
        run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
        run.params.maxDets = [100]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 0].mean(axis=1)  # (T, R, K) -> (T, K)
    return np.where(precision < 0, np.nan, precision)


@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocotools(seed: int) -> None:
    predictions, targets = random_cases(seed, cases=20, boxes=140, objects=9, classes=2)
    for entry in (*predictions.values(), *targets.values()):
        entry["boxes"] = flat(entry["boxes"])
    expected = coco_precision(predictions, targets, classes=3)
    matches = match(predictions, targets, ["a", "b", "absent"])
    ours = np.stack([average_precision(one, np.ones((1, 20)))[0] for one in matches.per_class], axis=1)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)
    assert np.isnan(ours[:, 2]).all() and 0.05 < ours[0, 0] < 0.95


def slow_average_precision(hits: list[bool], num_objects: int) -> float:
    total = 0.0
    for level in np.linspace(0, 1, 101):
        best = 0.0
        for end in range(1, len(hits) + 1):
            if sum(hits[:end]) / num_objects >= level:
                best = max(best, sum(hits[:end]) / end)
        total += best
    return total / 101


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_rule(seed: int) -> None:
    predictions, targets = random_cases(seed, cases=4, boxes=20, objects=6, classes=1)
    one = match(predictions, targets, ["x"]).per_class[0]
    ours = average_precision(one, np.ones((1, 4)))[0]
    for column in range(len(THRESHOLDS)):
        expected = slow_average_precision(one.hits[:, column].tolist(), int(one.objects.sum()))
        assert ours[column] == pytest.approx(expected, abs=1e-12)


def test_a_weight_is_so_many_copies_of_the_case() -> None:
    predictions, targets = random_cases(3, cases=5, boxes=30, objects=6, classes=1)
    rng = np.random.default_rng(0)
    for entry in predictions.values():  # distinct scores: among equal ones the order of cases would matter
        entry["scores"] = rng.random(len(entry["labels"]))
    weights = np.array([[1, 1, 1, 1, 1], [3, 0, 2, 0, 0], [0, 0, 1, 4, 0], [0, 2, 0, 1, 2]])
    ours = average_precision(match(predictions, targets, ["x"]).per_class[0], weights)
    for row, weight in zip(ours, weights, strict=True):
        copies = [
            (f"{name}-{copy}", name) for name, w in zip(sorted(targets), weight, strict=True) for copy in range(w)
        ]
        repeated = match(
            {new: predictions[old] for new, old in copies}, {new: targets[old] for new, old in copies}, ["x"]
        )
        expected = average_precision(repeated.per_class[0], np.ones((1, len(copies))))[0]
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-12)


def test_recall_reaches_its_level_exactly() -> None:
    """9 of 20 is the level 0.45; in float32 it is not reached."""
    box = np.array([[0.0, 0, 0, 2, 2, 2]])
    targets = {f"{i}": {"boxes": box, "labels": np.array([0])} for i in range(20)}
    none = {"boxes": np.zeros((0, 6)), "scores": np.zeros(0), "labels": np.zeros(0, int)}
    hit = {"boxes": box, "scores": np.ones(1), "labels": np.zeros(1, int)}
    predictions = {f"{i}": hit if i < 9 else none for i in range(20)}
    assert evaluate(predictions, targets, ["x"])["AP@0.50"] == pytest.approx(46 / 101, abs=1e-12)


def test_without_hits_or_objects() -> None:
    box = np.array([[0.0, 0, 0, 2, 2, 2]])
    none = {"boxes": np.zeros((0, 6)), "scores": np.zeros(0), "labels": np.zeros(0, int)}
    targets = {"a": {"boxes": box, "labels": np.array([0])}}
    matches = match({"a": none}, targets, ["x", "absent"])
    assert (average_precision(matches.per_class[0], np.ones((2, 1))) == 0).all()
    assert np.isnan(average_precision(matches.per_class[1], np.ones((2, 1)))).all()
    assert precision_recall(matches.per_class[0], 0)["precision"] == [0.0] * 101
    assert precision_recall(matches.per_class[1], 0) == {"recall": [], "precision": []}


def test_the_area_under_the_curve_is_the_value() -> None:
    predictions, targets = random_cases(2, cases=6, boxes=30, objects=6, classes=1)
    one = match(predictions, targets, ["x"]).per_class[0]
    for column in (0, 8, 16):
        value = average_precision(one, np.ones((1, 6)))[0, column]
        assert np.mean(precision_recall(one, column)["precision"]) == pytest.approx(value, abs=1e-12)
