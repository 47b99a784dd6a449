"""What every LightningModule shares: optimiser, schedule, averaging, logging, and the checkpoint's note."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn

from pretrain3d.config import UserError, build
from pretrain3d.modules.averaging import Average
from pretrain3d.modules.optim import OPTIMIZERS, parameter_groups, schedule
from pretrain3d.parallel import all_sum, world_size

NOTE = "pretrain3d"  # key of the checkpoint under which everything lies that `export`, `test` and `predict` need


class BaseModule(lightning.LightningModule):
    """A backbone and one network on top of it, trained step by step.

    Args:
        backbone: the network that travels from pretraining to detection; always ``self.backbone``.
        head: everything else that learns (a pretraining method or a detector).
        head_name: attribute name of ``head``.
        note: plain values that travel in the checkpoint (configuration, preprocessing, source).
        optimizer: ``{"name": ..., "lr": ..., "weight_decay": ..., ...}``.
        schedule: name in `optim.SCHEDULES`.
        warmup_steps: length of the linear ramp, in optimiser steps, over the whole net.
        ema: decay of the averaged weights, ``None`` for none. They are what validates, predicts and is exported.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        head_name: str,
        note: dict[str, Any],
        optimizer: dict[str, Any],
        schedule: str = "cosine",
        warmup_steps: int = 0,
        ema: float | None = None,
    ) -> None:
        super().__init__()
        if ema is not None and not 0.0 < ema < 1.0:
            raise UserError(f"module.ema is {ema}; it is null or between 0 and 1")
        self.backbone = backbone
        self.head_name = head_name
        self.add_module(head_name, head)
        self.note = note
        self.optimizer_node = optimizer
        self.schedule_name = schedule
        self.warmup_steps = warmup_steps
        self.averaged = Average(self.networks, ema) if ema is not None else None
        self._pending: tuple[int, Tensor, list[str]] | None = None

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that learn, by attribute name."""
        return {"backbone": self.backbone, self.head_name: self.get_submodule(self.head_name)}

    def best_networks(self) -> tuple[Any, Any]:
        """Backbone and head to predict with: the averaged ones where there is an average."""
        source = self.averaged if self.averaged is not None else self
        return source.get_submodule("backbone"), source.get_submodule(self.head_name)

    def configure_optimizers(self) -> Any:
        node = {key: value for key, value in self.optimizer_node.items() if key != "weight_decay"}
        groups = parameter_groups(self.networks.values(), float(self.optimizer_node.get("weight_decay", 0.0)))
        optimizer = build(OPTIMIZERS, node, "module.optimizer", groups=groups)
        steps = int(self.trainer.max_steps)
        scheduler = schedule(optimizer, self.schedule_name, self.warmup_steps, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the norm itself: Lightning 2.6 refuses to with a fused optimiser under mixed precision (its #21435)."""
        if gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The average follows every optimiser step, before any checkpoint of that step is written."""
        super().optimizer_step(*args, **kwargs)
        if self.averaged is not None:
            self.averaged.update(self.networks)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Anything that draws from torch's global generator (stochastic depth, say) becomes a function of the step."""
        torch.manual_seed((int(self.note["seed"]) * 1_000_003 + batch["sample_index"][0]) % 2**63)

    def finish_losses(self, losses: dict[str, Tensor], batch: dict[str, Any], stage: str) -> Tensor:
        """Logs every part of the loss; stops on a non-finite one, one step late so that no step waits for the device.

        Raises:
            UserError: the loss of the previous step was NaN or infinite; names its cases.
        """
        self.check_pending()
        total, size = losses["loss"], len(batch["case_ids"])
        if stage == "train":
            self._pending = (self.global_step, total.detach(), list(batch["case_ids"]))
            losses = self._mean_over_processes(losses)
        for key, value in losses.items():
            self.log(
                f"{stage}/{key}",
                value.detach().float(),
                on_step=stage == "train",
                on_epoch=stage != "train",
                sync_dist=stage != "train",
                batch_size=size,
                prog_bar=key == "loss",
            )
        return total

    def _mean_over_processes(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a single process with the whole batch would log; one exchange, and only where a row is written."""
        trainer: Any = self.trainer
        if world_size() == 1 or (self.global_step + 1) % trainer.log_every_n_steps:
            return losses
        values = torch.stack([value.detach().float() for value in losses.values()])
        return dict(zip(losses, all_sum(values) / world_size(), strict=True))

    def check_pending(self) -> None:
        """Looks at the last training loss that was not looked at yet."""
        if self._pending is None:
            return
        step, value, cases = self._pending
        self._pending = None
        if not torch.isfinite(value):
            names = ", ".join(dict.fromkeys(cases))
            raise UserError(
                f"the training loss became {float(value)} at step {step} (cases {names}); "
                "look at these cases, lower module.optimizer.lr or set trainer.gradient_clip_val"
            )

    def on_train_end(self) -> None:
        self.check_pending()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = "ema" if self.averaged is not None else "online"
        source = {**self.note["source"], "step": int(self.trainer.global_step)}
        processes = int(self.trainer.world_size)
        checkpoint[NOTE] = {**self.note, "source": source, "weights": weights, "processes": processes}
