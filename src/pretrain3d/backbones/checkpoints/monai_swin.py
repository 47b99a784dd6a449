"""SwinUNETR encoders: MONAI's own files, its self-supervised ``model_swinvit.pt``, and VoCo's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pretrain3d.backbones.checkpoints.contract import Imported, Ledger, Wishes, reported
from pretrain3d.backbones.swin import PATCH
from pretrain3d.config import UserError

WRAPS = ("state_dict", "model_state_dict", "model", "net", "student", "network_weights")
MARK = "patch_embed.proj.weight"  # what names the Swin Transformer's subtree
RENAMES = ((".mlp.fc1.", ".mlp.linear1."), (".mlp.fc2.", ".mlp.linear2."))  # before MONAI 1.0
PARTS = ("patch_embed", *(f"layers{stage}{kind}" for stage in (1, 2, 3, 4) for kind in ("", "c")))


def recognises(content: Mapping[str, Any]) -> bool:
    """Whether a Swin Transformer of MONAI is inside."""
    tensors = _tensors(content)
    return any(f".{name}".endswith(f".{MARK}") and tensors[name].ndim == 5 for name in tensors)


def convert(content: Mapping[str, Any], ledger_of: Any, wishes: Wishes, path: str) -> Imported:
    """Node and weights of a file; arguments as in `nnssl.convert`. The file is silent about preprocessing.

    Raises:
        UserError: several Swin Transformers, or one of another patch size.
    """
    ledger: Ledger = ledger_of(_tensors(content))
    prefix = _prefix(ledger, path)
    state: dict[str, Tensor] = {}
    for name in [n for n in ledger.left if n.startswith(prefix) and n.removeprefix(prefix).split(".")[0] in PARTS]:
        ours = "swinViT." + name.removeprefix(prefix)
        for old, new in RENAMES:
            ours = ours.replace(old, new)
        state[ours] = ledger.take(name)
    ledger.drop(list(ledger.left))
    projection = state[f"swinViT.{MARK}"]
    if projection.shape[2:] != (PATCH,) * 3:
        raise UserError(f"{path}: its patches are {tuple(projection.shape[2:])}; ours have {PATCH} voxels a side")
    blocks = [name.split(".") for name in state if ".blocks." in name]
    depths = [1 + max((int(b[4]) for b in blocks if b[1] == f"layers{stage}"), default=-1) for stage in (1, 2, 3, 4)]
    table = state.get("swinViT.layers1.0.blocks.0.attn.relative_position_bias_table")
    window = 7 if table is None else (round(len(table) ** (1 / 3)) + 1) // 2
    node = {
        "name": "swin",
        "feature_size": projection.shape[0],
        "depths": depths,
        "window": window,
        "v2": any(name.startswith("swinViT.layers1c.") for name in state),
        "in_channels": projection.shape[1],
    }
    silent = {"spacing_mm": None, "patch_size": None, "intensity": None}
    notes = ["the file does not say how its images were prepared; give intensity=... and spacing_mm=..."]
    return Imported(node, state, silent, {"method": "", "data": "", "citations": []}, notes=notes)


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in WRAPS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _prefix(ledger: Ledger, path: str) -> str:
    found = [name.removesuffix(MARK) for name in ledger.left if f".{name}".endswith(f".{MARK}")]
    chosen = [prefix for prefix in found if prefix.startswith("student.")] if len(found) > 1 else found
    if len(chosen) != 1:
        raise UserError(f"{path} holds {len(found)} Swin Transformers ({reported(found)}); save the one that you mean")
    return chosen[0]
