"""Plain convolutional encoders in released files: nnDetection's (RetinaUNet-MissingPiece-MultiTalent) and nnU-Net's.

Theirs and ours hold the same convolutions and norms. nnDetection's file has its first convolution apart, one per data
set; nnU-Net's has biases, which the norms behind them take out again, and every tensor under two names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pretrain3d.backbones.checkpoints.contract import Ledger, shown
from pretrain3d.backbones.checkpoints.released_resenc import stages_of, take_once
from pretrain3d.config import UserError

NNUNET_CLASS = "PlainConvUNet"
NNDETECTION_LEVELS = "backbone.levels"  # its module of stages


def is_nndetection(ledger: Ledger) -> bool:
    """Whether these are the tensors of nnDetection's own backbone."""
    return bool(ledger.under(NNDETECTION_LEVELS))


def take_nndetection(
    ledger: Ledger, stem: str, kwargs: Mapping[str, Any], path: str
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Node, weights and notes of a file of nnDetection; kernels and channels are read from the weights.

    Args:
        ledger: the file's tensors.
        stem: prefix of the first convolution, ``<stem>.0``, and its norm, ``<stem>.1``.
        kwargs: ``arch_kwargs``, of which ``strides`` counts: one per level, or one per level but the first.
        path: for errors.

    Raises:
        UserError: no stem of that form, or strides of another number of levels.
    """
    state: dict[str, Tensor] = {}
    for name in ledger.under(stem):
        index, _, what = name.removeprefix(f"{stem}.").partition(".")
        if index not in ("0", "1"):
            raise UserError(f"{path}: {name} is not part of a stem of convolution and norm, {stem}.0 and {stem}.1")
        state[f"stem.{('conv', 'norm')[int(index)]}.{what}"] = ledger.take(name)
    for name in ledger.under(NNDETECTION_LEVELS):
        inner = name.removeprefix(f"{NNDETECTION_LEVELS}.")
        state[re.sub(r"^(\d+)\.component\.(\d+)\.", r"stages.\1.blocks.\2.", inner)] = ledger.take(name)
    first = state.get("stem.conv.weight")
    if first is None:
        raise UserError(f"{path}: the stem {stem!r} has no convolution {stem}.0")
    found = [(match, tensor) for name, tensor in state.items() if (match := _CONV.fullmatch(name))]
    shapes = {(int(match[1]), int(match[2])): tuple(tensor.shape) for match, tensor in found}
    stages = 1 + max((stage for stage, _ in shapes), default=0)
    shape_of = [tuple(first.shape), *(shapes.get((stage, 0), ()) for stage in range(1, stages))]
    if any(len(shape) != 5 for shape in shape_of):
        raise UserError(f"{path}: its {stages} levels do not each begin with a 3D convolution")
    convs = [(stage == 0) + sum(index[0] == stage for index in shapes) for stage in range(stages)]
    strides, notes = _strides(kwargs.get("strides"), stages, path)
    node = _node(
        channels=[int(shape[0]) for shape in shape_of], convs=convs, strides=strides,
        kernels=[list(shape[2:]) for shape in shape_of], in_channels=int(first.shape[1]),
    )  # fmt: skip
    return node, state, notes


def take_nnunet(
    ledger: Ledger, kwargs: Mapping[str, Any], path: str
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Node, weights and notes of a PlainConvUNet's encoder.

    Args:
        ledger: the file's tensors.
        kwargs: ``arch_kwargs`` of its plans.
        path: for errors.

    Raises:
        UserError: a setting whose features ours would not reproduce.
    """
    channels, convs, strides, kernels = stages_of(kwargs, "n_conv_per_stage", path, free=("conv_bias",))
    names = [name for name in ledger.under("encoder.stages") if _NNUNET.match(name)]
    biases = [name for name in names if name.endswith((".conv.bias", ".all_modules.0.bias"))]
    ledger.drop(biases, "biases before a norm")
    state, notes = take_once(ledger, [name for name in names if name in ledger], _nnunet_name)
    first = state.get("stem.conv.weight")
    in_channels = 1 if first is None else int(first.shape[1])
    node = _node(channels=channels, convs=convs, strides=strides, kernels=kernels, in_channels=in_channels)
    return node, state, notes


def _nnunet_name(name: str) -> str:
    stage, conv, what = _NNUNET.fullmatch(name).groups()  # type: ignore[union-attr]
    return f"stem.{what}" if stage == conv == "0" else f"stages.{stage}.blocks.{int(conv) - (stage == '0')}.{what}"


_NNUNET = re.compile(r"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.(.+)")
_CONV = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.conv\.weight")


def _strides(stated: Any, stages: int, path: str) -> tuple[list[Any], list[str]]:
    if stated is None:
        return [1] + [2] * (stages - 1), ["its plan does not say the strides; 2 between levels is assumed"]
    strides = list(stated) if isinstance(stated, Sequence) and not isinstance(stated, str) else []
    if len(strides) == stages - 1:
        strides = [1, *strides]
    if len(strides) != stages:
        raise UserError(f"{path}: arch_kwargs.strides is {shown(stated)}; its weights have {stages} levels")
    return strides, []


def _node(**arguments: Any) -> dict[str, Any]:
    return {"name": "plainconv", **arguments}
