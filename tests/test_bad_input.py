"""What cannot be trained on or predicted is one line that names case and value."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from raw_folder import save, write_cases
from tiny_store import blocks, image_of, make_case, tiny_store, write_store

from pretrain3d.__main__ import main
from pretrain3d.config import UserError
from pretrain3d.data.case import case_path
from pretrain3d.data.prepare import prepare
from pretrain3d.data.readers.contract import RawVolume
from pretrain3d.data.readers.nndetection import NnDetection
from pretrain3d.data.store import Store
from pretrain3d.modules import pending
from pretrain3d.modules.base import BaseModule

NAN = float("nan")
BOXES = [
    ([3.0, NAN, 5, 9, 8, 12], "box 0 [3.0, nan, 5.0, 9.0, 8.0, 12.0] is not finite"),
    ([3.0, 4, 5, 3, 8, 12], "box 0 [3.0, 4.0, 5.0, 3.0, 8.0, 12.0] is empty or inverted"),
    ([9.0, 4, 5, 3, 8, 12], "box 0 [9.0, 4.0, 5.0, 3.0, 8.0, 12.0] is empty or inverted"),
    ([30.0, 4, 5, 43, 8, 12], "box 0 [30.0, 4.0, 5.0, 43.0, 8.0, 12.0] lies outside the volume [40, 36, 30]"),
    ([-1.0, 4, 5, 3, 8, 12], "box 0 [-1.0, 4.0, 5.0, 3.0, 8.0, 12.0] lies outside the volume [40, 36, 30]"),
]


@pytest.mark.parametrize(("box", "text"), BOXES)
def test_a_store_with_an_impossible_box_is_refused(tmp_path: Path, box: list[float], text: str) -> None:
    shape = (40, 36, 30)
    case = make_case("a", image_of(shape, 0), blocks(shape, [(3, 4, 5, 9, 8, 12)]), [1])
    assert case.problem(2) == ""
    assert replace(case, boxes=np.array([box], np.float32)).problem(2) == text
    path = write_store(tmp_path, [(case, image_of(shape, 0), blocks(shape, [(3, 4, 5, 9, 8, 12)]))]).path
    record = json.loads(case_path(path, "a").read_text())
    case_path(path, "a").write_text(json.dumps({**record, "boxes": [box]}))
    with pytest.raises(UserError) as caught:
        Store(path)
    assert f"case a: {text}" in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_label_of_a_store_is_refused(tmp_path: Path) -> None:
    path = tiny_store(tmp_path, 2, 0).path
    record = json.loads(case_path(path, "train_1").read_text())
    case_path(path, "train_1").write_text(json.dumps({**record, "labels": [0, 2, 1]}))
    with pytest.raises(UserError, match=r"case train_1: label 2 is not among the 2 classes \(0\.\.1\)"):
        Store(path)


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        ("nnunet", " has no class of objects, so that there is nothing to detect; with reader=nnunet name labels"),
        (
            "nndetection",
            "/plan.yaml has no anchors, as no training case held an object when it was made; where some do",
        ),
    ],
)
def test_a_detector_without_objects_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reader: str, text: str
) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    write_cases(raw, 2)
    for path in sorted((raw / "labelsTr").iterdir()):
        if path.suffix == ".json":
            path.write_text(json.dumps({"instances": {}}))
        elif reader == "nndetection":
            save(path, np.zeros((30, 28, 24), np.uint8), nib.load(path).affine)
    if reader == "nnunet":
        labels = {"background": 0, "nodule": 1, "lesion": 2}
        content = {"channel_names": {"0": "CT"}, "labels": labels}
        (raw / "dataset.json").write_text(json.dumps(content), encoding="utf-8-sig")  # begins with a byte order mark
    line = ["prepare", str(raw), f"out={store}", f"reader={reader}", "spacing_mm=2", "patch_size=16", "workers=1"]
    assert main(line) == 0
    assert "2 cases, 0 objects" in capsys.readouterr().out
    out = [f"out={tmp_path}", f"data.store={store}", "data.num_folds=2", "backbone=resenc_xxs"]
    assert main(["fit", "--config", "configs/detect/base.yaml", "name=det", *out]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"pretrain3d: error: {store}{text}")


def test_an_unknown_label_of_a_reader_is_named_and_the_other_cases_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cases(tmp_path / "raw", 2)
    read = NnDetection.read

    def careless(self: NnDetection, case: Any) -> RawVolume:
        volume = read(self, case)
        return replace(volume, labels={1: 0, 2: 5}) if case.id == "case_0" else volume

    monkeypatch.setattr(NnDetection, "read", careless)
    summary = prepare(NnDetection(tmp_path / "raw"), tmp_path / "out", None, 1, progress=False)
    assert summary.done == ["case_1"]
    assert "case case_0: label 5 is not among the 2 classes (0..1)" in summary.failed["case_0"]


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_cases(value: float) -> None:
    """The step after looks at it; `check_pending` is also called before a validation, a checkpoint and at the end."""
    logged: dict[str, Any] = {}
    module = SimpleNamespace(
        global_step=7, _pending=None, told_to_stop=False, _stops=False,
        log=lambda key, value, **_: logged.update({key: value}),
        _mean_over_processes=lambda losses: losses, _log_rates=lambda: None, head_name="head", get_submodule={}.get,
    )  # fmt: skip
    module.check_pending = lambda: BaseModule.check_pending(module)  # type: ignore[arg-type]
    batch = {"case_ids": ["a", "b", "a"]}
    BaseModule.finish_losses(module, {"loss": torch.tensor(1.0)}, batch, "train")  # type: ignore[arg-type]
    BaseModule.finish_losses(module, {"loss": torch.tensor(value)}, batch, "train")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"the training loss became {value} at step 7 \(cases a, b\)"):
        BaseModule.finish_losses(module, {"loss": torch.tensor(1.0)}, batch, "train")  # type: ignore[arg-type]
    assert logged.keys() == {"train/loss"}


def test_a_loss_that_is_not_finite_on_another_process_stops_this_one_with_the_same_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pending, "all_sum", lambda own: own + torch.tensor([NAN, 0.0]))
    monkeypatch.setattr(pending, "gather_objects", lambda own: [own, (NAN, ("c", "d")), (2.0, ("e",)), (NAN, ("c",))])
    module = SimpleNamespace(_pending=pending.PendingLoss.of(7, torch.tensor(1.0), ["a", "b"]), _stops=False)
    with pytest.raises(UserError, match=r"the training loss became nan at step 7 \(cases c, d\)"):
        BaseModule.check_pending(module)  # type: ignore[arg-type]
