"""A run that was killed at any moment ends with the weights and the metrics of the run that was not."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Runs `fit` and really kills it (SIGKILL, no handler runs): in the second micro-batch of a step, in the second case of
# a validation, or when half of a checkpoint is on disk.
DRIVER = """
import io, os, signal, sys
import torch
from pretrain3d.modules.detection import DetectionModule
from pretrain3d.__main__ import main

where, at = sys.argv[1], int(sys.argv[2])
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

if where == "training":
    step = DetectionModule.training_step
    def training_step(self, batch, batch_idx):
        if self.global_step == at and batch_idx % 2 == 1:
            die()
        return step(self, batch, batch_idx)
    DetectionModule.training_step = training_step
if where == "validation":
    validate = DetectionModule.validation_step
    def validation_step(self, batch, batch_idx):
        if self.global_step == at and batch_idx == 1:
            die()
        return validate(self, batch, batch_idx)
    DetectionModule.validation_step = validation_step
if where == "checkpoint":
    save, count = torch.save, [0]
    def half(obj, f, *args, **kwargs):
        count[0] += 1
        if count[0] == at:
            whole = io.BytesIO()
            save(obj, whole, *args, **kwargs)
            part = whole.getvalue()[: len(whole.getvalue()) // 2]
            if hasattr(f, "write"):
                f.write(part); f.flush()
            else:
                open(f, "wb").write(part)
            die()
        return save(obj, f, *args, **kwargs)
    torch.save = half
sys.exit(main(sys.argv[3:]))
"""


def fit(arguments: list[str], where: str = "never", at: int = 0) -> int:
    line = [sys.executable, "-c", DRIVER, where, str(at), "fit", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in csv.DictReader(file)]
    return weights, rows


@pytest.mark.slow
def test_killed_run_equals_uninterrupted_run(phantom_store: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        return [
            "--config", "configs/detect/phantom.yaml", f"name={name}", f"out={tmp_path}", f"data.store={phantom_store}",
            "data.patch_size=[32,32,32]", "data.batch_size=2", "data.num_workers=2", "module.ema=0.9",
            "trainer.accumulate_grad_batches=2", "trainer.max_steps=12", "module.warmup_steps=2",
            "trainer.val_every_n_steps=6", "trainer.checkpoint_every_n_steps=2", "trainer.log_every_n_steps=1",
            "trainer.accelerator=cpu", "module.overlap=0",
            "module.finetune={name: two_phase, head_steps: 5}",  # killed where the backbone thaws, too
        ]  # fmt: skip

    assert fit(arguments("whole")) == 0
    killed = arguments("killed")
    assert fit(killed, "training", 1) != 0  # before the first checkpoint
    assert fit(killed, "training", 5) != 0  # between two checkpoints
    assert fit(killed, "validation", 6) != 0
    assert fit(killed, "checkpoint", 1) != 0  # the first one after resuming at step 4
    assert fit(killed, "checkpoint", 3) != 0
    assert fit(killed, "training", 11) != 0
    assert fit(killed, "validation", 12) != 0
    assert fit(killed) == 0

    weights, rows = outcome(tmp_path / "whole")
    weights_killed, rows_killed = outcome(tmp_path / "killed")
    assert weights.keys() == weights_killed.keys()
    different = [key for key in weights if not torch.equal(weights[key], weights_killed[key])]
    assert not different
    steps = [row["step"] for row in rows_killed]
    assert len(steps) == len(set(steps))
    assert rows_killed == rows
    assert not list((tmp_path / "killed").rglob("*.tmp*"))
