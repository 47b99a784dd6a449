"""Pretraining by comparison: any method of `PRETRAINING` that cuts views out of a region and compares them."""

from __future__ import annotations

from typing import Any

from torch import nn

from pretrain3d.config import UserError, by_text
from pretrain3d.data.batch import torch_generator
from pretrain3d.data.views import ViewAugmentation
from pretrain3d.modules.pretraining import PretrainingModule
from pretrain3d.objectives.contract import ViewMethod
from pretrain3d.registry import CONTRACTS, check_promises, checked_arguments

PURPOSES = {"train": "views", "val": "validation views"}


class ContrastiveModule(PretrainingModule):
    """Lightning's side of a contrastive method.

    Args:
        views: arguments of `data.views.ViewAugmentation`, which changes every view on its own after it was cut.
        backbone, method, patch_size, note, optimizer, schedule, warmup_steps, ema: see `PretrainingModule`;
            ``patch_size`` is the region that views are cut from.

    Raises:
        UserError: the views are no multiple of what the backbone needs.
    """

    def __init__(
        self,
        backbone: nn.Module,
        method: dict[str, Any],
        patch_size: tuple[int, int, int],
        note: dict[str, Any],
        optimizer: dict[str, Any],
        views: dict[str, Any] | None = None,
        schedule: str = "cosine",
        warmup_steps: int = 0,
        ema: float | None = None,
    ) -> None:
        super().__init__(backbone, method, patch_size, note, optimizer, schedule, warmup_steps, ema)
        check_promises(self.method, ViewMethod, "method")
        size: Any = self.method.view_size
        multiple: Any = backbone.size_multiple
        cuts = f"module.method {method['name']} cuts crops of {by_text(size)} out of data.patch_size {list(patch_size)}"
        if any(side > room for side, room in zip(size, patch_size, strict=True)):
            raise UserError(f"{cuts}, into which they do not fit")
        if any(side % step for side, step in zip(size, multiple, strict=True)):
            raise UserError(f"{cuts}; the backbone needs multiples of {by_text(multiple)}")
        self.augment = ViewAugmentation(**checked_arguments(ViewAugmentation, views or {}, "module.views"))

    def prepare(self, method: Any, batch: dict[str, Any], stage: str) -> dict[str, Any]:
        """Views are placed by one generator per sample on the CPU, so that cutting them waits for no device."""
        seed = self.note["seed"] if stage == "train" else 0
        generators = [torch_generator(seed, index, PURPOSES[stage], "cpu") for index in batch["sample_index"]]
        prepared = method.prepare(batch, generators)
        views = prepared["inputs"]
        if views.ndim != 6 or tuple(views.shape[3:]) != tuple(method.view_size):
            raise UserError(
                f"{type(method).__name__}.prepare gives inputs {tuple(views.shape)}; expected (B, V, C, x, y, z) with "
                f"views of view_size, {by_text(method.view_size)} ({CONTRACTS})"
            )
        return {**prepared, "inputs": self.augment(prepared["inputs"], seed, batch["sample_index"])}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A method's teacher follows every optimiser step, before any checkpoint of that step is written."""
        super().optimizer_step(*args, **kwargs)
        self.method.after_step()
