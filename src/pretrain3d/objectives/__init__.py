"""Pretraining methods, one file each. What they promise is in `contract`."""

PRETRAINING = {
    "mae": "pretrain3d.objectives.mae:MAE",
    "simmim": "pretrain3d.objectives.simmim:SimMIM",
    "simclr": "pretrain3d.objectives.simclr:SimCLR",
    "voco": "pretrain3d.objectives.voco:VoCo",
}
