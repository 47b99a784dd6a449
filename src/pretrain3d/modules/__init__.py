"""LightningModules: what is trained, one file each."""

MODULES = {
    "reconstruction": "pretrain3d.modules.reconstruction:ReconstructionModule",
    "contrastive": "pretrain3d.modules.contrastive:ContrastiveModule",
    "segmentation": "pretrain3d.modules.segmentation:SegmentationModule",
    "detection": "pretrain3d.modules.detection:DetectionModule",
}

FINETUNE = {
    "whole": "pretrain3d.modules.finetune:whole",
    "two_phase": "pretrain3d.modules.finetune:two_phase",
    "sawtooth": "pretrain3d.modules.finetune:sawtooth",
    "frozen": "pretrain3d.modules.finetune:frozen",
}
