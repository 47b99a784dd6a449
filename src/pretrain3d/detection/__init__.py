"""Detectors by name; a new one is a file and a line here."""

DETECTORS: dict[str, str] = {
    "retina_unet": "pretrain3d.detection.retina:RetinaUNet",
    "retinanet": "pretrain3d.detection.retina:retinanet",
    "deformable_detr": "pretrain3d.detection.detr:DeformableDETR",
}
