"""The contract of `backbones.contract`, for every registered backbone."""

from __future__ import annotations

import pytest
import torch
from backbone_variants import VARIANTS, half_hidden

from pretrain3d.backbones import BACKBONES
from pretrain3d.backbones.decoders import image_decoder
from pretrain3d.config import UserError
from pretrain3d.registry import build

EMBEDDING = [name for name in VARIANTS if name.split("-")[0] in ("primus", "vit", "swin")]
CHECKPOINTING = ("resenc", "resenc-sparse", "plainconv", "primus", "vit", "swin")


def node(name: str) -> dict[str, object]:
    """A registered name, with arguments where it does not stand for one network."""
    return {"name": name, **(VARIANTS[name].arguments if name in VARIANTS else {})}


def image_of(name: str, channels: int = 1) -> torch.Tensor:
    return torch.randn(2, channels, *VARIANTS[name].size, generator=torch.Generator().manual_seed(1))


def test_every_registered_network_is_run_by_a_variant():
    with torch.device("meta"):
        kinds = {name: type(build(BACKBONES, node(name), "backbone")) for name in BACKBONES}
        run = {type(variant.build()) for variant in VARIANTS.values()}
    missing = sorted(name for name, kind in kinds.items() if kind not in run)
    assert not missing, f"give tests/backbone_variants.py a small variant of {missing}"


@pytest.mark.parametrize("name", BACKBONES)
def test_declared_levels_are_produced(name):
    with torch.device("meta"):
        backbone = build(BACKBONES, node(name), "backbone", in_channels=2)
        x, y, z = backbone.size_multiple
        size = (4 * x, 2 * y, 2 * z)
        features = backbone(torch.empty(1, 2, *size))
    assert backbone.in_channels == 2
    expected = [(1, lv.channels, *(s // f for s, f in zip(size, lv.stride, strict=True))) for lv in backbone.levels]
    assert [tuple(f.shape) for f in features] == expected
    strides = [level.stride for level in backbone.levels]
    assert strides == sorted(strides) and len(set(strides)) == len(strides), "finest first"
    assert backbone.size_multiple == strides[-1]
    assert not backbone.levels[0].tokens or len(backbone.levels) == 1


@pytest.mark.parametrize("name", BACKBONES)
def test_arguments_rebuild_the_same_network(name):
    with torch.device("meta"):
        backbone = build(BACKBONES, node(name), "backbone", in_channels=3)
        again = type(backbone)(**backbone.arguments)
    assert again.arguments == backbone.arguments and again.levels == backbone.levels
    assert backbone.runtime_arguments <= set(backbone.arguments)
    shapes = {key: value.shape for key, value in backbone.state_dict().items()}
    assert {key: value.shape for key, value in again.state_dict().items()} == shapes
    assert all(key in shapes for key in backbone.input_weights)
    assert all(shapes[key][1] == 3 for key in backbone.input_weights)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_wrong_size_names_the_multiple(name):
    backbone = VARIANTS[name].build()
    x, y, z = backbone.size_multiple
    with pytest.raises(UserError, match=f"needs a multiple of {x} x {y} x {z}"):
        backbone(torch.zeros(1, 1, 2 * x, 2 * y + 1, 2 * z))
    with pytest.raises(UserError, match=r"2 channel\(s\); this backbone takes 1"):
        backbone(torch.zeros(1, 2, 2 * x, 2 * y, 2 * z))
    if name.split("-")[0] in (
        "resenc",
        "resenc_xxs",
        "resenc_xs",
        "plainconv",
        "resnet",
    ):  # their norms need two voxels
        with pytest.raises(UserError, match="one voxel on the coarsest level"):
            backbone(torch.zeros(1, 1, x, y, z))
    else:
        assert all(f.isfinite().all() for f in backbone(torch.ones(1, 1, x, y, z)))


@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_voxels_change_no_feature(name):
    backbone, image = VARIANTS[name].build().eval(), image_of(name)
    keep = half_hidden(image.shape)
    other = torch.where(keep, image, 100 * torch.randn_like(image))
    other[~keep] = other[~keep].index_fill(0, torch.tensor([0]), float("nan"))
    visible = image.clone()
    visible[0, 0][keep[0, 0]] += 1.0 + torch.rand(int(keep[0].sum()))
    with torch.no_grad():
        features, changed, moved = backbone(image, keep), backbone(other, keep), backbone(visible, keep)
    for a, b, c in zip(features, changed, moved, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a[0], c[0]), "visible voxels do count"


@pytest.mark.parametrize("name", VARIANTS)
def test_everything_visible_equals_no_mask(name):
    backbone, image = VARIANTS[name].build().eval(), image_of(name)
    with torch.no_grad():
        plain, masked = backbone(image), backbone(image, torch.ones(image.shape, dtype=torch.bool))
    for a, b in zip(plain, masked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_bf16_is_finite_and_a_gradient_reaches_every_parameter(name):
    backbone, image = VARIANTS[name].build(), image_of(name)
    with torch.autocast("cpu", torch.bfloat16):
        features = backbone(image, half_hidden(image.shape))
    assert all(f.isfinite().all() for f in features)
    # random weights: the plain sum of an instance norm has no gradient
    sum((f.float() * torch.randn(f.shape)).sum() for f in features).backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert all(backbone.get_parameter(key).grad.abs().sum() > 0 for key in backbone.input_weights)


@pytest.mark.parametrize("name", VARIANTS)
def test_state_dict_round_trip(name):
    backbone, image = VARIANTS[name].build(), image_of(name)
    other = build(BACKBONES, {"name": VARIANTS[name].name, **VARIANTS[name].arguments}, "backbone")
    other.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        for a, b in zip(backbone.eval()(image), other.eval()(image), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", CHECKPOINTING)
def test_checkpointing_changes_no_gradient(name):
    gradients, image = [], image_of(name)
    for checkpointing in (False, True):
        backbone = VARIANTS[name].build(checkpointing=checkpointing)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            features = backbone(image, half_hidden(image.shape))
        sum(f.float().pow(3).sum() for f in features).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", EMBEDDING)
def test_embed_then_encode_is_a_call(name):
    backbone, image = VARIANTS[name].build().eval(), image_of(name)
    with torch.no_grad():
        embedded = backbone.embed(image)
        again = backbone.encode(embedded)
        features = backbone(image)
    level = backbone.levels[0]
    grid = tuple(s // f for s, f in zip(image.shape[2:], level.stride, strict=True))
    assert embedded.shape == (2, level.channels, *grid)
    assert all(torch.equal(a, b) for a, b in zip(features, again, strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_decoder_reaches_the_image_from_every_pyramid(name):
    backbone, image = VARIANTS[name].build(), image_of(name)
    decoder = image_decoder(backbone, backbone.levels, 3)
    outputs = decoder(backbone(image))
    assert outputs[0].shape == (2, 3, *image.shape[2:])
    outputs[0].pow(3).sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())
