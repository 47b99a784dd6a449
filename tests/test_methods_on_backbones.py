"""The reconstruction methods on every kind of backbone: each works or says in one line what it needs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from backbone_variants import VARIANTS
from method_checks import generators, make_batch
from torch import nn

from pretrain3d.backbones.decoders import image_decoder
from pretrain3d.config import UserError
from pretrain3d.modules.reconstruction import ReconstructionModule
from pretrain3d.objectives import PRETRAINING
from pretrain3d.registry import build

SLOW = ("resenc_xs", "swin", "checkpointing", "deep", "resnet-batch")
BACKBONES = [
    pytest.param(name, marks=pytest.mark.slow if any(part in name for part in SLOW) else ()) for name in VARIANTS
]


@pytest.mark.parametrize("method_name", ["models_genesis", "volume_fusion", "swin_mix"])
@pytest.mark.parametrize("name", BACKBONES)
def test_whole_patch_methods_run_on_every_backbone(name: str, method_name: str) -> None:
    backbone, (x, y, z) = VARIANTS[name].build(), VARIANTS[name].size
    size = (max(x, y), max(x, y), z)
    method = build(
        PRETRAINING, {"name": method_name, **({"shuffle": 0.0} if method_name == "models_genesis" else {})}, "method",
        levels=backbone.levels, in_channels=1, patch_size=size, decoder=partial(image_decoder, backbone),
    )  # fmt: skip
    prepared = method.prepare(make_batch(size), generators(0, 1))
    outputs = method(backbone, prepared)
    loss = method.loss(outputs, prepared)["loss"]
    loss.backward()
    assert loss.isfinite()
    image = outputs["logits" if method_name == "volume_fusion" else "reconstruction"]
    assert image.shape[2:] == torch.Size(size)
    for key, parameter in nn.ModuleDict({"backbone": backbone, "method": method}).named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_method_needs_of_a_backbone_is_said_at_once(name: str) -> None:
    """Slices and sparse masking are for CNNs of stages; anything else is refused when the module is put together."""
    backbone = VARIANTS[name].build()
    stages = name.startswith(("resenc", "plainconv"))
    runs = {"s3d": stages and name.endswith("sparse"), "slice_mae": stages}
    for method, possible in runs.items():
        given = {"patch_size": (32, 64, 32), "note": {"source": {}, "seed": 0}, "optimizer": {"name": "adamw"}}
        if possible:
            assert ReconstructionModule(backbone, {"name": method}, **given).backbone is backbone
            continue
        with pytest.raises(UserError, match=f"^{method}: the backbone {type(backbone).__name__} .*; take resenc_xs"):
            ReconstructionModule(backbone, {"name": method}, **given)
