"""Bootstrap intervals against resampling done by copying cases; groups; pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_matching import Case, random_cases

from pretrain3d.config import UserError
from pretrain3d.evaluation.matching import Matches, match
from pretrain3d.evaluation.protocol import KEYS, evaluate, values
from pretrain3d.evaluation.sizes import Sizes
from pretrain3d.evaluation.statistics import (
    SAMPLES,
    Groups,
    bootstrap,
    differences,
    evaluate_with_intervals,
    holm,
    intervals,
    plain_and_drawn,
    resample,
    row_samples,
)

CLASSES = ["a", "b"]


def paired_difference(a: Any, b: Any, samples: int = SAMPLES, seed: int = 0, groups: Groups | None = None) -> Any:
    """b minus a, each a run or the repetitions of a row, as `compare` pairs them."""
    rows = [[row] if isinstance(row, Matches) else row for row in (a, b)]
    return differences(*row_samples(rows, samples, seed, groups))


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


def test_a_single_patient_has_no_interval() -> None:
    predictions, targets = distinct(1, 6)
    one = dict.fromkeys(targets, "one")
    together = evaluate_with_intervals(match(predictions, targets, CLASSES), samples=50, groups=one)
    entry = together["metrics"]["mAP"]
    assert entry["value"] > 0 and entry["low"] is entry["high"] is None
    assert set(together) == {"metrics", "per_class", "curves", "cases"}
    a, b = (match(shifted(predictions, share), targets, CLASSES) for share in (0.0, 0.6))
    difference = paired_difference(a, b, samples=50, groups=one)["metrics"]["mAP"]
    assert difference["difference"] < 0 and difference["low"] is difference["p"] is None


def test_a_class_without_objects_has_no_interval_and_no_share() -> None:
    predictions, targets = distinct(1, 6)
    result = bootstrap(match(predictions, targets, [*CLASSES, "absent"]), samples=20)
    assert result["per_class"]["absent"]["mAP"] == {"value": None, "low": None, "high": None}
    assert (
        result["metrics"]["mAP"]["value"]
        == bootstrap(match(predictions, targets, CLASSES), 20)["metrics"]["mAP"]["value"]
    )


def test_a_class_with_objects_in_a_single_patient_has_no_interval() -> None:
    """Its samples only repeat what that patient has; from two patients on there is one."""
    predictions, targets = distinct(1, 12)
    groups = {name: f"p{index // 2}" for index, name in enumerate(sorted(targets))}
    for holding in (1, 2):
        for index, entry in enumerate(targets[name] for name in sorted(targets)):
            rare = len(entry["labels"]) > 0 and index // 2 < holding
            entry["labels"] = np.where(np.arange(len(entry["labels"])) == 0, 1 if rare else 0, 0)
        runs = [match(shifted(predictions, share), targets, CLASSES) for share in (0.0, 0.6)]
        assert len({groups[i] for i in targets if 1 in targets[i]["labels"]}) == holding
        result, pair = bootstrap(runs[0], 400, groups=groups), paired_difference(*runs, 400, groups=groups)
        for key in ("mAP", "FROC@0.50"):
            entry, difference = result["per_class"]["b"][key], pair["per_class"]["b"][key]
            assert entry["value"] is not None and difference["difference"] is not None
            known = [value is not None for value in (entry["low"], difference["high"], difference["p"])]
            assert known == [holding == 2] * 3
        assert result["per_class"]["a"]["mAP"]["low"] is not None and result["metrics"]["mAP"]["low"] is not None


def test_every_sample_is_a_mean_over_the_same_classes() -> None:
    """A sample without a hard class is no better for it: the class keeps its plain value there."""
    predictions, targets = distinct(1, 8)
    for index, name in enumerate(sorted(targets)):
        entry = targets[name] = {**targets[name], "spacing_mm": np.ones(3)}
        entry["labels"] = np.where(np.arange(len(entry["labels"])) == 0, int(index < 3), 0)
    matches = match(predictions, targets, [*CLASSES, "absent"])
    weights = plain_and_drawn(len(targets), 60, seed=0)
    sizes = Sizes(matches, predictions, targets)
    middle = float(np.median(sizes.objects))
    of_sizes = [sizes.values(weights, 0, high) for high in (middle, np.inf)]
    for overall, per_class in [values(matches, weights), *of_sizes]:
        for key in ("mAP", "AP@0.10", "AP@0.50"):
            rows = [per_class[name][key] for name in CLASSES]
            lacking = np.isnan(rows[1])
            assert 0 < lacking.sum() < 60 and not np.isnan(rows[0]).any() and np.isnan(per_class["absent"][key]).all()
            expected = (rows[0] + np.where(lacking, rows[1][0], rows[1])) / 2
            np.testing.assert_allclose(overall[key], expected, atol=1e-12)


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


Run = tuple[dict[str, Case], dict[str, Case]]  # predictions and targets


def scored_copies(run: Run, groups: dict[str, str], drawn: dict[str, int]) -> float:
    """mAP of a run in which every patient occurs as often as drawn; nan without an object."""
    copies = [(f"{case}/{copy}", case) for case in run[1] for copy in range(drawn[groups[case]])]
    value = evaluate({new: run[0][i] for new, i in copies}, {new: run[1][i] for new, i in copies}, CLASSES)["mAP"]
    return np.nan if value is None else value


def check_entry(entry: dict[str, Any], a: list[float], b: list[float]) -> None:
    """``{"a", "b", "difference", "low", "high", "p"}`` against the plain values and then the samples of both rows."""
    differences = [y - x for x, y in zip(a, b, strict=True)]
    assert [entry["a"], entry["b"], entry["difference"]] == pytest.approx([a[0], b[0], differences[0]], abs=1e-12)
    kept = [value for value in differences[1:] if not np.isnan(value)]
    assert [entry["low"], entry["high"]] == pytest.approx([*np.percentile(kept, [2.5, 97.5])], abs=1e-12)
    below, above = sum(value <= 0 for value in kept), sum(value >= 0 for value in kept)
    assert entry["p"] == pytest.approx(min(1, 2 * (1 + min(below, above)) / (1 + len(kept))))


def test_a_paired_bootstrap_is_both_runs_on_the_same_copied_patients() -> None:
    predictions, targets = distinct(5, 7)
    groups = {case: f"patient {index // 2}" for index, case in enumerate(sorted(targets))}
    runs = [(shifted(predictions, 0.3), targets), (predictions, targets)]
    found = paired_difference(*(match(*run, CLASSES) for run in runs), samples=25, seed=2, groups=groups)
    patients, rng = sorted(set(groups.values())), np.random.default_rng(2)
    draws = [dict.fromkeys(patients, 1)]  # the plain value
    draws += [dict(zip(patients, rng.multinomial(4, [0.25] * 4), strict=True)) for _ in range(25)]
    check_entry(found["metrics"]["mAP"], *([scored_copies(run, groups, drawn) for drawn in draws] for run in runs))


def test_the_hierarchical_bootstrap_draws_seeds_then_patients() -> None:
    """Row a has three seeds, row b two: a loop over samples and seeds."""
    predictions, targets = distinct(6, 8)
    samples, seed = 15, 3
    rows = [[(shifted(predictions, share), targets) for share in shares] for shares in ((0.5, 0.2, 0.1), (0.0, 0.3))]
    found = paired_difference(*([match(*one, CLASSES) for one in row] for row in rows), samples, seed)

    def draw(rng: np.random.Generator, count: int, draws: int) -> list[np.ndarray]:
        """How often each of so many things occurs: once in the plain value, then as drawn."""
        return [np.ones(count), *rng.multinomial(draws, [1 / count] * count, size=samples)]

    levels = np.random.default_rng([seed, 1])
    of_seeds = [draw(levels, len(row), len(row) - 1) for row in rows]
    of_patients = draw(np.random.default_rng(seed), 8, 8)
    own = {case: case for case in targets}
    totals: list[list[float]] = [[], []]
    for sample in range(1 + samples):
        patients = dict(zip(sorted(targets), of_patients[sample].astype(int), strict=True))
        for row, total in enumerate(totals):
            values = [scored_copies(one, own, patients) for one in rows[row]]
            total.append(float(np.average(values, weights=of_seeds[row][sample])))
    check_entry(found["metrics"]["mAP"], *totals)


def test_pairs_need_the_same_cases_and_classes() -> None:
    predictions, targets = distinct(2, 4)
    whole = match(predictions, targets, CLASSES)
    first = sorted(targets)[1:]
    part = match({i: predictions[i] for i in first}, {i: targets[i] for i in first}, CLASSES)
    with pytest.raises(UserError, match="'case0' is in one of them only"):
        paired_difference(whole, part)
    with pytest.raises(UserError, match="different classes"):
        paired_difference(whole, match(predictions, targets, ["a", "c"]))


def shifted(predictions: dict[str, Case], share: float) -> dict[str, Case]:
    """The predictions of the lower scores moved away."""
    return {
        name: {**entry, "boxes": entry["boxes"] + np.where(entry["scores"] < share, 50.0, 0.0)[:, None]}
        for name, entry in predictions.items()
    }


def of_row(runs: list[Matches], samples: int, groups: dict[str, str] | None = None) -> dict[str, float | None]:
    """The mAP of the mean over several runs, with its interval."""
    return intervals(*row_samples([runs], samples, groups=groups)[0])["metrics"]["mAP"]


def test_runs_of_one_method_are_averaged_and_drawn() -> None:
    """One patient, so that only the seeds vary: every sample holds one of the two."""
    predictions, targets = distinct(3, 6)
    a, b = (match(shifted(predictions, share), targets, CLASSES) for share in (0.0, 0.6))
    low, high = sorted(bootstrap(run, 0)["metrics"]["mAP"]["value"] for run in (a, b))
    entry = of_row([a, b], 200, groups=dict.fromkeys(targets, "one"))
    assert entry == pytest.approx({"value": (low + high) / 2, "low": low, "high": high}) and low < high
    assert of_row([a], 50) == bootstrap(a, 50)["metrics"]["mAP"]
    twice = of_row([a, a], 50)  # two equal runs know no more than one
    assert twice == pytest.approx(bootstrap(a, 50)["metrics"]["mAP"])


def test_the_mean_of_runs_varies_as_their_variance_says() -> None:
    """One patient: the variance of the samples is that of the mean, s^2 / n with n - 1 in s^2."""
    predictions, targets = distinct(3, 6)
    runs = [match(shifted(predictions, share), targets, CLASSES) for share in (0.0, 0.3, 0.6)]
    own = [bootstrap(run, 0)["metrics"]["mAP"]["value"] for run in runs]
    samples = row_samples([runs], 20_000, groups=dict.fromkeys(targets, "one"))[0][0]["mAP"][1:]
    assert np.var(samples) == pytest.approx(np.var(own, ddof=1) / 3, rel=0.03)


def test_several_runs_see_the_same_patients_in_every_sample() -> None:
    """The mean of the drawn runs, sample by sample: between the runs' own values on that sample's cases."""
    predictions, targets = distinct(3, 6)
    runs = [match(shifted(predictions, share), targets, [*CLASSES, "absent"]) for share in (0.0, 0.4, 0.8)]
    ((overall, per_class),) = row_samples([runs], 60, seed=4)
    own = np.stack([values(run, plain_and_drawn(len(targets), 60, 4))[0]["AP@0.10"] for run in runs])
    assert overall["AP@0.10"][0] == pytest.approx(own[:, 0].mean())
    halves = np.array([[i, j, 2 - i - j] for i in range(3) for j in range(3 - i)]) / 2  # every two of three runs
    for sample in range(1, 61):
        assert np.isclose(halves @ own[:, sample], overall["AP@0.10"][sample]).any()
    assert np.isnan(per_class["absent"]["mAP"]).all()


def test_holm() -> None:
    """A worked example; None is no comparison; adjusted values keep the order and end at 1."""
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([None]) == [None] and holm([0.2]) == [0.2]


def test_holm_rejects_what_the_sequential_procedure_rejects() -> None:
    """At any level: the smallest p value against level / m, the next one against level / (m - 1), until one fails."""
    rng = np.random.default_rng(0)
    for p_values in (rng.random(5) * 0.2, np.array([0.01, 0.01, 0.04, 0.9]), np.array([0.03])):
        adjusted = holm([*p_values])
        for level in rng.random(40):
            rejected: set[int] = set()
            for rank, index in enumerate(np.argsort(p_values, kind="stable")):
                if p_values[index] > level / (len(p_values) - rank):
                    break
                rejected.add(int(index))
            assert {index for index, p in enumerate(adjusted) if p is not None and p <= level} == rejected


def test_a_difference_without_objects_has_no_p() -> None:
    predictions, targets = distinct(1, 6)
    one = match(predictions, targets, [*CLASSES, "absent"])
    entry = paired_difference(one, one, 20)["per_class"]["absent"]["mAP"]
    assert entry == {"a": None, "b": None, "difference": None, "low": None, "high": None, "p": None}


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
