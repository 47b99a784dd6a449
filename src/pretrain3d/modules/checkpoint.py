"""From a checkpoint file back to a module that predicts: nothing else is needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain3d.backbones import BACKBONES
from pretrain3d.backbones.torchfile import read_torch
from pretrain3d.backbones.transfer import FORMAT
from pretrain3d.config import UserError
from pretrain3d.devices import computes_in
from pretrain3d.files import replacing
from pretrain3d.modules import MODULES
from pretrain3d.modules.base import NOTE, BaseModule
from pretrain3d.registry import build


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint that `fit` wrote, on the CPU; executes nothing that is stored in it.

    Raises:
        UserError: not a file, not readable, or not of pretrain3d.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    checkpoint = read_torch(Path(path))
    if isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT:
        raise UserError(f"{path} is a file of `pretrain3d export`, a backbone alone; a checkpoint of `fit` is needed")
    if not isinstance(checkpoint, dict) or NOTE not in checkpoint:
        raise UserError(f"{path} is not a checkpoint of pretrain3d: it has no {NOTE!r} entry")
    return checkpoint


def used_weights(checkpoint: Mapping[str, Any], part: str) -> dict[str, Tensor]:
    """The weights of a part of the module that predict and are exported: the average's where there is one.

    Args:
        checkpoint: see `read_checkpoint`.
        part: dotted attribute of the module, such as "backbone".
    """
    prefix = f"{part}." if checkpoint[NOTE]["weights"] == "online" else f"averaged.{part}."
    state = checkpoint["state_dict"]
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def store_inference(path: Path, inference: dict[str, Any]) -> None:
    """Puts what `sweep` found into the checkpoint's note as ``inference``; whole or not at all.

    Raises:
        UserError: see `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    checkpoint[NOTE] = {**checkpoint[NOTE], "inference": inference}
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def load_module(path: Path, kind: str, device: str | torch.device = "cpu") -> BaseModule:
    """The trained module of a checkpoint, in eval mode.

    A detector predicts in the precision of its training, on a CPU without that arithmetic in float32.

    Args:
        path: a `.ckpt` written by `fit`.
        kind: a name in MODULES; what the caller can use.
        device: where it goes.

    Raises:
        UserError: see `read_checkpoint`, or the checkpoint is of another kind.
    """
    checkpoint = read_checkpoint(path)
    note = checkpoint[NOTE]
    if note["kind"] != kind:
        hint = "; `fit` with transfer.path= trains a detector from its export" if kind == "detection" else ""
        raise UserError(f"{path} holds a {note['kind']} module; a {kind} module is needed{hint}")
    backbone = build(BACKBONES, note["backbone"], "backbone")
    given: dict[str, Any] = {
        "backbone": backbone,
        "note": note,
        "patch_size": tuple(note["preprocessing"]["patch_size"]),
    }
    if kind == "detection":
        given |= {"classes": note["classes"], "mirror_classes": note["mirror_classes"]}
    if kind == "segmentation":
        given |= {"label_classes": {name: about["label_classes"] for name, about in note["sets"].items()}}
    module: Any = build(MODULES, note["module"], "module", **given)
    module.load_state_dict(checkpoint["state_dict"])
    if kind == "detection" and not computes_in(module.precision, torch.device(device).type):
        module.precision = "32"
    return module.to(device).eval()
