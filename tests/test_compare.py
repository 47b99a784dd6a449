"""`compare`: differences of run folders, rows of several trainings, files and mistakes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_matching import Case, random_cases

from pretrain3d.__main__ import main
from pretrain3d.evaluation.matching import match
from pretrain3d.evaluation.scorefile import write
from pretrain3d.evaluation.statistics import bootstrap, holm, paired_difference
from pretrain3d.reporting.compare import compare
from pretrain3d.reporting.differences import HEADER, comparison_tables
from pretrain3d.reporting.results import write_result
from pretrain3d.reporting.rows import rows_of
from pretrain3d.reporting.tables import KEYS

CLASSES = ["a", "b"]
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
    expected = paired_difference(*runs, samples=60, groups=groups)
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
    assert comparison.num_runs == {"x-s* (2 seeds)": 2, "y-s* (2 seeds)": 2}
    means = []
    for of_row in (("x-s0", "x-s1"), ("y-s0", "y-s1")):
        alone = [bootstrap(match(worse(predictions, limits[name]), targets, CLASSES), 0) for name in of_row]
        means.append(np.mean([each["metrics"]["mAP"]["value"] for each in alone]))
    table = comparison_tables(comparison)[0]
    inside = comparison.values["y-s* (2 seeds)"]["metrics"]["mAP"]
    assert table.rows[1][1] == f"{means[1]:.3f} [{inside['low']:.3f}, {inside['high']:.3f}]"
    assert "means over runs, drawn too" in table.title and "another seed" not in table.title
    assert "the runs are few" in table.title
    assert "another seed" in comparison_tables(compare([runs[0], runs[2]], samples=5))[0].title
    entry = comparison.differences["y-s* (2 seeds)"]["metrics"]["mAP"]
    assert [entry["a"], entry["b"], entry["difference"]] == pytest.approx([*means, means[1] - means[0]])
    assert entry["low"] < entry["difference"] < entry["high"]


def test_folds_are_one_row(tmp_path: Path, cases: tuple[Cases, Cases]) -> None:
    predictions, targets = cases
    runs = []
    for row, limit in (("x", 0.5), ("y", 0.0)):
        for fold in (0, 1):
            part = sorted(targets)[fold * 4 : 4 + fold * 6]
            found = worse({name: predictions[name] for name in part}, limit)
            true = {name: targets[name] for name in part}
            runs.append(run_folder(tmp_path / f"{row}-f{fold}-s0", found, true, fold=fold))
    comparison = compare(runs, samples=40)
    assert list(comparison.num_runs) == ["x-f*-s* (2 folds)", "y-f*-s* (2 folds)"] and comparison.num_cases == 10
    assert comparison.differences["y-f*-s* (2 folds)"]["metrics"]["AP@0.10"]["difference"] > 0


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


def test_a_fold_without_cases_of_a_value_takes_no_part_in_it(tmp_path: Path, cases: tuple[Cases, Cases]) -> None:
    predictions, targets = cases
    runs = []
    for row, limit in (("x", 0.5), ("y", 0.0)):
        for fold, part in enumerate((sorted(targets)[:4], sorted(targets)[4:])):
            found = worse({name: predictions[name] for name in part}, limit)
            true = {name: targets[name] for name in part}
            runs.append(run_folder(tmp_path / f"{row}-f{fold}-s0", found, true, fold=fold))
    table = tmp_path / "cases.csv"
    table.write_text("case,site\n" + "".join(f"{i},{'A' if n < 2 else 'B'}\n" for n, i in enumerate(sorted(targets))))
    parts = compare(runs, samples=20, by="site", cases=str(table)).by["site"]
    assert [set(part.num_runs.values()) for part in parts.values()] == [{1}, {2}]
    assert [part.num_cases for part in parts.values()] == [2, 8]


def result(run: str, seed: int = 0, fold: int = 0, **config: Any) -> dict[str, Any]:
    return {"run": run, "seed": seed, "config": {"seed": seed, "name": run, "data": {"fold": fold}, **config}}


def test_what_makes_a_row() -> None:
    def rows(*results: dict[str, Any]) -> dict[str, list[int]]:
        return rows_of(results)

    assert rows(result("m-f0-s0"), result("m-f0-s1", 1), result("m-f1-s0", 0, 1)) == {"m-f*-s* (3 runs)": [0, 1, 2]}
    assert rows(result("m-s0"), result("m-s1", 1), result("n-s0")) == {"m-s* (2 seeds)": [0, 1], "n-s0": [2]}
    assert rows(result("m-s0"), result("m-s0")) == {"m-s0": [0], "m-s0 #2": [1]}  # the same seed again
    assert rows(result("m-s0"), result("m-s1", 1, backbone="other")) == {"m-s0": [0], "m-s1": [1]}
    logged = result("m-s1", 1, logger={"wandb": {"mode": "offline"}}, trainer={"log_every_n_steps": 5})
    assert rows(result("m-s0", logger={"wandb": None}), logged) == {"m-s* (2 seeds)": [0, 1]}
    best = result("m-s1", 1) | {"asked": {"checkpoint": "best"}}
    assert rows(result("m-s0") | {"asked": {"checkpoint": "last"}}, best) == {"m-s0": [0], "m-s1": [1]}


def test_mistakes_are_one_line(tmp_path: Path, cases: tuple[Cases, Cases], capsys: pytest.CaptureFixture[str]) -> None:
    predictions, targets = cases
    a = run_folder(tmp_path / "a", predictions, targets)
    b = run_folder(tmp_path / "b", predictions, targets)
    fewer = [name for name in targets if name != "case4"]
    part = run_folder(tmp_path / "part", {i: predictions[i] for i in fewer}, {i: targets[i] for i in fewer})
    moved = {**targets, "case2": {**targets["case2"], "boxes": targets["case2"]["boxes"] + 1}}
    assert len(targets["case2"]["labels"])
    other = run_folder(tmp_path / "other", predictions, moved)
    seeds = [run_folder(tmp_path / f"s-s{seed}", predictions, targets, seed=seed) for seed in (0, 1)]
    untested = run_folder(tmp_path / "untested", predictions, targets)
    (untested / "predictions.json").unlink()
    pretrained = run_folder(tmp_path / "mae", predictions, targets)
    result = json.loads((pretrained / "result.json").read_text())
    (pretrained / "result.json").write_text(json.dumps({**result, "metrics": {"network": {"value": 0.1}}}))
    for arguments, said in [
        ([a], "compare takes at least two run folders, got 1"),
        ([a, a], "is given twice"),
        ([a, part], "part was not tested on the cases of a: 'case4' is in one of them only"),
        ([a, other], "have other objects in case 'case2'"),
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
