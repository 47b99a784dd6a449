"""Backbones: networks from an image to a pyramid of features. What they promise is in `contract`."""

from __future__ import annotations

from os import PathLike
from typing import Any

BACKBONES = {
    "resenc": "pretrain3d.backbones.resenc:ResEnc",
    "resenc_xxs": "pretrain3d.backbones.resenc:resenc_xxs",
    "resenc_xs": "pretrain3d.backbones.resenc:resenc_xs",
    "resenc_s": "pretrain3d.backbones.resenc:resenc_s",
    "resenc_l": "pretrain3d.backbones.resenc:resenc_l",
    "plainconv": "pretrain3d.backbones.plainconv:PlainConv",
    "primus": "pretrain3d.backbones.primus:Primus",
    "primus_s": "pretrain3d.backbones.primus:primus_s",
    "primus_b": "pretrain3d.backbones.primus:primus_b",
    "primus_m": "pretrain3d.backbones.primus:primus_m",
    "primus_l": "pretrain3d.backbones.primus:primus_l",
    "vit": "pretrain3d.backbones.vit:ViT",
    "vit_b": "pretrain3d.backbones.vit:vit_b",
    "swin": "pretrain3d.backbones.swin:Swin",
    "resnet": "pretrain3d.backbones.monai_encoders:ResNet",
    "resnet50": "pretrain3d.backbones.monai_encoders:resnet50",
    "segresnet": "pretrain3d.backbones.monai_encoders:SegResNet",
}


def load_backbone(path: str | PathLike[str]) -> Any:
    """The pretrained backbone of a file, an `nn.Module` in eval mode: see `transfer.load_backbone`, imported on use."""
    from pretrain3d.backbones import transfer

    return transfer.load_backbone(path)
