"""How a detector is asked about whole volumes: settings that are checked at once, sides that are not exchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_detector import tiny_checkpoint

from pretrain3d.config import UserError
from pretrain3d.modules.checkpoint import load_module
from pretrain3d.modules.detection import DetectionModule


def module_of(path: Path, **settings: Any) -> DetectionModule:
    """The tiny detector with other settings of its inference."""
    classes = settings.pop("classes", ("nodule", "lesion"))
    checkpoint = tiny_checkpoint(path, classes=classes)
    content = torch.load(checkpoint, weights_only=True)
    content["pretrain3d"]["module"] |= {key: value for key, value in settings.items() if key != "mirror_classes"}
    content["pretrain3d"]["mirror_classes"] = settings.get("mirror_classes", {})
    torch.save(content, checkpoint)
    module: Any = load_module(checkpoint, "detection")
    return module


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tile_size": [20, 17, 32]},
            r"module.tile_size is \[20, 17, 32\]; the backbone needs a multiple of 2 x 2 x 2",
        ),
        (
            {"tile_size": [32, 16, 16], "detector": {"name": "deformable_detr", "hidden": 16, "heads": 2}},
            r"module.tile_size is \[32, 16, 16\]; deformable_detr .* training patch, 16 x 16 x 16: set .*=null",
        ),
        ({"overlap": 1.0}, r"overlap is 1.0"),
        ({"tile_batch": 0}, "tile_batch is 0"),
        ({"mirror_axes": [3]}, r"mirror_axes is \[3\]"),
        ({"merging": {"method": "mean"}}, "merge method is 'mean'; expected clustering or nms"),
    ],
)
def test_settings_are_checked_before_training(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        module_of(tmp_path / "a.ckpt", **settings)


def test_sides_without_a_counterpart_are_not_mirrored(tmp_path: Path) -> None:
    image, sides = torch.randn(1, 20, 20, 20), ("left kidney", "right kidney")
    module = module_of(tmp_path / "a.ckpt", classes=sides, mirror_axes=[0, 1])
    with pytest.warns(UserWarning, match="axis 0 .left-right.: left kidney, right kidney without a counterpart"):
        assert len(module.predict_views(image)) == 2  # as it is, and along axis 1
    paired = {"left kidney": "right kidney", "left lung": "right lung"}  # the second of organs, no classes
    module = module_of(tmp_path / "b.ckpt", classes=sides, mirror_axes=[0, 1], mirror_classes=paired)
    assert len(module.predict_views(image)) == 4
    assert len(module_of(tmp_path / "c.ckpt", mirror_axes=[0, 1]).predict_views(image)) == 4
