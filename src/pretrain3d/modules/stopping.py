"""How a run is told to stop or to be queued again, and how its processes stop together.

Lightning's handlers exchange tensors at whatever line a process was interrupted. NCCL pairs what processes exchange by
order alone, so that one of them is taken for a sum of gradients and all hang. Lightning 2.6 also asks the first process
before every batch whether it was told to stop, and reads the answer at once: every step of several GPUs waits for them.
Here a handler only makes a note, which travels with the next loss (`modules.pending`) and is read with it: all
processes learn of it at the same step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

Trainer = lightning.Trainer


class Stopping(Callback):
    """Takes the place of Lightning's handlers of SIGTERM, where there are several processes, and of SLURM's SIGUSR1.

    At SIGUSR1 the job is queued again, and nothing else: training goes on until SLURM ends it, and the next call from
    the last checkpoint.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Lightning has set its handlers by now; at the end it puts back those from before it."""
        if threading.current_thread() is not threading.main_thread():
            return  # where no handler can be set, and Lightning set none
        if SLURMEnvironment.detect():
            signal.signal(signal.SIGUSR1, lambda *_: queue_again() if trainer.is_global_zero else None)
        if trainer.world_size > 1:
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
            signal.signal(signal.SIGTERM, lambda number, _: self._note(number, trainer, pl_module))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Each process on its own: in validation they exchange nothing before its end, and all were told."""
        if trainer.world_size > 1 and pl_module.told_to_stop:
            raise SIGTERMException

    @staticmethod
    def _note(number: int, trainer: Trainer, module: Any) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None and not module.told_to_stop:
            launcher.kill(number)  # tells the processes that this one started
        module.told_to_stop = True


def queue_again() -> None:
    """Asks SLURM to queue this job again, or this one of an array of jobs."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    failed: int | str
    try:
        failed = subprocess.call(["scontrol", "requeue", job])
    except FileNotFoundError:
        failed = "no such program"
    if failed:
        print(f"job {job} is not queued again: scontrol ended with {failed}", file=sys.stderr)


def end_others(trainer: Trainer) -> None:
    """Ends the processes that this one started for a training that it left with an error.

    Nobody else does: they would wait for it in their next exchange, with NCCL for half an hour, on their GPUs.
    """
    launcher: Any = trainer.strategy.launcher
    started = getattr(launcher, "procs", None)
    if started:
        launcher.kill(signal.SIGKILL)  # one that waits for its GPU heeds nothing else
        started.clear()  # Lightning's observer of them would end this process too
