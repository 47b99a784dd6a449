"""Optimisers with decay and layer groups, and learning-rate schedules as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from pretrain3d.config import UserError


def parameter_groups(
    networks: Mapping[str, nn.Module], weight_decay: float, backbone_lr: float = 1.0, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups by network, by layer where layers learn at different speeds, and by decay.

    Matrices and kernels decay; norms, biases, tokens, positions and embeddings do not. With ``layer_decay`` d the rate
    of layer i of n in the backbone's ``layers()`` (its stem is layer 0) is ``d ** (n + 1 - i)`` of the head's.

    Args:
        networks: by name; ``"backbone"`` is what ``backbone_lr`` and ``layer_decay`` are about.
        weight_decay: of what decays.
        backbone_lr: factor of the backbone's learning rate.
        layer_decay: in (0, 1]; 1: the whole backbone is one layer.

    Returns:
        groups ``{"params", "weight_decay", "name", "lr_scale"}``; two of them share a name where only one decays.
        Parameters that require no gradient are left out.

    Raises:
        UserError: ``weight_decay`` is below 0 or not finite.

    Source: Clark et al. 2020, "ELECTRA"; Bao et al. 2022, "BEiT".
    """
    _check("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "0 or more")
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for network_name, network in networks.items():
        depths, last = _depths(network) if network_name == "backbone" and layer_decay != 1.0 else ({}, 0)
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad:
                continue
            group_name = f"{network_name}.{depths[name]}" if depths else network_name
            scale = backbone_lr if network_name == "backbone" else 1.0
            if depths:
                scale *= layer_decay ** (last + 1 - depths[name])
            decays = _decays(network, name, parameter)
            group = {"params": [], "weight_decay": weight_decay if decays else 0.0}
            group |= {"name": group_name, "lr_scale": scale}
            groups.setdefault((group_name, decays), group)["params"].append(parameter)
    return list(groups.values())


def _decays(network: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether this is the matrix or kernel of a layer: the rest is named otherwise, flat, or an embedding."""
    owner, _, last = name.rpartition(".")
    return parameter.ndim > 1 and last.endswith("weight") and not isinstance(network.get_submodule(owner), nn.Embedding)


def _depths(backbone: Any) -> tuple[dict[str, int], int]:
    """Layer of each parameter by name, and the last layer; the stem, what is in none of `Backbone.layers`, is 0."""
    layers = backbone.layers()
    depth = {id(p): index for index, layer in enumerate(layers, start=1) for part in layer for p in part.parameters()}
    return {name: depth.get(id(parameter), 0) for name, parameter in backbone.named_parameters()}, len(layers)


def adamw(
    groups: list[dict[str, object]],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    amsgrad: bool = False,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019).

    Raises:
        UserError: a number out of its range.
    """
    _check("lr", lr, 0 < lr < math.inf, "above 0")
    _check("betas", list(betas), all(0 <= beta < 1 for beta in betas), "two numbers from 0 to below 1")
    _check("eps", eps, 0 <= eps < math.inf, "0 or more")
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, amsgrad=amsgrad)  # type: ignore[arg-type]


def sgd(
    groups: list[dict[str, object]], lr: float, momentum: float = 0.9, nesterov: bool = True
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum: 0.9 in nnDetection, 0.99 in nnU-Net.

    Raises:
        UserError: a number out of its range.
    """
    _check("lr", lr, 0 < lr < math.inf, "above 0")
    _check("momentum", momentum, 0 <= momentum < 1, "from 0 to below 1")
    _check("momentum", momentum, momentum > 0 or not nesterov, "above 0 unless nesterov=false")
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


def _check(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise UserError(f"module.optimizer.{name} is {value}; it must be {expected}")


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
    """The factor of the learning rate at each optimiser step: a linear ramp, then `SCHEDULES[name]` down to 0.

    The ramp begins at 0, before the first step; nnDetection's at a rate of 1e-6.

    Raises:
        UserError: an unknown schedule, or a warm-up that is not shorter than the run.
    """
    if name not in SCHEDULES:
        raise UserError(f"module.schedule is {name!r}; it is one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup_steps < max(max_steps, 1):
        raise UserError(
            f"module.warmup_steps is {warmup_steps}; it must be 0 or more and below {max_steps}, the steps that "
            "trainer.max_steps (or module.swa.start_step) leaves to module.schedule"
        )
    decay = SCHEDULES[name]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return decay(min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps)))

    return factor


def schedule(optimizer: torch.optim.Optimizer, factor: Callable[[str, int], float]) -> LambdaLR:
    """A scheduler to be stepped once per optimiser step.

    Args:
        optimizer: over the groups of `parameter_groups`.
        factor: name of a group and step -> factor of the learning rate, before the group's own ``lr_scale``.
    """

    def of_group(group: dict[str, Any]) -> Callable[[int], float]:
        return lambda step: group["lr_scale"] * factor(group["name"], step)

    return LambdaLR(optimizer, [of_group(group) for group in optimizer.param_groups])
