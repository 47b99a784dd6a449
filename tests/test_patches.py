"""Where patches come from: pure draws, object-balanced placement, source regions, left and right."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from tiny_store import blocks, image_of, make_case, tiny_store, write_store

from pretrain3d.config import UserError
from pretrain3d.data import spatial
from pretrain3d.data.batch import generator, torch_generator
from pretrain3d.data.case import Case
from pretrain3d.data.normalise import Normalisation
from pretrain3d.data.patches import PatchDataset, PatchSampler
from pretrain3d.data.semantic import LATERAL
from pretrain3d.data.store import Store

STILL = spatial.SpatialSettings(flip_axes=(), rotation_p=0.0, scale_p=0.0)
FLIPS = spatial.SpatialSettings(rotation_p=0.0, scale_p=0.0)
ALL = spatial.SpatialSettings(rotation_p=1.0, scale_p=1.0)
WINDOW = Normalisation((-200.0,), (200.0,), (0.0,), (100.0,))


def dataset(store: Store, case_ids: list[str], patch: tuple[int, ...] = (16, 16, 16), **settings) -> PatchDataset:
    return PatchDataset(store, case_ids, patch, 3, lambda case: WINDOW, **{"intensities": {}, **settings})


def case_with(objects: list[tuple[int, ...]], labels: list[int], shape=(60, 50, 40), name: str = "case") -> Case:
    mask = blocks(shape, objects)
    return make_case(name, np.zeros((1, *shape), dtype=np.int16), mask, labels)


def test_draws_are_pure_functions():
    first = generator(1, 2, "position").random(4)
    generator(1, 3, "position").random(100)
    assert np.array_equal(first, generator(1, 2, "position").random(4))
    others = [generator(*key).random(4) for key in ((2, 2, "position"), (1, 3, "position"), (1, 2, "spatial"))]
    others.append(generator(2, 1, "position").random(4))
    assert all(not np.array_equal(first, other) for other in others)
    # the streams of runs that were started must never change
    assert generator(0, 0, "position").bit_generator.random_raw() == 5838321145776692768
    noise = torch_generator(1, 2, "noise", "cpu")
    assert noise.initial_seed() == torch_generator(1, 2, "noise", "cpu").initial_seed()
    assert noise.initial_seed() != torch_generator(1, 3, "noise", "cpu").initial_seed()


@pytest.mark.parametrize(("share", "of"), [(0.5, 2), (1 / 3, 3), (0.0, 1), (1.0, 1), (0.4, 5)])
def test_exact_share_of_consecutive_samples_is_placed_on_objects(share: float, of: int):
    sampler = PatchSampler([case_with([(5, 5, 5, 9, 9, 9)], [0])], (16, 16, 16), 0, share, STILL)
    on_object = np.array([sampler.draw(index).object_index is not None for index in range(10 * of)])
    assert (on_object.reshape(10, of).sum(axis=1) == round(share * of)).all()
    if share == 0.5:  # every other sample (one process of two) is not all background
        assert 0 < on_object[::2].sum() < 10


def test_classes_are_balanced_whatever_their_numbers():
    many = [(x, y, 5, x + 2, y + 2, 8) for x in range(2, 56, 4) for y in range(2, 46, 4)]
    cases = [
        case_with(many, [0] * len(many), name="many"),
        case_with([(5, 5, 5, 9, 9, 9), (20, 20, 20, 22, 22, 22)], [1, 0], name="rare"),
        case_with([], [], name="empty"),
    ]
    sampler = PatchSampler(cases, (16, 16, 16), 0, 1.0, STILL)
    drawn = [sampler.draw(index) for index in range(600)]
    rare = sum(draw.case_id == "rare" and draw.object_index == 0 for draw in drawn)
    assert 240 < rare < 360  # half of 600, +- 5 standard deviations
    assert all(draw.case_id != "empty" for draw in drawn)
    uniform = PatchSampler(cases, (16, 16, 16), 0, 0.0, STILL)
    assert {uniform.draw(index).case_id for index in range(50)} == {"many", "rare", "empty"}


@pytest.mark.parametrize("settings", [STILL, FLIPS, ALL], ids=["still", "flips", "all"])
def test_whole_object_lies_in_the_turned_patch(settings: spatial.SpatialSettings):
    objects = [(0, 0, 0, 4, 5, 3), (55, 44, 36, 60, 50, 40), (30, 20, 10, 37, 29, 18)]  # two in corners of the volume
    sampler = PatchSampler([case_with(objects, [0, 0, 0])], (24, 20, 18), 1, 1.0, settings)
    half = np.array([12, 10, 9])
    for index in range(150):
        drawn = sampler.draw(index)
        box = objects[drawn.object_index]  # type: ignore[index]
        for corner in range(8):
            point = np.array([box[axis + 3 * (corner >> axis & 1)] for axis in range(3)])
            seen = np.linalg.solve(drawn.linear.matrix, point - drawn.center) + half
            fits = np.abs(np.linalg.inv(drawn.linear.matrix)) @ (np.subtract(box[3:], box[:3]) / 2) <= half
            assert (seen[fits] >= -1e-9).all() and (seen[fits] <= 2 * half[fits] + 1e-9).all()


def test_offsets_of_an_object_are_spread_over_the_patch():
    sampler = PatchSampler([case_with([(30, 24, 18, 33, 27, 21)], [0])], (16, 16, 16), 1, 1.0, STILL)
    starts = np.array([sampler.draw(index).center - 8 for index in range(300)])
    assert (starts.min(axis=0) == [17, 11, 5]).all() and (starts.max(axis=0) == [30, 24, 18]).all()
    assert (starts == starts.astype(int)).all()


def test_centre_of_the_patch_lies_in_an_object_larger_than_it():
    sampler = PatchSampler([case_with([(5, 5, 5, 55, 45, 35)], [0])], (16, 16, 16), 1, 1.0, ALL)
    for index in range(100):
        drawn = sampler.draw(index)
        reach = np.linalg.solve(drawn.linear.matrix, drawn.center - [30, 25, 20])
        extent = np.abs(np.linalg.inv(drawn.linear.matrix)) @ np.array([25, 20, 15])
        assert (np.abs(reach) <= extent + 1e-9).all()


def test_source_region_holds_every_voxel_that_interpolation_needs():
    rng = np.random.default_rng(0)
    patch, shape = np.array([6, 5, 7]), np.array([40, 40, 40])
    for _ in range(20):
        linear, center = spatial.draw(rng, ALL, np.array([1.0, 2.0, 1.5])), rng.uniform(18, 22, size=3)
        start, stop = spatial.source_region(linear, center, patch, shape)
        touched = []
        for u in np.ndindex(*patch):
            point = center + linear.matrix @ (np.array(u) + 0.5 - patch / 2)
            touched += [np.floor(point - 0.5), np.floor(point - 0.5) + 1, np.floor(point)]
        assert (start == np.min(touched, axis=0)).all() and (stop == np.max(touched, axis=0) + 1).all()


def test_rotation_and_scale_keep_shapes_in_mm():
    spacing = np.array([0.7, 0.8, 3.0])
    for seed in range(10):
        linear = spatial.draw(np.random.default_rng(seed), ALL, spacing)
        in_mm = linear.matrix * spacing[:, None] / spacing
        factor = abs(np.linalg.det(in_mm)) ** (1 / 3)
        assert 0.7 <= factor <= 1.4
        assert np.allclose(in_mm @ in_mm.T, factor**2 * np.eye(3))


def test_frequencies_of_the_spatial_draw():
    draws = [spatial.draw(generator(0, i, "spatial"), spatial.SpatialSettings(), np.ones(3)) for i in range(1000)]
    factors = np.array([abs(np.linalg.det(draw.matrix)) ** (1 / 3) for draw in draws])
    scaled = np.abs(factors - 1) > 1e-9
    assert 140 < scaled.sum() < 260 and 0.7 <= factors.min() < 0.75 and 1.35 < factors.max() <= 1.4
    assert 60 < (factors[scaled] < 1).sum() < 140
    assert 290 < sum(draw.resample for draw in draws) < 430  # 1 - 0.8^2
    assert (np.abs(np.array([draw.flips for draw in draws]).mean(axis=0) - 0.5) < 0.08).all()


def test_sample_reads_its_region_and_maps_the_objects_to_slots(tmp_path: Path):
    store = tiny_store(tmp_path, num_train=3, num_pretrain=0)
    data = dataset(store, ["train_0", "train_1"], foreground=1.0, settings=STILL)
    for index in range(10):
        drawn, raw = data.sampler.draw(index), data[index]
        case = store.cases[drawn.case_id]
        start = (drawn.center - 8).astype(int)
        number = int(case.id[-1])
        window = (slice(None), *(slice(a, a + 16) for a in start))
        assert np.array_equal(raw["image"], image_of(case.shape, number)[window])
        mask = store.read(case.id, "instances", start, start + 16)
        found = {int(mask[tuple(place)]) for place in np.argwhere(mask)}
        for instance in found:
            slot = set(raw["slots"][mask == instance].tolist())
            assert len(slot) == 1
            assert raw["labels"][slot.pop() - 1] == case.labels[list(case.instances).index(instance)]
        assert (raw["slots"][mask == 0] == 0).all()


def test_dataset_can_be_sent_to_a_spawned_worker(tmp_path: Path):
    data = dataset(tiny_store(tmp_path, num_train=1), ["train_0"], foreground=1.0)
    first, second = data[0], pickle.loads(pickle.dumps(data))[0]
    assert np.array_equal(first["image"], second["image"]) and np.array_equal(first["slots"], second["slots"])


def test_sample_without_objects_reads_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = tiny_store(tmp_path, num_train=1)
    kinds = []
    read = Store.read
    monkeypatch.setattr(
        Store, "read", lambda self, case, kind, *region: kinds.append(kind) or read(self, case, kind, *region)
    )
    raw = dataset(store, ["pretrain_0"])[0]
    assert kinds == ["image"] and raw["slots"] is None and len(raw["labels"]) == 0


def mirrored_store(path: Path, **settings) -> Store:
    shape = (20, 20, 20)
    image, mask = image_of(shape, 0), blocks(shape, [(2, 2, 2, 6, 6, 6), (12, 2, 2, 16, 6, 6)])
    case = make_case("case", image, mask, [0, 1], annotated=(0, 2))
    return write_store(path, [(case, image, mask)], classes=("Left kidney", "Right kidney", "liver"), **settings)


def test_flip_of_axis_0_exchanges_left_and_right(tmp_path: Path):
    store = mirrored_store(tmp_path, mirror_classes={"Left kidney": "Right kidney", "Right kidney": "Left kidney"})
    data = dataset(store, ["case"], (20, 20, 20), settings=FLIPS)
    seen = set()
    for index in range(16):
        raw = data[index]
        flipped = raw["geometry"]["flips"][0]
        seen.add(flipped)
        assert raw["labels"].tolist() == ([1, 0] if flipped else [0, 1])
        assert raw["annotated"].tolist() == ([False, True, True] if flipped else [True, False, True])
    assert seen == {True, False}


def test_lateral_classes_without_counterparts_are_not_flipped_and_a_warning_says_so(tmp_path: Path):
    store = mirrored_store(tmp_path)
    with pytest.warns(UserWarning, match="axis 0 .* Left kidney, Right kidney"):
        data = dataset(store, ["case"], settings=FLIPS)
    flips = np.array([data[index]["geometry"]["flips"] for index in range(20)])
    assert not flips[:, 0].any() and flips[:, 1].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset(store, ["case"], settings=STILL)  # nothing to warn of


@pytest.mark.parametrize(
    "name", ["left lung", "kidney_right", "LeftParotid", "Parotid_L", "RIGHT_EYE", "lungLeft", "femur_l", "R-eye"]
)
def test_names_that_are_lateral(name: str):
    assert LATERAL.search(name)


@pytest.mark.parametrize(
    "name", ["bright spot", "cleft palate", "liver", "Upright", "lesion", "L", "nodule L3", "lr", "cell"]
)
def test_names_that_are_not_lateral(name: str):
    assert not LATERAL.search(name)


def test_mistakes_are_named():
    case = case_with([], [])
    with pytest.raises(UserError, match="no case"):
        PatchSampler([], (8, 8, 8), 0)
    with pytest.raises(UserError, match=r"foreground=1\.5"):
        PatchSampler([case], (8, 8, 8), 0, 1.5)
    for config, message in [
        ({"rotation": 3}, "no 'rotation'"),
        ({"scale": 2}, "scale=2"),
        ({"scale": [0, 1]}, "scale"),
        ({"scale_p": 2}, "scale_p=2"),
    ]:
        with pytest.raises(UserError, match=message):
            spatial.SpatialSettings.from_config(config, (0, 1, 2))
    with pytest.raises(UserError, match=r"flip_axes=\[3\]"):
        spatial.SpatialSettings.from_config(None, (3,))


def test_no_object_anywhere_means_random_places():
    sampler = PatchSampler([case_with([], [])], (16, 16, 16), 0, 0.5, STILL)
    starts = np.array([sampler.draw(index).center - 8 for index in range(400)])
    assert (starts.min(axis=0) == 0).all() and (starts.max(axis=0) == [44, 34, 24]).all()
