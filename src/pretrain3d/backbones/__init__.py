"""Backbones: networks from an image to a pyramid of features. What they promise is in `contract`."""

BACKBONES = {
    "resenc": "pretrain3d.backbones.resenc:ResEnc",
    "resenc_xs": "pretrain3d.backbones.resenc:resenc_xs",
    "resenc_s": "pretrain3d.backbones.resenc:resenc_s",
    "resenc_l": "pretrain3d.backbones.resenc:resenc_l",
}
