"""Case-level AUROC and AP against pairs and thresholds counted one by one."""

from __future__ import annotations

import numpy as np
import pytest
from test_matching import Case, random_cases

from pretrain3d.evaluation.case_level import case_auroc, case_average_precision, case_scores
from pretrain3d.evaluation.matching import match
from pretrain3d.evaluation.protocol import evaluate


def slow_auroc(scores: list[float], holds: list[bool]) -> float:
    """The share of pairs in the right order; ties are half right."""
    wins, pairs = 0.0, 0
    for a, positive in zip(scores, holds, strict=True):
        for b, other in zip(scores, holds, strict=True):
            if positive and not other:
                pairs += 1
                wins += 1.0 if a > b else 0.5 if a == b else 0.0
    return wins / pairs


def slow_ap(scores: list[float], holds: list[bool]) -> float:
    """Every distinct score is a threshold."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        above = [hold for score, hold in zip(scores, holds, strict=True) if score >= threshold]
        recall = sum(above) / sum(holds)
        total += (recall - before) * sum(above) / len(above)
        before = recall
    return total


def some_cases(seed: int) -> tuple[dict[str, Case], dict[str, Case]]:
    """Twelve cases with few distinct scores; some without a prediction, one class unknown in some."""
    predictions, targets = random_cases(seed, cases=12, boxes=2, objects=2, classes=2)
    for index, (name, entry) in enumerate(targets.items()):
        predictions[name]["scores"] = np.round(predictions[name]["scores"] * 4) / 4
        if index % 4 == 0 and not (entry["labels"] == 1).any():
            entry["annotated"] = (0,)
    return predictions, targets


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_slow_loops_for_every_weighting(seed: int) -> None:
    predictions, targets = some_cases(seed)
    matches = match(predictions, targets, ["a", "b"])
    weights = np.vstack([np.ones((1, 12), int), np.random.default_rng(seed).integers(0, 3, (5, 12))])
    for label, one in enumerate(matches.per_class):
        auroc, precision = case_auroc(one, weights), case_average_precision(one, weights)
        for sample, weight in enumerate(weights):
            scores: list[float] = []
            holds: list[bool] = []
            for name, copies in zip(matches.case_ids, weight, strict=True):
                if label in targets[name].get("annotated", (0, 1)):
                    found = predictions[name]["scores"][predictions[name]["labels"] == label]
                    scores += [max(found, default=-np.inf)] * copies
                    holds += [bool((targets[name]["labels"] == label).any())] * copies
            assert len(set(scores)) < len(scores)
            if all(holds) or not any(holds):
                assert np.isnan(auroc[sample]) and np.isnan(precision[sample])
            else:
                assert auroc[sample] == pytest.approx(slow_auroc(scores, holds), abs=1e-12)
                assert precision[sample] == pytest.approx(slow_ap(scores, holds), abs=1e-12)


def test_by_hand() -> None:
    """Two cases with an object (one found, 0.9), two without (a false positive in one, 0.5)."""
    box, none = np.array([[0.0, 0, 0, 4, 4, 4]]), np.zeros((0, 6))
    truth = {"boxes": box, "labels": np.array([0])}
    empty = {"boxes": none, "labels": np.zeros(0, int)}
    found = {"boxes": box, "labels": np.array([0])}
    silent = {**empty, "scores": np.zeros(0)}
    predictions = {"a": {**found, "scores": np.array([0.9])}, "b": silent, "c": {**found, "scores": np.array([0.5])},
                   "d": silent}  # fmt: skip
    targets = {"a": truth, "b": truth, "c": empty, "d": empty}
    one = match(predictions, targets, ["x"]).per_class[0]
    assert case_scores(one).tolist() == [0.9, -np.inf, 0.5, -np.inf]
    result = evaluate(predictions, targets, ["x"])
    assert result["case_AUROC"] == (2 + 0 + 0.5) / 4  # 0.9 beats both, "b" loses to "c" and ties with "d"
    assert result["case_AP"] == 0.5 * 1 + 0.5 * 2 / 4
    assert result["per_class"]["x"]["case_AUROC"] == result["case_AUROC"]


def test_without_both_kinds_of_cases_there_is_no_value() -> None:
    predictions, targets = random_cases(0, cases=3, boxes=5, objects=3, classes=1)
    some = [name for name, entry in targets.items() if len(entry["labels"])]
    assert some
    part = evaluate({i: predictions[i] for i in some}, {i: targets[i] for i in some}, ["x"])
    assert part["case_AUROC"] is None and part["case_AP"] is None and part["mAP"] is not None
