"""SimMIM against its definition."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from backbone_variants import VARIANTS
from method_checks import check_bf16_gradients_of, generators
from torch import nn

from pretrain3d.backbones.decoders import PatchDecoder, UNetDecoder, image_decoder
from pretrain3d.config import UserError
from pretrain3d.modules.reconstruction import ReconstructionModule
from pretrain3d.objectives import PRETRAINING
from pretrain3d.objectives.simmim import SimMIM
from pretrain3d.registry import build

EMBEDDING = ("primus", "vit", "swin")


def make(name: str, channels: int = 1, **arguments) -> tuple[nn.Module, SimMIM, dict[str, torch.Tensor]]:
    backbone, size = VARIANTS[name].build(in_channels=channels), VARIANTS[name].size
    given = {"levels": backbone.levels, "in_channels": channels, "patch_size": size}
    node = {"name": "simmim", **arguments}
    method = build(PRETRAINING, node, "module.method", **given, decoder=partial(image_decoder, backbone))
    inside = torch.ones(2, 1, *size, dtype=torch.bool)
    inside[0, :, size[0] - 3 :] = False  # the volume ends in the patch
    return backbone, method, {"image": torch.randn(2, channels, *size), "inside": inside}


@pytest.mark.parametrize("error", ["l1", "l2"])
@pytest.mark.parametrize("channels", [1, 2])
def test_loss_by_loops(channels, error):
    backbone, method, batch = make("primus", channels, error=error)
    prepared = method.prepare(batch, generators(0, 1))
    outputs = method(backbone, prepared)
    losses = method.loss(outputs, prepared)
    predicted, image = outputs["reconstruction"].detach().numpy(), batch["image"].numpy()
    keep, inside = prepared["keep"].numpy(), batch["inside"].numpy()
    of = np.abs if error == "l1" else np.square
    errors, trivial = [], []
    for b in range(2):
        for c in range(channels):
            voxels = list(np.ndindex(image.shape[2:]))
            mean = np.mean([image[b, c][v] for v in voxels if keep[b, 0][v] and inside[b, 0][v]])
            for v in voxels:
                if not keep[b, 0][v] and inside[b, 0][v]:
                    errors.append(of(predicted[b, c][v] - image[b, c][v]))
                    trivial.append(of(mean - image[b, c][v]))
    assert losses["loss"].item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert losses["mean_predictor"].item() == pytest.approx(np.mean(trivial), rel=1e-5)


@pytest.mark.parametrize("name", EMBEDDING)
def test_hidden_patches_are_the_mask_token_and_all_others_themselves(name):
    backbone, method, batch = make(name)
    prepared = method.prepare(batch, generators(0, 1))
    fed = []
    encode = backbone.encode
    backbone.encode = lambda embedded: fed.append(embedded) or encode(embedded)
    reconstruction = method(backbone, prepared)["reconstruction"]
    assert reconstruction.shape == batch["image"].shape
    embedded = backbone.embed(batch["image"])
    px, py, pz = backbone.levels[0].stride
    hidden = 0
    places = list(np.ndindex(2, *embedded.shape[2:]))
    for b, i, j, k in places[:: max(1, len(places) // 500)]:  # every one, of a Swin every 32nd
        cell = prepared["keep"][b, 0, i * px : (i + 1) * px, j * py : (j + 1) * py, k * pz : (k + 1) * pz]
        assert cell.all() or not cell.any()
        expected = embedded[b, :, i, j, k] if cell.all() else method.mask_token
        torch.testing.assert_close(fed[0][b, :, i, j, k], expected)
        hidden += not cell.any()
    assert hidden > 0


@pytest.mark.parametrize("name", EMBEDDING)
def test_hidden_voxels_influence_nothing_and_loss_voxels_are_the_hidden_ones(name):
    backbone, method, batch = make(name, ratio=0.75)
    prepared = method.prepare(batch, generators(0, 1))
    noise = torch.where(prepared["keep"], batch["image"], float("nan"))
    other = method.prepare({**batch, "image": noise}, generators(0, 1))
    a, b = method(backbone, prepared)["reconstruction"], method(backbone, other)["reconstruction"]
    assert torch.equal(a, b)
    b.sum().backward()
    assert all(p.grad.isfinite().all() for p in backbone.parameters()), "a hidden NaN stays out of the gradients"
    prediction = torch.randn(a.shape, requires_grad=True)
    method.loss({"reconstruction": prediction}, prepared)["loss"].backward()
    assert torch.equal(prediction.grad != 0, ~prepared["keep"] & batch["inside"])


@pytest.mark.parametrize("name", EMBEDDING)
def test_bf16_gives_a_float32_loss_and_every_parameter_a_gradient(name):
    check_bf16_gradients_of(*make(name))


def test_counts_and_defaults_at_the_reference_size():
    primus = VARIANTS["primus"].build(patch=8, image_size=160)
    method = SimMIM(primus.levels, 1, (160, 160, 160), partial(image_decoder, primus), ratio=0.75)
    assert method.block == (8, 8, 8) and isinstance(method.decoder, PatchDecoder)
    image = torch.zeros(1, 1, 160, 160, 160)
    keep = method.prepare({"image": image, "inside": image == 0}, generators(0))["keep"]
    assert (~keep[0, 0, ::8, ::8, ::8]).sum() == 6000 and (~keep).sum() == 6000 * 512
    swin = make("swin")[1]
    assert swin.ratio == 0.6 and swin.error is torch.abs and swin.block == (4, 8, 4)


def test_wrong_masks_are_refused():
    with pytest.raises(UserError, match=r"block is \(8, 8, 8\); it must be a multiple of a token, \(16, 16, 16\)"):
        primus = VARIANTS["primus"].build(patch=16, image_size=32)
        SimMIM(primus.levels, 1, (32, 32, 32), partial(image_decoder, primus), block=8)
    with pytest.raises(UserError, match="nothing to predict or nothing to see"):
        make("vit", ratio=1.0)
    with pytest.raises(UserError, match="error must be 'l1' or 'l2', got 'l3'"):
        make("vit", error="l3")


@pytest.mark.parametrize("name", ["resenc", "segresnet"])
def test_a_backbone_without_embedded_patches_is_refused(name):
    backbone = VARIANTS[name].build()
    with pytest.raises(UserError, match=r"simmim replaces embedded patches and a (ResEnc|SegResNet) has none"):
        ReconstructionModule(backbone, {"name": "simmim"}, (16, 16, 16), {"seed": 0}, {"name": "adamw", "lr": 1e-3})


def test_swin_is_decoded_to_the_image():
    backbone, method, _ = make("swin")
    coarse, patches = method.decoder
    assert isinstance(coarse, UNetDecoder) and isinstance(patches, PatchDecoder)
    assert patches.ups[-1].out_channels == 1 and backbone.levels[0].stride == (2, 2, 2)
