"""What shows how a run goes: pictures, and a progress bar without epochs."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from PIL import Image

Trainer = lightning.Trainer
Module = lightning.LightningModule

SECONDS_PER_LINE = 60  # of a run whose number of steps is not known


class Pictures(Callback):
    """Writes the pictures of the first validation case to ``<run>/pictures/step<N>_<name>.png``: first and last step.

    ``validation_step`` returns ``{"pictures": {name: array}}``. Slices (X, Y) of numbers become grey and are drawn as a
    radiologist hangs them (right of the patient on the left, front on top); (rows, columns, 3) are colours (uint8, or
    floats from 0 to 1), drawn as they are. All grey pictures of a step share the window of the first one, so that an
    original and its reconstruction can be compared.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder) / "pictures"

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        first = batch_idx == 0 and dataloader_idx == 0 and trainer.is_global_zero and not trainer.sanity_checking
        if not first or not isinstance(outputs, Mapping) or not outputs.get("pictures"):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        images = as_images(outputs["pictures"])
        for name, image in images.items():
            image.save(self.folder / f"step{trainer.global_step:07d}_{name}.png")
            for old in sorted(self.folder.glob(f"step*_{name}.png"))[1:-1]:
                old.unlink()
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):  # W&B
                for name, image in images.items():
                    logger.log_image(key=f"pictures/{name}", images=[image], step=trainer.global_step - 1)


def as_images(arrays: Mapping[str, np.ndarray]) -> dict[str, Image.Image]:
    """Arrays -> 8-bit images; see `Pictures`."""
    for name, array in arrays.items():
        assert array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3), f"picture {name}: shape {array.shape}"
    grey = [array for array in arrays.values() if array.ndim == 2]
    low, high = np.percentile(grey[0], (0.5, 99.5)) if grey else (0.0, 1.0)
    images = {}
    for name, array in arrays.items():
        if array.ndim == 2:
            array = (array.T[::-1, ::-1].astype(np.float64) - low) / max(float(high - low), 1e-6)
        if array.dtype != np.uint8:
            array = np.round(np.nan_to_num(np.clip(array, 0.0, 1.0)) * 255).astype(np.uint8)
        images[name] = Image.fromarray(array)
    return images


class Progress(TQDMProgressBar):
    """One bar over ``max_steps`` (the loader has no end), resumed where the run was; lines where there is no terminal.

    Args:
        title: in front of the bar.
        lines: how many lines a whole run writes into a file or pipe; one without an end writes one a minute.
    """

    def __init__(self, title: str = "fit", lines: int = 20) -> None:
        self._terminal = sys.stdout.isatty()
        super().__init__(refresh_rate=1 if self._terminal else 0, leave=False)
        self.title = title
        self.lines = lines
        self._last_line = 0
        self._start = (0.0, 0)

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.set_description_str(self.title)
        return bar

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        super().on_train_start(trainer)
        self._start = (time.monotonic(), trainer.global_step)
        self._last_line = self._line_of(trainer)
        bar = self.train_progress_bar
        bar.reset(total=trainer.max_steps if trainer.max_steps >= 0 else None)
        bar.initial = bar.n = trainer.global_step  # so that the rate is of this session
        bar.refresh()

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Nothing: the bar does not start again, there are no epochs."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        bar, step = self.train_progress_bar, trainer.global_step
        if bar.n != step and not bar.disable:
            if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # otherwise every step waited for it
                bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(step - bar.n)
        elif not self._terminal and self._line_of(trainer) != self._last_line:
            self._last_line = self._line_of(trainer)
            if trainer.is_global_zero:
                sys.stdout.write(self._line(trainer, pl_module) + "\n")
                sys.stdout.flush()

    def get_metrics(self, trainer: Trainer, pl_module: Module) -> dict[str, int | str | float | dict[str, float]]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        loss = trainer.callback_metrics.get("train/loss")
        return items if loss is None else {"train/loss": float(loss), **items}

    def _line_of(self, trainer: Trainer) -> int:
        if trainer.max_steps < 0:
            return int(time.monotonic() - self._start[0]) // SECONDS_PER_LINE
        return trainer.global_step * self.lines // max(trainer.max_steps, 1)

    def _line(self, trainer: Trainer, module: Module) -> str:
        start, first = self._start
        step, seconds = trainer.global_step, time.monotonic() - start
        shown = [f"{key} {value:.3f}" for key, value in self.get_metrics(trainer, module).items()
                 if isinstance(value, float)]  # fmt: skip
        end, clock = "", Tqdm.format_interval(seconds)
        if trainer.max_steps >= 0:
            left = (trainer.max_steps - step) * seconds / max(step - first, 1)
            end, clock = f"/{trainer.max_steps}", f"{clock}<{Tqdm.format_interval(left)}"
        return f"{self.title}: {step}{end} [{clock}] " + " ".join(shown)
