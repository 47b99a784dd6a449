"""One door for files of other frameworks: read safely, recognised, converted, every tensor accounted for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain3d.backbones.checkpoints import FORMATS
from pretrain3d.backbones.checkpoints.axes import permuted
from pretrain3d.backbones.checkpoints.contract import Imported, Ledger, Wishes, shown
from pretrain3d.backbones.checkpoints.hub import local, name_of
from pretrain3d.backbones.torchfile import read_torch
from pretrain3d.backbones.transfer import FORMAT, check_names, is_checkpoint, meta_backbone
from pretrain3d.config import UserError


def read_foreign(path: str | Path) -> dict[str, Any]:
    """A file of ``torch.save`` on the CPU; executes nothing that is stored in it.

    Numbers of numpy are let pass, because nnU-Net logs its losses as such; they are values, not code.

    Raises:
        UserError: no such file, unreadable, or one that would have to run code.
    """
    file = local(path)
    if not file.is_file():
        raise UserError(f"{path} is a folder; give the checkpoint in it" if file.is_dir() else f"{path}: no such file")
    content = read_torch(file, str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a table of weights")
    return content


def convert(path: str | Path, wishes: Wishes, axes: str = "xyz", kind: str | None = None) -> Imported:
    """A checkpoint of another framework in our terms, its last note being the account of all tensors.

    Args:
        path: a file, or ``hf://owner/name[/file]``.
        wishes: what the user says about the file.
        axes: "xyz" takes the network as it is, its first axis meeting our x. "zyx" turns it: nnU-Net and nnssl train on
            arrays in the order z, y, x.
        kind: a name in FORMATS; None: recognised.

    Raises:
        UserError: see `read_foreign`; no known format, or weights that are not those of the architecture it states.
    """
    content = read_foreign(path)
    name = kind or _recognised(content, str(path))
    ledgers: list[Ledger] = []

    def ledger_of(tensors: Any) -> Ledger:
        if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise UserError(f"{path}: its weights are {shown(tensors)}; they must be a table of tensors")
        ledgers.append(Ledger(tensors))
        return ledgers[-1]

    imported: Imported = importlib.import_module(FORMATS[name]).convert(content, ledger_of, wishes, str(path))
    account = ledgers[0].close(str(path))
    if axes == "zyx":
        imported = permuted(imported, imported.permutation)
    imported.weights = {key: tensor.detach().clone() for key, tensor in imported.weights.items()}  # no shared storage
    check_names(meta_backbone(imported.backbone).state_dict(), imported.weights, str(path), "the file")
    imported.source = {
        **imported.source,
        "method": imported.source.get("method") or name_of(path),
        "format": name,
        "file": str(path) if str(path).startswith("hf://") else Path(path).name,
    }
    imported.notes.append(account)
    return imported


def form_of(content: Mapping[str, Any]) -> str | None:
    """The name in FORMATS of what a file holds; None where none of them knows it."""
    return next((name for name, module in FORMATS.items() if importlib.import_module(module).recognises(content)), None)


def _recognised(content: Mapping[str, Any], path: str) -> str:
    if content.get("format") == FORMAT:
        raise UserError(f"{path} is a file of `pretrain3d export` already; give it to transfer.path as it is")
    if name := form_of(content):
        return name
    if is_checkpoint(content):
        raise UserError(f"{path} is a checkpoint of `fit`; `pretrain3d export RUN out=FILE` writes the file of its run")
    held = ", ".join(map(str, list(content)[:5]))
    raise UserError(f"{path} is of no known format ({', '.join(FORMATS)}); it holds {held}")
