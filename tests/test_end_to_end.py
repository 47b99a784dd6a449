"""The whole chain as a user types it, in one process and at the smallest size that is still real."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import nibabel
import pytest
import torch
import yaml

from pretrain3d.__main__ import main
from pretrain3d.backbones.transfer import load_export
from pretrain3d.commands.assemble import warn_of_anchors
from pretrain3d.config import UserError
from pretrain3d.data.splits import fold_cases
from pretrain3d.data.store import Store
from pretrain3d.devices import cpu_has_bf16

TINY = [
    "data.patch_size=[32,32,32]", "data.batch_size=2", "data.num_workers=0", "+data.num_val_patches=2",
    "module.warmup_steps=1", "trainer.max_steps=2", "trainer.val_every_n_steps=2", "trainer.checkpoint_every_n_steps=1",
    "trainer.log_every_n_steps=1", "trainer.accelerator=cpu",
]  # fmt: skip
SLIM = ["+module.detector.fpn_channels=16", "+module.detector.num_convs=1"]


@pytest.fixture(scope="module")
def runs(phantom_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MAE, its export, and a detector from it, two steps each."""
    out = tmp_path_factory.mktemp("runs")
    common = [f"out={out}", f"data.store={phantom_store}", *TINY]
    assert main(["fit", "--config", "configs/pretrain/phantom_mae.yaml", "name=mae", *common]) == 0
    assert main(["export", str(out / "mae"), f"out={out / 'mae.pt'}"]) == 0
    detect = ["fit", "--config", "configs/detect/phantom.yaml", "name=det", f"transfer.path={out / 'mae.pt'}"]
    assert main([*detect, "module.overlap=0", *common]) == 0
    return out


def test_pretrained_weights_arrive(runs: Path) -> None:
    exported = torch.load(runs / "mae.pt", weights_only=True)
    note = torch.load(runs / "det" / "checkpoints" / "last.ckpt", weights_only=True)["pretrain3d"]
    assert note["transfer"]["source"]["method"] == "mae"
    assert note["backbone"]["name"] == exported["backbone"]["name"] == "resenc_xxs"
    assert note["preprocessing"]["spacing_mm"] == exported["preprocessing"]["spacing_mm"]
    assert note["pretrained_on"] == exported["corpus"] and note["leakage"] == [], (
        "unlabelled cases are no others' copies"
    )
    assert exported["corpus"]["cases"] == 2 and note["corpus"]["cases"] == 4


def test_test_and_table(runs: Path, phantom_store: Path) -> None:
    assert main(["test", str(runs / "det"), "samples=50", "pictures=1"]) == 0
    result = json.loads((runs / "det" / "result.json").read_text())
    assert {"mAP", "AP@0.10", "AP@0.50", "FROC@0.10"} <= result["metrics"].keys()
    interval = result["metrics"]["AP@0.10"]
    assert interval["low"] <= interval["value"] <= interval["high"]
    assert result["backbone"]["init"] == "mae" and result["leakage"] == []
    out = runs / "mean_box"
    assert main(["test", "baseline=mean_box", f"store={phantom_store}", f"out={out}", "samples=50"]) == 0
    table, report = runs / "table.md", runs / "report.html"
    assert main(["table", str(runs / "det"), str(out), f"out={table}", f"report={report}"]) == 0
    assert "mAP" in table.read_text(encoding="utf-8") and "mean_box" in table.read_text(encoding="utf-8")
    html = report.read_text(encoding="utf-8")
    assert "<html" in html and 'src="http' not in html and 'href="http' not in html  # fetches nothing
    # The score command, given the files that `test` wrote, finds the same numbers.
    scores = runs / "scores.json"
    files = [f"predictions={runs / 'det' / 'predictions.json'}", f"targets={runs / 'det' / 'targets.json'}"]
    assert main(["score", *files, f"out={scores}", "samples=50"]) == 0
    assert json.loads(scores.read_text())["mAP"] == pytest.approx(result["metrics"]["mAP"]["value"], abs=1e-9)


def test_what_predict_cannot_use_is_said_before_it_predicts(
    runs: Path, phantom_raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = str(min((phantom_raw / "imagesTs").glob("*_0000.nii.gz")))
    (tmp_path / "text.ckpt").write_text("case,score\na,0.5\n")
    for weights, message in (
        (runs / "mae.pt", "mae.pt is a file of `pretrain3d export`, a backbone alone; a checkpoint of `fit` is needed"),
        (runs / "mae", "holds a reconstruction module; a detection module is needed; `fit` with transfer.path= trains"),
        (tmp_path / "text.ckpt", "cannot be read as a file of torch.save: it is of another kind, or was cut short"),
    ):
        assert main(["predict", str(weights), image, f"out={tmp_path / 'out'}"]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr("pretrain3d.api.Detector.predict", lambda *args, **kwargs: pytest.fail("it predicts"))
    assert main(["predict", str(runs / "det"), image, "out=/proc/out"]) == 2  # where nobody can write
    assert capsys.readouterr().err.startswith("pretrain3d: error: /proc/out: ")


def test_predict_needs_one_file_and_a_nifti(runs: Path, phantom_raw: Path) -> None:
    image = sorted((phantom_raw / "imagesTs").glob("*_0000.nii.gz"))[0]
    out = runs / "predicted"
    assert main(["predict", str(runs / "det" / "checkpoints" / "last.ckpt"), str(image), f"out={out}"]) == 0
    found = json.loads((out / "predictions.json").read_text())
    (case,) = found["cases"].values()
    shape = nibabel.load(image).shape
    for box in case["boxes"]:
        assert all(-1e-3 <= box[axis] < box[axis + 3] <= shape[axis] + 1e-3 for axis in range(3))


def test_finished_run_is_left_alone_and_another_config_is_refused(
    runs: Path, phantom_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["fit", "--config", "configs/pretrain/phantom_mae.yaml", "name=mae", f"out={runs}",
            f"data.store={phantom_store}", *TINY]  # fmt: skip
    before = (runs / "mae" / "checkpoints" / "last.ckpt").read_bytes()
    assert main(line) == 0
    assert "finished" in capsys.readouterr().out
    assert main([*line, "module.optimizer.lr=0.5"]) == 2
    assert "module.optimizer.lr" in capsys.readouterr().err
    assert (runs / "mae" / "checkpoints" / "last.ckpt").read_bytes() == before
    assert main([*line[:-1], "trainer.max_steps=3", line[-1]]) == 0
    assert json.loads((runs / "mae" / "state.json").read_text())["step"] == 3
    exact = "highest" if cpu_has_bf16() else "high"
    assert torch.get_float32_matmul_precision() == exact  # bf16-mixed: what is left in float32 is exact


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_is_single_on_a_cpu_without_it(
    precision: str, phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("pretrain3d.devices.cpu_has_bf16", lambda: False)
    line = ["fit", "--config", "configs/pretrain/phantom_mae.yaml", f"out={tmp_path}", f"data.store={phantom_store}",
            *TINY, "data.patch_size=[16,16,16]"]  # fmt: skip
    for name, given in (("half", precision), ("single", "32-true")):
        assert main([*line, f"name={name}", f"trainer.precision={given}"]) == 0
        said = capsys.readouterr().err
        assert said.count(f"trainer.precision={given} is slow on this CPU") == (name == "half")
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("half", "single")]
    index = rows[0][0].split(",").index("train/loss")
    half, single = ([row.split(",")[index] for row in each] for each in rows)
    assert half == single and len(half) > 2
    note = torch.load(tmp_path / "half" / "checkpoints" / "last.ckpt", weights_only=True)["pretrain3d"]
    assert note["precision"] == "32-true"
    assert main([*line, "name=half", f"trainer.precision={precision}", "trainer.max_steps=3"]) == 0  # the same config


def test_a_plan_is_for_its_backbone_and_its_runs(
    phantom_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["fit", "--config", "configs/detect/base.yaml", f"out={tmp_path}", f"data.store={phantom_store}", *TINY,
            *SLIM, "module.overlap=0"]  # fmt: skip
    small = ["backbone=resenc", "+backbone.channels=[8,8]", "+backbone.strides=[1,2]", "+backbone.blocks=[1,1]"]
    assert main([*line, "name=small", *small]) == 0  # one level, the plan's anchors are for four
    said = capsys.readouterr().err
    assert "on the levels of resenc the plan's anchors have a mean best IoU of" in said
    assert "give module.detector.anchors" in said and "pretrain3d plan" not in said  # which takes no arguments of it
    store = Store(phantom_store)
    data = SimpleNamespace(store=store, train_ids=fold_cases(store, 0)["train"])
    for own, advice in (
        (True, "give module.detector.anchors, sizes in voxels"),
        (False, "plan .* backbone=resenc_xs` finds"),
    ):
        warn_of_anchors(torch.full((1, 1, 3), 40.0), data, "resenc_xs", own)
        assert re.search(advice, capsys.readouterr().err)
    assert main([*line, "name=det"]) == 0
    assert torch.get_float32_matmul_precision() == "high"  # 32-true
    assert "mean best IoU" not in capsys.readouterr().err

    plan, checkpoint = phantom_store / "plan.yaml", tmp_path / "det" / "checkpoints" / "last.ckpt"
    before, written = plan.read_text(), checkpoint.read_bytes()
    try:
        plan.write_text(yaml.safe_dump({**yaml.safe_load(before), "anchors": {"sizes": [[9.0]] * 3}}))
        assert main([*line, "name=det", "trainer.max_steps=3"]) == 2
        error = capsys.readouterr().err
        assert "is not what it was trained on (module.detector.anchors.sizes" in error
        assert "[[9.0], [9.0], [9.0]] now" in error and checkpoint.read_bytes() == written
        assert main(["test", str(tmp_path / "det"), "samples=0", "pictures=0"]) == 0  # with those of its training
    finally:
        plan.write_text(before)

    index = phantom_store / "index.json"
    before, ids = index.read_text(), [case.id for case in Store(phantom_store).cases.values() if case.split == "train"]
    try:
        index.write_text(json.dumps({**json.loads(before), "folds": [{"train": ids[1:], "val": ids[:1]}]}))
        assert main(["test", str(tmp_path / "det"), "samples=0", "pictures=0"]) == 2  # what was trained on is held out
        assert re.search(rf"sets.*cases '.* there, '{len(ids) - 1} train, 1 val", capsys.readouterr().err)
    finally:
        index.write_text(before)


def test_a_run_that_cannot_begin_leaves_nothing_behind(
    phantom_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["fit", "--config", "configs/pretrain/phantom_mae.yaml", "name=mae", f"out={tmp_path / 'runs'}",
            f"data.store={phantom_store}", *TINY, "+logger.wandb.mode=offline"]  # fmt: skip
    for override, said in {
        "module.warmup_steps=1000": "module.warmup_steps is 1000",
        "module.optimizer.lr=-1": "module.optimizer.lr is -1",
        "trainer.devices=0": "trainer: `Trainer(devices=0)`",
    }.items():
        assert main([*line, override]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "runs").exists()


def test_mistakes_cost_one_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "configs/detect/phantom.yaml", "data.store=nowhere/store"]) == 2
    assert main(["test", str(runs / "absent")]) == 2
    assert main(["predict", str(runs / "absent.ckpt"), "x.nii.gz", "out=y"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(errors) == 3 and all(line.startswith("pretrain3d: error:") for line in errors)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+transfer.paht=x", "unknown key transfer.paht, did you mean 'path'? it takes path, adapt, name"),
        ("transfer.adapt=channels", "transfer.adapt=channels: expected a list"),
        ("transfer.path=.", ". is a folder; `pretrain3d export RUN out=FILE`"),
        ("+logger.tensorboard={}", "unknown key logger.tensorboard; it takes wandb"),
        ("logger.wandb=offline", "logger.wandb=offline: expected a section"),
        ("seed=-1", "seed must be a whole number from 0 on, got -1"),
        ("out=[1]", "out must be a folder, got [1]"),
        (
            "backbone=resenc_s",
            "patches of 48 x 48 x 48 do not fit resenc_s, which needs multiples of 32 x 32 x 32",
        ),
        ("data.patch_size=null backbone=resenc_s", "backbone=resenc_s` makes one for this"),
        ("data.patch_size=null", "needs multiples of 7 x 7 x 7: set data.patch_size"),  # `plan` takes no arguments
        ("stray", "not 'stray' (a value with spaces stands in quotes)"),
    ],
)
def test_mistakes_in_a_config(
    override: str, message: str, phantom_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["fit", "--config", "configs/pretrain/phantom_mae.yaml", "name=mae", f"data.store={phantom_store}", *TINY,
            "data.patch_size=[48,48,48]", f"out={tmp_path}"]  # fmt: skip
    if override == "data.patch_size=null":  # planned for steps of 16 voxels
        line += ["backbone=resenc", "+backbone.channels=[4,4]", "+backbone.strides=[1,7]", "+backbone.blocks=[1,1]"]
    assert main([*line, *override.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_a_checkpoint_is_no_export(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="it is a checkpoint, `pretrain3d export RUN out=FILE` writes"):
        load_export(runs / "mae" / "checkpoints" / "last.ckpt")
    released = runs / "nnssl.pth"
    assert main(["export", str(runs / "mae"), f"out={released}", "format=nnssl"]) == 0
    capsys.readouterr()
    assert main(["show", str(released)]) == 0
    assert "weights in the form nnssl; `pretrain3d import" in capsys.readouterr().out
