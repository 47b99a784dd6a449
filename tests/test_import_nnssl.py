"""Files of nnssl in and out: the official features, every tensor accounted for, nothing executed."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain3d.__main__ import main
from pretrain3d.backbones import BACKBONES, load_backbone
from pretrain3d.backbones.checkpoints import nnssl, released_primus, released_resenc
from pretrain3d.backbones.checkpoints.axes import permuted
from pretrain3d.backbones.checkpoints.contract import Imported, Ledger, Wishes
from pretrain3d.backbones.checkpoints.importing import convert
from pretrain3d.backbones.transfer import export_weights, fingerprint, load_export
from pretrain3d.config import UserError
from pretrain3d.registry import build

RESENC = {"name": "resenc", "channels": [4, 6, 6], "blocks": [1, 2, 1], "strides": [1, 2, [1, 2, 2]], "in_channels": 1,
          "kernels": [[1, 3, 3], 3, 3]}  # fmt: skip
PRIMUS = {"name": "primus", "embed_dim": 24, "depth": 2, "heads": 2, "patch": [4, 8, 8], "image_size": [8, 16, 24],
          "in_channels": 1}  # fmt: skip
PREPROCESSING = {"axes": "RAS", "spacing_mm": [1.0, 1.5, 2.0], "patch_size": [8, 16, 24], "intensity": {"scheme": "ct"}}
SOURCE = {"run": "r", "method": "mae", "data": "tiny", "licence": "CC0", "step": 7}


def randomised(node: dict) -> torch.nn.Module:
    """A backbone with no two tensors alike."""
    backbone = build(BACKBONES, node, "backbone").eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone


def exported(node: dict, path: Path) -> dict:
    return export_weights(path, node, randomised(node).state_dict(), PREPROCESSING, SOURCE)


def released_file(node: dict, path: Path, **plan: object) -> dict:
    """As if nnssl had written it: without our entry, with a decoder and a mask token."""
    nnssl.write(path, exported(node, path.with_suffix(".export")))
    content = torch.load(path, weights_only=True)
    del content["pretrain3d"]
    content["network_weights"] |= {"decoder.stages.0.weight": torch.zeros(2), "mask_token": torch.zeros(1)}
    content["nnssl_adaptation_plan"] |= plan
    torch.save(content, path)
    return content


@pytest.mark.parametrize("name", ["resenc", "primus"])
def test_official_features(testdata, tmp_path, capsys, name):
    folder = testdata / "golden" / "checkpoints"
    out = tmp_path / "weights.pt"
    assert main(["import", str(folder / f"nnssl_{name}.pth"), f"out={out}", "licence=CC-BY-4.0"]) == 0
    said = capsys.readouterr().out
    count = {"resenc": "464 tensors: 101 loaded, 101 second names, 262 left out (decoder 262)",
             "primus": "85 tensors: 74 loaded, 11 left out (mask_token 1, up_projection 10)"}[name]  # fmt: skip
    assert count in said
    expected = np.load(folder / f"nnssl_{name}_expected.npz")
    with torch.no_grad():
        features = load_backbone(out)(torch.from_numpy(expected["x"]))
    if name == "primus":
        np.testing.assert_allclose(features[0].numpy(), expected["features"], atol=1e-4, rtol=0)
    else:
        for level, got in enumerate(features):
            sampled = got[..., ::4, ::4, ::4] if level < 2 else got
            np.testing.assert_allclose(sampled.numpy(), expected[f"level{level}"], atol=1e-4, rtol=0)
    content = load_export(out)
    assert content["preprocessing"]["spacing_mm"] == [1.0, 1.0, 1.0]
    intensity = content["preprocessing"]["intensity"]
    assert (intensity["scheme"], intensity["foreground"]) == ("zscore", "image")  # as nnssl has it
    assert content["source"]["licence"] == "CC-BY-4.0" and content["source"]["data"] == "Golden"
    assert main(["import", str(folder / f"nnssl_{name}.pth"), f"out={out}", "licence=CC-BY-4.0"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_other_token_order_is_the_other_networks(testdata):
    folder = testdata / "golden" / "checkpoints"
    expected = np.load(folder / "nnssl_primus_expected.npz")
    imported = convert(folder / "nnssl_primus.pth", Wishes(token_order="whd"))
    backbone = build(BACKBONES, imported.backbone, "backbone").eval()
    backbone.load_state_dict(imported.weights)
    with torch.no_grad():
        features = backbone(torch.from_numpy(expected["x"]))[0].numpy()
    np.testing.assert_allclose(features, expected["features_if_token_order_is_wrong"], atol=1e-4, rtol=0)


def test_written_names_are_those_of_the_official_file(testdata):
    for name in ("resenc", "primus"):
        path = testdata / "golden" / "checkpoints" / f"nnssl_{name}.pth"
        content = torch.load(path, weights_only=True)
        plan = content["nnssl_adaptation_plan"]
        prefixes = (f"{plan['key_to_encoder']}.", f"{plan['key_to_stem']}.")
        wanted = {key for key in content["network_weights"] if key.startswith(prefixes)}
        imported = convert(path, Wishes())
        if name == "resenc":
            released = released_resenc.released_weights(imported.weights, imported.backbone["strides"])
        else:
            released = released_primus.released_weights(imported.weights)
        assert set(released) == wanted
        assert all(released[key].shape == content["network_weights"][key].shape for key in wanted)


@pytest.mark.parametrize("asked", [[], ["axes=zyx"]])
@pytest.mark.parametrize("axes", ["xyz", "zyx"])
@pytest.mark.parametrize("node", [RESENC, PRIMUS], ids=["resenc", "primus"])
def test_round_trip_is_exact(tmp_path, node, axes, asked):
    before = exported(node, tmp_path / "a.pt")
    before["corpus"] = {"version": 1, "cases": 0, "hashes": "", "groups": "", "signatures": ""}
    torch.save(before, tmp_path / "a.pt")
    out, back = tmp_path / "nnssl.pth", tmp_path / "back.pt"
    assert main(["export", str(tmp_path / "a.pt"), f"out={out}", "format=nnssl", f"axes={axes}"]) == 0
    assert main(["import", str(out), f"out={back}", *asked]) == 0
    after = load_export(back)
    assert after["fingerprint"] == before["fingerprint"] == fingerprint(after["weights"])
    assert all(after[key] == before[key] for key in ("backbone", "preprocessing", "corpus"))
    assert {key: after["source"][key] for key in SOURCE} == SOURCE


@pytest.mark.parametrize("node", [RESENC, PRIMUS], ids=["resenc", "primus"])
def test_a_file_without_our_entry_gives_the_same_network(tmp_path, node):
    content = released_file(node, tmp_path / "released.pth")
    plan = content["nnssl_adaptation_plan"]
    assert plan["architecture_plans"]["arch_kwargs"], "nnDetection's loader needs it filled"
    if node is RESENC:
        weights = content["network_weights"]
        assert all(f"{key}.weight" in weights for key in plan["keys_to_in_proj"])
        assert plan["architecture_plans"]["arch_kwargs"]["n_blocks_per_stage"] == [1, 2, 1]
    order = None if node is RESENC else "whd"
    imported = convert(tmp_path / "released.pth", Wishes(token_order=order))
    assert fingerprint(imported.weights) == load_export(tmp_path / "released.export")["fingerprint"]
    assert imported.preprocessing["spacing_mm"] == PREPROCESSING["spacing_mm"]
    assert "2 left out (decoder 1, mask_token 1)" in imported.notes[-1]


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("node", [RESENC, PRIMUS], ids=["resenc", "primus"])
def test_turned_networks_see_turned_images(node, order):
    backbone = randomised(node)
    turned = permuted(Imported(dict(node), backbone.state_dict(), dict(PREPROCESSING), {}), order)
    assert turned.preprocessing["spacing_mm"] == [PREPROCESSING["spacing_mm"][axis] for axis in order]
    other = build(BACKBONES, turned.backbone, "backbone").eval()
    other.load_state_dict(turned.weights)
    axes = (0, 1, *(2 + axis for axis in order))
    image = torch.randn(1, 1, 8, 16, 24)
    with torch.no_grad():
        pairs = zip(backbone(image), other(image.permute(axes).contiguous()), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a.permute(axes), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("forward", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("node", [RESENC, PRIMUS], ids=["resenc", "primus"])
def test_axes_follow_the_transposition_of_the_plan(tmp_path, node, forward):
    path = tmp_path / "released.pth"
    content = released_file(node, path)
    content["nnssl_adaptation_plan"]["pretrain_plan"]["transpose_forward"] = list(forward)
    torch.save(content, path)
    networks = []
    for axes in ("xyz", "zyx"):
        imported = convert(path, Wishes(token_order=None if node is RESENC else "whd"), axes=axes)
        networks.append(build(BACKBONES, imported.backbone, "backbone").eval())
        networks[-1].load_state_dict(imported.weights)
    seen = torch.randn(1, 1, 8, 16, 24)  # as nnssl gives it: the file's z, y, x, then transposed by the plan

    def to_ours(array: torch.Tensor) -> torch.Tensor:
        z_y_x = array.permute(0, 1, *(2 + int(axis) for axis in np.argsort(forward)))
        return z_y_x.permute(0, 1, 4, 3, 2).contiguous()

    z_y_x_mm = [PREPROCESSING["spacing_mm"][axis] for axis in np.argsort(forward)]
    assert imported.preprocessing["spacing_mm"] == z_y_x_mm[::-1]
    with torch.no_grad():
        for theirs, ours in zip(networks[0](seen), networks[1](to_ours(seen)), strict=True):
            torch.testing.assert_close(to_ours(theirs), ours, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("forward", [[0, 1], [0, 1, 1], "zyx", [0, 1, "2"]])
def test_a_transposition_that_is_none(tmp_path, forward):
    path = tmp_path / "file.pth"
    content = released_file(RESENC, path)
    content["nnssl_adaptation_plan"]["pretrain_plan"]["transpose_forward"] = forward
    torch.save(content, path)
    with pytest.raises(UserError, match=r"its transpose_forward is .*; it must be an order of 0, 1, 2"):
        convert(path, Wishes())


def test_architectures_by_name():
    shape = ("channels", "blocks", "strides", "kernels")
    for name in released_resenc.SHAPES:
        with torch.device("meta"):
            known = build(BACKBONES, {"name": name}, "backbone").arguments
        assert released_resenc.node_of(known) == {"name": name, "in_channels": 1}
    with torch.device("meta"):
        wanted = build(BACKBONES, {"name": "resenc_l"}, "backbone").arguments
    found = released_resenc.arguments_of("ResEncL", None, 2, "file")
    assert all(found[key] == wanted[key] for key in shape) and found["in_channels"] == 2
    with pytest.raises(UserError, match="arch_kwargs is null and ResidualEncoderUNet has no standard size"):
        released_resenc.arguments_of("ResidualEncoderUNet", None, 1, "file")
    with pytest.raises(UserError, match="the network is a PlainConvUNet"):
        released_resenc.arguments_of("PlainConvUNet", None, 1, "file")
    kwargs = released_resenc.kwargs_of({**wanted, "in_channels": 1})
    assert all(released_resenc.arguments_of("x.ResidualEncoderUNet", kwargs, 1, "f")[k] == wanted[k] for k in shape)
    for change in ({"squeeze_excitation": True}, {"conv_bias": False}, {"block": "a.BottleneckD"}):
        with pytest.raises(UserError, match=rf"arch_kwargs.{next(iter(change))} is"):
            released_resenc.arguments_of("ResidualEncoderUNet", {**kwargs, **change}, 1, "file")


@pytest.mark.parametrize("name", released_primus.SHAPES)
def test_primus_of_null_kwargs_is_read_off_the_weights(tmp_path, name):
    """As the released PrimusM: the name and the weights say all; a thousandth of the width keeps it small."""
    width, depth, heads = released_primus.SHAPES[name]
    assert released_primus.HEADS[width] == heads
    arguments = {"embed_dim": width, "depth": depth, "heads": heads, "patch": [8, 8, 8], "image_size": [16, 16, 16]}
    assert released_primus.node_of({**arguments, "in_channels": 1})["name"] == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_eva_depth": 3}, "arch_kwargs.encoder_eva_depth is 3, but by its weights it is 2"),
        ({"embed_dim": 48}, "arch_kwargs.embed_dim is 48, but by its weights it is 24"),
        ({"patch_embed_size": (8, 8, 8)}, r"patch_embed_size is \(8, 8, 8\), but by its weights it is \[4, 8, 8\]"),
        ({"encoder_eva_numheads": 5}, "5 heads do not fit a Primus of width 24, a multiple of 6 for each"),
        ({"use_rot_pos_emb": False}, "arch_kwargs.use_rot_pos_emb is False; pretrain3d's Primus has no such variant"),
        ({"rope_kwargs": {"temperature": 100}}, "arch_kwargs.rope_kwargs is {'temperature': 100}"),
        ({"input_shape": [8, 16]}, r"its image size is \[8, 16\]; it must be three numbers or null"),
    ],
)
def test_a_primus_whose_arguments_are_of_another_network_is_refused(tmp_path, change, message):
    path = tmp_path / "file.pth"
    content = released_file(PRIMUS, path)
    content["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"] |= change
    torch.save(content, path)
    with pytest.raises(UserError, match=message):
        convert(path, Wishes(token_order="whd"))


def test_citations_are_kept_in_either_form(tmp_path):
    path = tmp_path / "file.pth"
    stated = [{"type": "Pretraining Method", "name": "MAE", "apa_citations": ["A (2022)"]},
              {"type": "Framework", "name": "nnssl", "bibtex_citations": ["@misc{b}"]}]  # fmt: skip
    torch.save(released_file(RESENC, path) | {"citations": stated}, path)
    source = convert(path, Wishes()).source
    assert source["citations"] == ["A (2022)", "@misc{b}"] and source["method"] == "MAE"


def test_the_grid_of_the_positions_may_be_that_of_the_crops(tmp_path):
    """VoCo and SimCLR state the region of their crops; the learned positions belong to a crop."""
    path = tmp_path / "voco.pth"
    content = released_file(PRIMUS, path)
    plan = content["nnssl_adaptation_plan"]
    for key in ("pretrain_plan", "architecture_plans"):
        assert plan[key]
    plan["architecture_plans"]["arch_kwargs"].pop("input_shape")
    plan["pretrain_plan"]["configurations"]["noresample"] = {"patch_size": [8, 16, 240]}
    plan["pretrain_plan"]["configurations"] = {"a": {"patch_size": [8, 16, 240], "spacing": None}}
    torch.save(content, path)
    imported = convert(path, Wishes(token_order="whd"))
    assert imported.backbone["image_size"] == [8, 16, 24]
    assert any("no fixed one" in note for note in imported.notes) and imported.preprocessing["intensity"] is None


def test_the_trained_one_of_two_differing_names_wins_and_is_reported(tmp_path, capsys):
    path = tmp_path / "s3d.pth"
    content = released_file(RESENC, path)
    weights = content["network_weights"]
    name = "encoder.stages.1.blocks.0.conv1.conv.weight"
    weights[name] = torch.zeros_like(weights[name])
    torch.save(content, path)
    imported = convert(path, Wishes())
    assert imported.weights["stages.1.blocks.0.conv1.conv.weight"].abs().sum() > 0
    assert any(note.startswith("1 tensors differ from their second name, .all_modules") for note in imported.notes)


def test_stems_of_multitalent(tmp_path):
    path = tmp_path / "multitalent.pth"
    content = released_file(RESENC, path, key_to_stem="encoder.stem.351_0")
    weights = content["network_weights"]
    stem = {k.removeprefix("encoder.stem."): weights.pop(k) for k in list(weights) if k.startswith("encoder.stem.")}
    for number, key in enumerate(("351_0", "004", "0041")):
        weights |= {f"encoder.stem.{key}.{name}": tensor + number for name, tensor in stem.items()}
    torch.save(content, path)
    default, other = convert(path, Wishes()), convert(path, Wishes(stem="encoder.stem.004"))
    first = stem["convs.0.conv.weight"]
    assert torch.equal(default.weights["stem.conv.weight"], first)
    assert torch.equal(other.weights["stem.conv.weight"], first + 1)
    assert "other stems 16" in default.notes[-1] and "other stems 16" in other.notes[-1]
    with pytest.raises(UserError, match=r"no tensor lies under the stem 'encoder.stem.04', did you mean 'encoder.stem"):
        convert(path, Wishes(stem="encoder.stem.04"))
    with pytest.raises(UserError, match=r"the stem '004'.* there are encoder.stem.004, encoder.stem.0041"):
        convert(path, Wishes(stem="004"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["network_weights"].clear(), "no tensor lies under the stem"),
        (lambda c: c["nnssl_adaptation_plan"].update(key_to_encoder=None), "lacks key_to_encoder"),
        (
            lambda c: c["network_weights"].update({"encoder.stages.9.x.conv.weight": torch.zeros(1)}),
            "1 unknown tensors",
        ),
        (lambda c: c["network_weights"].pop("encoder.stem.convs.0.norm.bias") is None, ""),
    ],
)
def test_no_tensor_is_silently_skipped(tmp_path, change, message):
    path = tmp_path / "file.pth"
    content = released_file(RESENC, path)
    change(content)
    if not message:  # its second name is still there
        assert convert(path, Wishes()).weights
        content["network_weights"].pop("encoder.stem.convs.0.all_modules.1.bias")
        message = r"lacks 1 tensors \(stem.norm.bias\)"
    torch.save(content, path)
    with pytest.raises(UserError, match=message):
        convert(path, Wishes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nnssl_adaptation_plan": None}, "nnssl_adaptation_plan is null; it must be a table"),
        ({"nnssl_adaptation_plan": [1]}, r"nnssl_adaptation_plan is \[1\]; it must be a table"),
        ({"network_weights": None}, "weights are null; they must be a table of tensors"),
        ({"network_weights": {"a": 1}}, "weights are {'a': 1}; they must be a table of tensors"),
    ],
)
def test_a_file_without_its_parts(tmp_path, change, message):
    path = tmp_path / "file.pth"
    torch.save(released_file(RESENC, path) | change, path)
    with pytest.raises(UserError, match=message):
        convert(path, Wishes())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("strides", None, "arch_kwargs.strides is null; it must be a list, one number per stage"),
        ("features_per_stage", None, "arch_kwargs.features_per_stage is null"),
        ("features_per_stage", 32, "arch_kwargs.features_per_stage is 32"),
        ("n_blocks_per_stage", ["a"], r"arch_kwargs.n_blocks_per_stage is \['a'\]"),
        ("kernel_sizes", [], r"arch_kwargs.kernel_sizes is \[\]"),
        ("norm_op_kwargs", "x", "norm_op_kwargs is 'x'; it must be a table"),
    ],
)
def test_filled_arguments_without_the_shape(tmp_path, key, value, message):
    path = tmp_path / "file.pth"
    content = released_file(RESENC, path)
    kwargs = content["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"]
    kwargs.pop(key) if value is None else kwargs.update({key: value})
    torch.save(content, path)
    with pytest.raises(UserError, match=message):
        convert(path, Wishes())


def with_configuration(path: Path, **change: object) -> Imported:
    content = released_file(RESENC, path)
    for configuration in content["nnssl_adaptation_plan"]["pretrain_plan"]["configurations"].values():
        configuration.update(change)
    torch.save(content, path)
    return convert(path, Wishes())


def test_a_plan_may_say_less(tmp_path):
    imported = with_configuration(
        tmp_path / "file.pth",
        spacing=[None] * 3,
        normalization_schemes="ZScoreNormalization",
        use_mask_for_norm=False,
    )
    assert imported.preprocessing["spacing_mm"] is None and any("no fixed one" in note for note in imported.notes)
    assert imported.preprocessing["intensity"]["scheme"] == "zscore"
    for change in ({"spacing": "1 1 1"}, {"spacing": [1.0, None, 1.0]}, {"patch_size": [8, 8]}):
        with pytest.raises(UserError, match=f"its {next(iter(change))} is .*; it must be three numbers or null"):
            with_configuration(tmp_path / "file.pth", **change)


def test_only_an_export_is_replaced_by_an_export(tmp_path, capsys):
    exported(RESENC, tmp_path / "a.pt")
    out = tmp_path / "nnssl.pth"
    for _ in range(2):
        assert main(["export", str(tmp_path / "a.pt"), f"out={out}", "format=nnssl"]) == 0
    released_file(RESENC, out)
    before = out.read_bytes()
    assert main(["export", str(tmp_path / "a.pt"), f"out={out}", "format=nnssl"]) == 2
    assert "choose another name" in capsys.readouterr().err and out.read_bytes() == before


@pytest.mark.parametrize(
    ("intensity", "own"),
    [
        ({"scheme": "ct", "low": [-5.0], "high": None}, "scheme: ct, low: [-5.0]"),
        ({"scheme": "zscore", "foreground": "body"}, "scheme: zscore, foreground: body"),
        (None, "not known"),
        ({"scheme": "zscore", "foreground": "image", "low": None}, ""),
    ],
)
def test_another_normalisation_than_the_written_one_is_said(tmp_path, capsys, intensity, own):
    preprocessing = {**PREPROCESSING, "intensity": intensity}
    export_weights(tmp_path / "a.pt", RESENC, randomised(RESENC).state_dict(), preprocessing, SOURCE)
    assert main(["export", str(tmp_path / "a.pt"), f"out={tmp_path / 'b.pth'}", "format=nnssl"]) == 0
    said = "note: its plan says ZScoreNormalization of the whole image, but the intensity of the run is"
    assert capsys.readouterr().err == (f"{said} {own}\n" if own else "")


def test_the_ledger_ends_with_nothing_left():
    ledger = Ledger({f"module._orig_mod.{name}": torch.zeros(1) for name in ("a.x", "a.y", "b.z", "c")})
    with pytest.raises(UserError, match="none of its 4 tensors belongs to the backbone"):
        ledger.close("file")
    ledger.take("a.x")
    ledger.drop(["b.z", "c"])
    with pytest.raises(UserError, match=r"1 tensors are not known to this format \(a.y, b, c\)"):
        ledger.close("file")
    ledger.duplicate("a.y")
    assert ledger.close("file") == "4 tensors: 1 loaded, 1 second names, 2 left out (b 1, c 1)"


def test_a_file_that_needs_code_is_refused(tmp_path, capsys):
    class Touch:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"network_weights": {}, "nnssl_adaptation_plan": Touch()}, tmp_path / "bad.pth")
    torch.save({"network_weights": {}, "when": datetime.timedelta(1)}, tmp_path / "odd.pth")
    torch.save({"network_weights": {}, "when": np.datetime64("2024")}, tmp_path / "numpy.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"a": 1}, tmp_path / "other.pth")
    torch.save({"state_dict": {}, "pretrain3d": {}}, tmp_path / "own.ckpt")
    (tmp_path / "run").mkdir()
    for name, message in [
        ("bad.pth", "is refused: reading it would run code that it names (posix.mkdir)"),
        ("odd.pth", "is refused: reading it would run code that it names (datetime.timedelta)"),
        ("numpy.pth", "is refused: reading it would run code that it names (numpy.dtypes.DateTime64DType)"),
        ("text.pth", "cannot be read as a file of torch.save"),
        ("list.pth", "holds a list, not a table of weights"),
        ("other.pth", "is of no known format (nnssl, nnunet, monai_swin); it holds a"),
        ("own.ckpt", "own.ckpt is a checkpoint of `fit`; `pretrain3d export RUN out=FILE` writes the file of its run"),
        ("none.pth", "no such file"),
        ("run", "run is a folder; give the checkpoint in it"),
    ]:
        assert main(["import", str(tmp_path / name), f"out={tmp_path / 'out.pt'}"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out.pt").exists()


def test_mistakes_on_the_command_line(tmp_path, capsys):
    exported(RESENC, tmp_path / "a.pt")
    out = f"out={tmp_path / 'b.pt'}"
    for arguments, message in [
        (["import", out], "takes one checkpoint, got 0"),
        (["import", "x.pth"], "missing out=VALUE"),
        (["import", "x.pth", f"out={tmp_path}"], "is a folder"),
        (["import", "x.pth", out, "axes=yxz"], "axes=yxz, did you mean"),
        (["import", "x.pth", out, "token_order=xyz"], "it is hwd or whd"),
        (["import", "x.pth", out, "spacing_mm=1"], "expected three sizes in mm"),
        (["import", "x.pth", out, "intensity=ct"], "expected {scheme:"),
        (["import", "x.pth", out, "intensity={scheme: zscore, foreground: images}"], "takes body or image"),
        (["import", str(tmp_path / "a.pt"), out], "is a file of `pretrain3d export` already"),
        (["export", str(tmp_path / "a.pt"), out, "format=onnx"], "format=onnx: it is pretrain3d or nnssl"),
        (["export", str(tmp_path / "a.pt"), out, "axes=zyx"], "axes=zyx is for format=nnssl"),
        (["export", str(tmp_path / "a.pt"), f"out={tmp_path / 'a.pt'}", "format=nnssl"], "did not write"),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_what_the_user_states_is_kept(tmp_path):
    released_file(RESENC, tmp_path / "file.pth")
    out = tmp_path / "out.pt"
    stated = ["intensity={scheme: window, low: -175, high: 250}", "spacing_mm=[1.5,1.5,2]", "method=voco"]
    assert main(["import", str(tmp_path / "file.pth"), f"out={out}", *stated]) == 0
    content = load_export(out)
    assert content["preprocessing"]["intensity"] == {"scheme": "window", "low": -175, "high": 250}
    assert content["preprocessing"]["spacing_mm"] == [1.5, 1.5, 2.0] and content["source"]["method"] == "voco"
