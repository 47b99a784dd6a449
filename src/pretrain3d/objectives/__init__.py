"""Pretraining methods, one file each. What they promise is in `contract`."""

PRETRAINING = {
    "mae": "pretrain3d.objectives.mae:MAE",
    "simmim": "pretrain3d.objectives.simmim:SimMIM",
    "simclr": "pretrain3d.objectives.simclr:SimCLR",
    "voco": "pretrain3d.objectives.voco:VoCo",
    "s3d": "pretrain3d.objectives.s3d:S3D",
    "models_genesis": "pretrain3d.objectives.models_genesis:ModelsGenesis",
    "volume_fusion": "pretrain3d.objectives.volume_fusion:VolumeFusion",
    "slice_mae": "pretrain3d.objectives.slice_mae:SliceMAE",
    "supervised": "pretrain3d.objectives.segmentation:Segmentation",
    "swin_mix": "pretrain3d.objectives.swin_mix:SwinMix",
}
