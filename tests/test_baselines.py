"""Baselines: exact on made-up volumes, and the mean box's known numbers on OpenKBP."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage, stats

from pretrain3d.evaluation.baselines import MeanBoxBaseline, ThresholdBaseline, _score, components
from pretrain3d.evaluation.protocol import evaluate

Volume = tuple[np.ndarray, np.ndarray, np.ndarray]


def volume(seed: int, bright: int = 3, dark: int = 2) -> Volume:
    """Noise of 20 around 0; class 0: balls of +100; class 1: balls of -100; a distractor of +100 far too large."""
    rng = np.random.default_rng(seed)
    image = np.zeros((40, 44, 36))
    grid = np.stack(np.meshgrid(*(np.arange(s) for s in image.shape), indexing="ij"), axis=-1)
    boxes, labels = [], []
    image[:, 38:, :] = 100
    centres = [(x, y, z) for x in (8, 20, 32) for y in (8, 20, 32) for z in (8, 26)]
    for number, place in enumerate(rng.permutation(len(centres))[: bright + dark]):
        radius = rng.uniform(2.5, 4.5)
        ball = ((grid - np.array(centres[place])) ** 2).sum(axis=-1) <= radius**2
        image[ball] = 100 if number < bright else -100
        box = ndimage.find_objects(ball.astype(int))[0]
        boxes.append([s.start for s in box] + [s.stop for s in box])
        labels.append(0 if number < bright else 1)
    noisy = (image + rng.normal(0, 20, image.shape)).astype(np.int16)
    return noisy, np.array(boxes, float).reshape(-1, 6), np.array(labels, int)


def score(predict, volumes: list[Volume], classes: list[str]) -> dict:
    predictions, targets = {}, {}
    for index, (image, boxes, labels) in enumerate(volumes):
        predictions[str(index)] = dict(zip(("boxes", "scores", "labels"), predict(image), strict=True))
        targets[str(index)] = {"boxes": boxes, "labels": labels}
    return evaluate(predictions, targets, classes)


def test_the_mean_box_is_placed_relative_to_the_volume() -> None:
    boxes = [np.array([[1, 2, 3, 3, 4, 9.0]]), np.array([[4, 4, 6, 8, 8, 18.0], [0, 0, 0, 2, 2, 2]]), np.zeros((0, 6))]
    shapes, labels = [(10, 10, 10), (20, 20, 20), (5, 5, 5)], [np.array([0]), np.array([0, 2]), np.zeros(0, int)]
    found, scores, of_box = MeanBoxBaseline(3).fit(shapes, boxes, labels).predict((30, 10, 10))
    np.testing.assert_allclose(found, [[4.5, 2, 3, 10.5, 4, 9], [0, 0, 0, 3, 1, 1]], rtol=1e-6)
    assert of_box.tolist() == [0, 2] and scores.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert found.dtype == np.float32 and scores.dtype == np.float32


def test_components_and_their_features() -> None:
    image = np.zeros((12, 12, 12), np.float32)
    image[2:5, 2:5, 2:6] = 50
    image[2, 2, 2] = 0
    image[9, 9, 9] = 50  # too small
    image[:, 11, :] = 50  # too large
    boxes, features = components(image, (40.0, np.inf), 0, np.array([[2, 2, 2], [6, 6, 6]]))
    np.testing.assert_array_equal(boxes, [[2, 2, 2, 5, 5, 6]])
    np.testing.assert_allclose(features, [[np.log(35), np.log(4 / 3), 35 / 36, 50, 50]])
    opened, _ = components(image, (40.0, np.inf), 1, np.array([[2, 2, 2], [6, 6, 6]]))
    assert len(opened) == 1, "opening keeps what is thick"
    assert len(components(image, (60.0, np.inf), 0, np.ones((2, 3)))[0]) == 0
    assert components(image, (40.0, np.inf), 0, np.full((2, 3), 7))[1].shape == (0, 5)


def test_scores_rise_with_the_ratio_of_the_likelihoods() -> None:
    rng = np.random.default_rng(0)
    features, means, deviations = rng.normal(0, 2, (9, 3)), rng.normal(0, 1, (2, 3)), rng.uniform(0.3, 3, (2, 3))
    other, thing = (stats.norm.logpdf(features, means[i], deviations[i]).sum(axis=1) for i in (0, 1))
    ratio = thing - other
    np.testing.assert_allclose(_score(features, means, deviations), 0.5 + 0.5 * ratio / (10 + abs(ratio)))


def test_thresholding_finds_what_a_threshold_can_find() -> None:
    training, held_out = [volume(seed) for seed in range(6)], [volume(seed) for seed in range(50, 56)]
    baseline = ThresholdBaseline(search_cases=2).fit(training)
    result = score(baseline.predict, held_out, ["bright", "dark"])
    assert result["per_class"]["bright"]["AP@0.10"] > 0.9 and result["per_class"]["dark"]["AP@0.10"] > 0.9
    boxes, scores, labels = baseline.predict(held_out[0][0])
    assert boxes.dtype == scores.dtype == np.float32 and labels.dtype == np.int64
    assert (scores > 0).all() and (scores < 1).all()
    assert (boxes[:, 3:] - boxes[:, :3]).max() < 16, "the slab is larger than any object"
    again = ThresholdBaseline(search_cases=2).fit(training).predict(held_out[0][0])
    np.testing.assert_array_equal(again[0], boxes)


def test_thresholding_does_not_find_what_has_no_contrast() -> None:
    """Boxes of other cases: nothing to find, so nothing may be found."""
    volumes = [volume(seed) for seed in range(12)]
    shuffled = [(v[0], w[1], w[2]) for v, w in zip(volumes, volumes[1:] + volumes[:1], strict=True)]
    baseline = ThresholdBaseline(search_cases=2).fit(shuffled[:6])
    assert score(baseline.predict, shuffled[6:], ["bright", "dark"])["AP@0.10"] < 0.1


def test_a_class_without_training_objects_is_not_predicted() -> None:
    image, boxes, labels = volume(0, bright=4, dark=0)
    baseline = ThresholdBaseline(search_cases=2).fit([(image, boxes, labels), volume(1, bright=0, dark=0)])
    assert set(baseline.predict(image)[2]) == {0}
    empty = ThresholdBaseline().fit([volume(1, bright=0, dark=0)]).predict(image)
    assert [len(part) for part in empty] == [0, 0, 0] and empty[0].shape == (0, 6)


def test_the_mean_box_on_openkbp() -> None:
    """Known: AP@0.10 0.89, AP@0.50 0.14, mAP 0.50 on the test cases, counting classes only where they are annotated."""
    root = os.environ.get("PRETRAIN3D_TESTDATA")
    if not root:
        pytest.skip("PRETRAIN3D_TESTDATA is not set")
    folder = Path(root) / "data" / "openkbp"
    split: dict[str, list[Volume]] = {"train-pats": [], "test-pats": []}
    for about in json.loads((folder / "cases.json").read_text()):
        name, part = about["case"], about["split"]
        if part in split:
            organs = np.asarray(nibabel.load(folder / "labels_oar" / f"openkbp_{name}.nii.gz").dataobj).astype(np.uint8)
            found = [(i, box) for i, box in enumerate(ndimage.find_objects(organs)) if box is not None]
            boxes = np.array([[s.start for s in box] + [s.stop for s in box] for _, box in found], float)
            split[part].append((organs, boxes, np.array([i for i, _ in found])))
    training = split["train-pats"]
    baseline = MeanBoxBaseline(7).fit(
        [v[0].shape for v in training], [v[1] for v in training], [v[2] for v in training]
    )
    predictions, targets = {}, {}
    for index, (organs, boxes, labels) in enumerate(split["test-pats"]):
        row = dict(zip(("boxes", "scores", "labels"), baseline.predict(organs.shape), strict=True))
        predictions[f"{index:02d}"] = row
        targets[f"{index:02d}"] = {"boxes": boxes, "labels": labels, "annotated": tuple(labels)}
    result = evaluate(predictions, targets, [str(label) for label in range(7)])
    assert len(targets) == 32
    # all scores of a class are equal, so that AP, as COCO defines it, moves a little with the order of the cases
    assert result["AP@0.10"] == pytest.approx(0.89, abs=0.02)
    assert result["AP@0.50"] == pytest.approx(0.14, abs=0.03)
    assert result["mAP"] == pytest.approx(0.50, abs=0.04)
