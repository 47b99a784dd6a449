"""ResEnc, its parts and its decoder: known answers, and the released weights' features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backbone_variants import STAGES, VARIANTS, half_hidden
from torch import nn

from pretrain3d.backbones.contract import Level
from pretrain3d.backbones.convolution import Conv3d
from pretrain3d.backbones.decoders import UNetDecoder
from pretrain3d.backbones.plainconv import PlainConv
from pretrain3d.backbones.resenc import ResEnc, resenc_l, resenc_s, resenc_xs, resenc_xxs
from pretrain3d.backbones.stages import ConvBlock
from pretrain3d.config import UserError
from pretrain3d.sparse import active_voxels, masked_instance_norm


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sparse_keeps_hidden_places_at_zero():
    backbone = VARIANTS["resenc-sparse"].build()
    image = torch.randn(2, 1, *VARIANTS["resenc"].size)
    keep = half_hidden(image.shape)
    for level, features in zip(backbone.levels, backbone(image, keep), strict=True):
        active = active_voxels(keep, level.stride)
        assert active.float().mean() == keep.float().mean()  # 8 is a multiple of every stride here
        assert (features[~active.expand_as(features)] == 0).all()


def test_active_voxels_by_loops():
    keep = half_hidden((3, 1, 8, 8, 8), 4)
    keep[1] = True
    keep[2, 0, :2] = False  # crosses the cells of stride 4
    keep[2, 0, 2:] = True
    for stride in ((1, 2, 4), (2, 2, 2), (4, 4, 4), (8, 8, 8)):
        got = active_voxels(keep, stride)
        for sample in range(3):
            cells = keep[sample, 0].unfold(0, stride[0], stride[0]).unfold(1, stride[1], stride[1])
            cells = cells.unfold(2, stride[2], stride[2]).flatten(3)
            mixed = (cells.any(-1) & ~cells.all(-1)).any()
            expected = torch.ones_like(cells[..., 0]) if mixed else cells[..., 0]
            assert torch.equal(got[sample, 0], expected), (sample, stride)


def test_masked_instance_norm_by_loops():
    x, active = torch.randn(2, 3, 4, 4, 4), half_hidden((2, 1, 4, 4, 4), 2)
    weight, bias = torch.randn(3), torch.randn(3)
    got = masked_instance_norm(x * active, active, weight, bias)
    for b in range(2):
        on = active[b, 0]
        for c in range(3):
            values = x[b, c][on]
            normed = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt() * weight[c] + bias[c]
            torch.testing.assert_close(got[b, c][on], normed, rtol=1e-4, atol=1e-5)
            assert (got[b, c][~on] == 0).all()


def test_conv_block_is_convolution_norm_and_leaky_relu():
    block = ConvBlock(3, 5, (3, 1, 3), (1, 2, 2))
    x = torch.randn(2, 3, 6, 8, 8)
    convolved = F.conv3d(x, block.conv.weight, block.conv.bias, stride=(1, 2, 2), padding=(1, 0, 1))
    centred = convolved - convolved.mean((2, 3, 4), keepdim=True)
    normed = centred / (convolved.var((2, 3, 4), keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(block(x), torch.where(normed > 0, normed, 0.01 * normed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "size"),
    [((1, 8), (8, 8, 8)), ((16, 8), (8, 8, 8)), ((16, 16), (8, 8, 8)), ((32, 32), (2, 8, 8)), ((96, 96), (2, 2, 3))],
)
def test_convolution_gradients_are_those_of_float32(channels, size, dtype):
    convolution = Conv3d(*channels, 3, padding=1)
    x = torch.randn(2, channels[0], *size)
    target = torch.randn(2, channels[1], *size)
    for length in (10**5, 10**6):  # freed memory full of NaN: what a kernel does not initialise shows
        torch.full((length,), float("nan"))
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        output = convolution(x)
    assert output.is_contiguous()
    (output.float() * target).sum().backward()
    plain = nn.Conv3d(*channels, 3, padding=1).double()
    plain.load_state_dict(convolution.state_dict())
    (plain(x.double()) * target.double()).sum().backward()
    relative = 1e-4 if dtype == torch.float32 else 0.03
    for got, expected in zip(convolution.parameters(), plain.parameters(), strict=True):
        assert (got.grad - expected.grad).abs().max() <= relative * expected.grad.abs().max()


def test_parameter_counts():
    with torch.device("meta"):
        large, others = resenc_l(), (resenc_s(), resenc_xs(), resenc_xxs())
        decoder = UNetDecoder(large.levels, 1, outputs=5)
        plain = PlainConv()
    assert parameters(plain) == 14_022_880
    assert parameters(large) == 90_296_576
    assert parameters(large.stem) == 960
    assert parameters(large.stages) == 90_295_616
    assert parameters(decoder) == 12_052_389
    assert parameters(large) + parameters(decoder) == 102_348_965
    assert [round(parameters(m) / 1e6, 1) for m in others] == [29.9, 1.4, 0.5]


def released_name(name: str) -> str:
    """The name in a released ResEnc checkpoint of a weight of ours."""
    return "encoder." + name.replace("stem.", "stem.convs.0.").replace(".skip.", ".skip.1.")


def test_names_and_shapes_are_those_of_released_resenc_l(testdata):
    lines = (testdata / "reference" / "resenc_l_encoder_keys.txt").read_text().splitlines()
    released = dict(line.split("\t") for line in lines)
    with torch.device("meta"):
        ours = {released_name(k): str(tuple(v.shape)) for k, v in resenc_l().state_dict().items()}
    assert {key: shape for key, shape in released.items() if ".all_modules." not in key} == ours


def test_released_weights_give_the_official_features(testdata):
    folder = testdata / "golden" / "checkpoints"
    checkpoint = torch.load(folder / "nnssl_resenc.pth", weights_only=True)
    weights = checkpoint["network_weights"]
    plan = checkpoint["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"]
    backbone = ResEnc(plan["features_per_stage"], plan["n_blocks_per_stage"], plan["strides"], plan["kernel_sizes"])
    backbone.load_state_dict({name: weights[released_name(name)] for name in backbone.state_dict()})
    count = len(backbone.levels) - 1
    decoder = UNetDecoder(backbone.levels, 1, outputs=count)
    renames = {"ups": "decoder.transpconvs.{}", "blocks": "decoder.stages.{}.convs.0", "heads": "decoder.seg_layers.{}"}
    state = {}
    for name in decoder.state_dict():
        kind, index, rest = name.split(".", 2)
        state[name] = weights[f"{renames[kind].format(count - 1 - int(index))}.{rest}"]
    decoder.load_state_dict(state)

    expected = np.load(folder / "nnssl_resenc_expected.npz")
    with torch.no_grad():
        features = backbone(torch.from_numpy(expected["x"]))
        output = decoder(features)[0]
    for level, got in enumerate(features):
        sampled = got[..., ::4, ::4, ::4] if level < 2 else got
        np.testing.assert_allclose(sampled.numpy(), expected[f"level{level}"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(output[..., ::4, ::4, ::4].numpy(), expected["unet_output_every4"], atol=1e-4, rtol=0)


def test_decoder_outputs_as_many_levels_as_asked_for():
    levels = (Level(4, (1, 1, 1)), Level(6, (1, 2, 2)), Level(8, (2, 4, 4)))
    features = [torch.randn(1, 4, 4, 8, 12), torch.randn(1, 6, 4, 4, 6), torch.randn(1, 8, 2, 2, 3)]
    plain, deep = UNetDecoder(levels, 5), UNetDecoder(levels, 5, outputs=2)
    assert [tuple(o.shape) for o in plain(features)] == [(1, 5, 4, 8, 12)]
    assert [tuple(o.shape) for o in deep(features)] == [(1, 5, 4, 8, 12), (1, 5, 4, 4, 6)]
    sum(o.pow(3).sum() for o in plain(features)).backward()
    assert all(p.grad is not None for p in plain.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": [1, 2]}, "one entry per stage"),
        ({"masking": "none"}, "masking is 'none'"),
        ({"kernels": [3, 2, 3]}, "kernels are odd"),
        ({"strides": [1, 0, 2]}, r"resenc: strides is \[1, 0, 2\]; every number must be 1 or more"),
        ({"strides": [1, [2, -2, 2], 2]}, "resenc: strides is .*; every number must be 1 or more"),
        ({"blocks": [1, 0, 1]}, "resenc: blocks is"),
        ({"channels": [4, 0, 6]}, "resenc: channels is"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(UserError, match=message):
        ResEnc(**{**STAGES, **change})
