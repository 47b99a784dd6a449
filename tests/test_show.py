"""`show` on one of everything: it names the kind and says what matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from tiny_store import tiny_store

from pretrain3d.__main__ import main
from pretrain3d.geometry import Frame
from pretrain3d.reporting.formats.found import Found
from pretrain3d.reporting.formats.tables import write_json_boxes
from pretrain3d.reporting.formats.volumes import write_nifti


def shown(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, str]:
    """The title under "", then every line's value by its key."""
    assert main(["show", *map(str, argv)]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    return {"": title} | {key: value for key, _, value in (line.strip().partition("  ") for line in lines)}


def mistake(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["show", *map(str, argv)]) == 2
    return capsys.readouterr().err.removeprefix("pretrain3d: error: ").rstrip("\n")


def test_raw_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(capsys, tmp_path).startswith(
        f"{tmp_path} is neither a store, a run nor raw data that a reader knows (nndetection: {tmp_path}: no "
    )
    for name in ("b", "a"):
        nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / f"{name}.nii.gz")
    lines = {key: value.strip() for key, value in shown(capsys, tmp_path).items()}
    assert lines == {
        "": f"{tmp_path}: raw data of {tmp_path.name}, reader=images",
        "cases": "2 (2 pretrain), 2 patients",
        "classes": "none",
        "channels": "not said by the files; give modality= to prepare",
        "licence": "unknown",
    }


def test_a_data_set_with_a_mistake_is_no_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "nodule"}, "modalities": []}')
    assert "dataset.json: modalities must name every number from 0 on, got []" in mistake(capsys, tmp_path)


def test_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tiny_store(tmp_path / "store")
    lines = shown(capsys, store.path)
    assert lines[""] == f"{store.path}: store of the data set tiny"
    assert {key: value.strip() for key, value in lines.items()}.items() >= {
        "cases": "11 (6 train, 1 test, 4 pretrain), 11 patients",
        "channels": "CT",
        "spacing": "1 x 1 x 1 mm",
        "shape": "median 42 x 36 x 30, 24 x 12 x 20 to 52 x 36 x 30",
        "empty": "2 annotated cases without an object",
        "fold 0": "4 train, 2 val, 1 test, 4 pretrain",
        "data hash": store.data_hash,
        "plan.patch_size": "[16, 16, 16]",
        "plan.intensity.low": "-200.0",
    }.items()
    assert f"{store.classes[0]}, 10 objects in 5 cases, edge 6 to 7 mm, median 6" in lines["class 0"]
    assert shown(capsys, store.path / "plan.yaml")[""] == f"{store.path}/plan.yaml: plan of a store"


def test_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(
        "data: {store: stores/toy}\ntrainer: {max_steps: 5, twice: '${trainer.max_steps}'}\n"
    )
    assert main(["show", f"{tmp_path}/a.yaml", "trainer.max_steps=7"]) == 0
    assert capsys.readouterr().out == (
        f"# {tmp_path}/a.yaml: configuration with trainer.max_steps=7, resolved\n"
        "name: toy/scratch-f0-s0\nout: runs\nseed: 0\ndata:\n  store: stores/toy\n"
        "trainer:\n  max_steps: 7\n  twice: 7\n"
    )


def test_every_shipped_configuration_shows(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        assert main(["show", str(file)]) == 0, capsys.readouterr().err


RESULT: dict[str, Any] = {
    "run": "phantom/mae",
    "metrics": {key: {"value": 0.5, "low": 0.4, "high": 0.6} for key in ("mAP", "AP@0.10", "AP@0.15")},
    "per_class": {"nodule": {"mAP": {"value": 0.25, "low": None, "high": None}}, "lesion": {"mAP": {"value": None}}},
    "cases": [{}, {}],
    "config": {},
    "seed": 3,
    "cost": {"seconds": 61.4, "steps": 1500, "samples": 6000},
    "data": {"name": "phantom", "hash": "abc"},
    "backbone": {"name": "resenc_xs", "fingerprint": "f00d", "init": "mae", "transfer": {"path": "mae.pt"}},
    "commit": {"hash": "1234", "dirty": True},
}


def test_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    assert main(["show", f"{tmp_path}/result.json"]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}/result.json: result of phantom/mae\n"
        "  mAP            0.500 [0.400, 0.600]\n"
        "  AP@0.10        0.500 [0.400, 0.600]\n"
        "  mAP of nodule  0.250\n"
        "  mAP of lesion  null (no object of this class)\n"
        "  cases          2, of phantom, hash abc\n"
        "  backbone       name resenc_xs fingerprint f00d\n"
        "  transfer       mae.pt\n"
        "  seed           3\n"
        "  steps          1,500\n"
        "  samples        6,000\n"
        "  training time  1 min 01 s\n"
        "  commit         1234 with changes\n"
    )


def test_a_result_says_whether_its_cases_are_those_of_the_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("val", "test"):
        (tmp_path / "result.json").write_text(json.dumps({**RESULT, "asked": {"split": split}}))
        assert shown(capsys, tmp_path / "result.json")["cases"].strip() == f"2 {split}, of phantom, hash abc"


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/last.ckpt").write_bytes(bytes(2_000_000))
    (run / "config.yaml").write_text(
        "name: toy/mae\ndata: {store: stores/toy}\nbackbone: {name: resenc_xs}\n"
        "module: {name: reconstruction, method: {name: mae}}\ntrainer: {max_steps: 9}\n"
    )
    (run / "state.json").write_text('{"status": "running", "step": 4}')
    (run / "metrics.csv").write_text("step,train/loss,val/mAP\n1,0.5,\n2,0.25,0.75\n3,,0.5\n")
    (run / "result.json").write_text(json.dumps(RESULT))
    assert main(["show", str(run)]) == 0
    assert capsys.readouterr().out.startswith(
        f"{run}: run\n"
        "  name          toy/mae\n"
        "  state         unfinished at step 4 of 9\n"
        "  store         stores/toy\n"
        "  backbone      resenc_xs\n"
        "  transfer      none, from scratch\n"
        "  module        reconstruction mae\n"
        "  train/loss    0.25 at step 2\n"
        "  val/mAP       0.5 at step 3\n"
        "  best val/mAP  0.75 at step 2\n"
        "  checkpoints   last.ckpt (2.0 MB)\n"
        f"{run}/result.json: result of phantom/mae\n"
    )


@pytest.fixture
def backbone() -> Any:
    import torch

    from pretrain3d.backbones import BACKBONES
    from pretrain3d.registry import build

    torch.manual_seed(0)
    return build(BACKBONES, {"name": "resenc_xs", "in_channels": 1}, "backbone")


PREPROCESSING = {"spacing_mm": [1.0, 1.0, 2.0], "intensity": {"scheme": "window", "low": -200.0}}


def test_checkpoints_of_other_frameworks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    tensors, plans = {"a": torch.zeros(1), "b": torch.zeros(1)}, {"configurations": {}}
    swin = {"state_dict": {"module.patch_embed.proj.weight": torch.zeros(12, 1, 2, 2, 2)}}
    plan = {"architecture_plans": {"arch_class_name": "ResEncL"}}
    for form, content in [
        ("nnssl", {"network_weights": tensors, "nnssl_adaptation_plan": plan}),
        ("nnssl", {"network_weights": tensors, "nnssl_adaptation_plan": plan, "pretrain3d": {}}),
        ("nnssl", {"network_weights": None, "nnssl_adaptation_plan": None}),
        ("nnunet", {"network_weights": tensors, "init_args": {"plans": plans}}),
        ("monai_swin", swin),
    ]:
        torch.save(content, tmp_path / "file.pth")
        lines = shown(capsys, tmp_path / "file.pth")
        assert lines[""].endswith(f"in the form {form}; `pretrain3d import {tmp_path}/file.pth out=FILE` reads them")
        assert lines.get("tensors", "").strip() == ("2" if content.get("network_weights") else "")


def test_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str], backbone: Any) -> None:
    from pretrain3d.backbones.transfer import export_weights, fingerprint

    node, state = {"name": "resenc_xs", "in_channels": 1}, backbone.state_dict()
    export_weights(tmp_path / "mae.pt", node, state, PREPROCESSING, {"run": "phantom/mae", "step": 9})
    lines = shown(capsys, tmp_path / "mae.pt")
    assert lines[""] == f"{tmp_path}/mae.pt: exported backbone, version 1"
    assert {key: value.strip() for key, value in lines.items()}.items() >= {
        "backbone": "resenc_xs (in_channels=1)",
        "parameters": f"{sum(parameter.numel() for parameter in backbone.parameters()):,} in the backbone",
        "fingerprint": fingerprint(state),
        "preprocessing.spacing_mm": "[1.0, 1.0, 2.0]",
        "preprocessing.intensity.scheme": "window",
        "source.run": "phantom/mae",
    }.items()


def test_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], backbone: Any) -> None:
    import torch

    from pretrain3d.backbones.transfer import fingerprint
    from pretrain3d.modules.base import NOTE

    note = {
        "kind": "detection",
        "weights": "ema",
        "backbone": {"name": "resenc_xs", "in_channels": 1},
        "module": {"name": "detection", "detector": {"name": "retina_unet"}},
        "classes": ["nodule", "lesion"],
        "preprocessing": PREPROCESSING,
        "source": {"run": "phantom/det", "step": 7},
    }
    averaged = {name: value + 1 for name, value in backbone.state_dict().items()}
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    state |= {f"averaged.backbone.{name}": value for name, value in averaged.items()}
    torch.save({NOTE: note, "state_dict": state, "global_step": 7}, tmp_path / "last.ckpt")
    lines = {key: value.strip() for key, value in shown(capsys, tmp_path / "last.ckpt").items()}
    assert lines[""] == f"{tmp_path}/last.ckpt: checkpoint of a detection module"
    assert (
        lines.items()
        >= {
            "module": "detection retina_unet",
            "classes": "nodule, lesion",
            "step": "7",
            "weights": "ema are used",
            "fingerprint": fingerprint(averaged),
            "source.run": "phantom/det",
        }.items()
    )
    torch.save({"state_dict": state}, tmp_path / "foreign.ckpt")
    assert mistake(capsys, tmp_path / "foreign.ckpt").startswith(f"{tmp_path}/foreign.ckpt is not a checkpoint of ")


def test_score_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = {"boxes": [[0, 0, 0, 2, 2, 2], [0, 0, 0, 3, 3, 3]], "labels": [1, 1]}
    targets = {"classes": ["a", "b"], "cases": {"one": case, "two": {"boxes": [], "labels": []}}}
    predictions = {"classes": ["a", "b"], "cases": {"one": case | {"scores": [0.25, 0.9]}}}
    (tmp_path / "targets.json").write_text(json.dumps(targets))
    (tmp_path / "predictions.json").write_text(json.dumps(predictions))
    assert main(["show", f"{tmp_path}/targets.json", f"{tmp_path}/predictions.json"]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}/targets.json: score file of targets\n"
        "  cases  2, 1 without a box\n"
        "  a      0 boxes\n"
        "  b      2 boxes\n"
        "\n"
        f"{tmp_path}/predictions.json: score file of predictions\n"
        "  cases   1, 0 without a box\n"
        "  a       0 boxes\n"
        "  b       2 boxes\n"
        "  scores  0.25 to 0.9\n"
    )


def test_folders_of_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Masks of boxes are no images."""
    frame = Frame.of_file(np.eye(4), (12, 12, 12))
    boxes = np.array([[1, 1, 1, 6, 6, 6], [7, 7, 7, 9, 9, 9], [2, 2, 2, 3, 3, 3]])
    some = Found(frame, boxes, np.array([0.9, 0.5, 0.3]), np.array([1, 0, 1]))
    none = Found(frame, boxes[:0], np.zeros(0), np.zeros(0, np.int64))
    for case, found in (("1.2.a", some), ("b", none)):
        write_nifti(tmp_path, case, ["node", "lesion"], found)
    for folder in (tmp_path, tmp_path / "nifti"):
        assert shown(capsys, folder) == {
            "": f"{folder}: masks of the boxes that predict found", "images": "2, 1 without a box",
            "node": "  1 boxes", "lesion": "1 boxes", "hidden": "1 boxes that better ones cover",
        }  # fmt: skip
    write_json_boxes(tmp_path, ["node", "lesion"], {"1.2.a": some, "b": none})
    assert shown(capsys, tmp_path)[""] == f"{tmp_path}/predictions.json: score file of predictions"


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "other.yaml").write_text("a: 1\n")
    (tmp_path / "other.json").write_text('{"a": 1, "b": 2}')
    (tmp_path / "broken.json").write_text("{")
    assert mistake(capsys) == "show takes at least one path; see pretrain3d show --help"
    assert mistake(capsys, tmp_path / "none") == f"{tmp_path}/none does not exist"
    assert mistake(capsys, tmp_path / "a.txt").startswith(f"{tmp_path}/a.txt is nothing that show knows: raw data, ")
    assert mistake(capsys, tmp_path / "other.yaml").startswith(
        f"{tmp_path}/other.yaml is no configuration: it has none"
    )
    assert mistake(capsys, tmp_path / "other.json") == (
        f"{tmp_path}/other.json is neither a result nor a score file; it holds a, b"
    )
    assert mistake(capsys, tmp_path / "broken.json").startswith(f"{tmp_path}/broken.json is not JSON: ")
    assert mistake(capsys, tmp_path / "other.json", "seed=1") == (
        f"seed=1 overrides a configuration, and {tmp_path}/other.json is none"
    )
