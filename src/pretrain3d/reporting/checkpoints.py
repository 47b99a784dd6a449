"""Checkpoints that survive a kill, and the state of a run."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.callbacks import Checkpoint

from pretrain3d.config import UserError
from pretrain3d.modules.base import BaseModule
from pretrain3d.reporting.csv_logger import MetricsCSV
from pretrain3d.reporting.results import device_name, write_json

Trainer = lightning.Trainer
Module = lightning.LightningModule


class Checkpoints(Checkpoint):
    """``checkpoints/last.ckpt``, ``checkpoints/best.ckpt`` and ``state.json`` of a run folder.

    The checkpoint of step k is written when everything of step k is over (its optimiser step, its row of metrics, its
    validation), which is at the start of the next step or at the end of training. So whenever the process is killed,
    ``last.ckpt`` is a whole file, the rows of ``metrics.csv`` up to its step are on disk, and resuming from it repeats
    whatever was not over. A checkpoint is written every ``every_n_steps`` steps, after each validation and at the end.

    It takes the place of Lightning's own checkpoints: ``Trainer(enable_checkpointing=True)`` adds none beside it.
    ``state.json`` is ``{"status": "running" | "finished", "step": n, "seconds": wall time of training up to there,
    "device": its name}``.

    Args:
        folder: the run's folder.
        every_n_steps: optimiser steps between checkpoints.
        monitor: logged key of a validation that ``best.ckpt`` is the best of.
        mode: ``"max"`` or ``"min"``; of equal values the earlier stays.
    """

    def __init__(self, folder: str | Path, every_n_steps: int, monitor: str = "val/mAP", mode: str = "max") -> None:
        assert every_n_steps >= 1, every_n_steps
        assert mode in ("max", "min"), mode
        self.run_folder = Path(folder)
        self.folder = self.run_folder / "checkpoints"
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.mode = mode
        self.best: float | None = None
        self.seconds = 0.0  # of earlier sessions up to the checkpoint, then up to the last checkpoint of this one
        self._device: str | None = None
        self._clock: float | None = None  # the time at which `seconds` would have been 0
        self._best_is_new = False
        self._validated_step = -1
        self._saved_step = -1
        self._saving = False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "monitor": self.monitor, "mode": self.mode, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.seconds = state_dict["best"], state_dict["seconds"]

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._device = device_name(trainer.strategy.root_device)  # `on_train_start` is left out where nothing is to do

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        step = trainer.global_step
        self._saved_step = step
        self._clock = time.monotonic() - self.seconds
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob("*.tmp"):
                stale.unlink()
            self._write_state("running", step)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.start_from(step)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validated_step = trainer.global_step
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise UserError(f"the best checkpoint is chosen by {self.monitor}, which is not logged; logged: {known}")
        value = float(trainer.callback_metrics[self.monitor])
        sign = 1 if self.mode == "max" else -1
        if np.isfinite(value) and (self.best is None or sign * value > sign * self.best):
            self.best, self._best_is_new = value, True

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        # the first micro batch of step k + 1; during its later ones step k is already saved
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or self._validated_step == step
        if step > 0 and due and self._saved_step != step:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._saved_step != trainer.global_step:
            self._save(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Also called (unlike `on_train_end`) for a run that was killed between its last checkpoint and this."""
        step = trainer.global_step
        over = 0 <= trainer.max_steps <= step  # otherwise stopped by a time limit: a later `fit` goes on
        if trainer.is_global_zero:
            self._write_state("finished" if over else "running", step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        if self._saving:
            step = trainer.global_step
            every = trainer.val_check_batch or float("inf")  # batches
            scheduled = step * trainer.accumulate_grad_batches % every == 0
            _end_of_step(checkpoint["loops"]["fit_loop"], step, scheduled and self._validated_step == step)

    def _save(self, trainer: Trainer, module: Module) -> None:
        """Writes ``last.ckpt``, and before it ``best.ckpt``: killed in between, the same best is found again."""
        if isinstance(module, BaseModule):
            module.check_pending()  # a checkpoint with NaN weights must not replace a good one
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.flush()
        last, best = self.folder / "last.ckpt", self.folder / "best.ckpt"
        temporary = self.folder / "last.ckpt.tmp"
        if self._clock is not None:
            self.seconds = time.monotonic() - self._clock
        self._saving = True
        trainer.save_checkpoint(temporary, weights_only=False)  # on every process
        self._saving = False
        if trainer.is_global_zero:
            _sync(temporary)
            if self._best_is_new:
                copy = self.folder / "best.ckpt.tmp"
                shutil.copyfile(temporary, copy)
                _sync(copy)
                os.replace(copy, best)
            os.replace(temporary, last)
            _sync(self.folder)
            self._write_state("running", trainer.global_step)
        self._best_is_new = False
        self._saved_step = trainer.global_step

    def _write_state(self, status: str, step: int) -> None:
        state = {"status": status, "step": step, "seconds": self.seconds, "device": self._device}
        write_json(self.run_folder / "state.json", state)


def _end_of_step(loops: dict[str, Any], step: int, validated: bool) -> None:
    """Rewrites Lightning's progress counters to "step over, nothing after it begun", inside an epoch without end.

    At the hook where a checkpoint is written the next batch is already counted as fetched; at the end of training the
    epoch is counted as over. Lightning would go on from such counters one batch late or in a new epoch. It also counts
    a step for the loggers once more when it skips a validation that was due and done, so that count is one lower then;
    a time limit also validates where none was due, which is not skipped.
    """
    for count in ("total", "current"):
        batches = loops["epoch_loop.batch_progress"][count]
        batches.update(dict.fromkeys(batches, batches["completed"]))
        epochs = loops["epoch_progress"][count]
        epochs.update(processed=epochs["started"] - 1, completed=epochs["started"] - 1, ready=epochs["started"])
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1 if validated else step


def _sync(path: Path) -> None:
    """Waits until a file (or a folder's list of names) is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
