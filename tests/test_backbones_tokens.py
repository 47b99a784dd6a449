"""Primus, ViT and Swin: known answers, what a mask drops, and the released weights' features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backbone_variants import VARIANTS, half_hidden
from torch import nn

from pretrain3d.backbones.attention import DropPath, rotate, rotation_table
from pretrain3d.backbones.checkpoints.released_primus import ours
from pretrain3d.backbones.decoders import PatchDecoder, image_decoder, prime_factors
from pretrain3d.backbones.primus import Primus, primus_b, primus_l, primus_m, primus_s
from pretrain3d.backbones.tokens import PatchEmbedding, visible_first
from pretrain3d.backbones.vit import ViT, vit_b
from pretrain3d.config import UserError


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("build", "total"),
    [(primus_s, 26_268_285), (primus_b, 97_958_065), (primus_m, 151_786_529), (primus_l, 331_823_761)],
)
def test_primus_has_the_published_number_of_parameters(build, total):
    with torch.device("meta"):
        backbone = build()
        decoder = image_decoder(backbone, backbone.levels, 1)
    assert parameters(backbone) + parameters(decoder) == total


def test_parts_of_primus_m_and_of_vit_b():
    with torch.device("meta"):
        backbone, decoder, plain = primus_m(), PatchDecoder(864, (8, 8, 8), 1), vit_b()
    counts = [parameters(part) for part in (backbone.encoder, backbone.embedding, decoder)]
    assert counts == [150_554_304, 443_232, 788_993]
    assert [up.out_channels for up in decoder.ups] == [112, 16, 1]
    assert len(backbone.state_dict()) + len(decoder.state_dict()) == 384 - 1  # a released file has a mask token too
    # 12 blocks of 12 C^2 + 13 C, positions, a patch embedding, the final norm
    assert parameters(plain) == 12 * (12 * 768**2 + 13 * 768) + 1000 * 768 + 4097 * 768 + 2 * 768


def test_swin_is_the_encoder_of_monai_swin_unetr():
    from monai.networks.nets import SwinUNETR

    from pretrain3d.backbones.swin import Swin

    sizes = {24: 4.82, 48: 18.64, 96: 73.89}
    with torch.device("meta"):
        assert {size: round(parameters(Swin(size)) / 1e6, 2) for size in sizes} == sizes
    whole = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), use_v2=True)
    swin = Swin(12, (1, 1, 1, 1))
    swin.load_state_dict({k: v for k, v in whole.state_dict().items() if k.startswith("swinViT.")})
    image = torch.randn(1, 1, 32, 32, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(swin(image), whole.swinViT(image), strict=True))


def test_rotation_by_loops():
    grid, head_dim = (2, 3, 2), 12  # two bands per axis
    cosine, sine = rotation_table(grid, head_dim)
    assert cosine.shape == sine.shape == (1, 1, 12, 12)
    x = torch.randn(1, 1, 12, head_dim)
    turned = rotate(x, (cosine, sine))[0, 0]
    for token, place in enumerate(np.ndindex(grid)):
        for axis in range(3):
            for band in range(2):
                angle = place[axis] / 10_000 ** (band / 2)
                at = axis * 4 + band * 2
                a, b = x[0, 0, token, at].item(), x[0, 0, token, at + 1].item()
                expected = [a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)]
                np.testing.assert_allclose(turned[token, at : at + 2].numpy(), expected, atol=1e-5)


def test_rotated_products_depend_on_the_distance_alone():
    rotation = rotation_table((4, 4, 4), 24)
    query, key = torch.randn(24), torch.randn(24)
    products = torch.einsum(
        "nc,mc->nm",
        rotate(query.expand(1, 1, 64, 24), rotation)[0, 0],
        rotate(key.expand(1, 1, 64, 24), rotation)[0, 0],
    ).view([4] * 6)
    torch.testing.assert_close(products[0, 1, 0, 2, 1, 3], products[1, 2, 0, 3, 2, 3], rtol=1e-4, atol=1e-4)
    assert (products[0, 0, 0, 1, 0, 0] - products[0, 0, 0, 0, 1, 0]).abs() > 1e-3, "axes are told apart"


def test_patch_embedding_is_a_strided_convolution():
    embedding, image = PatchEmbedding(2, 6, (2, 4, 3)), torch.randn(2, 2, 4, 8, 9)
    expected = F.conv3d(image, embedding.weight, embedding.bias, stride=(2, 4, 3))
    torch.testing.assert_close(embedding(image), expected, rtol=1e-4, atol=1e-5)


def test_vit_blocks_are_torch_encoder_layers():
    backbone, image = VARIANTS["vit"].build().eval(), torch.randn(2, 1, 16, 24, 8)
    x = (backbone.embed(image) + backbone.encoder.positions).flatten(2).transpose(1, 2)
    for block in backbone.encoder.blocks:
        layer = nn.TransformerEncoderLayer(
            16, 4, 64, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        names = {"qkv": "self_attn.in_proj_", "proj": "self_attn.out_proj.", "fc1": "linear1.", "fc2": "linear2."}
        state = {}
        for key, value in block.state_dict().items():
            part, kind = key.split(".")
            state[names.get(part, f"{part}.") + kind] = value
        layer.load_state_dict(state)
        x = layer(x)
    expected = backbone.encoder.norm(x).transpose(1, 2).reshape(2, 16, 2, 3, 1)
    torch.testing.assert_close(backbone(image)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["primus", "vit"])
def test_hidden_tokens_are_dropped_sample_by_sample(name):
    backbone = VARIANTS[name].build().eval()
    image = torch.randn(4, 1, *VARIANTS[name].size)
    keep = half_hidden(image.shape)
    keep[1], keep[2] = True, False  # all visible, none
    keep[3], keep[3, 0, :2, :2, :2] = False, True  # one token, of which a corner is visible
    features = backbone(image, keep)[0]
    px, py, pz = backbone.patch
    assert len({int(k.sum()) for k in keep}) == 4, "other numbers of tokens in every sample"
    for sample in range(4):
        embedded = backbone.embed(image[sample : sample + 1].masked_fill(~keep[sample : sample + 1], 0.0))
        tokens = (embedded + backbone.encoder.positions)[0].flatten(1).T  # (N, C)
        table = rotation_table(backbone.grid, backbone.encoder.head_dim or 6)
        shown, places = [], list(np.ndindex(*backbone.grid))
        for token, (i, j, k) in enumerate(places):
            cell = keep[sample, 0, i * px : (i + 1) * px, j * py : (j + 1) * py, k * pz : (k + 1) * pz]
            if cell.any():
                shown.append(token)
            else:
                assert (features[sample, :, i, j, k] == 0).all()
        if shown:
            x = tokens[shown][None]
            for block in backbone.encoder.blocks:
                x = block(x, (table[0][:, :, shown], table[1][:, :, shown]) if name == "primus" else None, None)
            expected = backbone.encoder.norm(x)[0]
            got = torch.stack([features[(sample, slice(None), *places[token])] for token in shown])
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["primus", "vit"])
def test_a_known_number_of_visible_tokens_changes_nothing(name):
    backbone = VARIANTS[name].build().eval()
    image = torch.randn(2, 1, *VARIANTS[name].size)
    keep = half_hidden((1, *image.shape[1:])).repeat(2, 1, 1, 1, 1)
    number = int(backbone(image, keep)[0][0].abs().sum(0).gt(0).sum())
    assert torch.equal(backbone(image, keep)[0], backbone(image, keep, number)[0])
    with pytest.raises(AssertionError):
        backbone(image, keep, number + 1)


def test_visible_first_by_loops():
    visible = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    index, valid = visible_first(visible)
    assert index[:2].tolist()[0] == [1, 2, 4] and index[1, 0] == 2
    assert valid.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert visible_first(visible[:1])[1] is None


@pytest.mark.parametrize("name", ["primus", "vit"])
def test_an_empty_sample_leaves_gradients_finite(name):
    backbone = VARIANTS[name].build()
    image = torch.randn(2, 1, *VARIANTS[name].size)
    keep = torch.ones(image.shape, dtype=torch.bool)
    keep[0] = False
    for hidden in (keep, torch.zeros_like(keep)):
        backbone.zero_grad()
        features = backbone(image, hidden)[0]
        assert (features[0] == 0).all()
        features.pow(3).sum().backward()
        assert all(p.grad.isfinite().all() for p in backbone.parameters())


def test_other_sizes_interpolate_the_positions():
    backbone = VARIANTS["primus"].build()
    positions = backbone.encoder.positions.data
    positions[:] = torch.arange(3.0)[None, None, :, None]  # rises along y: 0, 1, 2 at the centres of 3 tokens
    wide = backbone.encoder._positions(torch.Size((2, 6, 2)))
    expected = [0.0, 0.25, 0.75, 1.25, 1.75, 2.0]
    torch.testing.assert_close(wide, torch.tensor(expected)[None, None, :, None].expand(24, 2, 6, 2))
    assert backbone.encoder._positions(torch.Size((2, 3, 2))) is backbone.encoder.positions
    assert backbone(torch.randn(1, 1, 8, 48, 16))[0].shape == (1, 24, 2, 6, 2)


def test_drop_path_keeps_the_mean():
    drop, x = DropPath(0.25), torch.ones(4000, 1, 1)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert y.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(x), x)


def test_stochastic_depth_rises_to_its_rate():
    backbone = Primus(24, 3, 2, 8, 16, drop_path=0.2)
    assert [block.drop_path.rate for block in backbone.encoder.blocks] == pytest.approx([0.0, 0.1, 0.2])
    assert all(block.drop_path.rate == 0.0 for block in backbone.make_stack(2).blocks)


def test_weights_start_small_and_outputs_of_deeper_blocks_smaller():
    backbone = Primus(96, 4, 4, 8, 32)
    for number, block in enumerate(backbone.encoder.blocks, start=1):
        for matrix in (block.attn.q_proj, block.attn.v_proj, block.mlp.fc1_x):
            assert matrix.weight.std().item() == pytest.approx(0.02, rel=0.1) and not matrix.bias.any()
        for output in (block.attn.proj, block.mlp.fc2):
            assert output.weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.1)
        assert torch.equal(block.gamma_1, torch.full((96,), 0.1)) and torch.equal(block.gamma_2, block.gamma_1)
    assert backbone.encoder.positions.std().item() == pytest.approx(0.02, rel=0.1)
    assert backbone.embedding.weight.std().item() == pytest.approx(512**-0.5, rel=0.1)


def released_checkpoint(testdata) -> tuple[dict, dict]:
    checkpoint = torch.load(testdata / "golden" / "checkpoints" / "nnssl_primus.pth", weights_only=True)
    return checkpoint["network_weights"], checkpoint["nnssl_adaptation_plan"]


def test_released_weights_give_the_official_features(testdata):
    weights, plan = released_checkpoint(testdata)
    about = plan["architecture_plans"]["arch_kwargs"]
    backbone = Primus(
        about["embed_dim"],
        about["eva_depth"],
        about["eva_numheads"],
        tuple(about["patch_embed_size"]),
        tuple(about["input_shape"]),
    ).eval()
    state = ours(weights, backbone.grid, about["eva_numheads"], plan["key_to_encoder"], plan["key_to_stem"])
    backbone.load_state_dict(state)
    expected = np.load(testdata / "golden" / "checkpoints" / "nnssl_primus_expected.npz")
    with torch.no_grad():
        features = backbone(torch.from_numpy(expected["x"]))[0].numpy()
    np.testing.assert_allclose(features, expected["features"], atol=2e-5, rtol=0)
    assert np.abs(features - expected["features_if_token_order_is_wrong"]).max() > 1.0


def test_released_weights_need_a_square_grid():
    with pytest.raises(UserError, match="as many tokens along x as along y; the grid is 2 x 3 x 2"):
        ours({}, (2, 3, 2), 2)


@pytest.mark.parametrize(
    ("channels", "stride", "out", "inner"),
    [(864, (8, 8, 8), 1, [112, 16]), (48, (8, 8, 8), 1, [16, 8]), (768, (16, 16, 16), 1, [176, 40, 8])],
)
def test_patch_decoder_channels(channels, stride, out, inner):
    with torch.device("meta"):
        decoder = PatchDecoder(channels, stride, out)
        image = decoder([torch.empty(1, channels, 2, 1, 3)])[0]
    assert [norm.normalized_shape[0] for norm in decoder.norms] == inner
    assert image.shape == (1, out, 2 * stride[0], stride[1], 3 * stride[2])


def test_patch_decoder_by_its_definition():
    decoder, x = PatchDecoder(16, (2, 4, 3), 2), torch.randn(2, 16, 2, 1, 2)
    first, second = decoder.ups
    assert [up.stride for up in decoder.ups] == [(1, 2, 1), (2, 2, 3)]
    y = first(x)
    centred = y - y.mean(1, keepdim=True)
    normed = centred / (y.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(decoder([x])[0], second(F.gelu(normed)), rtol=1e-4, atol=1e-5)


def test_prime_factors():
    assert {n: prime_factors(n) for n in (1, 2, 7, 8, 12)} == {1: [], 2: [2], 7: [7], 8: [2, 2, 2], 12: [3, 2, 2]}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Primus(32, 1, 2), "primus: embed_dim is 32; with 2 heads it must be a multiple of 12"),
        (lambda: ViT(30, 1, 4), "vit: embed_dim is 30; with 4 heads it must be a multiple of 4"),
        (lambda: ViT(32, 1, 4, 16, 40), "image_size is 40 x 40 x 40; it must be a multiple of the patch, 16 x 16 x 16"),
        (lambda: VARIANTS["swin"].build(feature_size=16), "feature_size is 16; it must be a multiple of 12"),
        (lambda: VARIANTS["segresnet"].build(filters=12), "filters is 12; it must be a multiple of 8"),
        (lambda: VARIANTS["resnet"].build(layers=[1, 1]), "one entry for each of 4 stages"),
        (lambda: VARIANTS["resnet"].build(layers=[1, 1, 0, 1]), "resnet: layers is .*; every number must be 1 or more"),
        (lambda: VARIANTS["segresnet"].build(blocks=[]), r"segresnet: blocks is \[\]; every number must be 1 or more"),
        (lambda: VARIANTS["swin"].build(window=0), "swin: window is 0; every number must be 1 or more"),
        (lambda: ViT(32, 1, 4, 0), "vit: patch is 0; every number must be 1 or more"),
        (lambda: ViT(32, 1, 4, (8, 0, 8)), r"vit: patch is \(8, 0, 8\)"),
        (lambda: Primus(24, 0, 2), "primus: depth is 0"),
        (lambda: Primus(24, 1, 2, drop_path=1.0), "primus: drop_path is 1.0; it must be 0 or more and below 1"),
        (lambda: VARIANTS["swin"].build(drop_path=-0.1), "swin: drop_path is -0.1; it must be 0 or more and below 1"),
    ],
)
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()
