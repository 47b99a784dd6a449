"""`test`: what it leaves for others to read, and the way of a result to W&B."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_store import blocks, make_case, write_store

from pretrain3d.__main__ import main
from pretrain3d.commands.trained import log_to_wandb
from pretrain3d.config import to_yaml
from pretrain3d.evaluation import statistics
from pretrain3d.reporting import wandb_logger
from pretrain3d.reporting.results import read_result, write_result
from pretrain3d.reporting.run_folder import RunFolder

BOXES = [(2, 2, 2, 6, 6, 6), (8, 8, 8, 12, 12, 12)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Five training cases and four test cases of two patients, the same objects in all."""
    cases = []
    for index in range(9):
        mask = blocks((16, 16, 16), BOXES)
        image = np.zeros((1, 16, 16, 16), np.float32)
        split, group = ("train", f"t{index}") if index < 5 else ("test", f"patient {index // 7}")
        cases.append((make_case(f"c{index}", image, mask, [0, 1], split, group), image, mask))
    write_store(tmp_path / "store", cases)
    return tmp_path / "store"


def test_files_say_sizes_and_patients(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["test", "baseline=mean_box", f"store={store}", f"out={out}", "samples=20"]) == 0
    cases = json.loads((out / "targets.json").read_text())["cases"]
    assert list(cases) == ["c5", "c6", "c7", "c8"]
    assert cases["c5"]["group"] == "patient 0" and cases["c8"]["group"] == "patient 1"
    assert cases["c5"]["spacing_mm"] == [1, 1, 1] and cases["c5"]["volumes_mm3"] == [1, 1]
    result = read_result(out)
    assert sum(row["objects"] for row in result["by_size"].values()) == 8
    assert {"case_AUROC", "case_AP"} <= set(result["metrics"])
    # every case is the same, so that the score command finds `test`'s number in every sample of patients
    files = [f"predictions={out / 'predictions.json'}", f"targets={out / 'targets.json'}"]
    assert main(["score", *files, f"out={tmp_path / 'again.json'}", "samples=20"]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    for key in ("mAP", "FROC@0.50"):
        assert [again[key], *again["intervals"][key]] == pytest.approx(list(result["metrics"][key].values()))
    assert again["by_size"].keys() == result["by_size"].keys()


def test_by_a_column_of_a_table(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers of `score` on the same files; a second call predicts nothing and keeps what there was."""
    out, table = tmp_path / "out", tmp_path / "cases.csv"
    call = ["test", "baseline=mean_box", f"store={store}", f"out={out}", "samples=20"]
    table.write_text("case,site\nc5,north\nc6,south\nc8,south\n")
    assert main([*call, f"cases={table}", "by=site"]) == 2
    assert "cases.csv has no row of case 'c7'" in capsys.readouterr().err and not out.exists()
    table.write_text(table.read_text() + "c7,north\n")
    assert main([*call, f"cases={table}", "by=site"]) == 0
    shown = capsys.readouterr().out
    assert "by site\n" in shown and "north  2 " in shown
    written = (out / "predictions.json").stat().st_mtime_ns
    assert main([*call, "by=spacing"]) == 0
    assert "nothing to predict" in capsys.readouterr().out
    assert (out / "predictions.json").stat().st_mtime_ns == written
    by = read_result(out)["by"]
    assert list(by) == ["site", "spacing"] and list(by["spacing"]) == ["1"] and by["spacing"]["1"]["num_cases"] == 4
    files = [f"predictions={out / 'predictions.json'}", f"targets={out / 'targets.json'}"]
    again = tmp_path / "again.json"
    assert main(["score", *files, f"out={again}", "samples=20", f"cases={table}", "by=site"]) == 0
    scored = json.loads(again.read_text())["by"]["site"]
    for site in ("north", "south"):
        entry = by["site"][site]["metrics"]["mAP"]
        assert list(entry.values()) == [scored[site]["mAP"], *scored[site]["intervals"]["mAP"]]
        assert by["site"][site]["per_class"].keys() == {"nodule", "lesion"}


def change_annotation(store: Path, case_id: str) -> None:
    record = store / "cases" / f"{case_id}.json"
    values = json.loads(record.read_text())
    record.write_text(json.dumps({**values, "labels": values["labels"][::-1]}))


@pytest.mark.parametrize("case_id", ["c1", "c7"])  # of the training cases, of the tested ones
def test_a_changed_annotation_is_scored_again(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case_id: str
) -> None:
    call = ["test", "baseline=mean_box", f"store={store}", f"out={tmp_path / 'out'}", "samples=5"]
    assert main(call) == 0 and main(call) == 0
    assert "nothing to predict" in capsys.readouterr().out
    change_annotation(store, case_id)
    assert main(call) == 0
    assert "nothing to predict" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["predictions.json", "targets.json"])
def test_a_result_without_its_score_files_is_made_again(store: Path, tmp_path: Path, name: str) -> None:
    """`compare` needs them, and sends whoever lacks them to `test`."""
    call = ["test", "baseline=mean_box", f"store={store}", f"out={tmp_path / 'out'}", "samples=5"]
    assert main(call) == 0
    content = (tmp_path / "out" / name).read_text()
    (tmp_path / "out" / name).unlink()
    assert main(call) == 0 and (tmp_path / "out" / name).read_text() == content


def test_a_result_never_stands_beside_the_boxes_of_another(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["test", "baseline=mean_box", f"store={store}", f"out={tmp_path / 'out'}", "samples=5"]
    assert main(call) == 0

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt  # when the boxes are written and the result is not

    with monkeypatch.context() as patch:
        patch.setattr(statistics, "evaluate_with_intervals", stop)
        assert main([*call, "split=val"]) == 130
    assert not (tmp_path / "out" / "result.json").exists()
    assert main(call) == 0
    predicted = json.loads((tmp_path / "out" / "predictions.json").read_text())["cases"]
    assert list(predicted) == [row["case"] for row in read_result(tmp_path / "out")["cases"]]


def test_mistakes_are_one_line_and_leave_nothing(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "out", tmp_path / "a_file"
    file.write_text("")
    given = {"baseline": "mean_box", "store": str(store), "out": str(out)}
    for changes, said in [
        ({"samples": "-1"}, "samples=-1: it must be 0 or more"),
        ({"out": str(file)}, "a_file is a file; expected the name of a folder"),
        ({"out": str(file / "x")}, "a_file is a file"),
        ({"baseline": "meanbox"}, "baseline=meanbox: it is mean_box or threshold"),
        ({"num_folds": "6"}, "5 training patients cannot fill 6 folds"),
        ({"split": "train"}, "split=train: it is test or val"),
        ({"by": "site"}, "by=site needs cases=TABLE as well"),
        ({"by": "site", "cases": "none.csv"}, "none.csv: cannot be read: No such file"),
        ({"pictures": "2"}, "unknown option 'pictures'"),
    ]:
        assert main(["test", *(f"{key}={value}" for key, value in {**given, **changes}.items())]) == 2, said
        captured = capsys.readouterr()
        assert said in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
        assert not out.exists() and file.read_text() == ""


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for paths, said in [
        ([], "test takes a run folder, or baseline="),
        ([tmp_path], "holds no config.yaml; is it the folder of a run?"),
        ([tmp_path, tmp_path], "test takes one run folder, got 2"),
    ]:
        assert main(["test", *map(str, paths)]) == 2
        assert said in capsys.readouterr().err


def a_run(folder: Path, logger: Any, used: bool) -> tuple[RunFolder, dict[str, Any]]:
    settings = {"name": "r", "logger": logger}
    write_result(folder, run="r", metrics={"mAP": {"value": 0.5, "low": None, "high": None}}, per_class={}, curves={},
                 cases=[], config=settings, seed=0, data={})  # fmt: skip
    (folder / "config.yaml").write_text(to_yaml(settings))
    if used:
        (folder / "wandb").mkdir()
        (folder / "wandb" / "run-id.txt").write_text("abc\n")
    return RunFolder(folder), settings


@pytest.mark.parametrize(
    ("logger", "used", "logs"),
    [
        ({"wandb": {"mode": "offline"}}, True, True),
        ({"wandb": {"mode": "offline"}}, False, False),  # asked for, but training left no W&B run
        ({"wandb": None}, True, False),
        (None, True, False),
    ],
)
def test_a_result_goes_to_the_wandb_run_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: Any, used: bool, logs: bool
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(wandb_logger, "log_result", lambda *arguments: calls.append(arguments))
    folder, settings = a_run(tmp_path / "r", logger, used)
    log_to_wandb(folder, settings)
    expected = [(logger["wandb"], folder.path, settings, read_result(folder.path))] if logs else []
    assert calls == expected


def test_a_wandb_that_fails_does_not_stop_a_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def init(**_: Any) -> None:
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", init)
    folder, settings = a_run(tmp_path / "r", {"wandb": {"mode": "offline"}}, True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log_to_wandb(folder, settings)
    assert any("no W&B log of this run: RuntimeError: no service" in str(each.message) for each in caught)


def test_a_pretraining_by_contrast_has_nothing_to_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml({"name": "simclr", "module": {"name": "contrastive"}}))
    assert main(["test", str(tmp_path)]) == 2
    assert "was pretrained by contrast, which has nothing to test on held-out cases" in capsys.readouterr().err
