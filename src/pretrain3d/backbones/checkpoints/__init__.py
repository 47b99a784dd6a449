"""Files of other frameworks to ours and back: one module per format with ``recognises`` and ``convert``."""

FORMATS = {
    "nnssl": "pretrain3d.backbones.checkpoints.nnssl",
    "nnunet": "pretrain3d.backbones.checkpoints.nnunet",
    "monai_swin": "pretrain3d.backbones.checkpoints.monai_swin",
}
