"""Volume Fusion against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from method_checks import check_bf16_gradients, check_empty_batch, check_pictures, generators, make, make_batch

from pretrain3d.config import UserError
from pretrain3d.objectives.corruptions import host_rng

SHAPE = (12, 10, 8)


def test_mixing_by_loops():
    _, method = make("volume_fusion", SHAPE, channels=2)
    batch = make_batch(SHAPE, channels=2, batch=3)
    prepared = method.prepare(batch, generators(0, 1, 2))
    image, inside = batch["image"].numpy(), batch["inside"].numpy()
    for b, draws in enumerate(generators(0, 1, 2)):
        behind = (b + 1) % 3
        label = np.zeros(SHAPE, int)
        for (x, y, z), value in method.draw_boxes(host_rng(draws), SHAPE):
            for v in np.ndindex(SHAPE):
                if all(s.start <= i < s.stop for s, i in zip((x, y, z), v, strict=True)):
                    label[v] = value
        np.testing.assert_array_equal(prepared["targets"][b], label)
        for v in np.ndindex(SHAPE):
            a = [0, 0.25, 0.5, 0.75, 1][label[v]]
            for c in range(2):
                expected = a * image[b, c][v] + (1 - a) * image[behind, c][v]
                assert prepared["inputs"][b, c][v].item() == pytest.approx(expected, abs=1e-6)
            assert prepared["inside"][b, 0][v].item() == (inside[b, 0][v] and inside[behind, 0][v])
    assert prepared["keep"].all()


def test_boxes_are_those_of_the_study_at_160():
    _, method = make("volume_fusion", (16, 16, 16))
    sides, numbers, labels, ends = [], [], [], []
    for seed in range(300):
        boxes = method.draw_boxes(np.random.default_rng(seed), (160, 160, 160))
        numbers.append(len(boxes))
        labels += [label for _, label in boxes]
        for window, _ in boxes:
            sides += [s.stop - s.start for s in window]
            ends += [(s.start, s.stop) for s in window]
    assert (min(numbers), max(numbers)) == (10, 39) and (min(sides), max(sides)) == (8, 100)
    assert min(start for start, _ in ends) == 0 and max(stop for _, stop in ends) == 160
    shares = np.bincount(labels, minlength=5) / len(labels)
    assert len(shares) == 5 and abs(shares - 0.2).max() < 4 * (0.16 / len(labels)) ** 0.5
    drawn = [box for seed in range(60) for box, _ in method.draw_boxes(np.random.default_rng(seed), (96, 96, 96))]
    sides = [s.stop - s.start for window in drawn for s in window]
    assert (min(sides), max(sides)) == (5, 60), "the same shares of any patch, rounded"


def test_loss_by_loops():
    _, method = make("volume_fusion", SHAPE, classes=3)
    prepared = method.prepare(make_batch(SHAPE), generators(0, 1))
    logits = torch.randn(2, 3, *SHAPE)
    losses = method.loss({"logits": logits}, prepared)
    targets, inside = prepared["targets"].numpy(), prepared["inside"].numpy()[:, 0]
    voxels = [(b, *v) for b in range(2) for v in np.ndindex(SHAPE) if inside[(b, *v)]]
    chances = logits.softmax(1).movedim(1, -1).double().numpy()  # (B, X, Y, Z, K)

    def dice(chances: np.ndarray) -> float:
        """1 - the mean over samples and classes."""
        values = []
        for b in range(2):
            for k in range(3):
                both = sum(chances[v][k] for v in voxels if v[0] == b and targets[v] == k)
                total = sum(chances[v][k] + (targets[v] == k) for v in voxels if v[0] == b)
                values.append((2 * both + 1e-5) / (total + 1e-5))
        return 1 - float(np.mean(values))

    entropy = float(np.mean([-math.log(chances[v][targets[v]]) for v in voxels]))
    assert losses["cross_entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert losses["dice"].item() == pytest.approx(dice(chances), rel=1e-5)
    assert losses["loss"].item() == pytest.approx(entropy + dice(chances), rel=1e-5)
    even = np.full_like(chances, 1 / 3)
    assert losses["uniform"].item() == pytest.approx(math.log(3) + dice(even), rel=1e-5)
    shares = [np.mean([targets[v] == k for v in voxels]) for k in range(3)]
    assert losses["prior"].item() == pytest.approx(-sum(p * math.log(p) for p in shares if p), rel=1e-5)
    found = chances.argmax(-1)
    assert losses["accuracy"].item() == pytest.approx(np.mean([found[v] == targets[v] for v in voxels]), rel=1e-5)
    ious = []
    for k in range(3):
        either = sum(found[v] == k or targets[v] == k for v in voxels)
        ious.append(sum(found[v] == k and targets[v] == k for v in voxels) / either)
    assert losses["mIoU"].item() == pytest.approx(np.mean(ious), rel=1e-5)


def test_a_perfect_prediction_scores_nothing_and_absent_classes_do_not_count():
    _, method = make("volume_fusion", SHAPE)
    prepared = method.prepare(make_batch(SHAPE), generators(0, 1))
    prepared["targets"] = prepared["targets"].clamp(max=2)  # classes 3 and 4 are absent
    logits = 50.0 * torch.nn.functional.one_hot(prepared["targets"], 5).movedim(-1, 1)
    losses = method.loss({"logits": logits}, prepared)
    assert losses["loss"].item() == pytest.approx(0, abs=1e-4)
    assert losses["accuracy"] == 1 and losses["mIoU"] == 1
    assert losses["uniform"] > math.log(5)


def test_one_patch_cannot_be_mixed_in_training_and_meets_its_reflection_in_validation():
    _, method = make("volume_fusion", SHAPE)
    batch = make_batch(SHAPE, batch=1)
    for processes in (1, 2):  # each mixes its own patches
        with pytest.raises(UserError, match=r"data.batch_size is 1, take 2 or more"):
            method.check_batch(1, processes)
    prepared = method.eval().prepare(batch, generators(0))
    ground = prepared["targets"][0] == 0
    assert torch.equal(prepared["inputs"][0, 0][ground], batch["image"][0, 0].flip((0, 1, 2))[ground])


def test_a_sample_keeps_its_boxes_in_any_batch():
    _, method = make("volume_fusion", SHAPE)
    batch = make_batch(SHAPE, batch=4)
    targets = method.prepare(batch, generators(0, 1, 2, 3))["targets"]
    alone = method.prepare({key: value[2:] for key, value in batch.items()}, generators(2, 3))["targets"]
    assert torch.equal(targets[2:], alone) and not torch.equal(targets[0], targets[1])


def test_contract():
    check_bf16_gradients("volume_fusion")
    losses = check_empty_batch("volume_fusion")
    assert losses["loss"] == 0 and losses["uniform"] == 0
    pictures = check_pictures("volume_fusion", ["fused", "weights", "predicted_weights"])
    assert len(np.unique(pictures["weights"])) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 1}, "classes is 1; at least 2"),
        ({"boxes": [5, 3]}, r"boxes is \[5, 3\]"),
        ({"side": [0.0, 0.5]}, r"side is \[0.0, 0.5\]"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        make("volume_fusion", SHAPE, **arguments)
