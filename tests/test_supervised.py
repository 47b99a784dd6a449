"""Supervised pretraining: losses against loops, partial labels, several sets, stems, whole volumes, the chain."""

from __future__ import annotations

import csv
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbone_variants import VARIANTS
from semantic_store import semantic_store
from tiny_store import tiny_store
from torch import Tensor, distributed, nn

from pretrain3d.__main__ import main
from pretrain3d.backbones.decoders import image_decoder
from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.backbones.transfer import load_backbone, load_export
from pretrain3d.config import UserError
from pretrain3d.data.module import DataModule
from pretrain3d.data.probe import ProbePatches
from pretrain3d.data.splits import fold_cases
from pretrain3d.evaluation.segmentation import SegmentationScores, summarise
from pretrain3d.modules.checkpoint import load_module
from pretrain3d.modules.volumes import predict_volume, tile_weight
from pretrain3d.objectives.segmentation import Segmentation
from pretrain3d.reporting.results import read_result

SHAPE = (8, 6, 4)
ONE = {"ct": ["liver", "kidney"]}
TWO = {"ct": ["liver", "kidney"], "mr": ["liver", "heart", "aorta"]}


def make(classes: dict[str, list[str]], backbone: Any = None, channels: int = 1, **arguments: Any) -> tuple[Any, Any]:
    backbone = backbone or ResEnc([4, 6, 8], [1, 1, 1], [1, 2, 2], in_channels=channels)
    stem = (lambda: ResEnc([4], [1], [1]).stem) if getattr(backbone, "takes_stem", False) else None
    method = Segmentation(
        backbone.levels, channels, (16, 16, 16), partial(image_decoder, backbone), classes, stem, **arguments
    )
    return backbone, method


def make_prepared(classes: dict[str, list[str]], sets: list[int], shape: tuple[int, ...] = SHAPE) -> dict[str, Any]:
    """Random labels; the last class of every second sample was not annotated, although some voxels carry it."""
    total, first = sum(map(len, classes.values())), np.cumsum([0, *map(len, classes.values())])
    targets = torch.zeros(len(sets), *shape, dtype=torch.int16)
    annotated = torch.zeros(len(sets), total, dtype=torch.bool)
    for row, index in enumerate(sets):
        local = torch.randint(0, int(first[index + 1] - first[index]) + 1, shape)
        targets[row] = torch.where(local > 0, local + first[index], 0)
        annotated[row, first[index] : first[index + 1] - row % 2] = True
    inside = torch.ones(len(sets), 1, *shape, dtype=torch.bool)
    inside[0, :, shape[0] // 2 :] = False
    return {
        "inputs": torch.randn(len(sets), 1, *shape), "targets": targets, "annotated": annotated, "sets": sets,
        "inside": inside, "keep": torch.ones_like(inside),
    }  # fmt: skip


def counted(prepared: dict[str, Any]) -> list[tuple[int, ...]]:
    """Voxels (b, x, y, z) that count: inside, and background or of an annotated class."""
    shape = prepared["targets"].shape
    return [
        v for v in np.ndindex(*shape)
        if prepared["inside"][v[0], 0][v[1:]]
        and (prepared["targets"][v] == 0 or prepared["annotated"][v[0], prepared["targets"][v] - 1])
    ]  # fmt: skip


def test_softmax_loss_by_loops() -> None:
    _, method = make(ONE)
    prepared = make_prepared(ONE, [0, 0])
    logits = torch.randn(2, 3, *SHAPE)
    entropy, both, found, true = [], np.zeros(2), np.zeros(2), np.zeros(2)
    for b, x, y, z in counted(prepared):
        known = [0, *(k + 1 for k in range(2) if prepared["annotated"][b, k])]
        powers = {k: math.exp(logits[b, k, x, y, z]) for k in known}
        label = int(prepared["targets"][b, x, y, z])
        entropy.append(-math.log(powers[label] / sum(powers.values())))
        for k in range(2):
            p = powers.get(k + 1, 0.0) / sum(powers.values())
            both[k] += p * (label == k + 1)
            found[k] += p
            true[k] += label == k + 1
    dice = float(np.mean(1 - (2 * both + 1e-5) / (found + true + 1e-5)))
    losses = method.loss({"logits": [logits]}, prepared)
    assert losses["cross_entropy"].item() == pytest.approx(np.mean(entropy), rel=1e-5)
    assert losses["dice_loss"].item() == pytest.approx(dice, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(np.mean(entropy) + dice, rel=1e-5)


def test_sigmoid_loss_over_two_sets_by_loops() -> None:
    _, method = make(TWO, outputs="sigmoid")
    prepared = make_prepared(TWO, [0, 1, 1, 0])
    logits = torch.randn(4, 5, *SHAPE)
    entropy: list[list[float]] = [[] for _ in range(5)]
    both, found, true = np.zeros(5), np.zeros(5), np.zeros(5)
    for b, x, y, z in counted(prepared):
        for k in range(5):
            if not prepared["annotated"][b, k]:
                continue
            p = 1 / (1 + math.exp(-logits[b, k, x, y, z]))
            is_k = int(prepared["targets"][b, x, y, z]) == k + 1
            entropy[k].append(-math.log(p if is_k else 1 - p))
            both[k] += p * is_k
            found[k] += p
            true[k] += is_k
    expected = float(np.mean([np.mean(of_class) for of_class in entropy]))
    losses = method.loss({"logits": [logits]}, prepared)
    assert losses["cross_entropy"].item() == pytest.approx(expected, rel=1e-5)
    dice = float(np.mean(1 - (2 * both + 1e-5) / (found + true + 1e-5)))
    assert losses["dice_loss"].item() == pytest.approx(dice, rel=1e-5)


@pytest.mark.parametrize("outputs", ["softmax", "sigmoid"])
def test_what_is_not_annotated_gets_exactly_no_gradient(outputs: str) -> None:
    classes = ONE if outputs == "softmax" else TWO
    sets = [0, 0] if outputs == "softmax" else [0, 1]
    _, method = make(classes, outputs=outputs)
    prepared = make_prepared(classes, sets)
    logits = torch.randn(2, len(classes["ct"]) + 1 if outputs == "softmax" else 5, *SHAPE, requires_grad=True)
    method.loss({"logits": [logits]}, prepared)["loss"].backward()
    assert logits.grad is not None
    told = prepared["annotated"]
    if outputs == "softmax":
        told = torch.nn.functional.pad(told, (1, 0), value=True)
    voxels = torch.zeros(2, *SHAPE, dtype=torch.bool)
    for voxel in counted(prepared):
        voxels[voxel] = True
    assert torch.equal(logits.grad != 0, told[:, :, None, None, None] & voxels[:, None])
    assert not told.all() and not voxels.all()


@pytest.mark.parametrize("outputs", ["softmax", "sigmoid"])
def test_constant_shares_cost_what_is_logged_as_trivial_and_a_perfect_answer_nothing(outputs: str) -> None:
    _, method = make(ONE, outputs=outputs)
    prepared = make_prepared(ONE, [0, 0], (16, 12, 8))
    prepared["annotated"][:] = True
    prepared["inside"][:] = True
    prepared["targets"] = torch.where(torch.rand(2, 16, 12, 8) < 0.6, 0, prepared["targets"])
    share = torch.bincount(prepared["targets"].flatten().int(), minlength=3) / prepared["targets"].numel()
    constant = share.log() if outputs == "softmax" else torch.logit(share[1:])
    losses = method.loss({"logits": [constant.view(1, -1, 1, 1, 1).expand(2, -1, 16, 12, 8)]}, prepared)
    assert losses["loss"].item() == pytest.approx(losses["trivial"].item(), rel=1e-4)
    partly = {**prepared, "annotated": torch.tensor([True, False]).expand(2, 2)}  # nothing is known of the second class
    known = prepared["targets"] != 2
    part = (prepared["targets"] == 1).sum() / known.sum()
    chances = torch.stack([1 - part, part, part])
    answer = chances.log() if outputs == "softmax" else torch.logit(chances[1:])
    losses = method.loss({"logits": [answer.view(1, -1, 1, 1, 1).expand(2, -1, 16, 12, 8)]}, partly)
    assert losses["loss"].item() == pytest.approx(losses["trivial"].item(), rel=1e-4)
    right = torch.nn.functional.one_hot(prepared["targets"].long(), 3).movedim(-1, 1)
    right = (right if outputs == "softmax" else right[:, 1:]) * 100.0 - 50.0
    assert method.loss({"logits": [right]}, prepared)["loss"].item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("outputs", ["softmax", "sigmoid"])
def test_batches_without_a_class_and_without_a_voxel(outputs: str) -> None:
    backbone, method = make(ONE, outputs=outputs, deep_supervision=True)
    prepared = make_prepared(ONE, [0, 0], (16, 16, 16))
    for key, value in (("targets", 0), ("inside", False)):  # background alone, then nothing at all
        prepared[key] = torch.full_like(prepared[key], value)
        losses = method.loss(method(backbone, prepared), prepared)
        losses["loss"].backward()
        assert losses["dice_loss"] == 0
        for name, parameter in nn.ModuleList([backbone, method]).named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert losses["loss"] == 0


def test_deep_supervision_halves_the_weight_per_level_and_drops_the_lowest() -> None:
    backbone = ResEnc([4, 4, 4, 4], [1, 1, 1, 1], [1, [1, 2, 2], 2, 2])
    _, method = make(ONE, backbone, deep_supervision=True)
    prepared = make_prepared(ONE, [0, 0], (8, 16, 16))
    outputs = method(backbone, prepared)
    assert [tuple(level.shape[1:]) for level in outputs["logits"]] == [(3, 8, 16, 16), (3, 8, 8, 8)]
    coarse = {
        **prepared,
        "inputs": prepared["inputs"][..., 1::2, 1::2],
        "targets": prepared["targets"][..., 1::2, 1::2],
        "inside": prepared["inside"][..., 1::2, 1::2],
    }
    fine, low = (
        method.loss({"logits": [level]}, at)["loss"]
        for level, at in zip(outputs["logits"], (prepared, coarse), strict=True)
    )
    total = method.loss(outputs, prepared)["loss"]
    assert total.item() == pytest.approx((2 * fine.item() + low.item()) / 3, rel=1e-6)
    total.backward()
    assert all(parameter.grad is not None for parameter in nn.ModuleList([backbone, method]).parameters())


def test_every_sample_goes_through_the_stem_of_its_set() -> None:
    backbone, method = make(TWO, outputs="sigmoid", stems=("mr",))
    assert len(method.stems) == 1
    prepared = make_prepared(TWO, [1, 0, 1], (16, 16, 16))
    mixed = method(backbone, prepared)["logits"][0]
    for row, index in enumerate(prepared["sets"]):
        alone = {**prepared, "inputs": prepared["inputs"][row : row + 1], "sets": [index]}
        torch.testing.assert_close(method(backbone, alone)["logits"][0][0], mixed[row])
    other = method(backbone, {**prepared, "sets": [0, 0, 0]})["logits"][0]
    assert not torch.allclose(other[0], mixed[0]) and torch.allclose(other[1], mixed[1], atol=1e-6)
    features = backbone(prepared["inputs"])
    torch.testing.assert_close(method.decoder(features)[0], other)
    # a stem without a sample still gets a gradient, of zero: DDP waits for it
    only = make_prepared(TWO, [0, 0], (16, 16, 16))
    method.loss(method(backbone, only), only)["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in method.stems.parameters())
    assert all(p.grad is not None and p.grad.any() for p in [backbone.stem.conv.weight])


@pytest.mark.parametrize("outputs", ["softmax", "sigmoid"])
def test_bf16(outputs: str) -> None:
    backbone, method = make(ONE, outputs=outputs, stems=())
    prepared = make_prepared(ONE, [0, 0], (16, 16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        result = method(backbone, prepared)
    losses = method.loss(result, prepared)
    for key, value in losses.items():
        assert value.dtype == torch.float32 and value.isfinite() and value.requires_grad == (key == "loss"), key
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


FAST = ("resenc", "primus", "vit", "segresnet", "resnet")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in VARIANTS]
)
def test_it_runs_on_every_backbone(name: str) -> None:
    backbone, size = VARIANTS[name].build(), VARIANTS[name].size
    full = set(backbone.levels[0].stride) == {1} and len(backbone.levels) > 1
    if not full:
        with pytest.raises(UserError, match=r"set module\.method\.deep_supervision=false"):
            make(ONE, backbone, deep_supervision=True)
    _, method = make(ONE, backbone, deep_supervision=full)
    prepared = make_prepared(ONE, [0, 0], size)
    outputs = method(backbone, prepared)
    assert outputs["logits"][0].shape == (2, 3, *size)
    method.loss(outputs, prepared)["loss"].backward()
    for key, parameter in nn.ModuleDict({"backbone": backbone, "method": method}).named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize(
    ("classes", "arguments", "message"),
    [
        (TWO, {}, "softmax is for one data set, these are ct, mr; set module.method.outputs=sigmoid"),
        ({"ct": []}, {}, "data set ct has no class"),
        (TWO, {"outputs": "sigmoid", "stems": ("pet",)}, "stems names 'pet'; the data sets are ct, mr"),
        (TWO, {"outputs": "sigmoid", "stems": ("ct", "mr")}, "every data set has a stem of its own"),
    ],
)
def test_mistakes(classes: dict[str, list[str]], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(classes, **arguments)


def test_a_backbone_without_a_stem_cannot_have_several() -> None:
    with pytest.raises(UserError, match="need a backbone with a stem"):
        make(TWO, VARIANTS["primus"].build(), outputs="sigmoid", stems=("mr",))


# ---- data


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Twelve cases of "alpha", six of "beta", whose maps say nothing about the second of its three organs."""
    folder = tmp_path_factory.mktemp("stores")
    semantic_store(folder / "a", "alpha", ["left_lung", "right_lung"], 12,
                   mirror_classes={"left_lung": "right_lung", "right_lung": "left_lung"})  # fmt: skip
    semantic_store(folder / "b", "beta", ["liver", "kidney", "aorta"], 6, annotated=(0, 2), unmapped=4)
    return [str(folder / "a"), str(folder / "b")]


def batches(data: DataModule, count: int) -> list[dict[str, Any]]:
    loader = iter(data.train_dataloader())
    return [data.on_after_batch_transfer(next(loader), 0) for _ in range(count)]


def test_maps_follow_every_transform_of_the_patch(stores: list[str]) -> None:
    """In these stores the map of organs is the map of the objects' classes, so both must stay the same."""
    spatial = {"rotation_p": 0.5, "scale_p": 0.5}
    data = DataModule(stores[1], num_workers=0, batch_size=4, augment={"spatial": spatial}, labels="semantic")
    seen = 0
    for batch in batches(data, 6):
        assert torch.equal(batch["semantic"], batch["mask"].short())
        assert batch["semantic_annotated"].tolist() == [[True, False, True]] * 4
        seen += int((batch["semantic"] > 0).any(dim=(1, 2, 3)).sum())
    assert seen > 12


def test_left_and_right_are_exchanged_in_a_mirrored_map(stores: list[str]) -> None:
    settings: dict[str, Any] = {"num_workers": 0, "batch_size": 8, "patch_size": [44, 36, 30], "labels": "semantic"}
    data = DataModule(stores[0], flip_axes=[0], augment={"spatial": {"flip_p": 1.0, "rotation_p": 0.0, "scale_p": 0.0}},
                      **settings)  # fmt: skip
    (batch,) = batches(data, 1)
    swapped = torch.tensor([0, 2, 1], dtype=torch.int16)[batch["mask"].long()]
    assert torch.equal(batch["semantic"], swapped) and (batch["semantic"] > 0).any()


def test_lateral_organs_without_a_counterpart_are_not_mirrored(tmp_path: Path) -> None:
    semantic_store(tmp_path, "alpha", ["left_lung", "heart"])
    data = DataModule(str(tmp_path), num_workers=0, labels="semantic")
    with pytest.warns(UserWarning, match="lateral classes without a counterpart in mirror_classes: left_lung"):
        dataset = data.train_dataloader().dataset
    assert dataset.sampler.settings.flip_axes == (1, 2)  # type: ignore[attr-defined]


def test_patches_are_placed_on_organs(stores: list[str]) -> None:
    settings: dict[str, Any] = {"num_workers": 0, "batch_size": 16, "patch_size": [8, 8, 8], "labels": "semantic"}
    on, off = (batches(DataModule(stores[1], foreground=share, **settings), 2) for share in (1.0, 0.0))
    assert all((batch["semantic"] > 0).any(dim=(1, 2, 3)).all() for batch in on)
    assert not all((batch["semantic"] > 0).any(dim=(1, 2, 3)).all() for batch in off)
    again = batches(DataModule(stores[1], foreground=1.0, **settings), 2)
    assert all(torch.equal(one["image"], two["image"]) for one, two in zip(on, again, strict=True))


def test_objects_can_be_the_labels(stores: list[str]) -> None:
    data = DataModule(stores[0], num_workers=0, labels="objects")
    assert data.label_classes == {"alpha": ["nodule", "lesion"]}
    (batch,) = batches(data, 1)
    assert "semantic" not in batch
    _, method = make(data.label_classes)
    assert method.prepare(batch)["targets"] is batch["mask"]
    case_id = data.val_ids[0]
    semantic = DataModule(stores[0], labels="semantic").label_map(case_id)
    assert torch.equal(data.label_map(case_id).labels, semantic.labels) and (semantic.labels > 0).any()


def test_a_mixture_draws_sets_by_the_square_root_of_their_size(stores: list[str]) -> None:
    data = DataModule(stores, num_workers=0, batch_size=2, labels="semantic", patch_size=[8, 8, 8])
    mixture: Any = data.train_dataloader().dataset
    sizes = [sum(name.startswith(f"{part}/") for name in data.train_ids) for part in ("alpha", "beta")]
    assert mixture.shares == pytest.approx(np.sqrt(sizes) / np.sqrt(sizes).sum())
    drawn = Counter(mixture[index]["set_index"] for index in range(300))
    assert abs(drawn[0] / 300 - mixture.shares[0]) < 4 * math.sqrt(0.25 / 300)
    assert [mixture[index]["case_id"] for index in range(5)] == [mixture[index]["case_id"] for index in range(5)]


def test_classes_of_a_mixture_stand_one_after_the_other(stores: list[str]) -> None:
    data = DataModule(stores, num_workers=0, batch_size=8, labels="semantic", augment=False)
    assert data.label_classes == {"alpha": ["left_lung", "right_lung"], "beta": ["liver", "kidney", "aorta"]}
    for batch in batches(data, 2):
        first = torch.tensor([[0, 2][index] for index in batch["set_index"]])
        mask, semantic = batch["mask"], batch["semantic"]  # two classes of objects in either set
        assert torch.equal(semantic > 0, mask > 0)
        assert torch.equal((semantic - first[:, None, None, None])[mask > 0], mask.short()[mask > 0] - first.short()[
            (mask > 0).nonzero()[:, 0]
        ])  # fmt: skip
        for row, index in enumerate(batch["set_index"]):
            assert batch["case_ids"][row].startswith(("alpha/", "beta/")[index])
            expected = [[1, 1, 0, 0, 0], [0, 0, 1, 0, 1]][index]
            assert batch["semantic_annotated"][row].int().tolist() == expected
            assert batch["annotated"][row].int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]][index]


def test_whole_cases_of_several_sets(stores: list[str]) -> None:
    data = DataModule(stores, labels="semantic", num_workers=0)
    assert {name.split("/")[0] for name in data.val_ids[:2]} == {"alpha", "beta"}  # in turn
    for case_id in data.val_ids:
        name, _, own = case_id.partition("/")
        alone = DataModule(stores[["alpha", "beta"].index(name)], labels="semantic")
        image, case = data.volume(case_id)
        assert case.id == own and torch.equal(image, alone.volume(own)[0])
        assert torch.equal(data.label_map(case_id).labels, alone.label_map(own).labels)
        assert data.set_of(case_id) == ["alpha", "beta"].index(name)
        assert data.pad_value(case_id) == alone.pad_value(own)


def test_mistakes_of_the_data(stores: list[str], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="4 of the 10 cases of pool=all lack a semantic map; left out"):
        data = DataModule(stores[1], pool="all", labels="semantic")
    assert len(data.train_ids) + len(data.val_ids) == 6
    with pytest.raises(UserError, match="0 training and 0 validation cases have a semantic map"):
        DataModule(stores[1], pool="pretrain", labels="semantic")
    tiny_store(tmp_path / "tiny")
    with pytest.raises(UserError, match=r"labels=semantic: .*tiny has no maps of organs; it has those of .*=objects"):
        DataModule(str(tmp_path / "tiny"), labels="semantic")
    with pytest.raises(UserError, match="twice"):
        DataModule([stores[0], stores[0]])
    semantic_store(tmp_path / "two", "alpha", ["liver"], channels=2)
    with pytest.raises(UserError, match="alpha has 1 input channels and alpha_2 2"):
        DataModule([stores[0], str(tmp_path / "two")])
    semantic_store(tmp_path / "fine", "gamma", ["liver"], spacing_mm=(0.5, 1.0, 1.0))
    with pytest.warns(UserWarning, match="the voxels of alpha are 1 x 1 x 1 mm and those of gamma 0.5 x 1 x 1 mm"):
        DataModule([stores[0], str(tmp_path / "fine")])


# ---- whole volumes


@pytest.mark.parametrize("shape", [(13, 9, 20), (5, 11, 8)])
def test_tiles_of_a_voxelwise_function_give_the_function(shape: tuple[int, int, int]) -> None:
    image = torch.randn(2, *shape)
    sizes = []

    def network(patches: Tensor) -> Tensor:
        sizes.append(tuple(patches.shape))
        return torch.cat([patches.sum(1, keepdim=True), patches[:, :1] ** 2, patches[:, 1:]], 1)

    found = predict_volume(network, image, (8, 8, 8), 0.5, 3, (0.0, 1.0))
    torch.testing.assert_close(found, network(image[None])[0])
    assert all(size[0] <= 3 and size[1:] == (2, 8, 8, 8) for size in sizes[:-1])


def test_the_middle_of_a_tile_counts_more() -> None:
    weight = tile_weight((8, 6, 4))
    assert weight.shape == (8, 6, 4) and weight.min() > 0 and torch.equal(weight, weight.flip((0, 1, 2)))
    starts = iter([0.0, 1.0])
    line = predict_volume(lambda p: torch.full((1, 1, 8, 6, 4), next(starts)), torch.zeros(1, 12, 6, 4), (8, 6, 4), 0.5)
    middle = line[0, :, 3, 2]
    assert (middle[:4] == 0).all() and (middle[8:] == 1).all() and (middle[4:8].diff() > 0).all()
    x = torch.arange(8) - 3.5
    one, two = torch.exp(-0.5 * (x[5] / 1) ** 2), torch.exp(-0.5 * (x[1] / 1) ** 2)  # sigma is an eighth of 8 voxels
    assert middle[5].item() == pytest.approx((two / (one + two)).item(), rel=1e-5)


def test_scores_of_whole_cases_by_hand() -> None:
    score = SegmentationScores({"ct": ["liver", "kidney"], "mr": ["heart"]})
    labels = torch.zeros(4, 1, 1, dtype=torch.int16)
    labels[:2] = 1
    found = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool).view(2, 4, 1, 1)
    score.update(0, found, labels, np.array([True, True]))  # liver 2/3, kidney absent from both: no value
    score.update(0, found.flip(0), torch.zeros_like(labels), np.array([False, True]))  # kidney made up: 0
    score.update(1, torch.ones(1, 4, 1, 1, dtype=torch.bool), labels, np.array([True]))  # 2 * 2 / (4 + 2)
    score.update(0, torch.stack([labels == 1, labels == 9]), labels, np.array([True, False]))  # a second liver: 1
    values = score.compute()
    assert values["dice/ct/liver"] == pytest.approx(5 / 6) and values["dice/ct/kidney"] == 0
    assert values["dice/mr/heart"] == pytest.approx(2 / 3) == pytest.approx(values["trivial_dice"])
    assert values["dice"] == pytest.approx((5 / 6 + 0 + 2 / 3) / 3)  # a class with more cases weighs no more
    assert values["volume_error"] == pytest.approx((0.25 + 1.0) / 2)
    score.reset()
    assert math.isnan(score.compute()["dice"])
    labels[2:] = 2  # nobody looked at these voxels, so that finding a liver there is no mistake
    (liver, _, _) = score.update(0, torch.ones(2, 4, 1, 1, dtype=torch.bool), labels, np.array([True, False]))
    assert liver.tolist() == [1, 0, 1] and math.isnan(score.compute()["dice/ct/kidney"])


def test_intervals_of_whole_cases() -> None:
    """Every sample is a mean over the same classes; what is of a single patient has no interval."""
    rng = np.random.default_rng(0)
    cases = [np.full((3, 3), np.nan) for _ in range(10)]
    for index, case in enumerate(cases):
        case[0] = 0.8 + 0.1 * rng.random(3)
        case[1] = 0.1 * rng.random(3) if index < 2 else np.nan
    cases[0][2] = 0.3
    patients = [str(index) for index in range(10)]
    found = summarise(cases, ["liver", "heart", "spleen"], patients, samples=500)
    spleen, dice = found["per_class"]["spleen"]["dice"], found["metrics"]["dice"]
    assert spleen["value"] == pytest.approx(0.3) and spleen["low"] is spleen["high"] is None
    assert found["per_class"]["heart"]["dice"]["high"] < 0.1
    assert dice["value"] - 0.05 < dice["low"] < dice["value"] < dice["high"] < dice["value"] + 0.05
    one = summarise(cases[:2], ["liver", "heart", "spleen"], ["p", "p"], samples=50)["metrics"]["dice"]
    assert one["value"] > 0 and one["low"] is one["high"] is None


# ---- the chain


TINY = [
    "data.patch_size=[16,16,16]", "data.batch_size=2", "data.num_workers=0", "module.warmup_steps=1",
    "module.overlap=0", "trainer.max_steps=2", "trainer.val_every_n_steps=2", "trainer.checkpoint_every_n_steps=2",
    "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "backbone=resenc", "+backbone.channels=[4,6,8]",
    "+backbone.blocks=[1,1,1]", "+backbone.strides=[1,2,2]",
]  # fmt: skip


def test_fit_on_two_sets_and_export_of_either_stem(stores: list[str], tmp_path: Path, capsys: Any) -> None:
    line = ["fit", "--config", "configs/pretrain/multitalent.yaml", "name=run", f"out={tmp_path}",
            f"data.store=[{stores[0]},{stores[1]}]", "module.method.stems=[beta]", "module.ema=0.9", *TINY]  # fmt: skip
    assert main(line) == 0
    run = tmp_path / "run"
    with open(run / "metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    for key in ("train/loss", "train/trivial", "val/dice", "val/trivial_dice", "val/dice/alpha/left_lung"):
        assert math.isfinite(float(last[key])), key
    assert (run / "checkpoints" / "best.ckpt").is_file() and len(list((run / "pictures").glob("*.png"))) == 3
    module = load_module(run / "checkpoints" / "last.ckpt", "segmentation")
    assert module.note["sets"]["beta"]["label_classes"] == ["liver", "kidney", "aorta"]
    shared, own = tmp_path / "shared.pt", tmp_path / "own.pt"
    assert main(["export", str(run), f"out={shared}"]) == 0
    assert main(["export", str(run), f"out={own}", "stem=beta"]) == 0
    one, two = load_backbone(shared).state_dict(), load_backbone(own).state_dict()
    assert {name for name in one if not torch.equal(one[name], two[name])} <= {n for n in one if n.startswith("stem.")}
    networks: Any = module.best_networks()
    assert torch.equal(two["stem.conv.weight"], networks[1].stems[0].conv.weight)
    assert torch.equal(one["stem.conv.weight"], networks[0].stem.conv.weight)
    assert load_export(own)["source"]["stem"] == "beta" and load_export(own)["source"]["data"] == "alpha+beta"
    assert main(["export", str(run), f"out={tmp_path / 'no.pt'}", "stem=alpha"]) == 2
    assert "stem=alpha: the run has stems of its own for beta" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one set with three test cases, one of them without a map."""
    out = tmp_path_factory.mktemp("tested")
    semantic_store(out / "store", "gamma", ["liver", "aorta"], 8, tests=(True, False, True))
    line = ["fit", "--config", "configs/pretrain/supervised.yaml", "name=sup", f"out={out}", f"data.store={out}/store"]
    assert main([*line, "module.ema=0.5", *TINY]) == 0
    return out


def test_held_out_dice_is_that_of_validation(tested: Path, capsys: Any) -> None:
    run = tested / "sup"
    assert main(["test", str(run), "split=val", "samples=50", "tile_batch=1"]) == 0
    assert "sup, dice 0." in capsys.readouterr().out
    result = read_result(run)
    with open(run / "metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    for key, entry in result["metrics"].items():
        assert entry["value"] == pytest.approx(float(last[f"val/{key}"]), rel=1e-4), key
    for name in ("liver", "aorta"):
        assert result["per_class"][name]["dice"]["value"] == pytest.approx(float(last[f"val/dice/{name}"]), rel=1e-4)
        of_cases = [row[f"dice/{name}"] for row in result["cases"]]
        assert result["per_class"][name]["dice"]["value"] == pytest.approx(np.mean(of_cases), rel=1e-4)
    assert result["cases"][0]["dice"] == pytest.approx(
        np.mean([result["cases"][0][f"dice/{name}"] for name in ("liver", "aorta")])
    )


def test_test_table_and_report(tested: Path, capsys: Any) -> None:
    run, report = tested / "sup", tested / "report.html"
    line = ["test", str(run), "samples=20"]
    assert main(line) == 0
    assert "1 of 3 test cases hold nothing to segment, left out" in capsys.readouterr().out
    assert [row["case"] for row in read_result(run)["cases"]] == ["c10", "c8"]
    assert main(line) == 0 and "is of these weights already" in capsys.readouterr().out
    assert main(["table", str(run), f"report={report}"]) == 0
    shown = capsys.readouterr().out
    dice = read_result(run)["per_class"]["liver"]["dice"]
    assert "segmentation: gamma, 2 test cases" in shown and "Dice per class, gamma, 2 test cases" in shown
    assert f"{dice['value']:.3f} [{dice['low']:.3f}, {dice['high']:.3f}]" in shown and "mAP" not in shown
    page = report.read_text(encoding="utf-8")
    assert "Dice of everything" in page and "Detection curves" not in page


def test_mistakes_of_a_test(tested: Path, capsys: Any) -> None:
    run = str(tested / "sup")
    for option, message in (
        ("tile_batch=0", "tile_batch=0: expected a whole number from 1 on"),
        ("samples=-1", "samples=-1: expected a whole number from 0 on"),
        ("split=train", "split=train: it is test or val"),
        ("by=site", "unknown option 'by'"),
    ):
        assert main(["test", run, option]) == 2
        assert message in capsys.readouterr().err, option


def test_labels_prepared_anew_are_measured_anew(tested: Path, capsys: Any) -> None:
    run, note = tested / "sup", tested / "store" / "prepared" / "c8.json"
    assert main(["test", str(run), "samples=0"]) == 0
    note.parent.mkdir()
    note.write_text('{"hash": "another"}')
    capsys.readouterr()
    assert main(["test", str(run), "samples=0"]) == 0
    assert "is of these weights already" not in capsys.readouterr().out


def test_summary_of_cases_by_loops() -> None:
    rng = np.random.default_rng(0)
    groups = ["a", "a", "b", "c", "d"]
    cases = rng.random((5, 2, 3))
    cases[:3, 1] = np.nan  # a class that only two patients have
    found = summarise(list(cases), ["x", "y"], groups, samples=3000)
    x, y = cases[:, 0, 0], cases[3:, 1, 0]
    assert found["per_class"]["x"]["dice"]["value"] == pytest.approx(x.mean())
    assert found["per_class"]["y"]["dice"]["value"] == pytest.approx(y.mean())
    assert found["metrics"]["dice"]["value"] == pytest.approx((x.mean() + y.mean()) / 2)
    drawn = []
    for _ in range(3000):
        chosen = [row for name in rng.choice(list("abcd"), 4) for row, group in enumerate(groups) if group == name]
        of_class = [[v for v in cases[chosen, column, 0] if not np.isnan(v)] for column in (0, 1)]
        drawn.append(np.mean([np.mean(values) for values in of_class if values]))
    entry = found["metrics"]["dice"]
    assert [entry["low"], entry["high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)


def test_the_shared_stem_travels_and_is_watched_with_what_it_was_trained_on(
    stores: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[ProbePatches] = []

    def choose(*arguments: Any) -> ProbePatches:
        watched.append(ProbePatches(*arguments))
        return watched[-1]

    monkeypatch.setattr("pretrain3d.modules.monitors.ProbePatches", choose)
    line = ["fit", "--config", "configs/pretrain/multitalent.yaml", "name=run", f"out={tmp_path}",
            f"data.store=[{stores[0]},{stores[1]}]", "module.method.stems=[alpha]", *TINY]  # fmt: skip
    assert main([*line, "data.intensity={scheme: ct}"]) == 0
    note = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["pretrain3d"]
    (patches,) = watched
    assert patches.store.name == "beta" and patches.has_organs
    learned = fold_cases(patches.store, 0)["train"]
    assert learned and not {case.id for case in patches.cases} & set(learned)
    assert note["preprocessing"] == note["sets"]["beta"]["preprocessing"] != note["sets"]["alpha"]["preprocessing"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.labels=null", "set data.labels to semantic"),
        ("module.method=mae", "module.method=mae is trained by module.name=reconstruction, not segmentation"),
        ("+data.validation=patches", "validation follows from the rest of the configuration"),
    ],
)
def test_mistakes_of_a_config(stores: list[str], tmp_path: Path, capsys: Any, override: str, message: str) -> None:
    line = ["fit", "--config", "configs/pretrain/supervised.yaml", "name=run", f"out={tmp_path}",
            f"data.store={stores[0]}", *TINY, override]  # fmt: skip
    assert main(line) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_detector_starts_from_it(phantom_store: Path, tmp_path: Path) -> None:
    tiny = [item for item in TINY if "patch_size" not in item and "overlap" not in item]
    common = [f"out={tmp_path}", f"data.store={phantom_store}", "data.patch_size=[32,32,32]", "module.overlap=0", *tiny]
    assert main(["fit", "--config", "configs/pretrain/phantom_supervised.yaml", "name=sup", *common]) == 0
    assert main(["export", str(tmp_path / "sup"), f"out={tmp_path / 'sup.pt'}"]) == 0
    detect = ["fit", "--config", "configs/detect/phantom.yaml", "name=det", f"transfer.path={tmp_path / 'sup.pt'}"]
    assert main([*detect, *common, "module.detector.detection_levels=[0,1,2]"]) == 0
    note = torch.load(tmp_path / "det" / "checkpoints" / "last.ckpt", weights_only=True)["pretrain3d"]
    assert note["transfer"]["source"]["method"] == "supervised"


# ---- two processes


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.method = make(TWO, outputs="sigmoid", deep_supervision=True, stems=("mr",))

    def forward(self, prepared: dict[str, Any]) -> Tensor:
        return self.method.loss(self.method(self.backbone, prepared), prepared)["loss"]


def gradients(network: nn.Module, rank: int, processes: int) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients on this process' part of a batch of 4; each process of two sees one set only."""
    torch.manual_seed(1)
    prepared = make_prepared(TWO, [0, 1, 0, 1], (16, 8, 8))
    mine = {key: value[rank::processes] for key, value in prepared.items()}
    loss = network(mine)
    loss.backward()
    return loss.detach(), [p.grad for p in network.parameters()]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(gradients(nn.parallel.DistributedDataParallel(Network()), rank, 2), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    loss, expected = gradients(Network(), 0, 1)
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        value, found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(value, loss)
        for one, two in zip(expected, found, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-6)
