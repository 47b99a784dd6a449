"""LightningModules: what is trained, one file each."""

MODULES = {
    "reconstruction": "pretrain3d.modules.reconstruction:ReconstructionModule",
    "detection": "pretrain3d.modules.detection:DetectionModule",
}
