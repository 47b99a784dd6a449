"""The checkpoint of a small detector, untrained, as `fit` would have written it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pretrain3d.backbones import BACKBONES
from pretrain3d.modules import MODULES
from pretrain3d.modules.base import NOTE
from pretrain3d.registry import build

INTENSITY = {"scheme": "window", "low": -1000.0, "high": 300.0, "mean": -350.0, "std": 650.0}


def tiny_checkpoint(
    path: Path,
    classes: tuple[str, ...] = ("nodule", "lesion"),
    modality: tuple[str, ...] = ("CT",),
    spacing_mm: tuple[float, ...] = (1.0, 1.0, 1.0),
    seed: int = 0,
    **more: Any,
) -> Path:
    """Two levels, tiles of 16^3 that find 20 boxes each, random weights of a ``seed``; ``more`` goes into the note."""
    torch.manual_seed(seed)
    backbone = {
        "name": "resenc", "channels": [8, 16], "blocks": [1, 1], "strides": [1, 2],
        "in_channels": len(modality),
    }  # fmt: skip
    detector = {"name": "retinanet", "detection_levels": [1], "anchors": {"boxes": [[6, 6, 6], [3, 3, 3]]},
                "fpn_channels": 16, "num_convs": 0, "detections_per_patch": 20}  # fmt: skip
    module = {"name": "detection", "detector": detector, "optimizer": {"name": "adamw", "lr": 0.001}, "overlap": 0.25}
    note = {
        "kind": "detection", "backbone": backbone, "module": module, "classes": list(classes), "mirror_classes": {},
        "preprocessing": {"modality": list(modality), "spacing_mm": list(spacing_mm), "patch_size": [16, 16, 16],
                          "intensity": INTENSITY},
        "batch": {"batch_size": 1, "accumulate_grad_batches": 1},
        "precision": "32-true", "weights": "online", "seed": 0, "source": {"run": "tiny", "step": 0}, **more,
    }  # fmt: skip
    built = build(
        MODULES, module, "module", backbone=build(BACKBONES, backbone, "backbone"), note=note, patch_size=(16, 16, 16),
        classes=list(classes), mirror_classes={},
    )  # fmt: skip
    with torch.no_grad():  # untrained heads say the same everywhere
        built.detector.classifier.output.weight.normal_(std=0.3)
        built.detector.regressor.output.weight.normal_(std=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": built.state_dict(), NOTE: note}, path)
    return path
