"""Every kind of registered backbone at a size that two CPU cores can run: what the contract tests go through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pretrain3d.backbones import BACKBONES
from pretrain3d.registry import build

STAGES = {"channels": [4, 6, 8], "blocks": [1, 2, 1], "strides": [1, [1, 2, 2], 2], "kernels": [[1, 3, 3], 3, 3]}
PLAIN = {"channels": [4, 6, 8], "convs": [2, 1, 3], "strides": [1, [1, 2, 2], 2], "kernels": [[1, 3, 3], 3, 3]}
RESNET = {"layers": [1, 1, 1, 1], "widths": [4, 4, 6, 8]}


@dataclass(frozen=True)
class Variant:
    """A backbone's node and the image size it is tested with, (3,) voxels and anisotropic."""

    name: str
    size: tuple[int, int, int]
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self, **more: Any) -> nn.Module:
        torch.manual_seed(0)
        return build(BACKBONES, {"name": self.name, **self.arguments, **more}, "backbone")


PRIMUS = {"embed_dim": 24, "depth": 2, "heads": 2, "patch": [4, 8, 8], "image_size": [8, 24, 16]}
VIT = {"embed_dim": 16, "depth": 2, "heads": 4, "patch": 8, "image_size": [16, 24, 8]}
SWIN = {"feature_size": 12, "depths": [1, 2, 1, 1], "window": 4}
VARIANTS = {
    "resenc": Variant("resenc", (8, 24, 16), STAGES),
    "resenc-sparse": Variant("resenc", (8, 24, 16), {**STAGES, "masking": "sparse"}),
    "resenc_xxs": Variant("resenc_xxs", (24, 24, 32)),
    "resenc_xs": Variant("resenc_xs", (32, 32, 48)),
    "plainconv": Variant("plainconv", (8, 24, 16), PLAIN),
    "plainconv-sparse": Variant("plainconv", (8, 24, 16), {**PLAIN, "masking": "sparse"}),
    "primus": Variant("primus", (8, 24, 16), PRIMUS),
    "primus-deep": Variant("primus", (8, 24, 16), {**PRIMUS, "drop_path": 0.2, "checkpointing": True}),
    "vit": Variant("vit", (16, 24, 8), VIT),
    "vit-checkpointing": Variant("vit", (16, 24, 8), {**VIT, "checkpointing": True}),
    "swin": Variant("swin", (32, 64, 32), SWIN),
    "swin-v1": Variant("swin", (32, 64, 32), {**SWIN, "v2": False, "checkpointing": True}),
    "resnet": Variant("resnet", (32, 64, 32), RESNET),
    "resnet-batch": Variant("resnet", (32, 64, 32), {**RESNET, "norm": "batch"}),
    "segresnet": Variant("segresnet", (8, 24, 16), {"filters": 8, "blocks": [1, 1, 2]}),
}


def half_hidden(shape: tuple[int, ...], side: int = 8, seed: int = 0) -> torch.Tensor:
    """Half of the blocks of ``side`` voxels hidden, not the same number in every sample: (B, 1, X, Y, Z) bool."""
    grid = [shape[0], 1, *(s // side for s in shape[-3:])]
    keep = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < 0.5
    for axis in (2, 3, 4):
        keep = keep.repeat_interleave(side, axis)
    return keep
