"""Optimisers with decay groups, and learning-rate schedules as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from pretrain3d.config import UserError


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and kernels decay; norms, biases and tokens (at most one dimension) do not."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(
    groups: list[dict[str, object]],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    amsgrad: bool = False,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019)."""
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, amsgrad=amsgrad)  # type: ignore[arg-type]


def sgd(
    groups: list[dict[str, object]], lr: float, momentum: float = 0.9, nesterov: bool = True
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, the default of nnU-Net and nnDetection."""
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


OPTIMIZERS = {"adamw": "pretrain3d.modules.optim:adamw", "sgd": "pretrain3d.modules.optim:sgd"}


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter, 2017)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def poly(progress: float) -> float:
    """``(1 - progress) ** 0.9``, as nnU-Net and nnDetection."""
    return (1.0 - progress) ** 0.9


def constant(progress: float) -> float:
    """No decay."""
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine, "poly": poly, "constant": constant}


def warmup_then(name: str, warmup_steps: int, max_steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at each optimiser step: a linear ramp over the whole net, then `SCHEDULES[name]`.

    Raises:
        UserError: an unknown schedule, or a warm-up that is not shorter than the run.
    """
    if name not in SCHEDULES:
        raise UserError(f"module.schedule is {name!r}; it is one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup_steps < max(max_steps, 1):
        raise UserError(f"module.warmup_steps is {warmup_steps}; it must be shorter than trainer.max_steps={max_steps}")
    decay = SCHEDULES[name]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return decay(min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps)))

    return factor


def schedule(optimizer: torch.optim.Optimizer, name: str, warmup_steps: int, max_steps: int) -> LambdaLR:
    """`warmup_then` as a scheduler to be stepped once per optimiser step."""
    return LambdaLR(optimizer, warmup_then(name, warmup_steps, max_steps))
