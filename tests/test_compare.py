"""`compare`: differences of run folders, rows of several trainings, files and mistakes."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_matching import Case, random_cases

from pretrain3d.__main__ import main
from pretrain3d.evaluation.matching import match
from pretrain3d.evaluation.scorefile import write
from pretrain3d.evaluation.statistics import bootstrap, differences, holm, row_samples
from pretrain3d.reporting.compare import compare
from pretrain3d.reporting.differences import HEADER, comparison_tables
from pretrain3d.reporting.results import write_result
from pretrain3d.reporting.rows import rows_of
from pretrain3d.reporting.tables import KEYS

CLASSES = ["a", "b"]
HALVES = (slice(0, 4), slice(4, 10))  # of the cases
Cases = dict[str, Case]


def worse(predictions: Cases, below: float) -> Cases:
    """Predictions of a score below this one are moved away from what they found."""
    return {
        name: {**entry, "boxes": entry["boxes"] + np.where(entry["scores"] < below, 50.0, 0.0)[:, None]}
        for name, entry in predictions.items()
    }


def run_folder(folder: Path, predictions: Cases, targets: Cases, seed: int = 0, fold: int = 0, **config: Any) -> Path:
    """A run folder as `test` leaves it, as far as `compare` reads it."""
    folder.mkdir(parents=True)
    write(folder / "predictions.json", CLASSES, predictions)
    write(folder / "targets.json", CLASSES, targets)
    entry = {"value": 0.5, "low": None, "high": None}
    write_result(
        folder, run=folder.name, metrics=dict.fromkeys(KEYS, entry), per_class={}, curves={},
        cases=[{"case": name} for name in targets], seed=seed, data={"hash": "h", "name": "d"},
        config={"name": folder.name, "seed": seed, "data": {"fold": fold}, **config},
    )  # fmt: skip
    return folder


@pytest.fixture
def cases() -> tuple[Cases, Cases]:
    predictions, targets = random_cases(2, cases=10, boxes=25, objects=5, classes=2)
    for index, entry in enumerate(targets.values()):
        entry["group"] = f"patient {index // 2}"
    return predictions, targets


def test_two_runs(tmp_path: Path, cases: tuple[Cases, Cases], capsys: pytest.CaptureFixture[str]) -> None:
    predictions, targets = cases
    a = run_folder(tmp_path / "a", worse(predictions, 0.5), targets)
    b = run_folder(tmp_path / "b", predictions, targets)
    out = tmp_path / "new" / "out.json"
    assert main(["compare", str(a), str(b), f"out={out}", "samples=60"]) == 0
    written = json.loads(out.read_text())
    groups = {name: entry["group"] for name, entry in targets.items()}
    runs = [match(found, targets, CLASSES) for found in (worse(predictions, 0.5), predictions)]
    expected = differences(*row_samples([[run] for run in runs], 60, groups=groups))
    found = written["differences"]["b"]
    for key, entry in expected["metrics"].items():
        assert found["metrics"][key] == pytest.approx(entry | {"p_holm": entry["p"]}, abs=1e-12), key
    assert found["per_class"]["b"]["mAP"]["low"] == pytest.approx(expected["per_class"]["b"]["mAP"]["low"])
    alone = bootstrap(runs[1], samples=60, groups=groups)["metrics"]["mAP"]
    assert written["values"]["b"]["metrics"]["mAP"] == pytest.approx(alone)
    assert written["reference"] == "a" and written["num_cases"] == 10

    shown = capsys.readouterr().out
    entry = expected["metrics"]["mAP"]
    line = (f"{entry['b']:.3f} [{alone['low']:.3f}, {alone['high']:.3f}]  {entry['difference']:+.3f} "
            f"[{entry['low']:+.3f}, {entry['high']:+.3f}]  {entry['p']:.3f}")  # fmt: skip
    assert line in shown and "(Holm)" not in shown and "AP@0.10 of b" in shown
    figure = out.with_suffix(".svg").read_text()
    assert "<svg" in figure and "difference from a" in figure and all(key in figure for key in KEYS)


def test_several_runs_are_corrected(tmp_path: Path, cases: tuple[Cases, Cases]) -> None:
    predictions, targets = cases
    below = {"a": 0.0, "b": 0.2, "c": 0.4, "d": 0.9}
    runs = [run_folder(tmp_path / name, worse(predictions, limit), targets) for name, limit in below.items()]
    out, figure = tmp_path / "out.csv", tmp_path / "figure.png"
    assert main(["compare", *map(str, runs), f"out={out}", f"figure={figure}", "samples=60"]) == 0
    rows = list(csv.DictReader(out.open()))
    assert tuple(rows[0]) == HEADER and figure.read_bytes().startswith(b"\x89PNG")
    assert not out.with_suffix(".svg").exists()
    for of_class in ("", "a"):
        chosen = {row["run"]: row for row in rows if row["class"] == of_class and row["metric"] == "mAP"}
        assert list(chosen) == ["b", "c", "d"]
        adjusted = holm([float(row["p"]) for row in chosen.values()])
        assert [float(row["p_holm"]) for row in chosen.values()] == pytest.approx(adjusted, rel=1e-5)
        assert adjusted != [float(row["p"]) for row in chosen.values()]
        assert float(chosen["d"]["high"]) < 0 and float(chosen["d"]["reference_value"]) > float(chosen["d"]["value"])
    table = comparison_tables(compare(runs, samples=20))[0]
    assert table.header == ["run", "mAP", "difference", "p", "p (Holm)"] and len(table.rows) == 4


def test_seeds_are_one_row(tmp_path: Path, cases: tuple[Cases, Cases]) -> None:
    predictions, targets = cases
    limits = {"x-s0": 0.3, "x-s1": 0.5, "y-s0": 0.0, "y-s1": 0.1}
    runs = []
    for name, limit in limits.items():
        seed = int(name[-1])
        transfer = {"path": f"runs/mae-s{seed}/backbone.pt"}
        runs.append(run_folder(tmp_path / name, worse(predictions, limit), targets, seed=seed, transfer=transfer))
    comparison = compare(runs, samples=40)
    assert comparison.num_repetitions == {"x-s* (2 seeds)": 2, "y-s* (2 seeds)": 2}
    means = []
    for of_row in (("x-s0", "x-s1"), ("y-s0", "y-s1")):
        alone = [bootstrap(match(worse(predictions, limits[name]), targets, CLASSES), 0) for name in of_row]
        means.append(np.mean([each["metrics"]["mAP"]["value"] for each in alone]))
    table = comparison_tables(comparison)[0]
    inside = comparison.values["y-s* (2 seeds)"]["metrics"]["mAP"]
    assert table.rows[1][1] == f"{means[1]:.3f} [{inside['low']:.3f}, {inside['high']:.3f}]"
    assert "means over seeds, drawn too" in table.title and "another seed" not in table.title
    assert "the seeds are few" in table.title
    assert "another seed" in comparison_tables(compare([runs[0], runs[2]], samples=5))[0].title
    entry = comparison.differences["y-s* (2 seeds)"]["metrics"]["mAP"]
    assert [entry["a"], entry["b"], entry["difference"]] == pytest.approx([*means, means[1] - means[0]])
    assert entry["low"] < entry["difference"] < entry["high"]


def folds_of(
    folder: Path, row: str, predictions: Cases, targets: Cases, seed: int = 0, parts: Sequence[slice] = HALVES
) -> list[Path]:
    """The folds of a cross-validation, each tested on its own cases."""
    runs = []
    for fold, part in enumerate(parts):
        names = sorted(targets)[part]
        found, true = ({name: cases[name] for name in names} for cases in (predictions, targets))
        runs.append(run_folder(folder / f"{row}-f{fold}-s{seed}", found, true, seed=seed, fold=fold))
    return runs


def test_folds_are_pooled(tmp_path: Path, cases: tuple[Cases, Cases]) -> None:
    """Folds of which each is a part of the cases are compared as runs on all cases are, in any order of the paths."""
    predictions, targets = cases
    found = {"x": worse(predictions, 0.5), "y": predictions}
    runs = [run for row in found for run in folds_of(tmp_path, row, found[row], targets)]
    whole = [run_folder(tmp_path / row, found[row], targets) for row in found]
    pooled, expected = (compare(paths, samples=40) for paths in (runs[:2] + runs[:1:-1], whole))
    assert pooled.num_repetitions == {"x-f*-s0 (2 folds)": 1, "y-f*-s0 (2 folds)": 1} and pooled.num_cases == 10
    assert pooled.differences["y-f*-s0 (2 folds)"] == expected.differences["y"]
    assert [*pooled.values.values()] == [*expected.values.values()]
    difference = pooled.differences["y-f*-s0 (2 folds)"]["metrics"]["mAP"]
    alone = [compare([runs[at], runs[at + 2]], samples=1).differences for at in (0, 1)]
    of_folds = [each[f"y-f{fold}-s0"]["metrics"]["mAP"]["difference"] for fold, each in enumerate(alone)]
    assert difference["difference"] > 0 and difference["difference"] != pytest.approx(np.mean(of_folds), abs=1e-4)
    mixed = compare([*runs[:2], whole[1]], samples=40)  # the other row is of one run on all cases
    assert mixed.differences["y"] == expected.differences["y"]


def test_folds_of_several_seeds(tmp_path: Path, cases: tuple[Cases, Cases]) -> None:
    """The mean over seeds of what the folds of each give together; seeds are drawn, folds are not."""
    predictions, targets = cases
    limits = {"x": (0.3, 0.6), "y": (0.0, 0.1)}
    runs, whole = [], []
    for row, of_seeds in limits.items():
        for seed, limit in enumerate(of_seeds):
            runs += folds_of(tmp_path, row, worse(predictions, limit), targets, seed)
            whole.append(run_folder(tmp_path / f"{row}-s{seed}", worse(predictions, limit), targets, seed=seed))
    pooled, expected = compare(runs, samples=40), compare(whole, samples=40)
    assert pooled.num_repetitions == {f"{row}-f*-s* (2 seeds of 2 folds)": 2 for row in limits}
    assert [*pooled.differences.values()] == [*expected.differences.values()]
    assert [*pooled.values.values()] == [*expected.values.values()]


def test_a_patient_in_two_folds_is_drawn_as_one(tmp_path: Path, cases: tuple[Cases, Cases]) -> None:
    predictions, targets = cases
    runs = folds_of(tmp_path, "x", predictions, targets, parts=(slice(0, 3), slice(3, 10)))
    groups = {name: entry["group"] for name, entry in targets.items()}
    assert groups["case2"] == groups["case3"]
    other = run_folder(tmp_path / "y", worse(predictions, 0.5), targets)
    value = compare([*runs, other], samples=40).values["x-f*-s0 (2 folds)"]
    assert value == bootstrap(match(predictions, targets, CLASSES), 40, groups=groups)


def test_folds_on_the_same_cases_are_averaged(tmp_path: Path, cases: tuple[Cases, Cases]) -> None:
    """Models of several folds that were tested on one held-out set are repetitions, as seeds are."""
    predictions, targets = cases
    limits = (0.0, 0.2, 0.5)
    runs = [
        run_folder(tmp_path / f"x-f{fold}", worse(predictions, limit), targets, fold=fold)
        for fold, limit in enumerate(limits)
    ]
    comparison = compare([*runs, run_folder(tmp_path / "y", predictions, targets)], samples=20)
    assert comparison.num_repetitions == {"x-f* (3 runs)": 3, "y": 1} and comparison.num_cases == 10
    alone = [bootstrap(match(worse(predictions, limit), targets, CLASSES), 0)["metrics"] for limit in limits]
    mean = np.mean([each["mAP"]["value"] for each in alone])
    assert comparison.values["x-f* (3 runs)"]["metrics"]["mAP"]["value"] == pytest.approx(mean)


def test_by_a_column_of_a_table(tmp_path: Path, cases: tuple[Cases, Cases], capsys: pytest.CaptureFixture[str]) -> None:
    """Every part is the comparison of runs that were tested on its cases only."""
    predictions, targets = cases
    below = {"a": 0.0, "b": 0.4, "c": 0.9}
    runs = [run_folder(tmp_path / name, worse(predictions, limit), targets) for name, limit in below.items()]
    sites = {case: "north" if index < 4 else "south" for index, case in enumerate(sorted(targets))}
    table, out = tmp_path / "cases.csv", tmp_path / "out.json"
    table.write_text("case,site\n" + "".join(f"{case},{site}\n" for case, site in sites.items()))
    call = ["compare", *map(str, runs), f"cases={table}", "by=site", "samples=40"]
    assert main([*call, f"out={out}"]) == 0
    parts = json.loads(out.read_text())["by"]["site"]
    shown = capsys.readouterr().out
    assert [parts[site]["num_cases"] for site in ("north", "south")] == [4, 6]
    for site in ("north", "south"):
        chosen = [case for case in targets if sites[case] == site]
        alone = [
            run_folder(tmp_path / site / run.name, worse({i: predictions[i] for i in chosen}, limit),
                       {i: targets[i] for i in chosen})
            for run, limit in zip(runs, below.values(), strict=True)
        ]  # fmt: skip
        expected = compare(alone, samples=40)
        for row in ("b", "c"):
            for key, entry in expected.differences[row]["metrics"].items():
                assert parts[site]["differences"][row]["metrics"][key] == pytest.approx(entry, abs=1e-12, nan_ok=True)
        entry = expected.differences["c"]["metrics"]["mAP"]
        line = next(line for line in shown.partition("mAP by site")[2].splitlines() if line.split()[:2] == ["c", site])
        assert line.split()[2:4] == [str(len(chosen)), f"{entry['b']:.3f}"]
        assert f"  {entry['difference']:+.3f} [" in line
    assert main([*call, f"out={tmp_path / 'out.csv'}"]) == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert {row["part"] for row in rows} == {"", "site=north", "site=south"}


def test_folds_by_a_column(tmp_path: Path, cases: tuple[Cases, Cases]) -> None:
    """A value is scored over all folds, also where one has no case of it."""
    predictions, targets = cases
    found = {"x": worse(predictions, 0.5), "y": predictions}
    runs = [run for row in found for run in folds_of(tmp_path, row, found[row], targets)]
    whole = [run_folder(tmp_path / row, found[row], targets) for row in found]
    table = tmp_path / "cases.csv"
    table.write_text("case,site\n" + "".join(f"{i},{'A' if n < 2 else 'B'}\n" for n, i in enumerate(sorted(targets))))
    parts, expected = (compare(paths, 20, by="site", cases=str(table)).by["site"] for paths in (runs, whole))
    assert [part.num_cases for part in parts.values()] == [2, 8]
    for site, part in parts.items():
        assert [*part.differences.values()] == [*expected[site].differences.values()]


def result(
    run: str, seed: int = 0, fold: int = 0, cases: str = "", metric: str = "mAP", **config: Any
) -> dict[str, Any]:
    return {
        "run": run, "seed": seed, "config": {"seed": seed, "name": run, "data": {"fold": fold}, **config},
        "cases": [{"case": case, "objects": 1} for case in cases], "metrics": {metric: {"value": 0.5}},
    }  # fmt: skip


def test_what_makes_a_row() -> None:
    def rows(*results: dict[str, Any]) -> dict[str, list[list[int]]]:
        return rows_of(results)

    assert rows(result("m-s0"), result("m-s1", 1), result("n-s0")) == {"m-s* (2 seeds)": [[0], [1]], "n-s0": [[2]]}
    assert rows(result("m-f0-s0"), result("m-f0-s1", 1)) == {"m-f0-s* (2 seeds)": [[0], [1]]}
    assert rows(result("m-s0"), result("m-s0")) == {"m-s0": [[0]], "m-s0 #2": [[1]]}  # the same seed again
    assert rows(result("m-s0"), result("m-s1", 1, backbone="other")) == {"m-s0": [[0]], "m-s1": [[1]]}
    logged = result("m-s1", 1, logger={"wandb": {"mode": "offline"}}, trainer={"log_every_n_steps": 5})
    assert rows(result("m-s0", logger={"wandb": None}), logged) == {"m-s* (2 seeds)": [[0], [1]]}
    best = result("m-s1", 1) | {"asked": {"checkpoint": "best"}}
    assert rows(result("m-s0") | {"asked": {"checkpoint": "last"}}, best) == {"m-s0": [[0]], "m-s1": [[1]]}


def test_which_runs_are_pooled() -> None:
    def rows(*runs: tuple[int, int, str], metric: str = "mAP") -> dict[str, list[list[int]]]:
        return rows_of([result(f"m-f{fold}-s{seed}", seed, fold, cases, metric) for seed, fold, cases in runs])

    assert rows((0, 0, "ab"), (0, 1, "c"), (0, 2, "d")) == {"m-f*-s0 (3 folds)": [[0, 1, 2]]}
    two = [(0, 0, "ab"), (1, 0, "ab"), (0, 1, "c"), (1, 1, "c")]
    assert rows(*two) == {"m-f*-s* (2 seeds of 2 folds)": [[0, 2], [1, 3]]}
    assert rows((0, 0, "ab"), (1, 1, "c"), (2, 2, "d")) == {"m-f*-s* (3 folds)": [[0, 1, 2]]}  # a seed for each fold
    # a seed that lacks a fold
    assert rows(*two, (2, 1, "c")) == {"m-f*-s* (2 seeds of 2 folds)": [[0, 2], [1, 3]], "m-f1-s2": [[4]]}
    assert rows(*two[:3], (0, 2, "d")) == {"m-f*-s0 (3 folds)": [[0, 2, 3]], "m-f0-s1": [[1]]}
    # test cases that are the same, in part, or unknown; a pretraining; a fold of two sets of cases
    assert rows((0, 0, "ab"), (0, 1, "ab"), (1, 0, "ab")) == {"m-f*-s* (3 runs)": [[0], [1], [2]]}
    assert rows((0, 0, "ab"), (0, 1, "bc")) == {"m-f*-s0 (2 runs)": [[0], [1]]}
    assert rows((0, 0, "ab"), (1, 1, "bc")) == {"m-f*-s* (2 runs)": [[0], [1]]}
    assert rows((0, 0, ""), (0, 1, "")) == {"m-f*-s0 (2 runs)": [[0], [1]]}
    assert rows((0, 0, "ab"), (0, 1, "c"), metric="dice") == {"m-f*-s0 (2 runs)": [[0], [1]]}
    assert rows((0, 0, "ab"), (1, 0, "c")) == {"m-f0-s0": [[0]], "m-f0-s1": [[1]]}


def test_mistakes_are_one_line(tmp_path: Path, cases: tuple[Cases, Cases], capsys: pytest.CaptureFixture[str]) -> None:
    predictions, targets = cases
    a = run_folder(tmp_path / "a", predictions, targets)
    b = run_folder(tmp_path / "b", predictions, targets)
    fewer = [name for name in targets if name != "case4"]
    part = run_folder(tmp_path / "part", {i: predictions[i] for i in fewer}, {i: targets[i] for i in fewer})
    again = run_folder(tmp_path / "val" / "a", {i: predictions[i] for i in fewer}, {i: targets[i] for i in fewer})
    moved = {**targets, "case2": {**targets["case2"], "boxes": targets["case2"]["boxes"] + 1}}
    assert len(targets["case2"]["labels"])
    other = run_folder(tmp_path / "other", predictions, moved)
    seeds = [run_folder(tmp_path / f"s-s{seed}", predictions, targets, seed=seed) for seed in (0, 1)]
    folds = folds_of(tmp_path, "f", predictions, targets)
    (folds[1] / "targets.json").unlink()
    more = folds_of(tmp_path, "g", predictions, targets, parts=(slice(0, 3), slice(3, 9)))
    untested = run_folder(tmp_path / "untested", predictions, targets)
    (untested / "predictions.json").unlink()
    pretrained = run_folder(tmp_path / "mae", predictions, targets)
    result = json.loads((pretrained / "result.json").read_text())
    (pretrained / "result.json").write_text(json.dumps({**result, "metrics": {"network": {"value": 0.1}}}))
    for arguments, said in [
        ([a], "compare takes at least two run folders, got 1"),
        ([a, a], "is given twice"),
        ([a, part], "part was not tested on the cases of a: 'case4' is in one of them only"),
        ([a, again], "a #2 was not tested on the cases of a: 'case4' is in one of them only"),
        ([a, other], "have other objects in case 'case2'"),
        ([a, *folds], f"{folds[1]} holds no targets.json, which its fold needs to be pooled with the others; run "),
        ([a, *more], "g-f*-s0 (2 folds) was not tested on the cases of a: 'case9' is in one of them only"),
        ([a, untested], "holds no predictions.json; run `pretrain3d test"),
        ([a, pretrained], "mae is a pretraining, tested on reconstruction; compare takes detectors"),
        ([a, tmp_path], "holds no result.json"),
        (seeds, "compare needs two rows, and the 2 given are one: s-s* (2 seeds)"),
        ([a, b, "out=table.txt"], "out=table.txt: the name must end in .md, .csv, .json"),
        ([a, b, "figure=x.gif"], "figure=x.gif: the name must end in .svg, .png, .pdf"),
        ([a, b, "samples=0"], "samples=0: it must be 1 or more"),
        ([a, b, "sample=5"], "did you mean 'samples'"),
        ([a, b, "by=site"], "by=site needs cases=TABLE as well"),
        ([a, b, "by=spacing"], "case 'case0' has no spacing_mm"),
        ([a, b, "by=site", f"cases={tmp_path / 'none.csv'}"], "none.csv: cannot be read: No such file"),
    ]:
        assert main(["compare", *map(str, arguments)]) == 2, said
        captured = capsys.readouterr()
        assert said in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
