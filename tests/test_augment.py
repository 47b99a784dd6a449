"""From the raw batch to the batch, against slow oracles written from the definition of the coordinates."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from tiny_store import blocks, image_of, make_case, tiny_store, write_store

from pretrain3d.config import UserError
from pretrain3d.data import intensity, spatial
from pretrain3d.data.augment import Augmentation, _boxes, _fill
from pretrain3d.data.batch import collate, is_raw
from pretrain3d.data.normalise import Normalisation
from pretrain3d.data.patches import PatchDataset
from pretrain3d.data.store import Store
from pretrain3d.geometry import boxes_of_slots

FLIPS = spatial.SpatialSettings(rotation_p=0.0, scale_p=0.0)
ALL = spatial.SpatialSettings(rotation_p=1.0, scale_p=1.0)
WINDOW = Normalisation((-100.0,), (120.0,), (10.0,), (50.0,))
PAD = (-100 - 10) / 50
PATCH = (14, 12, 10)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return tiny_store(tmp_path, num_train=2, num_pretrain=2)


def dataset(store: Store, case_ids: tuple[str, ...] = ("train_0", "train_1"), patch=PATCH, **settings) -> PatchDataset:
    return PatchDataset(store, case_ids, patch, 3, lambda case: WINDOW, **{"intensities": {}, **settings})


def points_of(data: PatchDataset, index: int):
    """Each voxel of patch ``index`` and the volume coordinate of its centre."""
    drawn = data.sampler.draw(index)
    patch = np.asarray(data.patch_size)
    for u in product(*map(range, data.patch_size)):
        yield u, drawn.center + drawn.linear.matrix @ (np.asarray(u) + 0.5 - patch / 2)


def slow_linear(volume: np.ndarray, point: np.ndarray) -> float:
    """Trilinear interpolation between voxel centres; beyond the outermost centres the nearest voxel counts."""
    value, first = 0.0, np.floor(point - 0.5).astype(int)
    for corner in product((0, 1), repeat=3):
        voxel = first + corner
        weight = np.prod(1 - np.abs(point - 0.5 - voxel))
        value += weight * volume[tuple(np.clip(voxel, 0, np.asarray(volume.shape) - 1))]
    return value


@pytest.mark.parametrize("settings", [FLIPS, ALL], ids=["flips", "resampled"])
def test_patch_is_what_the_definition_says(store: Store, settings: spatial.SpatialSettings):
    data = dataset(store, settings=settings)
    for index in (0, 1, 2, 3):
        batch = Augmentation()(collate([data[index]]))
        case = store.cases[batch["case_ids"][0]]
        volume = (np.clip(image_of(case.shape, int(case.id[-1]))[0].astype(float), -100, 120) - 10) / 50
        instances = store.read(case.id, "instances", (0, 0, 0), case.shape)
        image, inside, mask = np.full(PATCH, PAD), np.zeros(PATCH, bool), np.zeros(PATCH, int)
        owner = np.zeros(PATCH, int)
        for u, point in points_of(data, index):
            inside[u] = (point >= 0).all() and (point < case.shape).all()
            if inside[u]:
                image[u] = slow_linear(volume, point)
                owner[u] = instances[tuple(np.floor(point).astype(int))]
                mask[u] = 1 + case.labels[owner[u] - 1] if owner[u] else 0
        assert np.array_equal(batch["inside"][0, 0], inside)
        assert np.abs(batch["image"][0, 0].numpy() - image).max() < 1e-3  # steps of up to 4 between neighbours
        assert np.array_equal(batch["mask"][0], mask)
        expected = []
        for instance in sorted(set(owner[owner > 0].tolist())):
            places = np.argwhere(owner == instance)
            expected.append([*places.min(axis=0), *places.max(axis=0) + 1, case.labels[instance - 1]])
        valid = batch["valid"][0]
        found = torch.cat([batch["boxes"][0][valid], batch["labels"][0][valid][:, None]], dim=1)
        assert sorted(found.tolist()) == sorted([float(value) for value in row] for row in expected)


def test_batch_has_the_promised_keys_shapes_and_types(store: Store):
    data = dataset(store, settings=ALL, intensities=intensity.settings_from_config(None))
    raw = collate([data[index] for index in range(3)])
    assert is_raw(raw) and not is_raw({"case_id": "train_0"})
    batch = Augmentation()(raw)
    count = batch["labels"].shape[1]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items() if torch.is_tensor(value)} == {
        "image": (torch.float32, (3, 1, *PATCH)),
        "inside": (torch.bool, (3, 1, *PATCH)),
        "boxes": (torch.float32, (3, count, 6)),
        "labels": (torch.int64, (3, count)),
        "valid": (torch.bool, (3, count)),
        "annotated": (torch.bool, (3, 2)),
        "mask": (torch.int16, (3, *PATCH)),
    }
    assert batch["sample_index"] == [0, 1, 2] and all(isinstance(name, str) for name in batch["case_ids"])


def test_a_class_beyond_255_is_no_background(tmp_path: Path):
    image, mask = image_of(PATCH, 0), blocks(PATCH, [(2, 2, 2, 6, 6, 6), (8, 8, 6, 12, 11, 9)])
    case = make_case("train_0", image, mask, [255, 299], annotated=tuple(range(300)))
    many = write_store(tmp_path, [(case, image, mask)], tuple(f"class_{label}" for label in range(300)))
    batch = Augmentation()(collate([dataset(many, ("train_0",), PATCH, settings=FLIPS)[0]]))
    assert batch["mask"].unique().tolist() == [0, 256, 300]


def test_boxes_are_found_alike_on_every_device():
    slots = torch.from_numpy(blocks((14, 12, 10), [(0, 0, 0, 1, 1, 1), (3, 2, 1, 9, 12, 10), (2, 2, 2, 3, 3, 3)]))
    slots[slots == 3] = 5  # 3 and 4 have no voxel
    boxes, present = boxes_of_slots(slots[None], 6)
    on_cpu = _boxes(slots, 6)
    assert torch.equal(on_cpu[0], boxes[0]) and torch.equal(on_cpu[1], present[0])
    assert on_cpu[1].tolist() == [True, True, False, False, True, False]


def test_volume_smaller_than_the_patch_is_padded(store: Store):
    data = dataset(store, ("pretrain_0", "pretrain_1"), (16, 16, 16), settings=FLIPS)
    places = set()
    for index in range(12):
        batch = Augmentation()(collate([data[index]]))
        inside, image = batch["inside"][0, 0], batch["image"][0, 0]
        assert inside.any(dim=2).any(dim=0).sum() == 12  # all of the volume's 12 voxels of axis 1
        assert torch.all(image[~inside] == torch.tensor(PAD)) and image[inside].std() > 0.5
        places.add(int(inside[0, :, 0].int().argmax()))
        assert batch["boxes"].shape == (1, 1, 6) and not batch["valid"].any() and "mask" not in batch
    assert len(places) > 2


def boxes_only_store(path: Path) -> tuple[Store, np.ndarray]:
    shape = (40, 36, 30)
    image, mask = image_of(shape, 0), blocks(shape, [(3, 4, 5, 9, 8, 12), (20, 10, 8, 25, 17, 14)])
    case = make_case("case", image, mask, [0, 1], has_instances=False)
    return write_store(path, [(case, image, mask)]), case.boxes


def test_boxes_without_masks_are_the_hull_of_their_corners(tmp_path: Path):
    store, boxes = boxes_only_store(tmp_path)
    data = dataset(store, ("case",), settings=ALL)
    seen = 0
    for index in range(10):
        batch, drawn = Augmentation()(collate([data[index]])), data.sampler.draw(index)
        assert "mask" not in batch
        expected = []
        for label, box in enumerate(boxes):
            corners = [[box[axis + 3 * side] for axis, side in enumerate(c)] for c in product((0, 1), repeat=3)]
            moved = np.linalg.solve(drawn.linear.matrix, (np.asarray(corners) - drawn.center).T).T + np.array(PATCH) / 2
            low, high = np.clip(moved.min(axis=0), 0, PATCH), np.clip(moved.max(axis=0), 0, PATCH)
            centres = [sum(a <= i + 0.5 < b for i in range(size)) for a, b, size in zip(low, high, PATCH, strict=True)]
            if all(centres):
                expected.append([*low, *high, label])
        valid = batch["valid"][0]
        found = torch.cat([batch["boxes"][0][valid], batch["labels"][0][valid][:, None]], dim=1)
        assert found.shape == (len(expected), 7)
        assert np.allclose(found.numpy(), np.reshape(expected, (-1, 7)), atol=1e-4)
        seen += len(expected)
    assert seen >= 5


def test_boxes_without_masks_flip_exactly(tmp_path: Path):
    store, boxes = boxes_only_store(tmp_path)
    data = dataset(store, ("case",), (40, 36, 30), settings=FLIPS)
    for index in range(8):
        batch, flips = Augmentation()(collate([data[index]])), data.sampler.draw(index).linear.flips
        expected = boxes.copy()
        for axis, size in enumerate((40, 36, 30)):
            if flips[axis]:
                expected[:, axis], expected[:, axis + 3] = size - boxes[:, axis + 3], size - boxes[:, axis]
        assert np.array_equal(batch["boxes"][0], expected) and batch["valid"].all()


def test_sample_is_the_same_bit_for_bit_in_whatever_batch(store: Store):
    everything = {name: {"p": 1.0} for name in intensity.DEFAULTS}
    data = dataset(store, settings=ALL, intensities=intensity.settings_from_config(everything))
    together = Augmentation()(collate([data[index] for index in range(4)]))
    for index in (3, 1, 0, 2):
        alone = Augmentation()(collate([data[index]]))
        for key in ("image", "inside", "mask", "annotated"):
            assert torch.equal(alone[key][0], together[key][index])
        count = alone["boxes"].shape[1]
        for key in ("boxes", "labels", "valid"):
            assert torch.equal(alone[key][0], together[key][index, :count])
            assert not together["valid"][index, count:].any()


def test_frequencies_of_the_intensity_draw():
    settings = intensity.settings_from_config(None)
    draws = [intensity.draw(np.random.default_rng(index), settings, 1) for index in range(2000)]
    for name, values in settings.items():
        drawn = [draw[name][0] for draw in draws if name in draw]
        share = values["p"] * values.get("channel_p", 1.0)
        assert abs(len(drawn) / 2000 - share) < 5 * (share * (1 - share) / 2000) ** 0.5
        low, high = values["range"]
        assert low <= min(drawn) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(drawn) <= high
    gammas = np.array([draw["gamma"][0] for draw in draws if "gamma" in draw])
    assert abs((gammas < 1).mean() - 0.5) < 0.1


def test_each_channel_draws_its_own_numbers_and_may_be_left_alone():
    settings = intensity.settings_from_config({"blur": {"p": 1.0}, "gamma": {"p": 1.0}})
    draws = [intensity.draw(np.random.default_rng(index), settings, 3) for index in range(50)]
    assert all(None not in draw["gamma"] and len(set(draw["gamma"])) == 3 for draw in draws)
    assert {None in draw.get("blur", ()) for draw in draws} == {True, False}


def plane() -> torch.Tensor:
    return (
        torch.from_numpy(ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(20, 18, 16)), 1.5)).float() * 9
    )


@pytest.mark.parametrize("sigma", [0.5, 0.8, 1.0])
def test_blur_is_scipys_gaussian(sigma: float):
    radius = max(1, int(np.ceil(3 * sigma)))
    expected = ndimage.gaussian_filter(plane().numpy().astype(np.float64), sigma, mode="nearest", radius=radius)
    assert np.abs(intensity.blur(plane(), sigma).numpy() - expected).max() < 1e-5


def test_brightness_and_contrast():
    x = plane()
    assert torch.equal(intensity.brightness(x, 1.2), x * 1.2)
    stretched = intensity.contrast(x, 1.25)
    assert stretched.min() == x.min() and stretched.max() == x.max()
    middle = (x - x.mean()).abs() < 0.5 * x.std()
    assert torch.allclose((stretched - x.mean())[middle], (x - x.mean())[middle] * 1.25, atol=1e-5)
    assert torch.allclose(intensity.contrast(x, 0.8).std(), x.std() * 0.8, rtol=1e-5)


@pytest.mark.parametrize("bend", [intensity.gamma, intensity.gamma_inverted])
def test_gamma_keeps_mean_std_and_order(bend):
    x = plane()
    bent = bend(x, 1.5)
    assert torch.allclose(bent.mean(), x.mean(), atol=1e-4) and torch.allclose(bent.std(), x.std(), rtol=1e-4)
    order = x.flatten().argsort()
    assert (bent.flatten()[order].diff() >= -1e-4).all()
    assert torch.allclose(bend(x, 1.0), x, atol=1e-4)
    assert torch.isfinite(bend(torch.zeros(4, 4, 4), 0.7)).all()  # a constant patch, all padding
    middle = bent.flatten()[order][len(order) // 2] - x.flatten()[order][len(order) // 2]
    assert middle < 0 if bend is intensity.gamma else middle > 0  # darkens, and its mirror image


def test_low_resolution_neither_shifts_nor_sharpens():
    ramp = torch.arange(24.0).view(24, 1, 1).expand(24, 24, 24).contiguous()
    low = intensity.low_resolution(ramp, 0.5)
    assert (low - ramp)[2:-2].abs().max() <= 1.0 and low.shape == ramp.shape
    noise = torch.randn(20, 20, 20)
    assert intensity.low_resolution(noise, 0.5).std() < 0.8 * noise.std()
    assert torch.allclose(intensity.low_resolution(noise, 1.0), noise, atol=1e-6)


def test_noise_has_the_drawn_strength_and_belongs_to_the_sample():
    def noise(index: int) -> torch.Tensor:
        image = torch.zeros(2, 24, 24, 24)
        intensity.apply(image, {"noise": (0.1, 0.05)}, 7, index)
        return image

    assert abs(noise(0)[0].std() - 0.1) < 0.003 and abs(noise(0)[1].std() - 0.05) < 0.0015
    assert torch.equal(noise(0), noise(0)) and not torch.equal(noise(0), noise(1))
    assert abs((noise(0)[0] * noise(0)[1]).mean()) < 1e-4  # channels have fields of their own


def test_intensity_settings_are_checked():
    assert intensity.settings_from_config(False) == {}
    assert "gamma" not in intensity.settings_from_config({"gamma": False})
    assert intensity.settings_from_config({"gamma": {"p": 0.9}})["gamma"] == {"p": 0.9, "range": (0.7, 1.5)}
    for config, message in [
        ({"gama": {}}, "no 'gama'"),
        ({"gamma": {"q": 1}}, "no 'q'"),
        ({"gamma": {"p": 1.1}}, "gamma.p=1.1"),
        ({"gamma": {"range": [1.5, 0.7]}}, "gamma.range"),
        ({"gamma": 0.3}, "gamma=0.3"),
        ({"low_resolution": {"range": [0.5, 2]}}, "at most 1"),
    ]:
        with pytest.raises(UserError, match=message):
            intensity.settings_from_config(config)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.9])
def test_the_mask_of_classes_by_voxel(share):
    torch.manual_seed(0)
    slots = (torch.randint(1, 5, (9, 8, 7)) * (torch.rand(9, 8, 7) < share)).to(torch.int16)
    lookup = torch.tensor([0, 2, 1, 2, 7], dtype=torch.int16)
    mask = torch.zeros(2, 9, 8, 7, dtype=torch.int16)
    _fill(mask[1], slots, lookup)
    assert mask[0].sum() == 0
    assert all(mask[1][place] == lookup[int(slots[place])] for place in np.ndindex(9, 8, 7))
