"""Bootstrap intervals against resampling done by copying cases; groups; pairs."""

from __future__ import annotations

import numpy as np
import pytest
from test_matching import Case, random_cases

from pretrain3d.config import UserError
from pretrain3d.evaluation.matching import match
from pretrain3d.evaluation.protocol import KEYS, evaluate, values
from pretrain3d.evaluation.statistics import bootstrap, evaluate_with_intervals, paired_difference, resample

CLASSES = ["a", "b"]


def distinct(seed: int, cases: int) -> tuple[dict[str, Case], dict[str, Case]]:
    predictions, targets = random_cases(seed, cases=cases, boxes=25, objects=5, classes=2)
    rng = np.random.default_rng(seed)
    for entry in predictions.values():  # among equal scores AP depends on the order of cases
        entry["scores"] = rng.random(len(entry["labels"]))
    return predictions, targets


def test_samples_equal_an_evaluation_of_copied_cases() -> None:
    predictions, targets = distinct(0, 6)
    weights = resample(6, 12, seed=3)
    overall, per_class = values(match(predictions, targets, CLASSES), weights)
    for sample, weight in enumerate(weights):
        copies = [(f"{name}/{n}", name) for name, w in zip(sorted(targets), weight, strict=True) for n in range(w)]
        repeated = evaluate({new: predictions[i] for new, i in copies}, {new: targets[i] for new, i in copies}, CLASSES)
        for row, expected in [(overall, repeated)] + [
            (per_class[name], repeated["per_class"][name]) for name in CLASSES
        ]:
            for key in KEYS:
                value = None if np.isnan(row[key][sample]) else row[key][sample]
                assert value == (None if expected[key] is None else pytest.approx(expected[key], abs=1e-12)), key


def test_resampling_draws_as_many_cases_with_replacement() -> None:
    weights = resample(10, 2000, seed=0)
    assert (weights.sum(axis=1) == 10).all() and abs(weights.mean() - 1) < 1e-12
    assert abs(weights.var() - 0.9) < 0.03  # a multinomial count: n p (1 - p)
    np.testing.assert_array_equal(weights, resample(10, 2000, seed=0))
    assert (weights != resample(10, 2000, seed=1)).any()


def test_cases_of_a_patient_are_drawn_together() -> None:
    weights = resample(5, 200, seed=0, groups=["p", "q", "p", "r", "q"])
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(weights[:, 1], weights[:, 4])
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()


def test_intervals_surround_the_value_and_are_percentiles() -> None:
    predictions, targets = distinct(1, 12)
    matches = match(predictions, targets, CLASSES)
    result = bootstrap(matches, samples=300, seed=5)
    plain = evaluate(predictions, targets, CLASSES)
    assert set(result["metrics"]) == set(KEYS) and list(result["per_class"]) == CLASSES
    for key in KEYS:
        entry = result["metrics"][key]
        assert (
            entry["value"] == pytest.approx(plain[key], abs=1e-12) and entry["low"] <= entry["value"] <= entry["high"]
        )
    samples = values(matches, resample(12, 300, seed=5))[0]["mAP"]
    np.testing.assert_allclose(
        [result["metrics"]["mAP"][end] for end in ("low", "high")], np.percentile(samples, [2.5, 97.5])
    )


def test_groups_are_named_by_case() -> None:
    predictions, targets = distinct(1, 6)
    together = evaluate_with_intervals(predictions, targets, CLASSES, samples=50, groups=dict.fromkeys(targets, "one"))
    entry = together["metrics"]["mAP"]
    assert entry["low"] == entry["value"] == entry["high"]  # one patient: every sample is the whole set
    assert set(together) == {"metrics", "per_class", "curves", "cases"}


def test_a_class_without_objects_has_no_interval_and_no_share() -> None:
    predictions, targets = distinct(1, 6)
    result = bootstrap(match(predictions, targets, [*CLASSES, "absent"]), samples=20)
    assert result["per_class"]["absent"]["mAP"] == {"value": None, "low": None, "high": None}
    assert (
        result["metrics"]["mAP"]["value"]
        == bootstrap(match(predictions, targets, CLASSES), 20)["metrics"]["mAP"]["value"]
    )


def test_without_samples_there_are_values_only() -> None:
    predictions, targets = distinct(1, 6)
    entry = bootstrap(match(predictions, targets, CLASSES), samples=0)["metrics"]["mAP"]
    assert entry["value"] is not None and entry["low"] is None and entry["high"] is None


def test_pairs() -> None:
    predictions, targets = distinct(2, 10)
    worse = {
        name: {**entry, "boxes": entry["boxes"] + np.where(entry["scores"] > 0.3, 50.0, 0.0)[:, None]}
        for name, entry in predictions.items()
    }
    a, b = match(worse, targets, CLASSES), match(predictions, targets, CLASSES)
    entry = paired_difference(a, b, samples=200)["metrics"]["AP@0.10"]
    assert entry["difference"] == pytest.approx(entry["b"] - entry["a"]) and entry["low"] > 0
    assert entry["p"] == pytest.approx(2 / 201)
    back = paired_difference(b, a, samples=200)["metrics"]["AP@0.10"]
    assert back["high"] == pytest.approx(-entry["low"]) and back["p"] == entry["p"]
    same = paired_difference(b, b, samples=200)
    assert same["metrics"]["mAP"]["p"] == 1 and same["per_class"]["a"]["mAP"]["low"] == 0


def test_pairs_need_the_same_cases_and_classes() -> None:
    predictions, targets = distinct(2, 4)
    whole = match(predictions, targets, CLASSES)
    first = sorted(targets)[1:]
    part = match({i: predictions[i] for i in first}, {i: targets[i] for i in first}, CLASSES)
    with pytest.raises(UserError, match="'case0' is in one of them only"):
        paired_difference(whole, part)
    with pytest.raises(UserError, match="different classes"):
        paired_difference(whole, match(predictions, targets, ["a", "c"]))


def test_rows_per_case_add_up() -> None:
    predictions, targets = distinct(4, 8)
    result = evaluate(predictions, targets, CLASSES)
    assert [row["case"] for row in result["cases"]] == sorted(targets)
    for row in result["cases"]:
        assert row["objects"] == len(targets[row["case"]]["labels"]) == row["hits"] + row["missed"]
        assert row["predictions"] == len(predictions[row["case"]]["labels"])
    curve = result["curves"]["froc"]
    assert curve["sensitivity"][-1] == pytest.approx(
        sum(row["hits"] for row in result["cases"]) / sum(row["objects"] for row in result["cases"])
    )
