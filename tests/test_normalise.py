import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_store import make_case, tiny_store, write_store

from pretrain3d.config import UserError
from pretrain3d.data.case import Case
from pretrain3d.data.fingerprint import CT_RANGE, Histogram, Moments, image_moments, merge, target_spacing
from pretrain3d.data.module import DataModule
from pretrain3d.data.normalise import Normalisation, normalisation_for, normalisation_of, resolve_intensity

SHAPE = (6, 5, 4)
CT = {"scheme": "ct", "foreground": "objects", "low": None, "high": None, "mean": None, "std": None}


def slow_percentile(values: np.ndarray, percent: float) -> float:
    """The smallest value with at least that share of the values at or below it."""
    return next(v for v in np.sort(values) if (values <= v).mean() >= percent / 100 - 1e-12)


def test_an_integer_histogram_is_exact():
    values = np.random.default_rng(0).normal(100, 300, 2000).astype(np.int16)
    histogram = Histogram.of(values)
    assert histogram.total == 2000 and histogram.width == 1
    for percent in (0, 0.5, 37, 50, 99.5, 100):
        assert histogram.percentile(percent) == slow_percentile(values, percent)
    clipped = np.clip(values, -50, 400)
    assert histogram.clipped_moments(-50, 400) == pytest.approx((clipped.mean(), clipped.std()))
    assert (histogram.mean, histogram.std) == pytest.approx((values.mean(), values.std()))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 5e4])
def test_a_histogram_of_floats_is_right_to_a_bin(scale):
    values = (np.random.default_rng(1).gamma(2, 1, 5000) * scale).astype(np.float32)
    histogram = Histogram.of(values)
    assert len(histogram.counts) <= 4097 and histogram.total == 5000
    for percent in (0.5, 50, 99.5):
        assert histogram.percentile(percent) == pytest.approx(slow_percentile(values, percent), abs=histogram.width)
    assert (histogram.mean, histogram.std) == pytest.approx((values.mean(dtype=float), values.std(dtype=float)))


@pytest.mark.parametrize("kind", ["integers", "floats"])
def test_merged_histograms_are_the_histogram_of_all(kind):
    rng = np.random.default_rng(2)
    parts = [rng.normal(center, width, 500) for center, width in ((0, 10), (4000, 900), (-70, 1))]
    parts = [part.astype(np.int16 if kind == "integers" else np.float32) for part in parts]
    together = np.concatenate(parts)
    merged = merge([Histogram.of(part) for part in [*parts, parts[0][:0]]])
    assert merged.total == len(together)
    assert (merged.mean, merged.std) == pytest.approx((together.mean(dtype=float), together.std(dtype=float)))
    for percent in (1, 50, 99):
        tolerance = 0 if kind == "integers" else merged.width
        assert merged.percentile(percent) == pytest.approx(slow_percentile(together, percent), abs=tolerance)


def test_values_outside_the_range_are_clipped_and_nothing_is_empty():
    histogram = Histogram.of(np.array([-3000, 0, 9000], dtype=np.int16), CT_RANGE)
    assert histogram.percentile(0) == -1024 and histogram.percentile(100) == 3071
    assert merge([]).total == 0 and Histogram.of(np.zeros(0)).total == 0
    for value in (0.0, 2.5, -3e7):
        assert Histogram.of(np.full(3, value)).percentile(50) == pytest.approx(value, rel=1e-5, abs=1e-20)
    again = Histogram.from_dict(histogram.to_dict())
    assert again.to_dict() == histogram.to_dict()


def test_target_spacing_is_the_median_with_a_finer_coarse_axis():
    spacings = np.array([[0.7, 0.7, z] for z in (1.0, 2.5, 5.0, 5.0, 5.0)])
    few_slices = np.tile([512, 512, 100], (5, 1))
    expected = float(np.percentile([1.0, 2.5, 5.0, 5.0, 5.0], 10))
    assert target_spacing(spacings, few_slices) == pytest.approx((0.7, 0.7, expected))
    many_slices = np.tile([512, 512, 200], (5, 1))
    assert target_spacing(spacings, many_slices) == pytest.approx((0.7, 0.7, 5.0))
    thinner = np.array([[0.7, 0.7, z] for z in (0.1, 0.1, 5.0, 5.0, 5.0)])
    assert target_spacing(thinner, few_slices) == pytest.approx((0.7, 0.7, 0.7))
    assert target_spacing(spacings[:, [2, 0, 1]], few_slices[:, [2, 0, 1]])[0] == pytest.approx(expected)


def test_normalisation_is_clip_then_affine():
    normalisation = Normalisation((-100.0, -math.inf), (200.0, math.inf), (50.0, 3.0), (25.0, 2.0))
    image = np.random.default_rng(0).normal(0, 500, (2, *SHAPE)).astype(np.int16)
    found = normalisation(torch.from_numpy(image)).numpy()
    assert found.dtype == np.float32
    for voxel in np.ndindex(image.shape):
        value = float(image[voxel])
        expected = (min(max(value, -100), 200) - 50) / 25 if voxel[0] == 0 else (value - 3) / 2
        assert found[voxel] == pytest.approx(expected, rel=1e-6)
    assert normalisation.pad_value == (-100.0, 3.0) and normalisation.padding == (-6.0, 0.0)


def store_of(tmp_path, foreground_means, splits=None):
    """One case per mean: objects around the mean, body around 1000."""
    rng = np.random.default_rng(0)
    cases = []
    for index, mean in enumerate(foreground_means):
        image = rng.normal(1000, 5, (1, *SHAPE)).astype(np.int16)
        mask = np.zeros(SHAPE, dtype=np.int16)
        mask[:3] = 1
        image[0][mask > 0] = rng.normal(mean, 20, mask.sum()).astype(np.int16)
        case = make_case(f"c{index}", image, mask, [0], split=splits[index] if splits else "train")
        histograms = {"body": (Histogram.of(image[0]),), "objects": (Histogram.of(image[0][mask > 0]),)}
        cases.append((replace(case, histograms=histograms), image, mask))
    return write_store(tmp_path, cases), [(image, mask) for _, image, mask in cases]


def test_ct_takes_the_training_fold_only(tmp_path):
    splits = ["train", "train", "val", "test", "pretrain"]
    store, data = store_of(tmp_path, [0, 100, -5000, 9000, 4000], splits)
    values = np.concatenate([image[0][mask > 0] for image, mask in data[:2]]).astype(float)
    resolved = resolve_intensity(store, CT, 0)
    low, high = (slow_percentile(values, p) for p in (0.5, 99.5))
    clipped = np.clip(values, low, high)
    assert (resolved["low"], resolved["high"]) == ([low], [high])
    assert (resolved["mean"][0], resolved["std"][0]) == pytest.approx((clipped.mean(), clipped.std()))
    normalisation = normalisation_for(store, CT, 0)(store.cases["c2"])
    normalised = normalisation(torch.from_numpy(values.reshape(1, -1, 1, 1))).double().numpy()
    assert normalised.mean() == pytest.approx(0, abs=1e-5) and normalised.std() == pytest.approx(1, abs=1e-5)
    assert resolve_intensity(store, {**CT, "foreground": "body"}, 0)["high"][0] > 900


def test_folds_differ_in_their_statistics(tmp_path):
    store, _ = store_of(tmp_path, [0, 100, 200, 300, 400])
    means = {resolve_intensity(store, CT, fold)["mean"][0] for fold in range(5)}
    assert len(means) == 5


def test_without_labelled_cases_the_body_of_the_others_is_taken(tmp_path):
    store, _ = store_of(tmp_path, [0, 0], ["pretrain", "pretrain"])
    assert resolve_intensity(store, {"scheme": "ct", "foreground": "body"}, 0)["high"][0] > 900


def test_given_numbers_stay_and_what_is_resolved_stays_resolved(tmp_path):
    store, _ = store_of(tmp_path, [0, 100, 200, 300, 400])
    resolved = resolve_intensity(store, {**CT, "low": -1, "std": [7.0]}, 0)
    assert resolved["low"] == -1 and resolved["std"] == [7.0] and resolved["high"][0] > 0
    assert resolve_intensity(store, resolved, 3) == resolved
    case = store.cases["c0"]
    assert normalisation_of(resolved, 1)(case.histograms["body"], ()) == normalisation_for(store, resolved, 1)(case)


def test_window_maps_to_plus_minus_one(tmp_path):
    store, _ = store_of(tmp_path, [0] * 5)
    normalisation = normalisation_for(store, {"scheme": "window", "low": -160, "high": 240}, 0)(store.cases["c0"])
    values = torch.tensor([-900, -160, 40, 240, 900], dtype=torch.int16).view(1, -1, 1, 1)
    assert normalisation(values).flatten().tolist() == [-1, -1, 0, 1, 1]


def test_zscore_is_of_each_case(tmp_path):
    store, data = store_of(tmp_path, [0, 3000] * 3)
    of_case = normalisation_for(store, {"scheme": "zscore"}, 0)
    for name, (image, _) in zip(store.cases, data, strict=True):
        normalised = of_case(store.cases[name])(torch.from_numpy(image)).double().numpy()
        assert normalised.mean() == pytest.approx(0, abs=1e-4) and normalised.std() == pytest.approx(1, abs=1e-4)


def test_zscore_of_the_whole_image(tmp_path):
    """nnU-Net crops to what is not 0, of any channel, and takes all voxels of that box."""
    store, _ = store_of(tmp_path, [0] * 5)
    intensity = {"scheme": "zscore", "foreground": "image"}
    with pytest.raises(UserError, match="prepare the data again"):  # a store of before
        normalisation_for(store, intensity, 0)
    image = np.zeros((2, 9, 8, 7), np.float32)
    image[0, 2:5, 1:7, 3:6] = np.arange(54, dtype=np.float32).reshape(3, 6, 3) - 20  # one voxel of it is 0
    image[1, 4:7, 1:2, 3:4] = 5.0
    moments = image_moments(image)
    box = image[:, 2:7, 1:7, 3:6]
    expected = [(channel.mean(dtype=float), channel.std(dtype=float)) for channel in box]
    assert [(m.mean, m.std) for m in moments] == [pytest.approx(pair) for pair in expected]
    store.cases = {name: replace(case, moments=(Moments(500.0, 50.0),)) for name, case in store.cases.items()}
    case = store.cases["c0"]
    assert Case.from_dict(json.loads(json.dumps(case.to_dict()))).moments == case.moments
    resolved = resolve_intensity(store, intensity, 0)
    assert resolve_intensity(store, resolved, 0) == resolved
    assert normalisation_for(store, resolved, 0)(case)(torch.full((1, 1, 1, 1), 600)).item() == 2.0


@pytest.mark.parametrize(
    ("intensity", "text"),
    [
        ({"scheme": "cT"}, "scheme is 'cT'; use one of ct, zscore, window"),
        ({"scheme": "ct", "foreground": "lung"}, "foreground is 'lung'"),
        ({**CT, "low": 0, "high": 1, "mean": 0, "std": 1, "foreground": "object"}, "takes objects or body"),
        ({"scheme": "ct", "forground": "body"}, "has no 'forground', did you mean 'foreground'"),
        ({"scheme": "zscore", "foreground": "images"}, "foreground is 'images'; scheme zscore takes body or image"),
        ({"scheme": "zscore", "foreground": "objects"}, "scheme zscore takes body or image"),
        ({"scheme": "window", "low": 0, "high": 1, "foreground": "boddy"}, "foreground is 'boddy'"),
        ({"scheme": "window", "low": 3}, "needs low and high"),
        ({"scheme": "window", "low": 3, "high": 3}, "low must be below high"),
        ({"scheme": "window", "low": 0, "high": 1, "std": 0}, "std above 0"),
        ({"scheme": "window", "low": [0, 1], "high": 1}, "low must be a number or a list of 1 numbers"),
        ({"scheme": "window", "low": "a", "high": 1}, "low must be a number"),
        ({"scheme": "zscore", "mean": 3}, "takes mean and std from each case"),
    ],
)
def test_senseless_settings_are_refused(tmp_path, intensity, text):
    store, _ = store_of(tmp_path, [0] * 5)
    with pytest.raises(UserError, match=text):
        normalisation_for(store, intensity, 0)


def test_a_plan_of_a_window_may_keep_its_foreground(tmp_path):
    store, _ = store_of(tmp_path, [0] * 5)
    edited = {"scheme": "window", "low": 0, "high": 2, "foreground": "objects"}
    assert normalisation_for(store, edited, 0)(store.cases["c0"]).mean == (1.0,)


def test_windows_become_channels(tmp_path):
    """One CT channel is looked at through several windows; outside the volume each is at its lower end."""
    store = tiny_store(tmp_path / "store", num_pretrain=0)
    node = {"scheme": "windows", "low": [-1000, 0], "high": [200, 100]}
    resolved = resolve_intensity(store, node, fold=0)
    assert resolve_intensity(store, resolved, fold=0) == resolved  # as a checkpoint holds it
    normalisation = normalisation_for(store, resolved, fold=0)(store.cases["train_0"])
    image = torch.tensor([-2000, -400, 50, 3000], dtype=torch.int16).view(1, 4, 1, 1)
    expected = [[-1.0, 0.0, 0.75, 1.0], [-1.0, -1.0, 0.0, 1.0]]
    assert normalisation(image)[..., 0, 0].numpy() == pytest.approx(np.array(expected), abs=1e-6)

    data = DataModule(str(store.path), patch_size=(16, 16, 16), num_workers=0, intensity=node)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert data.in_channels == batch["image"].shape[1] == 2
    volume, _ = data.volume("train_0")
    assert volume.shape[0] == 2 and data.pad_value("train_0") == pytest.approx((-1.0, -1.0))

    with pytest.raises(UserError, match="needs lists low and high of one length"):
        resolve_intensity(store, {"scheme": "windows", "low": [0], "high": 100}, fold=0)
