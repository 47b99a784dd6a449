"""A training that is stopped by SIGTERM or Ctrl+C says so, with the exit status of that signal."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pretrain3d.__main__ import main
from pretrain3d.commands.fit import train
from pretrain3d.modules import pending
from pretrain3d.modules.base import BaseModule
from pretrain3d.modules.pretraining import PretrainingModule
from pretrain3d.modules.stopping import Stopping

DRIVER = """
import os, signal, sys
from pretrain3d.modules.pretraining import PretrainingModule as Module
from pretrain3d.__main__ import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
step = Module.training_step
def training_step(self, batch, batch_idx):
    if self.global_step == int(sys.argv[2]):
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    return step(self, batch, batch_idx)
Module.training_step = training_step
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=pytest.mark.slow)])
def test_a_signal_is_one_line(
    phantom_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, status: int
) -> None:
    run = tmp_path / "run"
    line = ["fit", "--config", "configs/pretrain/phantom_mae.yaml", "name=run", f"out={tmp_path}",
            f"data.store={phantom_store}", "data.patch_size=[16,16,16]", "data.batch_size=2", "data.num_workers=0",
            "+data.num_val_patches=2", "module.warmup_steps=1", "trainer.max_steps=6", "trainer.val_every_n_steps=6",
            "trainer.checkpoint_every_n_steps=2", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu"]  # fmt: skip
    for step, kept in [(1, "begins again, there is no checkpoint yet"), (3, "continues from the checkpoint of step 2")]:
        call = [sys.executable, "-c", DRIVER, name, str(step), *line]
        done = subprocess.run(call, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stderr[-3000:]
        (said,) = [text for text in done.stderr.splitlines() if "stopped" in text]
        at = step + (name == "SIGTERM")  # Lightning ends the batch first
        assert said == f"{run}: stopped at step {at} of 6; the same call {kept}"
        assert "Traceback" not in done.stderr

    export = ["export", str(run), f"out={tmp_path / 'mae.pt'}"]
    assert main(export) == 0
    assert capsys.readouterr().err == f"{run} is at step 2 of 6\n"
    free = ["data.num_workers=1", "trainer.checkpoint_every_n_steps=1", "trainer.log_every_n_steps=2",
            f"out={tmp_path}/../{tmp_path.name}"]  # fmt: skip
    assert main([*line, *free]) == 0 and main(export) == 0
    assert "is at step" not in capsys.readouterr().err
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["log_every_n_steps"] == 2

    assert main([*line, "name=whole"]) == 0  # none of which changes a bit of the weights
    whole, resumed = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
                      for name in ("whole", "run"))  # fmt: skip
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_signal_to_all_processes_of_a_job_is_one_line_too(phantom_store: Path, tmp_path: Path) -> None:
    """As `timeout`, `scancel` and a terminal that is closed send it: to those that read patches as well."""
    line = ["fit", "--config", "configs/pretrain/phantom_mae.yaml", "name=run", f"out={tmp_path}",
            f"data.store={phantom_store}", "data.patch_size=[32,32,32]", "data.batch_size=2", "data.num_workers=1",
            "module.warmup_steps=1", "trainer.max_steps=2000", "trainer.accelerator=cpu"]  # fmt: skip
    kill = "os.kill(os.getpid(), getattr(signal, sys.argv[1]))"
    driver = DRIVER.replace(kill, "print('told', flush=True); __import__('time').sleep(60)")  # until the worker ends
    call = [sys.executable, "-c", driver, "", "1", *line]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(call, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        assert any("told" in text for text in process.stdout)
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said[-3000:]
    assert f"{tmp_path / 'run'}: stopped at step 1 of 2000; the same call begins again" in said
    assert "Traceback" not in said


def test_a_job_that_slurm_requeues(phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first checkpoint and after it; nothing is written in the middle of a step."""
    asked, steps = tmp_path / "asked", PretrainingModule.training_step
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for key, value in {"NTASKS": 1, "JOB_ID": 7, "JOB_NAME": "train", "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    line = ["fit", "--config", "configs/pretrain/phantom_mae.yaml", f"out={tmp_path}", f"data.store={phantom_store}",
            "data.patch_size=[16,16,16]", "data.batch_size=2", "data.num_workers=0", "module.warmup_steps=1",
            "+data.num_val_patches=2", "trainer.max_steps=6", "trainer.val_every_n_steps=6",
            "trainer.checkpoint_every_n_steps=3", "trainer.accelerator=cpu"]  # fmt: skip
    assert main([*line, "name=whole"]) == 0
    run = tmp_path / "run"
    for stop in (1, 4):

        def step(module: PretrainingModule, batch: dict, batch_idx: int, stop: int = stop) -> torch.Tensor:
            if module.global_step == stop:
                os.kill(os.getpid(), signal.SIGUSR1)
            if module.global_step == stop + 1:
                raise KeyboardInterrupt
            return steps(module, batch, batch_idx)

        monkeypatch.setattr(PretrainingModule, "training_step", step)
        assert main([*line, "name=run"]) == 130
        assert not list(run.glob("hpc_*"))
    monkeypatch.setattr(PretrainingModule, "training_step", steps)
    assert main([*line, "name=run"]) == 0
    assert asked.read_text() == "requeue 7\n" * 2
    one, other = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
                  for folder in (run, tmp_path / "whole"))  # fmt: skip
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert (run / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


class Launcher:
    """Of processes that this one has started."""

    def __init__(self) -> None:
        self.procs, self.sent = ["a process"], []

    def kill(self, number: int) -> None:
        self.sent.append(number)


def test_several_processes_stop_together_at_the_step_after_any_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler exchanges nothing, since NCCL would take it for what the others exchange; nor does every batch."""
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    launcher, loop = Launcher(), SimpleNamespace()
    trainer: Any = SimpleNamespace(
        world_size=2, is_global_zero=True, strategy=SimpleNamespace(launcher=launcher),
        fit_loop=SimpleNamespace(epoch_loop=loop),
    )  # fmt: skip
    told, other = (
        SimpleNamespace(global_step=0, _pending=None, told_to_stop=False, _stops=False, log=lambda *_, **__: None,
                        _mean_over_processes=lambda losses: losses, _log_rates=lambda: None,
                        head_name="head", get_submodule={}.get)
        for _ in range(2)
    )  # fmt: skip
    before = signal.getsignal(signal.SIGTERM)
    try:
        Stopping().on_train_start(trainer, told)
        loop._broadcast_sigterm_tensor()  # no other process is here to answer
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told.told_to_stop and launcher.sent == [signal.SIGTERM]
    with pytest.raises(SIGTERMException):
        Stopping().on_validation_batch_start(trainer, told)
    Stopping().on_validation_batch_start(trainer, other)

    def step(module: Any, others: bool) -> None:
        monkeypatch.setattr(pending, "all_sum", lambda own: own + torch.tensor([1.0, float(others)]))
        module.check_pending = lambda: BaseModule.check_pending(module)
        BaseModule.finish_losses(module, {"loss": torch.tensor(1.0)}, {"case_ids": ["a"]}, "train")

    step(told, others=False)
    step(other, others=True)
    for module in (told, other):
        with pytest.raises(SIGTERMException):
            step(module, others=False)


def test_no_process_outlives_the_error_of_the_one_that_started_it(tmp_path: Path) -> None:
    launcher = Launcher()

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = SimpleNamespace(fit=fails, strategy=SimpleNamespace(launcher=launcher))
    with pytest.raises(OSError, match="No space left"):
        train(trainer, None, None, None)
    assert launcher.sent == [signal.SIGKILL] and launcher.procs == []
    with pytest.raises(OSError, match="No space left"):  # one process, or those of SLURM
        train(SimpleNamespace(fit=fails, strategy=SimpleNamespace(launcher=None)), None, None, None)
