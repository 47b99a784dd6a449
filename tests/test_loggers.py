"""metrics.csv holds each step once, whatever happens; W&B logs offline and never stops a run."""

import csv
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from pretrain3d.config import UserError
from pretrain3d.reporting.csv_logger import MetricsCSV
from pretrain3d.reporting.results import read_rows
from pretrain3d.reporting.wandb_logger import log_result, make_wandb_logger, result_curves

RESULT = {
    "metrics": {"mAP": {"value": 0.5, "low": 0.4, "high": 0.6}, "AP@0.10": {"value": None, "low": None, "high": None}},
    "per_class": {"nodule": {"mAP": {"value": 0.5, "low": 0.4, "high": 0.6}}, "none": None},
    "curves": {
        "froc": {"false_positives_per_case": [0.0, 1.0], "sensitivity": [0.0, 0.5]},
        "froc_per_class": {
            "nodule": {"false_positives_per_case": [0.0], "sensitivity": [0.1]},
            "none": {"false_positives_per_case": [], "sensitivity": []},
        },
        "pr@0.50": {"nodule": {"recall": [0.0, 0.5], "precision": [1.0, 0.5]}},
    },
}


def test_rows_of_a_step_are_merged_and_exact(tmp_path):
    logger = MetricsCSV(tmp_path)
    value = float(np.float32(0.1))  # 0.10000000149011612
    logger.log_metrics({"train/loss": value, "epoch": 0}, step=4)
    logger.log_metrics({"val/mAP": 1 / 3}, step=4)
    logger.log_metrics({"train/loss": 2}, step=0)
    assert not logger.path.exists()  # at most every few seconds
    logger.flush()
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "train/loss", "val/mAP"]
    assert [row["step"] for row in rows] == ["1", "5"]
    assert float(rows[1]["train/loss"]) == value and float(rows[1]["val/mAP"]) == 1 / 3
    assert rows[0]["val/mAP"] == ""


def test_a_resumed_table_equals_an_uninterrupted_one(tmp_path):
    def log(logger, steps):
        for step in steps:
            logger.log_metrics({"train/loss": 1 / (step + 3)}, step)
            if step % 4 == 3:
                logger.log_metrics({"val/mAP": step / 7, "a/first": 1.0}, step)

    whole, parts = MetricsCSV(tmp_path / "whole"), MetricsCSV(tmp_path / "parts")
    log(whole, range(12))
    whole.finalize("success")
    log(parts, range(5))
    parts.flush()
    parts = MetricsCSV(tmp_path / "parts")
    parts.start_from(3)  # the checkpoint of step 3; row 4 brought the columns of the validation
    assert [row["step"] for row in read_rows(parts.path)] == ["1", "2", "3"]
    assert "val/mAP" not in parts.path.read_text()
    log(parts, range(3, 12))
    parts.finalize("success")
    assert parts.path.read_bytes() == whole.path.read_bytes()


def test_a_new_run_in_an_old_folder_starts_an_empty_table(tmp_path):
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"train/loss": 1.0}, 0)
    logger.flush()
    MetricsCSV(tmp_path).start_from(0)
    assert read_rows(tmp_path / "metrics.csv") == []


def test_rewriting_is_rare_on_a_long_table(tmp_path, monkeypatch):
    logger = MetricsCSV(tmp_path)
    writes = []
    monkeypatch.setattr("pretrain3d.reporting.csv_logger.write_text", lambda path, text: writes.append(len(text)))
    for step in range(20_000):
        logger.log_metrics({"train/loss": step / 3}, step)
    assert not writes  # well under the interval
    logger.flush()
    logger.flush()
    assert len(writes) == 1  # nothing new the second time


def test_wandb_logs_offline_and_keeps_its_id(tmp_path):
    pytest.importorskip("wandb")
    node = {"mode": "offline", "project": "test"}
    logger = make_wandb_logger(node, tmp_path, {"name": "run", "seed": 3})
    logger.log_metrics({"train/loss": 0.5, "epoch": 0}, step=9)
    logger.log_image("pictures/original", [np.zeros((4, 4), np.uint8)], step=9)
    assert logger.experiment.config["seed"] == 3
    logger.log_metrics({"lr/head": 0.1}, step=19)  # by which W&B knows that the step before is over
    history = dict(logger.experiment.summary)
    assert history["train/loss"] == 0.5 and "pictures/original" in history and "epoch" not in history
    assert history["trainer/global_step"] == history["_step"] == 10
    run_id = logger.experiment.id
    assert getattr(logger.experiment.settings, "finish_timeout", 600) == 600  # not for ever without a network
    logger.finalize("success")
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a failure of the tables or curves would be one
        log_result(node, tmp_path, {"name": "run"}, RESULT)
    ids = [path.stem.removeprefix("run-") for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert set(ids) == {run_id}  # a resumed run is the same run (W&B's folders have names by the second: one or two)


def test_wandb_sums_up_by_the_best_value_and_counts_optimiser_steps(tmp_path):
    pytest.importorskip("wandb")
    logger = make_wandb_logger({"mode": "offline", "notes": "n", "job_type": "j"}, tmp_path, {"name": "run"})
    for step, value in ((9, 0.25), (19, 0.5), (29, 0.375)):
        logger.log_metrics({"train/loss": value}, step)
        logger.log_metrics(dict.fromkeys(("val/mAP", "val/AP@0.10/nodule", "val/loss", "val/spread"), value), step)
    run = logger.experiment
    assert (run.step, run.notes, run.job_type) == (30, "n", "j")
    logger.log_metrics({"val/mAP": 0.9}, 19)  # what a resumed run repeats
    logger.log_metrics({"val/spread": 0.75}, 39)
    logger.log_metrics({"val/spread": 0.5}, 49)
    summary = dict(run.summary)
    logger.finalize("success")
    found = {key: dict(summary[key]) for key in ("val/mAP", "val/AP@0.10/nodule", "val/loss")}
    assert found["val/mAP"] == found["val/AP@0.10/nodule"] == {"max": 0.5, "last": 0.375}
    assert found["val/loss"] == {"min": 0.25, "last": 0.375}
    assert (summary["train/loss"], summary["val/spread"], summary["trainer/global_step"]) == (0.375, 0.75, 40)


def test_every_training_is_a_wandb_run_of_its_own(tmp_path):
    wandb = pytest.importorskip("wandb")
    ids = []
    for name, resume in (("a", False), ("b", False), ("b", True), ("b", False)):  # in one process
        logger = make_wandb_logger({"mode": "offline"}, tmp_path / name, {"name": name}, resume)
        assert logger.experiment.name == name
        ids.append(logger.experiment.id)
        logger.finalize("failed")
        assert wandb.run is None
    assert ids[1] == ids[2] and len(set(ids)) == 3  # begun again, its first steps are not those of the one before


def test_a_part_of_an_offline_run_holds_what_came_before(tmp_path):
    """`wandb sync` sends each part as lines 0, 1, ... of the history: the last one takes the place of the others."""
    pytest.importorskip("wandb")
    table = MetricsCSV(tmp_path)
    for step, value in ((9, 0.5), (19, 0.25), (29, 0.375)):
        table.log_metrics({"train/loss": value, "val/mAP": value}, step)
    table.finalize("success")
    (tmp_path / "pictures").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "pictures" / "step0000020_masked_input.png")
    logger = make_wandb_logger({"mode": "offline"}, tmp_path, {"name": "run"}, resume=True)
    logger.log_result(RESULT | {"asked": {"step": 30}})
    run = logger.experiment
    summary, step, resumes = dict(run.summary), run.step, run.settings.resume
    logger.finalize("success")
    assert dict(summary["val/mAP"]) == {"max": 0.5, "last": 0.375}
    assert (summary["train/loss"], summary["trainer/global_step"], summary["test/mAP"]) == (0.375, 30, 0.5)
    assert "pictures/masked_input" in summary and step == 31 and resumes is None


def test_a_tested_run_is_summed_up_per_class(tmp_path):
    pytest.importorskip("wandb")
    result = RESULT | {"asked": {"step": 70}, "per_class": {"nodule": {"AP@0.10": {"value": 0.25}}, "empty": None}}
    logger = make_wandb_logger({"mode": "offline"}, tmp_path, {"name": "run"}, resume=True)
    logger.log_result(result)
    summary = dict(logger.experiment.summary)
    logger.finalize("success")
    assert summary["test/AP@0.10/nodule"] == 0.25
    assert summary["trainer/global_step"] == 70


def test_curves_without_points_are_not_drawn():
    curves = result_curves(RESULT)
    assert list(curves) == ["FROC at IoU 0.10", "precision-recall at IoU 0.50"]
    assert list(curves["FROC at IoU 0.10"][0]) == ["all classes", "nodule"]


def test_wandb_is_not_started_unless_asked(tmp_path):
    assert make_wandb_logger(None, tmp_path, {}) is None
    assert make_wandb_logger({"mode": "disabled"}, tmp_path, {}) is None
    assert not list(tmp_path.iterdir())


def test_a_missing_wandb_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="no W&B log of this run: ModuleNotFoundError"):
        assert make_wandb_logger({"mode": "offline"}, tmp_path, {}) is None


def test_a_wandb_that_does_not_start_is_a_warning(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**_):
        raise RuntimeError("no service\nhere")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.warns(UserWarning, match="no W&B log of this run: RuntimeError: no service here"):
        assert make_wandb_logger({}, tmp_path, {}) is None


def test_a_wandb_that_breaks_later_is_silent_after_one_warning(tmp_path):
    pytest.importorskip("wandb")
    logger = make_wandb_logger({"mode": "offline"}, tmp_path, {"name": "run"})
    logger.finalize("success")  # the service is gone
    with pytest.warns(UserWarning, match="no more W&B log"):
        logger.log_metrics({"train/loss": 0.5}, step=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.log_metrics({"train/loss": 0.5}, step=1)


@pytest.mark.parametrize(
    "node, message", [({"mode": "ofline"}, "did you mean 'offline'"), ({"projekt": "x"}, "did you mean 'project'")]
)
def test_mistakes_in_the_config_are_named(node, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make_wandb_logger(node, tmp_path, {})
