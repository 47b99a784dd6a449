"""Pretraining methods, one file each. What they promise is in `contract`."""

PRETRAINING = {
    "mae": "pretrain3d.objectives.mae:MAE",
}
