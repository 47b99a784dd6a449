"""Transfer files: whole, strict, and they say what they did."""

from __future__ import annotations

import datetime
import os
import re

import pytest
import torch

from pretrain3d.__main__ import main
from pretrain3d.backbones import BACKBONES, transfer
from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.backbones.transfer import export_weights, fingerprint, load_backbone, load_export, transfer_into
from pretrain3d.config import UserError
from pretrain3d.registry import build

STAGES = {"channels": [4, 6], "blocks": [1, 1], "strides": [1, 2], "in_channels": 1}
NODE = {"name": "resenc", **STAGES}
PREPROCESSING = {"spacing_mm": [1.0, 1.0, 2.0], "intensity": {"scheme": "ct", "low": [-900.0]}, "channels": 1}
SOURCE = {"run": "phantom/mae", "step": 7, "method": "mae", "licence": "", "data_hash": "ab"}


@pytest.fixture
def backbone() -> ResEnc:
    return build(BACKBONES, NODE, "backbone")


@pytest.fixture
def file(backbone, tmp_path):
    path = tmp_path / "exports" / "mae.pt"
    export_weights(path, NODE, backbone.state_dict(), PREPROCESSING, SOURCE)
    return path


def test_round_trip(backbone, file):
    content = load_export(file)
    assert content["backbone"] == NODE
    assert content["preprocessing"] == PREPROCESSING and content["source"] == SOURCE
    again = load_backbone(file)
    image = torch.randn(1, 1, 8, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(backbone(image), again(image), strict=True))
    assert os.listdir(file.parent) == ["mae.pt"], "no temporary file is left"


def test_transfer_reports_what_it_loaded(backbone, file):
    target = build(BACKBONES, {**NODE, "masking": "sparse", "checkpointing": True}, "backbone")
    report = transfer_into(target, file)
    assert fingerprint(target.state_dict()) == fingerprint(backbone.state_dict()) == report.fingerprint
    assert report.tensors == len(backbone.state_dict())
    assert report.parameters == sum(p.numel() for p in backbone.parameters())
    assert report.adaptations == [] and report.source == SOURCE and report.preprocessing == PREPROCESSING
    assert report.to_dict()["fingerprint"] == report.fingerprint
    assert "nothing adapted" in str(report) and report.fingerprint in str(report)


def test_a_named_variant_and_its_stages_are_the_same_backbone(tmp_path):
    tiny = build(BACKBONES, {"name": "resenc_xs"}, "backbone")
    export_weights(tmp_path / "xs.pt", {"name": "resenc_xs"}, tiny.state_dict(), {}, {})
    spelled = build(BACKBONES, {"name": "resenc", **tiny.arguments}, "backbone")
    transfer_into(spelled, tmp_path / "xs.pt")
    assert fingerprint(spelled.state_dict()) == fingerprint(tiny.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 2}, r"in_channels is 1 in the file and 2 in the model.*adapt=\[channels\]"),
        ({"channels": [4, 8]}, r"channels is \[4, 6\] in the file and \[4, 8\] in the model"),
        ({"blocks": [1, 2]}, r"blocks is \[1, 1\] in the file and \[1, 2\] in the model"),
        ({"strides": [1, [2, 2, 1]]}, r"strides is .*\[2, 2, 2\]\] in the file and .*\[2, 2, 1\]\] in the model"),
        ({"kernels": 5}, r"kernels is \[\[3, 3, 3\].* in the file and \[\[5, 5, 5\]"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_values(file, change, message):
    target = build(BACKBONES, {**NODE, **change}, "backbone")
    before = fingerprint(target.state_dict())
    with pytest.raises(UserError, match=message):
        transfer_into(target, file)
    assert fingerprint(target.state_dict()) == before, "all or nothing"


def test_another_kind_of_backbone_is_refused(file):
    with pytest.raises(UserError, match="holds a ResEnc, the model's backbone is a Conv3d"):
        transfer_into(torch.nn.Conv3d(1, 4, 3), file)


def test_channels_are_adapted_by_name_and_reported(backbone, file):
    target = build(BACKBONES, {**NODE, "in_channels": 3}, "backbone")
    report = transfer_into(target, file, adapt=["channels"])
    assert report.adaptations == ["channels: stem.conv.weight repeated over 3 channels and divided by 3"]
    image = torch.randn(1, 1, 8, 8, 8)
    for a, b in zip(backbone(image), target(image.expand(-1, 3, -1, -1, -1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert transfer_into(backbone, file, adapt=["channels"]).adaptations == []


def test_wrong_adaptations_are_refused(backbone, tmp_path, file):
    with pytest.raises(UserError, match="unknown adaptation 'chanels', did you mean 'channels'"):
        transfer_into(backbone, file, adapt=["chanels"])
    two = build(BACKBONES, {**NODE, "in_channels": 2}, "backbone")
    export_weights(tmp_path / "two.pt", {**NODE, "in_channels": 2}, two.state_dict(), {}, {})
    with pytest.raises(UserError, match="in_channels is 2 in the file and 1 in the model; only a file of 1 channel"):
        transfer_into(backbone, tmp_path / "two.pt", adapt=["channels"])


@pytest.mark.parametrize("kind", ["primus", "vit"])
def test_learned_positions_are_adapted_by_name_and_reported(tmp_path, kind):
    node = {"name": kind, "embed_dim": 24, "depth": 1, "heads": 2, "patch": 8, "image_size": 16, "in_channels": 1}
    source = build(BACKBONES, node, "backbone").eval()
    export_weights(tmp_path / "a.pt", node, source.state_dict(), {}, {})
    target = build(BACKBONES, {**node, "image_size": [24, 16, 32], "in_channels": 2}, "backbone").eval()
    refusal = r"image_size is \[16, 16, 16\] in the file and \[24, 16, 32\] in the model.*adapt=\[positions\]"
    with pytest.raises(UserError, match=refusal):
        transfer_into(target, tmp_path / "a.pt", adapt=["channels"])
    report = transfer_into(target, tmp_path / "a.pt", adapt=["channels", "positions"])
    assert report.adaptations[1] == (
        "positions: encoder.positions interpolated from image_size [16, 16, 16] to [24, 16, 32]"
    )
    image = torch.randn(1, 1, 24, 16, 32)
    with torch.no_grad():  # the source interpolates as it runs
        torch.testing.assert_close(source(image)[0], target(image.expand(-1, 2, -1, -1, -1))[0], rtol=1e-4, atol=1e-5)
    assert transfer_into(source, tmp_path / "a.pt", adapt=["positions"]).adaptations == []


DEEP = {"name": "resenc", "channels": [4, 6, 8], "blocks": [1, 2, 1], "strides": [1, 2, 2], "kernels": 3}
FLAT = {"name": "resenc", "channels": [4, 6], "blocks": [1, 2], "strides": [1, [2, 2, 1]], "kernels": [[3, 3, 1], 3]}


def test_stages_kernels_and_strides_are_adapted_by_name_and_reported(tmp_path):
    source = build(BACKBONES, DEEP, "backbone")
    export_weights(tmp_path / "deep.pt", DEEP, source.state_dict(), {}, {})
    target = build(BACKBONES, FLAT, "backbone")
    before = fingerprint(target.state_dict())
    names = ["stages", "kernels", "strides"]
    for missing in names:
        with pytest.raises(UserError, match=r"in the file and .* in the model.*transfer\.adapt may change stages"):
            transfer_into(target, tmp_path / "deep.pt", adapt=[name for name in names if name != missing])
        assert fingerprint(target.state_dict()) == before, "all or none"
    report = transfer_into(target, tmp_path / "deep.pt", adapt=names)
    third = [name for name in source.state_dict() if name.startswith("stages.2.")]
    assert report.adaptations == [
        f"stages: the first 2 of 3, {len(third)} tensors left out",
        "kernels: averaged along z in stage 0",
        "strides: [[1, 1, 1], [2, 2, 1]] instead of [[1, 1, 1], [2, 2, 2]]",
    ]
    old, got = source.state_dict(), target.state_dict()
    assert set(got) == set(old) - set(third)
    for name, tensor in got.items():
        if tensor.ndim == 5 and not name.startswith("stages.1."):  # the stem and stage 0: 3 x 3 x 1
            for place in torch.cartesian_prod(*(torch.arange(n) for n in tensor.shape)).tolist():
                o, i, x, y, _ = place
                mean = sum(old[name][o, i, x, y, z] for z in range(3)) / 3
                torch.testing.assert_close(tensor[tuple(place)], mean)
        else:
            assert torch.equal(tensor, old[name]), name
    assert [level.stride for level in target.levels] == [(1, 1, 1), (2, 2, 1)]
    assert transfer_into(source, tmp_path / "deep.pt", adapt=names).adaptations == []


def test_nothing_is_made_up_for_a_deeper_network_or_a_larger_kernel(tmp_path):
    source = build(BACKBONES, FLAT, "backbone")
    export_weights(tmp_path / "flat.pt", FLAT, source.state_dict(), {}, {})
    for change in ({"channels": [4, 6, 8], "blocks": [1, 2, 1], "strides": [1, [2, 2, 1], 2], "kernels": 3},
                   {"kernels": 3}, {"kernels": [[3, 3, 1], 5]}):  # fmt: skip
        target = build(BACKBONES, {**FLAT, **change}, "backbone")
        with pytest.raises(UserError, match=r"(kernels|strides) is .* in the file and .* in the model"):
            transfer_into(target, tmp_path / "flat.pt", adapt=["stages", "kernels", "strides"])


def test_damaged_and_foreign_files_are_named(backbone, file, tmp_path):
    whole = file.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"no such thing"):
        (tmp_path / "broken.pt").write_bytes(broken)
        with pytest.raises(UserError, match=r"broken\.pt cannot be read as a file of torch\.save"):
            load_export(tmp_path / "broken.pt")
    flipped = bytearray(whole)
    flipped[whole.index(load_export(file)["weights"]["stem.conv.weight"].numpy().tobytes())] ^= 1
    (tmp_path / "flipped.pt").write_bytes(flipped)
    with pytest.raises(UserError, match=r"flipped\.pt is damaged: fingerprint \w+ instead of \w+"):
        load_export(tmp_path / "flipped.pt")
    torch.save({"when": datetime.date(2024, 1, 1)}, tmp_path / "code.pt")  # would have to import something
    with pytest.raises(UserError, match=r"code\.pt is refused: reading it would run code .*\(datetime\.date\)"):
        load_export(tmp_path / "code.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt is not a file of `pretrain3d export` \(it holds state_dict\)"):
        load_export(tmp_path / "other.pt")
    torch.save({**load_export(file), "version": 2}, tmp_path / "newer.pt")
    with pytest.raises(UserError, match="has format version 2, this release reads version 1"):
        load_export(tmp_path / "newer.pt")
    torch.save({k: v for k, v in load_export(file).items() if k != "source"}, tmp_path / "part.pt")
    with pytest.raises(UserError, match=r"part\.pt is incomplete: it lacks source"):
        load_export(tmp_path / "part.pt")
    with pytest.raises(UserError, match=r"none\.pt: no such file"):
        load_export(tmp_path / "none.pt")


def test_weights_of_another_backbone_are_neither_written_nor_loaded(backbone, file, tmp_path):
    state = dict(backbone.state_dict())
    state["extra"] = state.pop("stem.conv.bias")
    with pytest.raises(UserError, match=r"lacks 1 tensors \(stem.conv.bias\).*1 unknown tensors \(extra\)"):
        export_weights(tmp_path / "no.pt", NODE, state, {}, {})
    assert not (tmp_path / "no.pt").exists()
    content = load_export(file)
    content["weights"]["stem.conv.bias"] = torch.zeros(5)
    content["fingerprint"] = fingerprint(content["weights"])
    torch.save(content, tmp_path / "edited.pt")
    for load in (load_backbone, lambda path: transfer_into(backbone, path)):
        with pytest.raises(UserError, match=r"stem.conv.bias is \(5,\) in the file and \(4,\) in the backbone"):
            load(tmp_path / "edited.pt")


def test_values_that_could_not_be_read_back_are_not_written(backbone, tmp_path):
    with pytest.raises(AssertionError, match=r"export\.source\.path is a PosixPath"):
        export_weights(tmp_path / "no.pt", NODE, backbone.state_dict(), {}, {"path": tmp_path})
    assert not (tmp_path / "no.pt").exists()


def test_a_killed_export_leaves_the_old_file(backbone, file, monkeypatch):
    before = file.read_bytes()

    def killed(content, temporary):
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer.torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        export_weights(file, NODE, backbone.state_dict(), PREPROCESSING, SOURCE)
    assert file.read_bytes() == before and os.listdir(file.parent) == ["mae.pt"]


def test_a_view_does_not_drag_its_storage_along(backbone, tmp_path):
    state = {
        name: torch.zeros(10**6)[: tensor.numel()].view(tensor.shape) for name, tensor in backbone.state_dict().items()
    }
    export_weights(tmp_path / "views.pt", NODE, state, {}, {})
    assert (tmp_path / "views.pt").stat().st_size < 10**5


def test_fingerprint_sees_names_types_shapes_and_values():
    state = {"a": torch.arange(6.0), "b": torch.tensor(1)}
    marks = [
        fingerprint(state),
        fingerprint({"a": torch.arange(6.0), "c": torch.tensor(1)}),
        fingerprint({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)}),
        fingerprint({"a": torch.arange(6.0).bfloat16(), "b": torch.tensor(1)}),
        fingerprint({"a": torch.arange(6.0) + 1e-6, "b": torch.tensor(1)}),
    ]
    assert len(set(marks)) == len(marks)
    assert all(re.fullmatch("[0-9a-f]{16}", mark) for mark in marks)
    assert fingerprint(dict(reversed(state.items()))) == marks[0]


@pytest.fixture
def run_folder(backbone, tmp_path):
    """A run as `fit` leaves it, its averaged weights different from the online ones."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    state |= {f"averaged.backbone.{name}": tensor + 1 for name, tensor in backbone.state_dict().items()}
    state["method.decoder.weight"] = torch.zeros(3)
    note = {
        "kind": "reconstruction",
        "backbone": NODE,
        "preprocessing": PREPROCESSING,
        "source": SOURCE,
        "weights": "ema",
    }
    torch.save({"state_dict": state, "pretrain3d": note, "global_step": 7}, folder / "checkpoints" / "last.ckpt")
    note = {**note, "weights": "online"}
    torch.save({"state_dict": state, "pretrain3d": note, "global_step": 7}, folder / "checkpoints" / "best.ckpt")
    return folder


def test_export_prefers_averaged_weights_and_is_idempotent(backbone, run_folder, tmp_path, capsys):
    out = tmp_path / "out" / "mae.pt"
    assert main(["export", str(run_folder), f"out={out}"]) == 0
    content = load_export(out)
    assert content["source"] == {**SOURCE, "weights": "ema"} and content["preprocessing"] == PREPROCESSING
    averaged = {name: tensor + 1 for name, tensor in backbone.state_dict().items()}
    assert fingerprint(content["weights"]) == fingerprint(averaged)
    assert fingerprint(averaged) in capsys.readouterr().out
    written = out.stat().st_mtime_ns
    assert main(["export", str(run_folder), f"out={out}"]) == 0
    assert "nothing to do" in capsys.readouterr().out and out.stat().st_mtime_ns == written
    assert main(["export", str(run_folder), f"out={out}", "checkpoint=best"]) == 0
    assert fingerprint(load_export(out)["weights"]) == fingerprint(backbone.state_dict())


def test_safetensors_are_not_read(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    message = f"{path} cannot be read as a file of torch.save: safetensors are not read; give a file of torch"
    assert main(["import", str(path), f"out={tmp_path / 'a.pt'}"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "a.pt").exists()
    with pytest.raises(UserError, match=re.escape(message)):
        load_export(path)


def test_export_names_the_mistake(run_folder, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("do not lose me")
    mistakes = [
        ([], "takes one run folder, got 0"),
        ([str(run_folder)], "missing out=VALUE"),
        ([str(run_folder), f"out={tmp_path}"], "is a folder"),
        (
            [str(run_folder), f"out={tmp_path / 'notes.txt'}"],
            "notes.txt cannot be read as a file of torch.save: it is of another kind",
        ),
        ([str(tmp_path / "none"), f"out={tmp_path / 'a.pt'}"], "none does not exist"),
        ([str(run_folder), f"out={tmp_path / 'a.pt'}", "checkpoint=first"], "last or best"),
        ([str(run_folder), f"out={tmp_path / 'a.pt'}", "chekpoint=best"], "did you mean 'checkpoint'"),
    ]
    for arguments, message in mistakes:
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert (tmp_path / "notes.txt").read_text() == "do not lose me"
