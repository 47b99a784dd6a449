"""What `fit` does in a folder that holds a run already."""

from __future__ import annotations

import copy
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from pretrain3d.config import UserError
from pretrain3d.reporting.results import write_json
from pretrain3d.reporting.run_folder import RunFolder

SETTINGS: dict[str, Any] = {
    "name": "r", "out": "runs", "seed": 0, "data": {"store": "s", "num_workers": 2}, "logger": {"wandb": None},
    "trainer": {"max_steps": 6, "log_every_n_steps": 1, "checkpoint_every_n_steps": 2, "precision": "32-true"},
}  # fmt: skip


def with_value(key: str, value: Any) -> dict[str, Any]:
    settings = copy.deepcopy(SETTINGS)
    node = settings
    *sections, last = key.split(".")
    for section in sections:
        node = node[section]
    node[last] = value
    return settings


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of 6 steps that was killed after its checkpoint of step 4."""
    run = RunFolder(tmp_path / "runs" / "r")
    run.open(SETTINGS)
    run.last.parent.mkdir()
    run.last.write_bytes(b"")
    write_json(run.path / "state.json", {"status": "running", "step": 4})
    return run


def test_what_is_no_run_or_not_far_enough(tmp_path: Path, folder: RunFolder) -> None:
    folder.last.unlink()
    for path, said in [
        (folder.path, "r has no checkpoint last yet; `fit` writes one every trainer.checkpoint_every_n_steps"),
        (tmp_path, "holds no checkpoints/last.ckpt; is it the folder of a run?"),
        (tmp_path / "none", "none does not exist"),
    ]:
        with pytest.raises(UserError) as caught:
            RunFolder(path).checkpoint("last")
        assert str(caught.value).endswith(said)
    with pytest.raises(UserError, match="none does not exist"):
        RunFolder(tmp_path / "none").config()


@pytest.mark.parametrize("status", ["running", "finished"])
def test_steps_that_were_done_stay_done(folder: RunFolder, status: str) -> None:
    write_json(folder.path / "state.json", {"status": status, "step": 4})
    with pytest.raises(UserError, match=r"already ran 4 steps; trainer.max_steps=3 is less"):
        folder.start_of(with_value("trainer.max_steps", 3))
    assert folder.start_of(with_value("trainer.max_steps", 8)) == "resume"
    assert folder.start_of(with_value("trainer.max_steps", -1)) == "resume"  # no limit
    same = folder.start_of(with_value("trainer.max_steps", 4))
    assert same == ("finished" if status == "finished" else "resume")


def test_two_processes_do_not_train_one_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r")
    run.open(SETTINGS)

    def refused() -> None:
        with pytest.raises(UserError, match=rf"r is being trained by another process \({os.getppid()} on .+\); give"):
            RunFolder(run.path).open(with_value("seed", 1))

    other = multiprocessing.get_context("fork").Process(target=refused)
    other.start()
    other.join()
    assert other.exitcode == 0 and run.config() == SETTINGS


def test_what_the_weights_do_not_depend_on_may_change(folder: RunFolder) -> None:
    changes = {
        "data.num_workers": 0, "logger.wandb": {"mode": "offline"}, "logger": None, "trainer.log_every_n_steps": 5,
        "trainer.checkpoint_every_n_steps": 1, "out": str(folder.path.parent),
    }  # fmt: skip
    for key, value in changes.items():
        assert folder.start_of(with_value(key, value)) == "resume", key
    for key, value in {"data.store": "t", "trainer.precision": "16", "seed": 1}.items():
        with pytest.raises(UserError, match=f"another config .{key} '?.*there, {value!r} asked"):
            folder.start_of(with_value(key, value))


def test_what_an_earlier_version_did_not_note_is_named(folder: RunFolder) -> None:
    note = {"classes": ["a"], "sets": {}}
    folder.check_same(note, note)
    with pytest.raises(UserError, match=r"the store of .* is not what it was trained on .*classes"):
        folder.check_same(note, {**note, "classes": ["b"]})
    with pytest.raises(UserError, match="by an earlier version, whose checkpoints lack batch: it cannot be resumed"):
        folder.check_same(note, {**note, "batch": {"batch_size": 1}})
