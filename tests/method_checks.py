"""What the tests of pretraining methods share: small inputs, and the promises that every method keeps."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.backbones.stages import MASKING
from pretrain3d.backbones.vit import ViT
from pretrain3d.config import UserError
from pretrain3d.modules.pretraining import build_method
from pretrain3d.objectives import PRETRAINING
from pretrain3d.registry import resolve

Shape = tuple[int, int, int]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def make_batch(shape: Shape, channels: int = 1, batch: int = 2) -> dict[str, Tensor]:
    """Noise; of the first sample, the last voxels along x lie outside the volume."""
    inside = torch.ones(batch, 1, *shape, dtype=torch.bool)
    inside[0, :, shape[0] * 3 // 4 :] = False
    return {"image": torch.randn(batch, channels, *shape), "inside": inside}


def make(name: str, shape: Shape, channels: int = 1, **arguments: Any) -> tuple[Any, Any]:
    """A method of the registry on the first tiny backbone that it takes: a ResEnc, a sparse one, a Transformer."""
    kinds = [partial(ResEnc, [4, 6, 8], [1, 1, 1], [1, 2, 2], masking=masking) for masking in MASKING]
    backbones = (kind(in_channels=channels) for kind in (*kinds, partial(ViT, 16, 2, 4, 8, shape)))
    backbone = next(backbone for backbone in backbones if takes_backbone(name, backbone))
    return backbone, build_method(backbone, {"name": name, **arguments}, shape)


def takes_backbone(name: str, backbone: nn.Module) -> bool:
    check = getattr(resolve(PRETRAINING, name, "module.method"), "check_backbone", None)
    try:
        return check is None or check(backbone) is None
    except UserError:
        return False


def check_bf16_gradients(name: str, shape: Shape = (16, 16, 16), **arguments: Any) -> None:
    """`check_bf16_gradients_of` a method of the registry on a tiny ResEnc."""
    check_bf16_gradients_of(*make(name, shape, **arguments), make_batch(shape))


def check_bf16_gradients_of(backbone: nn.Module, method: Any, batch: dict[str, Tensor]) -> None:
    """Under bf16 the losses are float32, and every parameter gets a finite gradient."""
    with torch.autocast("cpu", torch.bfloat16):
        prepared = method.prepare(batch, generators(0, 1))
        outputs = method(backbone, prepared)
    assert any(output.dtype == torch.bfloat16 for output in outputs.values()), "autocast did nothing"
    losses = method.loss(outputs, prepared)
    for key, value in losses.items():
        assert value.dtype == torch.float32 and value.isfinite() and value.requires_grad == (key == "loss"), key
    losses["loss"].backward()
    for key, parameter in nn.ModuleDict({"backbone": backbone, "method": method}).named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


def check_empty_batch(name: str, shape: Shape = (16, 16, 16), **arguments: Any) -> dict[str, Tensor]:
    """A batch that lies outside the volume gives finite losses and gradients; returns the losses."""
    backbone, method = make(name, shape, **arguments)
    batch = make_batch(shape)
    batch["inside"] = torch.zeros_like(batch["inside"])
    prepared = method.prepare(batch, generators(0, 1))
    losses = method.loss(method(backbone, prepared), prepared)
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())
    return losses


def check_own_draws(name: str, shape: Shape = (16, 16, 16), **arguments: Any) -> None:
    """What is made of a sample depends on its own generator alone, and changes with it."""
    _, method = make(name, shape, **arguments)
    batch = make_batch(shape)
    once, again = (method.prepare(batch, generators(5, 6)) for _ in range(2))
    alone = method.prepare({key: value[1:] for key, value in batch.items()}, generators(6))
    other = method.prepare(batch, generators(7, 8))
    for key in ("inputs", "targets", "keep"):
        assert torch.equal(once[key], again[key]) and torch.equal(once[key][1:], alone[key]), key
    assert any(not torch.equal(once[key], other[key]) for key in ("inputs", "keep"))


def check_hidden_is_scored(name: str, shape: Shape = (16, 16, 16), **arguments: Any) -> None:
    """Loss voxels are the hidden voxels inside the volume, no other; what is hidden changes no prediction."""
    backbone, method = make(name, shape, **arguments)
    batch = make_batch(shape)
    prepared = method.prepare(batch, generators(0, 1))
    prediction = torch.randn(2, 1, *shape, requires_grad=True)
    method.loss({"reconstruction": prediction}, prepared)["loss"].backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad != 0, ~prepared["keep"] & batch["inside"])
    assert not prepared["keep"].all() and prepared["keep"].any()
    other = torch.where(prepared["keep"], batch["image"], 100 * torch.randn_like(batch["image"]))
    with torch.no_grad():
        a = method(backbone, prepared)["reconstruction"]
        b = method(backbone, method.prepare({**batch, "image": other}, generators(0, 1)))["reconstruction"]
    assert torch.equal(a, b)


def check_pictures(name: str, names: list[str], shape: Shape = (16, 16, 8)) -> dict[str, np.ndarray]:
    """Slices (X, Y) float32 of the first sample under these names; returns them."""
    backbone, method = make(name, shape)
    prepared = method.prepare(make_batch(shape), generators(0, 1))
    pictures = method.pictures(method(backbone, prepared), prepared)
    assert list(pictures) == names
    for picture in pictures.values():
        assert picture.dtype == np.float32 and picture.ndim == 2 and np.isfinite(picture).all()
    return pictures
