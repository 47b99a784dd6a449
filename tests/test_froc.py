"""FROC against a loop written from the definition, by hand, and on the LUNA16 script's own output."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from test_matching import random_cases

from pretrain3d.evaluation.froc import FALSE_POSITIVES_PER_CASE, froc_curve, froc_score
from pretrain3d.evaluation.matching import ClassMatches, match
from pretrain3d.evaluation.protocol import evaluate

RATES = (0.125, 0.25, 0.5, 1, 2, 4, 8)


def slow_froc(scores: list[float], hits: list[bool], num_cases: int, num_objects: int) -> float:
    """Every distinct score is a threshold; straight lines between; the last point goes on for ever."""
    points = [(0.0, 0.0)]
    for threshold in sorted(set(scores), reverse=True):
        above = [hit for score, hit in zip(scores, hits, strict=True) if score >= threshold]
        points.append(((len(above) - sum(above)) / num_cases, sum(above) / num_objects))
    total = 0.0
    for rate in RATES:
        last = max(index for index, point in enumerate(points) if point[0] <= rate)
        value = points[last][1]
        if last + 1 < len(points) and points[last][0] < rate:
            (x0, y0), (x1, y1) = points[last], points[last + 1]
            value = y0 + (y1 - y0) * (rate - x0) / (x1 - x0)
        total += value
    return total / len(RATES)


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_slow_loop_pooled_and_per_class(seed: int) -> None:
    predictions, targets = random_cases(seed, cases=7, boxes=40, objects=5, classes=2)
    matches = match(predictions, targets, ["a", "b"])
    weights = np.ones((1, 7))
    for one in (*matches.per_class, matches.pooled()):
        for column in (0, 8):
            hits = one.hits[:, column].tolist()
            expected = slow_froc(one.scores.tolist(), hits, 7, int(one.objects.sum()))
            assert froc_score(one, column, weights)[0] == pytest.approx(expected, abs=1e-12)


def test_a_weight_is_so_many_copies_of_the_case() -> None:
    predictions, targets = random_cases(1, cases=4, boxes=30, objects=5, classes=1)
    weights = np.array([[2, 0, 1, 1], [0, 3, 0, 1]])
    ours = froc_score(match(predictions, targets, ["x"]).per_class[0], 0, weights)
    for value, weight in zip(ours, weights, strict=True):
        copies = [
            (f"{name}-{copy}", name) for name, w in zip(sorted(targets), weight, strict=True) for copy in range(w)
        ]
        repeated = evaluate(
            {new: predictions[old] for new, old in copies}, {new: targets[old] for new, old in copies}, ["x"]
        )
        assert value == pytest.approx(repeated["FROC@0.10"], abs=1e-12)


def one_class(scores: list[float], hits: list[int], case: list[int], objects: list[int]) -> ClassMatches:
    marks = np.array(hits, bool)[:, None]
    return ClassMatches(
        np.array(case, int), np.array(scores, float), marks, np.array(objects), np.ones(len(objects), bool)
    )


def test_by_hand() -> None:
    """4 cases, one without an object: a hit, two false positives (0.5 per case), the second hit."""
    one = one_class([0.9, 0.8, 0.8, 0.7], [1, 0, 0, 1], [0, 1, 3, 1], [1, 1, 1, 0])
    false, sensitivity = froc_curve(one, 0, np.ones((1, 4)))
    assert false[0].tolist() == [0, 0, 0, 0.5, 0.5]
    np.testing.assert_allclose(sensitivity[0], [0, 0, 1 / 3, 1 / 3, 2 / 3])
    assert froc_score(one, 0, np.ones((1, 4)))[0] == pytest.approx((2 * 1 / 3 + 5 * 2 / 3) / 7)


def test_equal_scores_enter_together_in_any_order() -> None:
    first = one_class([0.5, 0.5], [1, 0], [0, 0], [1])
    second = one_class([0.5, 0.5], [0, 1], [0, 0], [1])
    for one in (first, second):  # a straight line from (0, 0) to (1, 1)
        assert froc_score(one, 0, np.ones((1, 1)))[0] == pytest.approx((0.125 + 0.25 + 0.5 + 4) / 7)


def test_no_hit_is_zero_and_no_object_is_null() -> None:
    assert froc_score(one_class([0.5], [0], [0], [1]), 0, np.ones((1, 1)))[0] == 0
    assert froc_score(one_class([], [], [], [2]), 0, np.ones((1, 1)))[0] == 0
    assert np.isnan(froc_score(one_class([0.5], [0], [0], [0]), 0, np.ones((1, 1)))[0])


def test_cases_without_annotation_of_the_class_are_no_cases() -> None:
    """One false positive in the only annotated case of two is one per case, not a half."""
    one = one_class([0.9, 0.8], [0, 1], [0, 0], [1, 0])
    part = ClassMatches(one.case, one.scores, one.hits, one.objects, np.array([True, False]))
    assert froc_score(one, 0, np.ones((1, 2)))[0] == pytest.approx(5 / 7)
    assert froc_score(part, 0, np.ones((1, 2)))[0] == pytest.approx(4 / 7)


def test_the_luna16_script_output_gives_its_cpm() -> None:
    """The official script's own (is nodule, probability) vectors: CPM 0.7291014."""
    root = os.environ.get("PRETRAIN3D_TESTDATA")
    if not root:
        pytest.skip("PRETRAIN3D_TESTDATA is not set")
    folder = Path(root) / "data" / "luna16_froc"
    known = json.loads((folder / "EXPECTED.json").read_text())["official_script_output"]
    with gzip.open(folder / known["inputs"][0], "rt") as file:
        rows = [[float(value) for value in row] for row in csv.reader(file)]
    hit, score = np.array([row for row in rows if row[1] > -1e8]).T
    order = np.argsort(-score, kind="stable")
    objects, cases = np.zeros(888, int), np.zeros(len(score), int)
    objects[0] = known["nodules"]
    one = ClassMatches(cases, score[order], hit[order, None] > 0, objects, np.ones(888, bool))
    false, sensitivity = froc_curve(one, 0, np.ones((1, 888)))
    for rate in FALSE_POSITIVES_PER_CASE:
        value = np.interp(rate, false[0], sensitivity[0])
        assert value == pytest.approx(known["sensitivity"][f"{rate:g}"], abs=1e-6)
    assert froc_score(one, 0, np.ones((1, 888)))[0] == pytest.approx(0.7291014, abs=1e-7)
