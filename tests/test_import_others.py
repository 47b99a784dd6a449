"""nnU-Net v2 and SwinUNETR checkpoints: the same features as the network that they came from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR

from pretrain3d.backbones import BACKBONES
from pretrain3d.backbones.checkpoints import released_resenc
from pretrain3d.backbones.checkpoints.contract import Wishes
from pretrain3d.backbones.checkpoints.importing import convert
from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.config import UserError
from pretrain3d.registry import build

KERNELS, STRIDES = [[1, 3, 3], [3, 3, 3]], [[1, 1, 1], [1, 2, 2]]
CT = {"percentile_00_5": -900.0, "percentile_99_5": 300.0, "mean": 40.0, "std": 120.0, "median": 1.0}


def nnunet_file(path, architecture: dict, **plans: object) -> ResEnc:
    backbone = ResEnc([4, 8], [1, 2], STRIDES, KERNELS)
    weights = released_resenc.released_weights(backbone.state_dict(), backbone.arguments["strides"])
    weights = {f"module.{name}": tensor for name, tensor in weights.items()}
    weights["module.decoder.seg_layers.0.weight"] = torch.zeros(3)
    base = {"spacing": [3.0, 0.8, 0.7], "patch_size": [16, 32, 24], "normalization_schemes": ["CTNormalization"]}
    configurations = {"3d_fullres": {**base, **architecture}, "3d_cascade_fullres": {"inherits_from": "3d_fullres"}}
    content = {
        "network_weights": weights,
        "trainer_name": "nnUNetTrainer",
        "init_args": {
            "plans": {
                "dataset_name": "Dataset007_Pancreas",
                "configurations": configurations,
                "transpose_forward": [0, 1, 2],
                "foreground_intensity_properties_per_channel": {"0": CT},
                **plans,
            },
            "configuration": "3d_cascade_fullres",
            "device": torch.device("cpu"),
        },
        "logging": {"train_losses": [np.float32(0.5), np.float64(0.25)], "epochs": [np.int64(3)]},
        "optimizer_state": {"param_groups": [{"lr": 0.1}]},
    }
    torch.save(content, path)
    return backbone


NEW = {
    "architecture": {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": 2, "features_per_stage": [4, 8], "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": KERNELS, "strides": STRIDES, "n_blocks_per_stage": [1, 2],
            "n_conv_per_stage_decoder": [1], "conv_bias": True, "dropout_op": None, "dropout_op_kwargs": None,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
}  # fmt: skip
OLD = {
    "UNet_class_name": "ResidualEncoderUNet", "UNet_base_num_features": 4, "unet_max_num_features": 320,
    "conv_kernel_sizes": KERNELS, "pool_op_kernel_sizes": STRIDES, "n_conv_per_stage_encoder": [1, 2],
}  # fmt: skip


@pytest.mark.parametrize("architecture", [NEW, OLD], ids=["new", "old"])
def test_nnunet(tmp_path, architecture):
    backbone = nnunet_file(tmp_path / "checkpoint_final.pth", architecture).eval()
    imported = convert(tmp_path / "checkpoint_final.pth", Wishes())
    assert imported.preprocessing == {
        "spacing_mm": [3.0, 0.8, 0.7],
        "patch_size": [16, 32, 24],
        "intensity": {"scheme": "ct", "low": [-900.0], "high": [300.0], "mean": [40.0], "std": [120.0]},
    }
    assert imported.source["format"] == "nnunet" and imported.source["data"] == "Dataset007_Pancreas"
    assert any("axes=zyx" in note for note in imported.notes) and "left out (decoder 1)" in imported.notes[-1]
    turned = convert(tmp_path / "checkpoint_final.pth", Wishes(), axes="zyx")
    assert turned.preprocessing["spacing_mm"] == [0.7, 0.8, 3.0] and turned.backbone["kernels"][0] == [3, 3, 1]
    image = torch.randn(1, 1, 8, 16, 16)
    for result, axes in ((imported, (0, 1, 2, 3, 4)), (turned, (0, 1, 4, 3, 2))):
        other = build(BACKBONES, result.backbone, "backbone").eval()
        other.load_state_dict(result.weights)
        with torch.no_grad():
            for a, b in zip(backbone(image), other(image.permute(axes).contiguous()), strict=True):
                torch.testing.assert_close(a.permute(axes), b, rtol=1e-3, atol=1e-4)


def test_nnunet_axes_follow_the_transposition_of_the_plans(tmp_path):
    nnunet_file(tmp_path / "a.pth", NEW, transpose_forward=[2, 0, 1])  # the network saw x, z, y
    turned = convert(tmp_path / "a.pth", Wishes(), axes="zyx")
    assert turned.preprocessing["spacing_mm"] == [3.0, 0.7, 0.8]


def test_other_networks_of_nnunet_are_named(tmp_path):
    nnunet_file(tmp_path / "a.pth", {"architecture": {**NEW["architecture"], "network_class_name": "a.ResidualUNet"}})
    with pytest.raises(UserError, match=r"the network is a a\.ResidualUNet; these can be imported"):
        convert(tmp_path / "a.pth", Wishes())
    nnunet_file(tmp_path / "b.pth", {})
    with pytest.raises(UserError, match="plans do not describe the network, 'conv_kernel_sizes' is missing"):
        convert(tmp_path / "b.pth", Wishes())


def test_nnunet_without_the_numbers_of_its_normalisation(tmp_path):
    for known in ({}, {"0": {}}, {"0": CT | {"mean": None}}, None):
        nnunet_file(tmp_path / "a.pth", NEW, foreground_intensity_properties_per_channel=known)
        with pytest.raises(UserError, match="its plans lack numbers for CTNormalization: percentile_00_5, "):
            convert(tmp_path / "a.pth", Wishes())


def swin_features(imported, image: torch.Tensor) -> list[torch.Tensor]:
    backbone = build(BACKBONES, imported.backbone, "backbone").eval()
    backbone.load_state_dict(imported.weights)
    with torch.no_grad():
        return backbone(image)


@pytest.mark.parametrize("v2", [False, True])
def test_swin_unetr(tmp_path, v2):
    torch.manual_seed(0)
    whole = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, use_v2=v2).eval()
    torch.save(whole.state_dict(), tmp_path / "supervised.pt")
    imported = convert(tmp_path / "supervised.pt", Wishes())
    assert imported.backbone == {
        "name": "swin", "feature_size": 12, "depths": [2, 2, 2, 2], "window": 7, "v2": v2, "in_channels": 1,
    }  # fmt: skip
    assert "encoder1 " in imported.notes[-1] and "decoder5 " in imported.notes[-1]
    assert imported.preprocessing["intensity"] is None
    image = torch.randn(1, 1, 32, 32, 64)
    with torch.no_grad():
        wanted = whole.swinViT(image, True)
    for a, b in zip(wanted, swin_features(imported, image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_self_supervised_files_of_monai_and_voco(tmp_path):
    torch.manual_seed(0)
    whole = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, use_v2=True)
    state = {k.removeprefix("swinViT."): v for k, v in whole.state_dict().items() if k.startswith("swinViT.")}
    old = {name.replace(".linear1.", ".fc1.").replace(".linear2.", ".fc2."): v for name, v in state.items()}
    monai = {f"module.{name}": v for name, v in old.items()} | {"module.norm.weight": torch.ones(96)}
    voco = {f"module.backbone.swin_vit.{name}": v for name, v in state.items()}
    voco |= {"module.student.layer3.weight": torch.zeros(1), "module.backbone.encoder1.x": torch.zeros(1)}
    both = {
        f"{who}.swinViT.{name}": v + (who == "teacher") for who in ("student", "teacher") for name, v in state.items()
    }
    files = {"monai": {"state_dict": monai, "epoch": 3}, "voco": {"state_dict": voco}, "both": both}
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
        imported = convert(tmp_path / f"{name}.pt", Wishes())
        assert all(torch.equal(imported.weights[f"swinViT.{key}"], value) for key, value in state.items()), name
        assert imported.source["method"] == name
    with pytest.raises(UserError, match="axes=zyx is for ResEnc, PlainConv and Primus; a swin saw x, y, z"):
        convert(tmp_path / "voco.pt", Wishes(), axes="zyx")
    torch.save({f"{who}.{name}": v for who in ("a", "b") for name, v in state.items()}, tmp_path / "two.pt")
    with pytest.raises(UserError, match="holds 2 Swin Transformers"):
        convert(tmp_path / "two.pt", Wishes())
