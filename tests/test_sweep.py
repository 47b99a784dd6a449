"""The search for merge settings, and operating points, against their definitions."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_tiles import PerfectDetector, coordinates, spread_objects
from tiny_detector import INTENSITY, tiny_checkpoint
from tiny_store import tiny_store

from pretrain3d import boxes as box_ops
from pretrain3d.__main__ import main
from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.commands.assemble import about_sets
from pretrain3d.config import UserError, to_yaml
from pretrain3d.data.module import DataModule
from pretrain3d.detection.contract import Detections
from pretrain3d.detection.merge import Merging, ViewDetections, merge, merge_tiles
from pretrain3d.detection.sweep import GRID, SweepCase, measure_at, operating_points, sweep
from pretrain3d.detection.tiles import predict_views
from pretrain3d.evaluation.matching import match
from pretrain3d.evaluation.protocol import evaluate
from pretrain3d.files import replacing
from pretrain3d.modules.base import NOTE
from pretrain3d.modules.checkpoint import read_checkpoint

SHAPE = (40, 36, 34)


class Doubting:
    """Sees every object twice, the second time shifted by a third of its size, and is sure of small specks."""

    def __init__(self, boxes: torch.Tensor, specks: torch.Tensor) -> None:
        self.perfect = PerfectDetector(boxes, torch.zeros(len(boxes), dtype=torch.long))
        self.specks = PerfectDetector(specks, torch.zeros(len(specks), dtype=torch.long))

    def __call__(self, patches: torch.Tensor) -> list[Detections]:
        pairs = zip(self.perfect(patches), self.specks(patches), strict=True)
        return [self.look(found, specks) for found, specks in pairs]

    def look(self, found: Detections, specks: Detections) -> Detections:
        shift = torch.zeros(len(found), 6)
        shift[:, [0, 3]] = (box_ops.sizes(found.boxes)[:, :1] / 3).expand(-1, 2)
        boxes = torch.cat([found.boxes, (found.boxes + shift).clamp(0, 32), specks.boxes])
        scores = torch.cat([found.scores, found.scores - 0.05, specks.scores + 0.05])
        keep = (box_ops.sizes(boxes) > 0.5).all(dim=1)
        return Detections(boxes, scores, torch.zeros(len(boxes), dtype=torch.long))[keep]


@pytest.fixture(scope="module")
def cases() -> dict[str, SweepCase]:
    result = {}
    for index in range(3):
        every = spread_objects(SHAPE, 6, 9, seed=index)
        boxes, specks = every[::5], every[2::5].clone()
        specks[:, 3:] = specks[:, :3] + 2
        views = predict_views(Doubting(boxes, specks), coordinates(SHAPE), (32, 32, 32), 0.5, 8, -1.0, mirror_axes=(2,))
        target: dict[str, Any] = {"boxes": boxes.numpy(), "labels": np.zeros(len(boxes), np.int64)}
        result[f"case_{index}"] = SweepCase(views, target)
    return result


def predictions(cases: dict[str, SweepCase], merging: Merging) -> dict[str, Any]:
    merged = {case: merge(each.views, merging) for case, each in cases.items()}
    return {case: {"boxes": found.boxes.numpy(), "scores": found.scores.numpy(), "labels": found.labels.numpy()}
            for case, found in merged.items()}  # fmt: skip


def test_a_sweep_finds_what_hides_specks(cases: dict[str, SweepCase]) -> None:
    found = sweep(cases, ["object"], "AP@0.50", false_positives=0.5)
    assert found.value > found.value_before + 0.02
    assert found.merging.min_size > 2  # specks of 2^3 are gone, at no cost
    targets = {case: each.target for case, each in cases.items()}
    assert found.value == evaluate(predictions(cases, found.merging), targets, ["object"])["AP@0.50"]
    assert found.value_before == evaluate(predictions(cases, Merging()), targets, ["object"])["AP@0.50"]
    assert found.value == max(trial["AP@0.50"] for trial in found.trials)
    tried = [Merging(**{key: value for key, value in trial.items() if key != "AP@0.50"}) for trial in found.trials]
    assert len(set(tried)) == len(tried) and Merging() in tried and found.merging in tried
    for name, values in GRID.items():
        assert {getattr(merging, name) for merging in tried} >= set(values)
    assert found.operating["false_positives_per_case"] == 0.5 and len(found.operating_points) == 7
    assert json.loads(json.dumps(found.to_dict()))["merging"] == found.merging.to_dict()


def test_tiles_are_merged_once_for_what_it_depends_on(
    cases: dict[str, SweepCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Merging] = []

    def counted(view: Any, merging: Merging) -> ViewDetections:
        seen.append(merging)
        return merge_tiles(view, merging)

    monkeypatch.setattr("pretrain3d.detection.sweep.merge_tiles", counted)
    trials = sweep(cases, ["object"], "AP@0.50").trials
    settings = {(trial["tile_iou"], trial["min_score"]) for trial in trials}
    assert len(seen) == len(settings) * sum(len(case.views) for case in cases.values())
    assert len(settings) < len(trials) / 2


def test_a_fixed_setting_stays(cases: dict[str, SweepCase]) -> None:
    free = sweep(cases, ["object"], "AP@0.50")
    found = sweep(cases, ["object"], "AP@0.50", fixed=("min_size",))
    assert found.merging.min_size == Merging().min_size < free.merging.min_size
    assert {trial["min_size"] for trial in found.trials} == {Merging().min_size}


def test_settings_that_make_no_difference_stay(cases: dict[str, SweepCase]) -> None:
    """With one view neither the method nor its threshold matters: a tie is no reason to leave the default."""
    perfect = {}
    for case, each in cases.items():
        boxes = torch.from_numpy(each.target["boxes"])
        detector = PerfectDetector(boxes, torch.zeros(len(boxes), dtype=torch.long))
        perfect[case] = SweepCase(predict_views(detector, coordinates(SHAPE), (32, 32, 32), 0.5, 8, -1.0), each.target)
    found = sweep(perfect, ["object"])
    assert found.merging == Merging() and found.value == found.value_before == 1.0
    assert found.operating["sensitivity"] == 1.0 and found.operating["threshold"] == 0.0


def slow_operating_point(found: dict[str, Any], targets: dict[str, Any], rate: float) -> tuple[float, float]:
    """The lowest of all cuts between scores that keeps the rate: false positives per case, and sensitivity."""
    scores = sorted({score for each in found.values() for score in each["scores"].tolist()})
    cuts = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(scores)), 2.0]
    for cut in cuts:
        measured = measure_at(cut, match(found, targets, ["a", "b"]))
        if measured["false_positives_per_case"] <= rate:
            return measured["false_positives_per_case"], measured["sensitivity"]
    raise AssertionError("a cut above all scores keeps every rate")


@pytest.mark.parametrize("rate", [0.0, 1 / 8, 0.5, 1.0, 2.0, 50.0])
def test_operating_points_keep_their_rate_and_no_less(rate: float) -> None:
    rng = np.random.default_rng(4)
    found, targets = {}, {}
    for case in ("x", "y", "z"):
        true = np.array([[i * 10.0, 0, 0, i * 10 + 5, 5, 5] for i in range(4)])
        boxes = np.vstack([true[:3] + rng.normal(0, 0.3, (3, 6)), true[:3] + 40])
        found[case] = {"boxes": boxes, "scores": np.round(rng.random(6), 1), "labels": np.array([0, 0, 1, 0, 1, 1])}
        targets[case] = {"boxes": true, "labels": np.array([0, 0, 1, 1])}
    (row,) = operating_points(match(found, targets, ["a", "b"]), [rate])
    measured = measure_at(row["threshold"], match(found, targets, ["a", "b"]))
    assert (row["measured"], row["sensitivity"]) == (measured["false_positives_per_case"], measured["sensitivity"])
    assert (row["measured"], row["sensitivity"]) == slow_operating_point(found, targets, rate)
    scores = np.concatenate([each["scores"] for each in found.values()])
    assert row["threshold"] == 0 or row["threshold"] not in scores
    for score in scores:  # a box at the score counts
        at = measure_at(score, match(found, targets, ["a", "b"]))
        assert round(3 * at["false_positives_per_case"] + 12 * at["sensitivity"]) == (scores >= score).sum()


def test_operating_points_of_nothing() -> None:
    none = {"boxes": np.zeros((0, 6)), "scores": np.zeros(0), "labels": np.zeros(0, np.int64)}
    (row,) = operating_points(match({"a": none}, {"a": none}, ["object"]), [1.0])
    assert row == {"false_positives_per_case": 1.0, "threshold": 0.0, "sensitivity": 0.0, "measured": 0.0}


def test_mistakes_are_named(cases: dict[str, SweepCase]) -> None:
    with pytest.raises(UserError, match=r"metric=mAPP is unknown, did you mean 'mAP'"):
        sweep(cases, ["object"], "mAPP")
    bare = {case: SweepCase(each.views, {"boxes": np.zeros((0, 6)), "labels": np.zeros(0)})
            for case, each in cases.items()}  # fmt: skip
    with pytest.raises(UserError, match="none of the 3 validation cases has an object"):
        sweep(bare, ["object"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run: an untrained detector on a small store."""
    store = tiny_store(tmp_path / "store", num_train=3, num_pretrain=0)
    folder = tmp_path / "run"
    data = {"store": str(store.path), "fold": 1, "num_folds": 3, "batch_size": None}  # null: the plan's
    sets = about_sets(DataModule(**{**data, "batch_size": 1}, intensity=INTENSITY))
    tiny_checkpoint(folder / "checkpoints" / "last.ckpt", transfer=None, processes=1, sets=sets)
    settings = {"name": "run", "seed": 0, "data": data, "backbone": {"name": "resenc"},
                "trainer": {"accumulate_grad_batches": 1}}  # fmt: skip
    (folder / "config.yaml").write_text(to_yaml(settings))
    (folder / "state.json").write_text('{"status": "finished", "step": 1, "seconds": 1.0}')
    return folder


def test_a_store_is_what_it_was_in_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = run.parent / "store"
    plan = {
        **yaml.safe_load((store / "plan.yaml").read_text()),
        "patch_size": [32, 32, 32],
        "intensity": {"scheme": "ct"},
    }
    (store / "plan.yaml").write_text(yaml.safe_dump(plan))  # planned again since: the run goes on with its own
    assert main(["test", str(run), "samples=5", "pictures=0"]) == 0
    index = json.loads((store / "index.json").read_text())
    changes = [
        ("spacing_mm", [2.0, 2.0, 2.0], r"spacing_mm \[1.0, 1.0, 1.0\] there, \[2.0, 2.0, 2.0\] now"),
        ("classes", ["lesion", "nodule"], r"classes \['nodule', 'lesion'\] there"),
        ("data_hash", "other", "data_hash '.*' there, 'other' now"),
    ]
    for key, value, there in changes:
        (store / "index.json").write_text(json.dumps({**index, key: value}))
        capsys.readouterr()
        for command in ("test", "sweep"):
            assert main([command, str(run)]) == 2
            assert re.search(there, capsys.readouterr().err)


def test_the_command_keeps_what_it_found_and_test_uses_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert main(["test", str(run), "samples=5", "pictures=0"]) == 0
    before = json.loads((run / "result.json").read_text())
    assert before["operating"] is None and before["asked"]["merging"] == Merging().to_dict()
    assert main(["sweep", str(run), "metric=FROC@0.10", "false_positives=2"]) == 0
    stored = read_checkpoint(checkpoint)[NOTE]["inference"]
    assert stored["metric"] == "FROC@0.10" and stored["operating"]["false_positives_per_case"] == 2
    assert stored["cases"] and all(case.startswith("train") for case in stored["cases"])
    record = json.loads((run / "sweep.json").read_text())
    assert record["merging"] == stored["merging"] and len(record["trials"]) > 20
    written = checkpoint.read_bytes()
    capsys.readouterr()
    assert main(["sweep", str(run), "metric=FROC@0.10", "false_positives=2"]) == 0
    assert "nothing to do" in capsys.readouterr().out and checkpoint.read_bytes() == written

    assert main(["show", str(checkpoint)]) == 0
    (shown,) = [line for line in capsys.readouterr().out.splitlines() if "sweep.operating.threshold" in line]
    assert shown.split()[1] == str(stored["operating"]["threshold"])
    assert main(["test", str(run), "samples=5", "pictures=0"]) == 0  # not current any more: other settings
    after = json.loads((run / "result.json").read_text())
    assert after["asked"]["merging"] == stored["merging"]
    assert after["operating"]["threshold"] == stored["operating"]["threshold"]
    assert "is replaced" not in capsys.readouterr().err  # of the same split and checkpoint
    assert main(["test", str(run), "split=val", "samples=5", "pictures=0"]) == 0  # the cases that were swept on
    said = capsys.readouterr()
    assert "chosen on these cases: those of its config are used" in said.out
    assert f"{run / 'result.json'} of checkpoint=last, split=test is replaced\n" in said.err
    result = json.loads((run / "result.json").read_text())
    assert result["operating"] is None and result["asked"]["merging"] == Merging().to_dict()


def test_pictures_are_of_the_boxes_that_are_reported(run: Path) -> None:
    def pictures() -> list[str]:
        return sorted(path.stem for path in (run / "pictures").glob("test_*.npz"))

    assert main(["test", str(run), "samples=0", "split=val"]) == 0
    (of_val,) = pictures()
    assert main(["test", str(run), "samples=0"]) == 0
    of_test = pictures()
    assert of_test and of_val not in of_test
    assert main(["test", str(run), "samples=0"]) == 0  # nothing to predict
    assert pictures() == of_test
    assert main(["test", str(run), "samples=0", "split=val", "pictures=0"]) == 0
    assert pictures() == []
    assert main(["test", str(run), "samples=0", "split=val"]) == 0  # nothing to predict, as none was asked for
    assert pictures() == []
    assert main(["test", str(run), "samples=0", "split=val", "pictures=1"]) == 0
    assert pictures() == [of_val]


@pytest.mark.parametrize(("command", "split"), [("test", "test"), ("sweep", "train")])
def test_a_changed_annotation_counts(run: Path, capsys: pytest.CaptureFixture[str], command: str, split: str) -> None:
    line = [command, str(run), *(["samples=0", "pictures=0"] if command == "test" else [])]
    assert main(line) == 0 and main(line) == 0
    assert "nothing to " in capsys.readouterr().out
    for record in (run.parent / "store" / "cases").glob(f"{split}_*.json"):
        values = json.loads(record.read_text())
        boxes = [[x + 0.5 for x in box] for box in values["boxes"]]
        record.write_text(json.dumps({**values, "boxes": boxes}))
    assert main(line) == 0
    assert "nothing to " not in capsys.readouterr().out


def test_merging_may_be_configured(run: Path) -> None:
    tiny = {"module": {"name": "detection", "merging": {"method": "nms"}}}
    checkpoint = run / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content[NOTE]["module"] |= tiny["module"]
    torch.save(content, checkpoint)
    assert main(["test", str(run), "samples=0", "pictures=0", "tile_batch=1"]) == 0
    assert json.loads((run / "result.json").read_text())["asked"]["merging"]["method"] == "nms"


@pytest.mark.parametrize(
    ("options", "line"),
    [(["metric=mAPP"], "metric=mAPP is unknown"), (["false_positives=0"], "expected a number above 0"),
     (["checkpoint=best"], "has no checkpoint best yet"), (["tile_batch=0"], "tile_batch=0: expected a whole")],
)  # fmt: skip
def test_mistakes_of_the_command(run: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str) -> None:
    assert main(["sweep", str(run), *options]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert line in errors[-1] and errors[-1].startswith("pretrain3d: error:")
    assert "inference" not in read_checkpoint(run / "checkpoints" / "last.ckpt")[NOTE]


def test_out_of_memory_names_the_case(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ResEnc, "forward", starved)
    assert main(["sweep", str(run)]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert re.match(r"pretrain3d: error: case train_\d: out of memory with tiles of 16 x 16 x 16, 4 at once", error)


def test_a_run_is_swept_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(run), f"{run}/"]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_broken_files_of_a_run_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "last.ckpt").write_bytes(b"abc")
    assert main(["test", str(run), "pictures=0"]) == 2
    assert "last.ckpt cannot be read as a file of torch.save: " in capsys.readouterr().err
    (run / "state.json").write_text("{")
    assert main(["test", str(run), "pictures=0"]) == 2
    assert "state.json is not a JSON file" in capsys.readouterr().err
    assert not (run / "predictions.json").exists()


def test_an_unfinished_run_is_said_to_be_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(to_yaml({**config, "trainer": {**config["trainer"], "max_steps": 9}}))
    (run / "state.json").write_text('{"status": "running", "step": 1, "seconds": 1.0}')
    assert main(["test", str(run), "samples=0", "pictures=0"]) == 0
    assert f"{run} is at step 1 of 9\n" in capsys.readouterr().err


def test_predict_and_a_baseline_stay_out_of_the_folder_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(run.rglob("*"))
    (run.parent / "a.nii.gz").write_bytes(b"")
    for line in (
        ["predict", str(run), str(run.parent / "a.nii.gz")],
        ["test", "baseline=mean_box", f"store={run.parent / 'store'}"],
    ):
        assert main([*line, f"out={run}"]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert f"out={run} is the folder of a run, whose results would be lost" in error
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("command", ["test", "sweep"])
def test_a_folder_that_cannot_be_written_costs_no_prediction(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def refused(*_: object, dir: Path) -> None:  # root may write anywhere
        raise OSError(errno.EROFS, "Read-only file system", f"{dir}/tmpabc")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(ResEnc, "forward", lambda *_: pytest.fail("predicted"))
    assert main([command, str(run)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"pretrain3d: error: {run}: Read-only file system"


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_line(run: Path) -> None:
    """The limit on the size of a file stands for the disk; nothing of what was there is lost."""
    code = ("import resource, sys; from pretrain3d.__main__ import main; "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.exit(main(sys.argv[1:]))")  # fmt: skip
    out, before = run.parent / "a.pt", (run / "checkpoints" / "last.ckpt").read_bytes()
    for line, path, reason in [
        (["export", str(run), f"out={out}"], out, "cannot be written whole; is the disk full?"),
        (["sweep", str(run)], run / "checkpoints" / "last.ckpt", "cannot be written whole; is the disk full?"),
        (["test", str(run), "samples=0", "pictures=0"], run / "predictions.json", "File too large"),
    ]:
        done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, timeout=300)
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1] == f"pretrain3d: error: {path}: {reason}" and "Traceback" not in done.stderr
    assert not out.exists() and (run / "checkpoints" / "last.ckpt").read_bytes() == before
    assert not list(run.parent.rglob(".tmp-*"))


def test_a_folder_that_may_not_be_written_is_no_full_disk() -> None:
    folder, me = Path(tempfile.mkdtemp()), os.geteuid()  # not in pytest's folder, which is for its owner alone
    folder.chmod(0o555)
    try:
        if me == 0:  # root may write anywhere
            os.seteuid(65534)
        with pytest.raises(PermissionError) as error, replacing(folder / "a.pt") as temporary:
            torch.save({}, temporary)
        assert error.value.filename == str(folder / "a.pt")
    finally:
        os.seteuid(me)
        folder.rmdir()


def test_runs_that_start_from_other_settings_are_swept_apart(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    checkpoint = other / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content[NOTE]["module"] |= {"merging": {"method": "nms", "view_iou": 0.3}}
    torch.save(content, checkpoint)
    before = checkpoint.read_bytes()
    assert main(["sweep", str(run), str(other)]) == 2
    said = f"{other} is configured with another module.merging than {run} (method, view_iou): sweep them apart"
    assert said in capsys.readouterr().err and checkpoint.read_bytes() == before
    assert not (run / "sweep.json").exists()


def test_folds_are_swept_for_an_ensemble(run: Path, tmp_path: Path) -> None:
    """NMS takes the best score of all networks: the threshold of one is none for the others together."""
    other = shutil.copytree(run, tmp_path / "other")
    methods = []
    for runs in ([run], [run, other]):
        assert main(["sweep", *map(str, runs)]) == 0
        trials = json.loads((run / "sweep.json").read_text())["trials"]
        methods.append({trial["method"] for trial in trials})
    assert methods == [{"clustering", "nms"}, {"clustering"}]


@pytest.mark.parametrize("top", [0.75, 1.0])
def test_an_operating_point_that_finds_nothing_is_above_all_scores(top: float) -> None:
    far = np.array([[40.0, 0, 0, 45, 5, 5], [0, 0, 0, 5, 5, 5]])
    found = {"x": {"boxes": far, "scores": np.array([top, 0.5]), "labels": np.zeros(2, np.int64)}}
    targets = {"x": {"boxes": far[1:], "labels": np.zeros(1, np.int64)}}
    (row,) = operating_points(match(found, targets, ["a"]), [0.5])
    assert row["threshold"] > top and (row["sensitivity"], row["measured"]) == (0.0, 0.0)
    measured = measure_at(row["threshold"], match(found, targets, ["a"]))
    assert (measured["sensitivity"], measured["false_positives_per_case"]) == (0.0, 0.0)


def test_an_operating_point_that_finds_nothing_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(run), "false_positives=0.001"]) == 0
    chosen = read_checkpoint(run / "checkpoints" / "last.ckpt")[NOTE]["inference"]["operating"]
    said = capsys.readouterr()
    assert chosen["sensitivity"] == 0 and "sensitivity 0.000" in said.out
    assert "warning: no object is found there with 0.001 false positives per case" in said.err
    assert main(["test", str(run), "samples=0", "pictures=0"]) == 0
    assert main(["sweep", str(run), "false_positives=50"]) == 0
    assert "warning: no object" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["test", "sweep"])
def test_a_run_of_an_earlier_version(run: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    checkpoint = run / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    del content[NOTE]["batch"]
    torch.save(content, checkpoint)
    assert main([command, str(run)]) == 2
    error = capsys.readouterr().err
    assert f"{run} was trained by an earlier version, whose checkpoints lack batch" in error and error.count("\n") == 1
