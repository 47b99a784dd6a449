"""The SwinUNETR mix against its definition: views, and the sum of three losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from method_checks import check_bf16_gradients, check_empty_batch, check_pictures, generators, make, make_batch

from pretrain3d.config import UserError, load
from pretrain3d.objectives import corruptions
from pretrain3d.objectives.swin_mix import by_patch

SHAPE = (16, 16, 8)


def test_targets_are_turned_about_z():
    _, method = make("swin_mix", SHAPE, channels=2)
    batch = make_batch(SHAPE, channels=2, batch=6)
    prepared = method.prepare(batch, generators(*range(6)))
    assert prepared["targets"].shape == (12, 2, *SHAPE) and prepared["keep"].all()
    for row, quarters in enumerate(prepared["quarters"].tolist()):
        image, inside = batch["image"][row % 6], batch["inside"][row % 6]
        for x, y in np.ndindex(SHAPE[:2]):  # a quarter turns (x, y) to (15 - y, x)
            i, j = x, y
            for _ in range(quarters):
                i, j = 15 - j, i
            assert torch.equal(prepared["targets"][row][:, i, j], image[:, x, y])
            assert torch.equal(prepared["inside"][row][:, i, j], inside[:, x, y])
    assert set(prepared["quarters"].tolist()) == {0, 1, 2, 3}
    assert prepared["quarters"][:6].tolist() != prepared["quarters"][6:].tolist()


def test_dropped_boxes_reach_the_drawn_share():
    shape = (40, 40, 20)
    volume, totals = 40 * 40 * 20, []
    for seed in range(200):
        goal = np.random.default_rng(seed).uniform(0, 0.3) * volume
        windows = corruptions.cut_out_windows(np.random.default_rng(seed), shape)
        sizes = [math.prod(s.stop - s.start for s in window) for window in windows]
        assert sum(sizes) >= goal > sum(sizes[:-1])
        for window in windows:
            for cut, size in zip(window, shape, strict=True):
                assert 0 <= cut.start < cut.stop <= size and cut.stop - cut.start <= size // 4
        totals.append(sum(sizes) / volume)
    assert 0.13 < np.mean(totals) < 0.19
    assert corruptions.cut_out_windows(np.random.default_rng(0), shape, 0.0) == []


def test_views_are_the_turned_patch_noise_and_other_patches():
    _, method = make("swin_mix", SHAPE)
    ones = torch.arange(1.0, 5.0).view(4, 1, 1, 1, 1).expand(4, 1, *SHAPE).clone()
    ones += 0.1 * torch.rand_like(ones)
    prepared = method.prepare({**make_batch(SHAPE, batch=4), "image": ones}, generators(0, 1, 2, 3))
    owners, shares = set(), []
    for row in range(8):
        view, target = prepared["inputs"][row], prepared["targets"][row]
        same = view == target
        owner = view[~same].floor()
        assert owner.min() >= 1 and owner.max() <= 4
        # Of one other patch at most, and noise in the range of its own.
        others = {int(value) for value in owner.unique()} - {row % 4 + 1}
        assert len(others) <= 1
        owners |= {(row % 4 + 1, other) for other in others}
        shares.append(1 - same.float().mean().item())
    assert len(owners) > 3 and 0.05 < np.mean(shares) < 0.5 and max(shares) < 0.7


def test_a_patch_alone_is_not_mixed():
    _, method = make("swin_mix", SHAPE, drop=0.0)
    prepared = method.prepare(make_batch(SHAPE, batch=1), generators(0))
    assert torch.equal(prepared["inputs"], prepared["targets"])


def test_views_are_the_samples_own():
    _, method = make("swin_mix", SHAPE)
    batch = make_batch(SHAPE, batch=3)
    once, again = (method.prepare(batch, generators(4, 5, 6)) for _ in range(2))
    assert all(torch.equal(once[key], again[key]) for key in once)
    turned = {key: value[[2, 0, 1]] for key, value in batch.items()}
    moved = method.prepare(turned, generators(6, 4, 5))
    rows = [2, 0, 1, 5, 3, 4]
    assert torch.equal(moved["targets"], once["targets"][rows]) and torch.equal(moved["inputs"], once["inputs"][rows])


def test_loss_by_loops():
    weights = {"reconstruction": 2.0, "rotation": 0.5, "contrast": 3.0}
    _, method = make("swin_mix", SHAPE, channels=2, **weights)
    prepared = method.prepare(make_batch(SHAPE, channels=2), generators(0, 1))
    outputs = {
        "reconstruction": torch.randn(4, 2, *SHAPE),
        "turns": torch.randn(2, 2, 4),
        "embeddings": torch.randn(2, 2, 512),
        "quarters": by_patch(prepared["quarters"]),
    }
    losses = method.loss(outputs, prepared)
    targets, inputs, inside = (prepared[key].numpy() for key in ("targets", "inputs", "inside"))
    errors, means = [], []
    for b, c in np.ndindex(4, 2):
        voxels = [v for v in np.ndindex(SHAPE) if inside[b, 0][v]]
        mean = np.mean([inputs[b, c][v] for v in voxels])
        errors += [abs(outputs["reconstruction"][b, c][v].item() - targets[b, c][v]) for v in voxels]
        means += [abs(mean - targets[b, c][v]) for v in voxels]
    turns = outputs["turns"].transpose(0, 1).flatten(0, 1).double().numpy()  # first views, then second ones
    rotation = []
    for row, quarters in enumerate(prepared["quarters"].tolist()):
        rotation.append(math.log(sum(math.exp(t) for t in turns[row])) - turns[row][quarters])
    vectors = outputs["embeddings"].transpose(0, 1).flatten(0, 1).double().numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    contrast = []
    for i in range(4):  # views 0, 1 are the first ones of both patches, 2, 3 the second ones
        similar = {j: math.exp(vectors[i] @ vectors[j] / 0.5) for j in range(4) if j != i}
        contrast.append(-math.log(similar[(i + 2) % 4] / sum(similar.values())))
    parts = {"reconstruction": np.mean(errors), "rotation": np.mean(rotation), "contrast": np.mean(contrast)}
    for name, part in parts.items():
        assert losses[name].item() == pytest.approx(part, rel=1e-4), name
    assert losses["loss"].item() == pytest.approx(sum(weights[name] * part for name, part in parts.items()), rel=1e-4)
    assert losses["mean_predictor"].item() == pytest.approx(np.mean(means), rel=1e-4)
    trivial = 2.0 * np.mean(means) + 0.5 * math.log(4) + 3.0 * math.log(3)
    assert losses["trivial"].item() == pytest.approx(trivial, rel=1e-4)
    right = np.mean(turns.argmax(1) == prepared["quarters"].numpy())
    assert losses["rotation_accuracy"].item() == pytest.approx(right)


def smooth_batch(batch: int) -> dict[str, torch.Tensor]:
    coarse = torch.randn(batch, 1, 4, 4, 2)
    return {**make_batch(SHAPE, batch=batch), "image": torch.nn.functional.interpolate(coarse, size=SHAPE)}


def test_patches_are_told_apart_from_the_start():
    """Means of an untrained network share most of their length: as they are, no cosine would be below 0.9."""
    backbone, method = make("swin_mix", SHAPE)
    outputs = method(backbone, method.prepare(smooth_batch(6), generators(*range(6))))
    assert outputs["embeddings"].shape == (6, 2, 512) and outputs["turns"].shape == (6, 2, 4)
    vectors = torch.nn.functional.normalize(outputs["embeddings"].flatten(0, 1), dim=1)
    cosines = (vectors @ vectors.T)[~torch.eye(12, dtype=torch.bool)]
    assert cosines.mean() < 0.2 and cosines.min() < -0.3


def test_without_contrast_a_patch_does_not_know_its_batch():
    backbone, method = make("swin_mix", SHAPE, contrast=0.0, drop=0.0)
    batch = smooth_batch(3)
    together = method(backbone, method.prepare(batch, generators(0, 1, 2)))
    fewer = method(backbone, method.prepare({key: value[:2] for key, value in batch.items()}, generators(0, 1)))
    for key in ("turns", "embeddings", "quarters"):
        torch.testing.assert_close(fewer[key], together[key][:2])


def test_what_is_restored_comes_from_the_coarsest_level_alone():
    backbone, method = make("swin_mix", SHAPE)
    features = backbone(torch.randn(2, 1, *SHAPE), None)
    others = [torch.randn_like(level) for level in features[:-1]]
    restored = method.decoder(features)[0]
    assert restored.shape == (2, 1, *SHAPE) and torch.equal(restored, method.decoder([*others, features[-1]])[0])
    widths = [(block.conv.in_channels, block.conv.out_channels) for block in method.decoder.blocks]
    assert widths == [(8, 6), (6, 4)]


@pytest.mark.slow
def test_cost_is_that_of_the_reference(monkeypatch):
    """Parameters to the last printed digit: encoder, restoring stack and both heads are those of the reference."""
    monkeypatch.syspath_prepend("benchmarks")
    from pretrain_cost import WORKLOADS, tflop

    work = WORKLOADS["swin_mix, resenc_l"]
    forward, total, parameters = tflop(work)
    assert (forward, total) == (pytest.approx(work.forward, rel=0.01), pytest.approx(work.total, rel=0.01))
    assert parameters / 1e6 == pytest.approx(96.60, abs=0.005)


def test_contract():
    check_bf16_gradients("swin_mix")
    check_empty_batch("swin_mix")
    check_pictures("swin_mix", ["original", "corrupted", "restored"])


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((16, 8, 8), {}, r"data.patch_size is \[16, 8, 8\], take x and y of the same size"),
        ((4, 4, 4), {}, "a single voxel at the coarsest level"),
        (SHAPE, {"drop": 1.0}, "drop is 1.0"),
        (SHAPE, {"temperature": 0.0}, "temperature is 0.0"),
        (SHAPE, {"contrast": -1.0}, "weight contrast is -1.0"),
        (SHAPE, {"reconstruction": 0.0, "rotation": 0.0, "contrast": 0.0}, "weights reconstruction, .* are all 0"),
    ],
)
def test_mistakes(shape, arguments, message):
    with pytest.raises(UserError, match=message):
        make("swin_mix", shape, **arguments)


def test_shipped_configs_do_not_mirror_rotations_away():
    """Mirrors of x and of y together turn a patch by half: quarters 0 and 2 would look the same."""
    for name in ("swin_mix", "phantom_swin_mix"):
        assert not {0, 1} <= set(load(f"configs/pretrain/{name}.yaml", ["data.store=x"])["data"]["flip_axes"])
