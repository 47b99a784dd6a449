"""The axes of a network: the same weights for arrays whose axes come in another order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pretrain3d.backbones.checkpoints.contract import Imported
from pretrain3d.backbones.checkpoints.released_primus import exchanged, turned
from pretrain3d.backbones.primus import Primus
from pretrain3d.backbones.stages import StageBackbone
from pretrain3d.backbones.transfer import meta_backbone
from pretrain3d.config import UserError

REVERSED = (2, 1, 0)  # its own inverse


def permuted(imported: Imported, order: Sequence[int]) -> Imported:
    """The network that gives for ``image.permute(axes by order)`` the features of the old one, permuted alike.

    Args:
        imported: a ResEnc, a PlainConv or a Primus.
        order: the new network's axis a is the old one's axis ``order[a]``.

    Raises:
        UserError: another backbone; those come from frameworks whose arrays are x, y, z already.
    """
    backbone = meta_backbone(imported.backbone)
    if not isinstance(backbone, (StageBackbone, Primus)):
        raise UserError(f"axes=zyx is for ResEnc, PlainConv and Primus; a {imported.backbone['name']} saw x, y, z")
    spatial = [2 + axis for axis in order]
    weights = {}
    for name, tensor in imported.weights.items():
        if tensor.ndim == 5:
            tensor = tensor.permute(0, 1, *spatial).contiguous()
        elif name == "encoder.positions":
            tensor = tensor.permute(0, *(1 + axis for axis in order)).contiguous()
        elif isinstance(backbone, Primus) and turned(name):
            tensor = exchanged(tensor, backbone.arguments["heads"], order)
        weights[name] = tensor
    node = dict(imported.backbone)
    for key in ("patch", "image_size"):
        if key in node:
            node[key] = _reordered(node[key], order)
    for key in ("strides", "kernels"):
        if key in node and not isinstance(node[key], int):
            node[key] = [_reordered(value, order) for value in node[key]]
    preprocessing = dict(imported.preprocessing)
    for key in ("spacing_mm", "patch_size"):
        if preprocessing.get(key) is not None:
            preprocessing[key] = _reordered(preprocessing[key], order)
    return replace(imported, backbone=node, weights=weights, preprocessing=preprocessing)


def _reordered(value: Any, order: Sequence[int]) -> Any:
    return value if isinstance(value, int) else [value[axis] for axis in order]
