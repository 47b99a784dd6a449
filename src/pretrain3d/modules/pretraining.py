"""What every pretraining module shares: a method of `PRETRAINING` on a backbone, its losses and its pictures."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pretrain3d.backbones.decoders import image_decoder
from pretrain3d.modules.base import BaseModule
from pretrain3d.objectives import PRETRAINING
from pretrain3d.objectives.contract import Method
from pretrain3d.registry import build, check_promises, resolve


class PretrainingModule(BaseModule):
    """Lightning's side of a pretraining method; a subclass says how a batch is prepared for it.

    Args:
        backbone: see `BaseModule`.
        method: ``{"name": a name in PRETRAINING, ...}``.
        patch_size: (3,) voxels of a training patch.
        note, optimizer, schedule, warmup_steps, ema: see `BaseModule`.

    Raises:
        UserError: the backbone lacks what the method needs.
    """

    validates_on = "patches"
    method: Any  # from the registry; see `objectives.contract.Method`

    def __init__(
        self,
        backbone: nn.Module,
        method: dict[str, Any],
        patch_size: tuple[int, int, int],
        note: dict[str, Any],
        optimizer: dict[str, Any],
        schedule: str = "cosine",
        warmup_steps: int = 0,
        ema: float | None = None,
    ) -> None:
        head = build_method(backbone, method, patch_size)
        super().__init__(backbone, head, "method", note, optimizer, schedule, warmup_steps, ema)

    @abstractmethod
    def prepare(self, method: Any, batch: dict[str, Any], stage: str) -> dict[str, Any]:
        """``method.prepare`` with random numbers of the run's seed (``train``), or the same ones always (``val``)."""

    def _losses(
        self, backbone: nn.Module, method: Any, batch: dict[str, Any], stage: str
    ) -> tuple[dict[str, Tensor], Any, dict[str, Any]]:
        prepared = self.prepare(method, batch, stage)
        outputs = method(backbone, prepared)
        with torch.autocast(batch["image"].device.type, enabled=False):
            losses = method.loss(outputs, prepared)
        return losses, outputs, prepared

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses, _, _ = self._losses(self.backbone, self.method, batch, "train")
        return self.finish_losses(losses, batch, "train")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """The same draws at every validation, so that the curve compares like with like."""
        backbone, method = self.best_networks()
        losses, outputs, prepared = self._losses(backbone, method, batch, "val")
        self.finish_losses(losses, batch, "val")
        return {"pictures": method.pictures(outputs, prepared)} if batch_idx == 0 else {}


def build_method(backbone: Any, node: dict[str, Any], patch_size: tuple[int, int, int], **given: Any) -> nn.Module:
    """A method of `PRETRAINING` for a backbone.

    Args:
        backbone: it will run on.
        node: ``{"name": ..., **arguments}``.
        patch_size: (3,) voxels of a training patch.
        given: what only some methods take.

    Raises:
        UserError: the backbone lacks what the method needs, or the method part of its contract.
    """
    check = getattr(resolve(PRETRAINING, node["name"], "module.method"), "check_backbone", None)
    if check is not None:
        check(backbone)
    method = build(
        PRETRAINING,
        node,
        "module.method",
        levels=backbone.levels,
        in_channels=backbone.in_channels,
        patch_size=tuple(patch_size),
        decoder=partial(image_decoder, backbone),
        **given,
    )
    check_promises(method, Method, "method")
    return method
