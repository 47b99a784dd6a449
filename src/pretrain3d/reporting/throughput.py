"""How fast a run is, what of the device it uses, and how much memory it takes."""

from __future__ import annotations

import re
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from pretrain3d.devices import GIB

Trainer = lightning.Trainer
Module = lightning.LightningModule

WARM = 2  # steps that are not speed: one is counted, in the next networks are compiled; workers start
PEAKS = {  # TFLOP/s in bf16 or fp16 with sums in fp32, without sparsity; NVIDIA's data sheets and whitepapers
    r"B200": 2250.0,
    r"H200|GH200 .*|H100 80GB HBM3": 989.4,
    r"H200 NVL|H100 NVL": 835.5,
    r"H100 PCIe": 756.0,
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": 312.0,
    r"A40": 149.7,
    r"A30": 165.0,
    r"A10": 125.0,
    r"L40S": 362.0,
    r"L40": 181.0,
    r"L4": 121.0,
    r"RTX 6000 Ada Generation": 364.2,
    r"RTX A6000": 154.8,
    r"RTX A5000": 111.1,
    r"GeForce RTX 5090": 209.5,
    r"GeForce RTX 4090": 165.2,
    r"GeForce RTX 3090": 71.0,
}


def peak_flops(gpu: str, precision: str) -> float | None:
    """FLOP/s that the tensor cores of a GPU reach at most; None for one that is not in `PEAKS`.

    Args:
        gpu: its name, as CUDA gives it.
        precision: Lightning's name of it. Full precision is TF32 here, at half the speed of bf16.
    """
    name = gpu.removeprefix("NVIDIA ")
    peak = next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)
    if peak is None or precision.startswith("64"):
        return None
    return peak * 1e12 / (2 if precision.startswith("32") else 1)


class Throughput(Callback):
    """Logs a run's speed and cost, of all processes together unless said otherwise.

    - ``perf/patches_per_second``: in training only; ``perf/samples_seen``: since the start of the run
    - ``perf/seconds_left``: with everything
    - ``perf/tflop_per_second``: model FLOP, see `modules.flop`
    - ``perf/mfu``: model-FLOP utilisation, the share of what the GPUs could do at most; on GPUs of `PEAKS`
    - ``perf/memory_gib``: the most that tensors took on this process's GPU since the first steps, validation included
    """

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None  # time and step at the end of the steps that are not measured
        self._since = 0.0
        self._paused = 0.0
        self._patches = 0
        self._start_step = 0
        self._step = -1

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._first, self._start_step, self._step = None, trainer.global_step, trainer.global_step
        self._since, self._paused, self._patches = time.monotonic(), 0.0, 0

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._paused -= time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._paused += time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._patches += len(batch["image"]) * trainer.world_size
        step = trainer.global_step
        if step == self._step:  # a micro batch of an unfinished step
            return
        self._step = step
        now = time.monotonic()
        if self._first is None:
            if step - self._start_step >= WARM:
                self._first = (now, step)
                self._since, self._paused, self._patches = now, 0.0, 0
                if _on_gpu(trainer):
                    torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        elif step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            seconds = max(now - self._since - self._paused, 1e-9)
            per_step = len(batch["image"]) * trainer.world_size * trainer.accumulate_grad_batches
            values = {"patches_per_second": self._patches / seconds, "samples_seen": float(step * per_step)}
            values |= self._use(trainer, pl_module, values["patches_per_second"])
            start, first_step = self._first
            if trainer.max_steps >= 0:
                values["seconds_left"] = (trainer.max_steps - step) * (now - start) / (step - first_step)
            for key, value in values.items():
                pl_module.log(f"perf/{key}", value)
            self._since, self._paused, self._patches = now, 0.0, 0

    @staticmethod
    def _use(trainer: Trainer, module: Module, patches_per_second: float) -> dict[str, float]:
        """What is used of the devices."""
        found = {}
        flop_per_sample = getattr(module, "flop_per_sample", None)
        if flop_per_sample is not None:
            found["tflop_per_second"] = flop_per_sample * patches_per_second / 1e12
        if _on_gpu(trainer):
            device = trainer.strategy.root_device
            found["memory_gib"] = torch.cuda.max_memory_allocated(device) / GIB
            peak = peak_flops(torch.cuda.get_device_name(device), str(trainer.precision))
            if peak is not None and "tflop_per_second" in found:
                found["mfu"] = found["tflop_per_second"] * 1e12 / (trainer.world_size * peak)
        return found


def _on_gpu(trainer: Trainer) -> bool:
    return trainer.strategy.root_device.type == "cuda"
