"""The folds of a cross-validation are scored as the one run that has all their boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_compare import CLASSES, Cases, folds_of, run_folder, worse
from test_matching import random_cases

from pretrain3d.__main__ import main
from pretrain3d.commands.score import flat
from pretrain3d.commands.tested import write_strata
from pretrain3d.evaluation.matching import match
from pretrain3d.evaluation.scorefile import groups_of, read_pair, write
from pretrain3d.evaluation.statistics import evaluate_with_intervals
from pretrain3d.evaluation.strata import chosen_values
from pretrain3d.reporting.reported import read_runs
from pretrain3d.reporting.results import read_result, write_json

THIRDS = (slice(0, 3), slice(3, 5), slice(5, 9))


@pytest.fixture
def cases() -> tuple[Cases, Cases]:
    """Nine cases of six patients, one class not annotated in some."""
    predictions, targets = random_cases(7, cases=9, boxes=25, objects=5, classes=2)
    for index, (name, entry) in enumerate(sorted(targets.items())):
        entry |= {"group": f"patient {index % 6}", "spacing_mm": np.array([1.0, 1.0, 1 + index / 4])}
        if index in (0, 4):
            kept = entry["labels"] == 0
            targets[name] = entry | {key: entry[key][kept] for key in ("boxes", "labels")} | {"annotated": [0]}
    return predictions, targets


def score(folder: Path, predictions: Cases, targets: Cases, *options: str) -> dict[str, Any]:
    """What `pretrain3d score` says of all boxes."""
    folder.mkdir()
    write(folder / "predictions.json", CLASSES, predictions)
    write(folder / "targets.json", CLASSES, targets)
    files = [f"{kind}={folder / kind}.json" for kind in ("predictions", "targets")]
    assert main(["score", *files, f"out={folder / 'score.json'}", *options]) == 0
    return dict(json.loads((folder / "score.json").read_text()))


def measured(run: Path, samples: int, column: str = "") -> Path:
    """With the numbers that `test` writes, those by a column too."""
    classes, found, true = read_pair(run / "predictions.json", run / "targets.json")
    scored = evaluate_with_intervals(match(found, true, classes), samples, groups=groups_of(true))
    asked = {"split": "val", "samples": samples}
    write_json(run / "result.json", {**read_result(run), **scored, "asked": asked})
    write_strata(run, column, chosen_values("", column, true), samples)
    return run


def test_pooled_folds_are_what_score_says_of_all_their_boxes(tmp_path: Path, cases: tuple[Cases, Cases]) -> None:
    """Values, intervals, classes, sizes, parts by a column, curves and cases."""
    runs = [measured(run, 50, "spacing") for run in folds_of(tmp_path, "x", *cases, parts=THIRDS)]
    expected = score(tmp_path / "all", *cases, "samples=50", "by=spacing")
    ((name, (row,)),) = read_runs(runs[::-1]).rows.items()
    assert name == row.label == "x-f*-s0 (3 folds)" and row.result is not None
    found = flat({key: row.result[key] for key in ("metrics", "per_class")})
    for key, value in found.items():
        assert value == expected[key], key
    assert found["per_class"]["b"]["FROC@0.50"] is not None and found["intervals"]["case_AUROC"] is not None
    assert {bin: flat(part) for bin, part in row.result["by_size"].items()} == expected["by_size"]
    parts = row.result["by"]["spacing"]
    assert {value: flat(part) for value, part in parts.items()} == expected["by"]["spacing"]
    assert list(parts) == ["1..1.5", "1.75..2.25", "2.5..3"]  # thirds of all cases, not of those of a fold
    assert row.result["curves"] == expected["curves"]
    assert [each["case"] for each in row.result["cases"]] == sorted(cases[1])


def test_scores_of_all_folds_are_ranked_together(tmp_path: Path, cases: tuple[Cases, Cases]) -> None:
    """A fold whose scores are all higher, in the same order, changes the number of the row."""
    predictions, targets = cases
    values = []
    for row, more in (("x", 0.0), ("y", 1.0)):
        raised = {n: {**e, "scores": e["scores"] + more * (n < "case3")} for n, e in predictions.items()}
        (pooled,) = read_runs(folds_of(tmp_path, row, raised, targets, parts=THIRDS)).rows.values()
        assert pooled[0].result is not None
        values.append(pooled[0].result["metrics"]["mAP"]["value"])
    assert abs(values[0] - values[1]) > 1e-3


def test_a_column_that_a_fold_was_not_measured_by_is_left_out(
    tmp_path: Path, cases: tuple[Cases, Cases], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = folds_of(tmp_path, "x", *cases, parts=THIRDS)
    for run in runs[:2]:
        measured(run, 50, "spacing")
    ((row,),) = read_runs([measured(runs[2], 50), *runs[:2]]).rows.values()
    assert row.result is not None and row.result["by"] == {}
    said = f"{row.label}: its numbers by spacing are left out, as {runs[2]} has none; test with by=spacing\n"
    assert capsys.readouterr().err == said


def test_without_samples_or_voxel_sizes(tmp_path: Path, cases: tuple[Cases, Cases]) -> None:
    predictions, targets = cases
    for entry in targets.values():
        del entry["spacing_mm"]
    runs = [measured(run, 0) for run in folds_of(tmp_path, "x", predictions, targets, parts=THIRDS)]
    ((row,),) = read_runs(runs).rows.values()
    assert row.result is not None and row.result["by_size"] == {}
    assert row.result["metrics"]["mAP"]["value"] > 0 and row.result["metrics"]["mAP"]["low"] is None


def test_the_table_of_folds(tmp_path: Path, cases: tuple[Cases, Cases], capsys: pytest.CaptureFixture[str]) -> None:
    """One seed: pooled, with its interval; two: the mean and deviation of the pooled; beside a run on all cases."""
    predictions, targets = cases
    limits = {("x", 0): 0.0, ("y", 0): 0.2, ("y", 1): 0.6}
    runs, expected = [], {}
    for (row, seed), limit in limits.items():
        found = worse(predictions, limit)
        own = folds_of(tmp_path, row, found, targets, seed, parts=THIRDS)
        runs += [measured(run, 50) for run in own]
        expected[row, seed] = score(tmp_path / f"{row}{seed}", found, targets, "samples=50")
    lacking = [measured(run, 50) for run in folds_of(tmp_path, "y", predictions, targets, 2, parts=THIRDS[:2])]
    whole = measured(run_folder(tmp_path / "whole", predictions, targets), 50)
    capsys.readouterr()
    out, report = tmp_path / "table.md", tmp_path / "report.html"
    assert main(["table", *map(str, [*runs, *lacking, whole]), f"out={out}", f"report={report}"]) == 0
    text = out.read_text(encoding="utf-8")
    lines = {line.split("|")[1].strip(): line for line in text.splitlines()[::-1] if line.startswith("| ")}
    low, high = expected["x", 0]["intervals"]["mAP"]
    assert f"| {expected['x', 0]['mAP']:.3f} [{low:.3f}, {high:.3f}] |" in lines["x-f*-s0 (3 folds)"]
    of_seeds = [expected["y", seed]["mAP"] for seed in (0, 1)]
    line = lines["y-f*-s* (2 seeds of 3 folds)"]
    assert f"| {np.mean(of_seeds):.3f} ± {np.std(of_seeds, ddof=1):.3f} |" in line
    first, _, second = text.split("### ")[1:4]
    assert first.startswith("d, 9 val cases, 95 % intervals") and second.startswith("d, 5 val cases, 95 % intervals")
    assert "| whole |" in first and "| y-f*-s2 (2 folds) |" in second  # a seed that lacks a fold is of other cases
    page = report.read_text(encoding="utf-8")
    assert page.count("<summary>x-f*-s0 (3 folds): 9 cases</summary>") == 1 and "<summary>x-f0-s0:" not in page
    assert all(f"<summary>Configuration of x-f{fold}-s0</summary>" in page for fold in range(3))


def test_mistakes_are_one_line(tmp_path: Path, cases: tuple[Cases, Cases], capsys: pytest.CaptureFixture[str]) -> None:
    predictions, targets = cases
    without, mixed, shared = (folds_of(tmp_path / name, "x", predictions, targets) for name in "abc")
    (without[1] / "predictions.json").unlink()
    path = mixed[1] / "targets.json"
    path.write_text(path.read_text().replace('["a", "b"]', '["b", "a"]'))
    for name in ("predictions", "targets"):
        text = (shared[0] / f"{name}.json").read_text()
        (shared[1] / f"{name}.json").write_text(text)
    for runs, said in [
        (without, f"{without[1]} holds no predictions.json, which its fold needs to be pooled with the others; run "
                  "`pretrain3d test` of it again"),
        (mixed, f"{mixed[1]} and {mixed[0]} cannot be pooled: their classes are b, a and a, b"),
        (shared, f"{shared[1]} and another fold hold case 'case0', which their result.json do not say"),
    ]:  # fmt: skip
        assert main(["table", *map(str, runs)]) == 2
        captured = capsys.readouterr()
        assert said in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
    assert main(["table", str(without[1])]) == 0  # alone it needs no boxes
