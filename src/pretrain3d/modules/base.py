"""What every LightningModule shares: optimiser, schedule, averaging, logging, and the checkpoint's note."""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from pretrain3d.config import UserError
from pretrain3d.modules import FINETUNE
from pretrain3d.modules.averaging import Average, StochasticAveraging
from pretrain3d.modules.finetune import Timetable
from pretrain3d.modules.flop import ModelFlop
from pretrain3d.modules.optim import OPTIMIZERS, parameter_groups, schedule
from pretrain3d.modules.pending import PendingLoss, total_of
from pretrain3d.modules.wrapping import wrap_anew
from pretrain3d.parallel import all_sum, world_size
from pretrain3d.registry import build, checked_arguments, fitted

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
        finetune: ``{"name": a name in FINETUNE, ...}``, see `modules.finetune`; ``None``: the whole net from the start.
        swa: arguments of `StochasticAveraging`, ``None`` for none; once there is an average it stands where that of
            ``ema`` would.

    Attributes:
        validates_on: what a validation step takes: "volumes" (a whole case) or "patches" (a batch of fixed ones).
        flop_per_sample: model FLOP of a training step per sample, forward and backward; known after the first step, and
            counted again where a phase freezes or frees the backbone.
        told_to_stop: whether this process was (`modules.stopping`); all of them stop once all know.
    """

    validates_on: Literal["volumes", "patches"] = "volumes"

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
        finetune: dict[str, Any] | None = None,
        swa: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if ema is not None and not 0.0 < ema < 1.0:
            raise UserError(f"module.ema is {ema}; it is null or between 0 and 1")
        if ema is not None and swa is not None:
            raise UserError(f"module.ema={ema} and module.swa exclude each other; set one of them to null")
        self.backbone = backbone
        self.head_name = head_name
        self.add_module(head_name, head)
        self.note = note
        self.optimizer_node = optimizer
        self.schedule_name = schedule
        self.warmup_steps = warmup_steps
        self.finetune_node = finetune or {"name": "whole"}
        arguments = None if swa is None else checked_arguments(StochasticAveraging, swa, "module.swa")
        self.swa = None if arguments is None else StochasticAveraging(**arguments)
        self.averaged = Average(self.networks, ema) if ema is not None or self.swa is not None else None
        self._timetable: Timetable | None = None
        self._phase: int | None = None
        self._frozen: list[nn.Parameter] = []  # of the backbone, in a phase that freezes it
        self._pending: PendingLoss | None = None
        self.told_to_stop = self._stops = False
        self._compiled = False
        self._batch_size = 0
        self.flop_per_sample: float | None = None

    def compile_networks(self) -> None:
        """Lets `torch.compile` make kernels of both networks at the second training step; parameters keep their names.

        The first step is eager, so that its operations can be counted. Validation stays eager: its last tiles and
        batches have other shapes, and each shape would be compiled. So would each number of denoising queries: a
        detector that takes targets stays eager.

        Raises:
            UserError: a method that calls the backbone in another way in every batch.
        """
        head = self.get_submodule(self.head_name)
        if not getattr(head, "compilable", True):
            raise UserError(
                f"trainer.compile=true: {type(head).__name__} calls the networks in another way in every batch, and "
                "each way would be compiled; set it to false"
            )
        self._compiled = True
        networks = (self.backbone,) if getattr(head, "needs_targets", False) else self.networks.values()
        for network in networks:
            network.compile(dynamic=False)  # shapes do not change; dynamic ones break strided 3D convolutions

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that learn, by attribute name."""
        return {"backbone": self.backbone, self.head_name: self.get_submodule(self.head_name)}

    def has_average(self) -> bool:
        """Whether averaged weights are there to predict with; those of SWA come late in a run."""
        return self.averaged is not None and (self.swa is None or bool(self.averaged.updates > 0))

    def best_networks(self) -> tuple[Any, Any]:
        """Backbone and head to predict with: the averaged ones where there is an average."""
        source = self.averaged if self.averaged is not None and self.has_average() else self
        return source.get_submodule("backbone"), source.get_submodule(self.head_name)

    def configure_optimizers(self) -> Any:
        self._freeze(False)  # the optimiser knows all that ever learns; it passes over what has no gradient
        self._phase = None
        self._timetable = table = self._make_timetable()
        node = {key: value for key, value in self.optimizer_node.items() if key != "weight_decay"}
        decay = fitted(self.optimizer_node.get("weight_decay", 0.0), float, "module.optimizer.weight_decay")
        groups = parameter_groups(self.networks, decay, table.backbone_lr, table.layer_decay)
        optimizer = build(OPTIMIZERS, node, "module.optimizer", groups=groups)
        scheduler = schedule(optimizer, table.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _make_timetable(self) -> Timetable:
        trainer: Any = self.trainer
        steps = 10**6 if trainer.fast_dev_run else int(trainer.max_steps)  # the former sees the begin of a long run
        if steps < 1 and self.schedule_name != "constant":
            raise UserError(
                f"trainer.max_steps={steps}: module.schedule={self.schedule_name} needs the length of the run, 1 or "
                "more; only module.schedule=constant works without"
            )
        if steps < 0:
            steps = sys.maxsize
        cycle = None
        if self.swa is not None:
            self.swa.check_length(steps)
            cycle = self.swa.cycle()
        end = self.swa.start_step if self.swa is not None and cycle is not None else steps
        given = {"schedule": self.schedule_name, "warmup_steps": self.warmup_steps, "max_steps": end}
        table: Timetable = build(FINETUNE, self.finetune_node, "module.finetune", **given)
        return table if cycle is None else table.then(end, cycle)

    def _enter_phase(self, step: int) -> None:
        """Freezes or frees the backbone as the phase of ``step`` wants it, before anything of that step is computed."""
        assert self._timetable is not None
        index = self._timetable.at(step)
        if index == self._phase:
            return
        self._phase, phase = index, self._timetable.phases[index]
        if step == phase.start and phase.restarts:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            optimizer.state.clear()
        if phase.frozen != bool(self._frozen):
            self._freeze(phase.frozen)
            self.flop_per_sample = None  # another step from here on
            wrap_anew(self, f"module.finetune {self.finetune_node['name']} freezes the backbone")

    def _freeze(self, frozen: bool) -> None:
        """Takes the backbone out of learning, or puts back what was taken out."""
        chosen = [p for p in self.backbone.parameters() if p.requires_grad] if frozen else self._frozen
        for parameter in chosen:
            parameter.requires_grad_(not frozen)
        self._frozen = chosen if frozen else []
        if chosen:
            self.backbone.train(self.training and not frozen)

    def train(self, mode: bool = True) -> BaseModule:
        """A frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self._frozen:
            self.backbone.eval()
        return self

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by itself: Lightning 2.6 refuses to with a fused optimiser under mixed precision (its #21435)."""
        if gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
            clip(parameters, gradient_clip_val)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The average follows every optimiser step, before any checkpoint of that step is written."""
        if self.flop_per_sample is None:
            with self._eager(), ModelFlop() as counter:
                super().optimizer_step(*args, **kwargs)
            self.flop_per_sample = counter.flop / self._batch_size
        else:
            super().optimizer_step(*args, **kwargs)
        due = self.swa is None or self.swa.due(self.global_step + 1)  # Lightning counts this step when this returns
        if self.averaged is not None and due:
            self.averaged.update(self.networks)

    def on_train_start(self) -> None:
        """A resumed run goes on at the rate that its own length asks for: the checkpoint's is of the length then."""
        rates: Any = self.lr_schedulers()
        for group, peak, factor in zip(rates.optimizer.param_groups, rates.base_lrs, rates.lr_lambdas, strict=True):
            group["lr"] = peak * factor(rates.last_epoch)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Anything that draws from torch's global generator (stochastic depth, say) becomes a function of the step."""
        self._enter_phase(self.global_step)
        self._batch_size = len(batch["sample_index"])
        torch.manual_seed((int(self.note["seed"]) * 1_000_003 + batch["sample_index"][0]) % 2**63)

    def _eager(self) -> AbstractContextManager[Any]:
        """Within it nothing is compiled."""
        return torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()

    def on_validation_start(self) -> None:
        if self._compiled:
            torch.compiler.set_stance("force_eager")

    def on_validation_end(self) -> None:
        if self._compiled:
            torch.compiler.set_stance("default")

    def finish_losses(self, losses: dict[str, Tensor], batch: dict[str, Any], stage: str) -> Tensor:
        """Logs every part of the loss; stops on a non-finite one, one step late so that no step waits for the device.

        Raises:
            UserError: the loss of the previous step was NaN or infinite, on any process; names the cases it was of.
        """
        self.check_pending()
        total, size = total_of(losses, self.get_submodule(self.head_name)), len(batch["case_ids"])
        if stage == "train":
            if self._stops:
                raise SIGTERMException
            self._pending = PendingLoss.of(self.global_step, total, batch["case_ids"], self.told_to_stop)
            losses = self._mean_over_processes(losses)
            self._log_rates()
        for key, value in losses.items():
            self.log(
                f"{stage}/{key}",
                value.detach().float(),
                on_step=stage == "train",
                on_epoch=stage != "train",
                sync_dist=stage != "train",
                batch_size=size,
                prog_bar=stage != "train" and key == "loss",  # Lightning waits for what its bar shows in every step
            )
        return total

    def _log_rates(self) -> None:
        """The learning rate of each part of the network, where a row is written."""
        trainer: Any = self.trainer
        if (self.global_step + 1) % trainer.log_every_n_steps:
            return
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        for name, rate in {group["name"]: float(group["lr"]) for group in optimizer.param_groups}.items():
            self.log(f"lr/{name}", rate, on_step=True, on_epoch=False, batch_size=1)

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
        pending, self._pending = self._pending, None
        total, told_to_stop = pending.values()
        self._stops |= told_to_stop
        if not math.isfinite(total):
            value, names = pending.culprits()
            raise UserError(
                f"the training loss became {value} at step {pending.step} (cases {', '.join(names)}); "
                "look at these cases, lower module.optimizer.lr or set trainer.gradient_clip_val"
            )

    def on_train_end(self) -> None:
        self.check_pending()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = ("ema" if self.swa is None else "swa") if self.has_average() else "online"
        source = {**self.note["source"], "step": int(self.trainer.global_step)}
        processes = int(self.trainer.world_size)
        checkpoint[NOTE] = {**self.note, "source": source, "weights": weights, "processes": processes}
