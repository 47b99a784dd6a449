"""Models Genesis: each corruption against its definition, and what the network is asked for."""

from __future__ import annotations

from itertools import permutations, product
from math import comb

import numpy as np
import pytest
import torch
from method_checks import (
    check_bf16_gradients,
    check_empty_batch,
    check_own_draws,
    check_pictures,
    generators,
    make,
    make_batch,
)

from pretrain3d.config import UserError
from pretrain3d.objectives import corruptions

SHAPE = (16, 12, 20)
NOTHING = {"flip": 0.0, "shuffle": 0.0, "bend": 0.0, "paint": 0.0}


def sources(way: str, starts: np.ndarray, sides: np.ndarray, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Where each voxel comes from, (X, Y, Z) indices, by either way to the same distribution."""
    size = np.array(shape)
    if way == "loop":
        return corruptions.window_by_window(starts, sides, size, np.random.default_rng(seed)).reshape(shape)
    return corruptions.all_windows(starts, sides, size, generators(seed)[0]).numpy().reshape(shape)


@pytest.mark.parametrize("way", ["loop", "at once"])
def test_windows_are_shuffled_in_turn(way):
    shape, rng = (9, 7, 8), np.random.default_rng(1)
    sides = rng.integers(1, 5, (40, 3))
    starts = rng.integers(0, np.array(shape) - sides, endpoint=True)
    places = np.arange(np.prod(shape)).reshape(shape)
    owner = np.full(shape, -1)
    for number, (start, side) in enumerate(zip(starts, sides, strict=True)):
        owner[tuple(slice(a, a + s) for a, s in zip(start, side, strict=True))] = number
    found = sources(way, starts, sides, shape, seed=0)
    moved = 0
    for v in np.ndindex(shape):
        if owner[v] < 0:
            assert found[v] == places[v]
            continue
        origin = np.unravel_index(found[v], shape)
        start, side = starts[owner[v]], sides[owner[v]]
        assert all(a <= o < a + s for a, o, s in zip(start, origin, side, strict=True)), "from its own window"
        moved += found[v] != places[v]
    assert moved > 0.5 * (owner >= 0).sum()
    for number in range(40):  # no voxel of a window is taken twice
        taken = found[owner == number]
        assert len(np.unique(taken)) == len(taken)
    last = tuple(slice(a, a + s) for a, s in zip(starts[-1], sides[-1], strict=True))
    np.testing.assert_array_equal(np.sort(found[last].ravel()), np.sort(places[last].ravel()))


@pytest.mark.parametrize("way", ["loop", "at once"])
def test_every_order_of_a_window_is_equally_likely(way):
    starts, sides = np.array([[0, 1, 0]]), np.array([[1, 3, 1]])
    orders = [tuple(sources(way, starts, sides, (1, 5, 1), seed)[0, 1:4, 0]) for seed in range(600)]
    counts = [orders.count(order) for order in permutations((1, 2, 3))]
    assert sum(counts) == 600 and max(abs(c - 100) for c in counts) < 4 * (600 * 5 / 36) ** 0.5


def test_shuffling_moves_channels_together_and_not_far():
    image = torch.stack([torch.arange(20.0**3).view(20, 20, 20), -torch.arange(20.0**3).view(20, 20, 20)])
    shuffled = corruptions.shuffle_windows(image, np.random.default_rng(0), generators(0)[0], num_windows=800)
    assert torch.equal(shuffled[0], -shuffled[1])
    came_from = np.stack(np.unravel_index(shuffled[0].long().numpy(), (20, 20, 20)))
    distance = abs(came_from - np.indices((20, 20, 20)))
    assert distance.max() == 1, "windows have sides of 1 or 2"
    assert 0.1 < (distance.max(0) > 0).mean() < 0.9


def test_windows_have_sides_up_to_a_tenth_of_each_axis(monkeypatch):
    drawn = []

    def identity(starts, sides, shape, rng):
        drawn.append((starts, sides))
        return np.arange(shape.prod())

    monkeypatch.setattr(corruptions, "window_by_window", identity)
    corruptions.shuffle_windows(torch.zeros(1, 48, 39, 9), np.random.default_rng(0), generators(0)[0])
    ((starts, sides),) = drawn
    assert len(sides) == 10_000 and (sides.min(0) == 1).all() and sides.max(0).tolist() == [4, 3, 1]
    assert (starts.min(0) == 0).all() and (starts + sides).max(0).tolist() == [48, 39, 9]


def reference_curve(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The original's definition: sample the curve from its end to its start; sort x, and y too half of the time."""
    inner = rng.random((2, 2))
    points = np.array([(0, 0), *inner, (1, 1)])
    t = np.linspace(0, 1, 100_000)
    weights = [comb(3, i) * t ** (3 - i) * (1 - t) ** i for i in range(4)]
    x, y = (sum(w * p for w, p in zip(weights, points[:, axis], strict=True)) for axis in range(2))
    if rng.random() < 0.5:
        return np.interp(image, np.sort(x), y)
    return np.interp(image, np.sort(x), np.sort(y))


def test_bent_intensities_by_the_reference_curve():
    image = np.random.default_rng(0).random(500)
    directions = set()
    for seed in range(12):
        table = corruptions.bezier_table(np.random.default_rng(seed))
        bent = corruptions.look_up(torch.from_numpy(image).float(), table).numpy()
        expected = reference_curve(np.random.default_rng(seed), image)
        assert np.median(abs(bent - expected)) < 1e-4 and abs(bent - expected).max() < 0.01
        rises = np.diff(table)
        assert (rises >= 0).all() or (rises <= 0).all()
        directions.add(bool(table[-1] > table[0]))
        assert {table[0], table[-1]} == {0.0, 1.0}
    assert directions == {True, False}


def test_the_ends_of_the_curve_swallow_few_voxels():
    """The reference code clamps 65.6 % of z-scored noise."""
    _, method = make("models_genesis", SHAPE, **{**NOTHING, "bend": 1.0})
    prepared = method.prepare(make_batch(SHAPE, batch=4), generators(0, 1, 2, 3))
    for sample in prepared["inputs"]:
        ends = (sample == sample.min()) | (sample == sample.max())
        assert ends.float().mean() < 0.03


@pytest.mark.parametrize("seed", range(6))
def test_in_painting(seed):
    image = torch.full((2, 24, 18, 30), 2.0)
    painted = corruptions.in_paint(image, np.random.default_rng(seed), generators(seed)[0])
    noise = painted != image
    windows = boxes_of_in_painting(np.random.default_rng(seed), (24, 18, 30))
    expected = torch.zeros(24, 18, 30, dtype=torch.bool)
    for window in windows:
        expected[window] = True
        for cut, size in zip(window, (24, 18, 30), strict=True):
            assert size // 6 <= cut.stop - cut.start <= size // 3
            assert cut.start >= 3 and cut.stop <= size - 3
    assert len(windows) <= 5 and torch.equal(noise[0], expected) and torch.equal(noise[1], expected)
    values = painted[noise]
    assert not len(values) or (values.min() >= 0 and values.max() <= 1 and values.std() > 0.2)


def boxes_of_in_painting(rng: np.random.Generator, shape: tuple[int, int, int]) -> list[tuple[slice, slice, slice]]:
    size = np.array(shape)
    return corruptions._windows(rng, size, size // 6, size // 3, at_most=5)


def test_numbers_of_boxes():
    counts = [len(boxes_of_in_painting(np.random.default_rng(seed), (24, 18, 30))) for seed in range(800)]
    assert set(counts) <= set(range(6))
    assert np.mean(np.array(counts) == 0) < 0.05 + 4 * (0.05 * 0.95 / 800) ** 0.5
    assert abs(np.mean(np.array(counts) == 5) - 0.95**5) < 4 * 0.42 / 800**0.5


@pytest.mark.parametrize("seed", range(6))
def test_out_painting_keeps_boxes_and_paints_the_rest(seed):
    image = torch.full((1, 28, 21, 14), 2.0)
    painted = corruptions.out_paint(image, np.random.default_rng(seed), generators(seed)[0])[0]
    kept = painted == 2.0
    assert (painted[~kept] >= 0).all() and (painted[~kept] <= 1).all()
    ranges = [torch.nonzero(kept.any(a).any(b)) for a, b in ((2, 1), (2, 0), (1, 0))]
    for found, size in zip(ranges, (28, 21, 14), strict=True):
        assert found.max() - found.min() + 1 >= size - 4 * size // 7
        assert found.min() >= 3 and found.max() < size - 3


def test_out_painting_keeps_one_to_five_boxes_of_three_to_four_sevenths(monkeypatch):
    size, draw, boxes = np.array([28, 21, 14]), corruptions._windows, []

    def watched(*args, **more):
        windows = draw(*args, **more)
        boxes[-1] += windows
        return windows

    monkeypatch.setattr(corruptions, "_windows", watched)
    for seed in range(60):
        boxes.append([])
        painted = corruptions.out_paint(torch.full((1, *size), 2.0), np.random.default_rng(seed), generators(seed)[0])
        kept = torch.zeros(1, *size, dtype=torch.bool)
        for window in boxes[-1]:
            kept[:, *window] = True
        assert torch.equal(painted == 2.0, kept)
    assert {len(some) for some in boxes} <= {1, 2, 3, 4, 5} and max(map(len, boxes)) == 5
    sides = np.array([[cut.stop - cut.start for cut in window] for some in boxes for window in some])
    assert sides.min(0).tolist() == [12, 9, 6] and sides.max(0).tolist() == [16, 12, 8]


def test_tiny_patches_are_painted_too():
    for shape, painter in product([(2, 3, 4), (8, 8, 8)], [corruptions.in_paint, corruptions.out_paint]):
        assert painter(torch.zeros(1, *shape), np.random.default_rng(0), generators(0)[0]).shape == (1, *shape)


def test_only_spatial_axes_are_flipped_and_the_target_with_the_input():
    _, method = make("models_genesis", SHAPE, channels=2, **{**NOTHING, "flip": 1.0}, percentiles=[0, 100])
    batch = make_batch(SHAPE, channels=2, batch=40)
    prepared = method.prepare(batch, generators(*range(40)))
    assert torch.equal(prepared["inputs"], prepared["targets"])
    seen = set()
    for row in range(40):
        for axes in product([False, True], repeat=3):
            dims = [axis + 1 for axis in range(3) if axes[axis]]
            if torch.allclose(batch["image"][row].flip(dims), prepared["targets"][row], atol=1e-5):
                assert torch.equal(batch["inside"][row].flip(dims), prepared["inside"][row])
                seen.add(axes)
                assert len(dims) in (1, 3), "three flips in turn, those of the same axis undo each other"
    assert {axis for axes in seen for axis in range(3) if axes[axis]} == {0, 1, 2}


def test_unit_range_by_percentiles_and_by_a_window():
    batch = make_batch(SHAPE)
    batch["image"][0, :, 12:] = 1e6  # outside the volume
    _, method = make("models_genesis", SHAPE, **NOTHING, percentiles=[10, 80])
    prepared = method.prepare(batch, generators(0, 1))
    for row in range(2):
        values = batch["image"][row][batch["inside"][row]].numpy()
        low, high = np.percentile(values, [10, 80])
        expected = batch["image"][row].clamp(low, high)
        torch.testing.assert_close(prepared["targets"][row], expected.float(), atol=1e-5, rtol=1e-5)
    _, method = make("models_genesis", SHAPE, **NOTHING, window=[-0.5, 1.0])
    prepared = method.prepare(batch, generators(0, 1))
    torch.testing.assert_close(prepared["targets"], batch["image"].clamp(-0.5, 1.0))
    assert prepared["keep"].all()


def test_a_constant_image_stays_finite():
    _, method = make("models_genesis", SHAPE)
    batch = {**make_batch(SHAPE), "image": torch.full((2, 1, *SHAPE), 3.0)}
    prepared = method.prepare(batch, generators(0, 1))
    assert torch.equal(prepared["targets"], batch["image"]) and prepared["inputs"].isfinite().all()


def test_everything_at_once_stays_in_the_range_of_the_target():
    _, method = make("models_genesis", SHAPE, shuffle=1.0, bend=1.0, paint=1.0)
    batch = make_batch(SHAPE, batch=4)
    prepared = method.prepare(batch, generators(0, 1, 2, 3))
    for row in range(4):
        low, high = prepared["targets"][row].aminmax()
        assert (prepared["inputs"][row] >= low - 1e-5).all() and (prepared["inputs"][row] <= high + 1e-5).all()
        assert (prepared["inputs"][row] != prepared["targets"][row]).float().mean() > 0.5


def test_loss_by_loops():
    _, method = make("models_genesis", SHAPE, channels=2)
    prepared = method.prepare(make_batch(SHAPE, channels=2), generators(0, 1))
    predicted = torch.randn(2, 2, *SHAPE)
    losses = method.loss({"reconstruction": predicted}, prepared)
    inside, targets, inputs = (prepared[key].numpy() for key in ("inside", "targets", "inputs"))
    errors, means, copies = [], [], []
    for b, c in np.ndindex(2, 2):
        voxels = [v for v in np.ndindex(SHAPE) if inside[b, 0][v]]
        mean = np.mean([targets[b, c][v] for v in voxels])
        errors += [(predicted[b, c][v].item() - targets[b, c][v]) ** 2 for v in voxels]
        means += [(mean - targets[b, c][v]) ** 2 for v in voxels]
        copies += [(inputs[b, c][v] - targets[b, c][v]) ** 2 for v in voxels]
    assert losses["loss"].item() == pytest.approx(np.mean(errors), rel=1e-4)
    assert losses["mean_predictor"].item() == pytest.approx(np.mean(means), rel=1e-4)
    assert losses["copy"].item() == pytest.approx(np.mean(copies), rel=1e-4)


def test_contract():
    check_bf16_gradients("models_genesis")
    check_own_draws("models_genesis")
    assert check_empty_batch("models_genesis")["loss"] == 0
    check_pictures("models_genesis", ["original", "corrupted", "restored"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flip": 1.5}, "flip is 1.5; it is a probability"),
        ({"percentiles": [99, 1]}, r"percentiles are \[99.0, 1.0\]"),
        ({"window": [2.0, 2.0]}, r"window is \[2.0, 2.0\]"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        make("models_genesis", SHAPE, **arguments)
