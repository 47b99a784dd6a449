"""Plain convolutional encoders in: nnDetection's file with one stem per data set, nnU-Net's default network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain3d.__main__ import main
from pretrain3d.backbones import load_backbone
from pretrain3d.backbones.checkpoints.contract import Wishes
from pretrain3d.backbones.checkpoints.importing import convert
from pretrain3d.backbones.plainconv import PlainConv
from pretrain3d.config import UserError

CHANNELS, STRIDES = [4, 8, 8], [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
KERNELS = [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
CONVS = [2, 1, 3]


def convolution(cin: int, cout: int, kernel: list[int]) -> dict[str, Tensor]:
    """Weights of a convolution without bias, and of the norm behind it."""
    return {"weight": torch.randn(cout, cin, *kernel) / (cin * 9) ** 0.5, "scale": 1 + 0.1 * torch.randn(cout),
            "shift": 0.1 * torch.randn(cout)}  # fmt: skip


def network() -> list[list[dict[str, Any]]]:
    """Per stage the convolutions in the order in which they act, with their strides."""
    stages, cin = [], 1
    for stage, cout in enumerate(CHANNELS):
        convs = []
        for index in range(CONVS[stage]):
            stride = STRIDES[stage] if index == 0 else [1, 1, 1]
            convs.append({**convolution(cin, cout, KERNELS[stage]), "stride": stride})
            cin = cout
        stages.append(convs)
    return stages


def features_of(stages: list[list[dict[str, Any]]], x: Tensor, bias: float = 0.0) -> list[Tensor]:
    """What such a network computes, written from its definition."""
    features = []
    for convs in stages:
        for conv in convs:
            padding = [size // 2 for size in conv["weight"].shape[2:]]
            x = F.conv3d(x, conv["weight"], stride=conv["stride"], padding=padding) + bias
            x = F.leaky_relu(F.instance_norm(x, weight=conv["scale"], bias=conv["shift"], eps=1e-5), 0.01)
        features.append(x)
    return features


def nndetection_file(stages: list[list[dict[str, Any]]], path: Path, **kwargs: Any) -> dict[str, Any]:
    """RetinaUNet-MissingPiece-MultiTalent: two stems, a decoder, segmentation layers."""
    stem, other = stages[0][0], convolution(1, CHANNELS[0], KERNELS[0])
    weights = {}
    for name, conv in (("351_0", stem), ("004", other)):
        weights |= {f"stem.{name}.0.weight": conv["weight"], f"stem.{name}.1.weight": conv["scale"],
                    f"stem.{name}.1.bias": conv["shift"]}  # fmt: skip
    for stage, convs in enumerate([stages[0][1:], *stages[1:]]):
        for index, conv in enumerate(convs):
            prefix = f"backbone.levels.{stage}.component.{index}"
            weights |= {f"{prefix}.conv.weight": conv["weight"], f"{prefix}.norm.weight": conv["scale"],
                        f"{prefix}.norm.bias": conv["shift"]}  # fmt: skip
    weights |= {"decoder.lateral.P0.conv.weight": torch.zeros(2), "seg_layer.weight": torch.zeros(3)}
    configuration = {"spacing": [1.0, 1.0, 1.0], "patch_size": [16, 16, 16],
                     "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False]}  # fmt: skip
    plan = {
        "architecture_plans": {"arch_class_name": "ConvBackbone", "arch_kwargs": kwargs or None},
        "pretrain_plan": {"dataset_name": "MultiTalent", "configurations": {"3d": configuration}},
        "pretrain_num_input_channels": 1, "key_to_encoder": "backbone", "key_to_stem": "stem.351_0",
        "keys_to_in_proj": ["stem.351_0.0"], "key_to_lpe": None,
    }  # fmt: skip
    content = {"network_weights": weights, "nnssl_adaptation_plan": plan}
    torch.save(content, path)
    return content


def test_features_of_nndetections_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stages = network()
    nndetection_file(stages, tmp_path / "a.pth", strides=STRIDES[1:], fpn_channels=128)
    assert main(["import", str(tmp_path / "a.pth"), f"out={tmp_path / 'a.pt'}"]) == 0
    assert "23 tensors: 18 loaded, 5 left out (decoder 1, other stems 3, seg_layer 1)" in capsys.readouterr().out
    backbone, x = load_backbone(tmp_path / "a.pt"), torch.randn(2, 1, 4, 8, 16)
    assert isinstance(backbone, PlainConv) and backbone.arguments["convs"] == CONVS
    with torch.no_grad():
        for ours, theirs in zip(backbone(x), features_of(stages, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_another_stem_and_strides_that_the_plan_does_not_say(tmp_path: Path) -> None:
    content = nndetection_file(network(), tmp_path / "a.pth")
    imported = convert(tmp_path / "a.pth", Wishes(stem="stem.004"))
    assert torch.equal(imported.weights["stem.conv.weight"], content["network_weights"]["stem.004.0.weight"])
    assert imported.backbone["strides"] == [1, 2, 2] and any("strides" in note for note in imported.notes)
    with pytest.raises(UserError, match=r"no tensor lies under the stem 'stem.04'.*did you mean 'stem.004'"):
        convert(tmp_path / "a.pth", Wishes(stem="stem.04"))


def test_files_that_are_not_such_a_network_say_why(tmp_path: Path) -> None:
    nndetection_file(network(), tmp_path / "a.pth", strides=[2])
    with pytest.raises(UserError, match=r"arch_kwargs.strides is \[2\]; its weights have 3 levels"):
        convert(tmp_path / "a.pth", Wishes())
    content = nndetection_file(network(), tmp_path / "b.pth")
    del content["network_weights"]["backbone.levels.1.component.0.conv.weight"]
    torch.save(content, tmp_path / "b.pth")
    with pytest.raises(UserError, match="its 3 levels do not each begin with a 3D convolution"):
        convert(tmp_path / "b.pth", Wishes())
    content = nndetection_file(network(), tmp_path / "c.pth")
    content["network_weights"]["stem.351_0.2.weight"] = torch.zeros(2)
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"stem\.351_0\.2\.weight is not part of a stem of convolution and norm"):
        convert(tmp_path / "c.pth", Wishes())


@pytest.mark.parametrize("old", [False, True])
def test_features_of_nnunets_default_network(tmp_path: Path, old: bool) -> None:
    stages, weights = network(), {"decoder.seg_layers.0.weight": torch.zeros(3)}
    for stage, convs in enumerate(stages):
        for index, conv in enumerate(convs):
            prefix = f"encoder.stages.{stage}.0.convs.{index}"
            for block in (f"{prefix}.conv", f"{prefix}.all_modules.0"):
                weights |= {f"{block}.weight": conv["weight"], f"{block}.bias": torch.full((len(conv["scale"]),), 0.3)}
            for norm in (f"{prefix}.norm", f"{prefix}.all_modules.1"):
                weights |= {f"{norm}.weight": conv["scale"], f"{norm}.bias": conv["shift"]}
    configuration: dict[str, Any] = {"spacing": [3.0, 1.0, 1.0], "patch_size": [4, 8, 16],
                                     "normalization_schemes": ["ZScoreNormalization"]}  # fmt: skip
    if old:
        configuration |= {"UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 4, "unet_max_num_features": 8,
                          "conv_kernel_sizes": KERNELS, "pool_op_kernel_sizes": STRIDES,
                          "n_conv_per_stage_encoder": CONVS}  # fmt: skip
    else:
        kwargs = {"n_stages": 3, "features_per_stage": CHANNELS, "conv_op": "torch.nn.modules.conv.Conv3d",
                  "kernel_sizes": KERNELS, "strides": STRIDES, "n_conv_per_stage": CONVS, "conv_bias": True,
                  "n_conv_per_stage_decoder": [1, 1], "nonlin": "torch.nn.LeakyReLU", "dropout_op": None,
                  "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d"}  # fmt: skip
        name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
        configuration["architecture"] = {"network_class_name": name, "arch_kwargs": kwargs}
    plans = {"dataset_name": "Dataset003_Liver", "configurations": {"3d_fullres": configuration}}
    init = {"plans": plans, "configuration": "3d_fullres"}
    torch.save({"network_weights": weights, "init_args": init}, tmp_path / "a.pth")
    imported = convert(tmp_path / "a.pth", Wishes())
    assert "left out (biases before a norm 12, decoder 1)" in imported.notes[-1]
    x = torch.randn(1, 1, 4, 8, 16)
    for axes, order in (("xyz", (0, 1, 2, 3, 4)), ("zyx", (0, 1, 4, 3, 2))):
        imported = convert(tmp_path / "a.pth", Wishes(), axes=axes)
        arguments = {key: value for key, value in imported.backbone.items() if key != "name"}
        backbone = PlainConv(**arguments).eval()
        backbone.load_state_dict(imported.weights)
        with torch.no_grad():
            for ours, theirs in zip(backbone(x.permute(order)), features_of(stages, x, bias=0.3), strict=True):
                torch.testing.assert_close(ours.permute(order), theirs, rtol=1e-4, atol=1e-5)
