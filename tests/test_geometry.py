import itertools
import json

import nibabel
import numpy as np
import pytest
import torch
from raw_folder import affine_of

from pretrain3d.config import UserError
from pretrain3d.geometry import (
    Frame,
    boxes_of_instances,
    boxes_of_slots,
    flip_boxes,
    occupied_planes,
    transform_boxes,
)

SHAPE = (11, 7, 9)
SPACING = (0.7, 1.3, 2.5)
ORIENTATIONS = [
    "".join(letters) for order in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*order)
]


def random_boxes(rng: np.random.Generator, shape, count=20) -> np.ndarray:
    ends = np.sort(rng.uniform(0, 1, (count, 2, 3)), axis=1) * np.asarray(shape)
    return ends.reshape(count, 6)


def oblique(rng: np.random.Generator, axes: str) -> np.ndarray:
    """Axes turned by less than 30 degrees from ``axes``: the closest ones stay the same."""
    matrix, _ = np.linalg.qr(np.eye(3) + rng.uniform(-0.15, 0.15, (3, 3)))
    matrix *= np.sign(np.diag(matrix))  # qr may turn a column round
    affine = affine_of(axes, SPACING)
    affine[:3, :3] = matrix @ affine[:3, :3]
    return affine


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_a_voxel_is_where_its_box_says(axes):
    """A marked voxel is followed through the arrays and through the boxes, and both must meet in the world."""
    rng = np.random.default_rng(0)
    affine = oblique(rng, axes)
    frame = Frame.of_file(affine, SHAPE)
    voxel = tuple(int(rng.integers(size)) for size in SHAPE)
    marked = np.zeros(SHAPE, dtype=np.int32)
    marked[voxel] = 1
    start = (1, 0, 2)  # may cut the voxel off: its box then begins below 0, still exact
    oriented = frame.orient(marked)
    frame = frame.cropped(start, oriented.shape)
    place = np.argwhere(oriented)[0] - start
    box = np.concatenate([place, place + 1])[None]
    np.testing.assert_allclose(frame.to_original(box)[0], [*voxel, *(v + 1 for v in voxel)])
    np.testing.assert_allclose(frame.from_original(np.array([[*voxel, *(v + 1 for v in voxel)]]))[0], box[0])
    world = frame.to_world(box)
    np.testing.assert_allclose(world["center_mm"][0], affine[:3, :3] @ voxel + affine[:3, 3])
    np.testing.assert_allclose(world["size_mm"][0], SPACING)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SLA", "IPR"])
def test_cached_axes_point_right_anterior_superior(axes):
    rng = np.random.default_rng(1)
    frame = Frame.of_file(oblique(rng, axes), SHAPE)
    for axis in range(3):
        step = np.zeros((2, 6))
        step[:, 3:] = 1
        step[1, [axis, axis + 3]] += 1
        center = frame.to_world(step)["center_mm"]
        direction = center[1] - center[0]
        assert np.argmax(np.abs(direction)) == axis and direction[axis] > 0
        assert np.linalg.norm(direction) == pytest.approx(frame.spacing_mm[axis])


@pytest.mark.parametrize("axes", ["RAS", "PIR", "ALS"])
def test_boxes_survive_crop_and_resampling_and_back(axes):
    rng = np.random.default_rng(2)
    frame = Frame.of_file(affine_of(axes, SPACING), SHAPE)
    frame = frame.cropped((1, 2, 0), tuple(size - 1 for size in frame.cached_shape)).resampled((13, 5, 8))
    boxes = random_boxes(rng, frame.cached_shape)
    np.testing.assert_allclose(frame.from_original(frame.to_original(boxes)), boxes, atol=1e-12)
    whole = np.array([[0, 0, 0, *frame.cached_shape]])
    size_mm = np.ptp(whole.reshape(2, 3), axis=0) * frame.spacing_mm
    np.testing.assert_allclose(np.sort(size_mm), np.sort(frame.to_world(whole)["size_mm"][0]))  # edges stay aligned
    np.testing.assert_allclose(frame.spacing_mm * frame.factor, frame.input_spacing_mm)


def test_two_crops_are_one():
    frame = Frame.of_file(affine_of("LIP", SPACING), SHAPE)
    twice = frame.cropped((1, 1, 1), frame.cached_shape).cropped((2, 0, 1), (5, 4, 6))
    assert twice.to_dict() == frame.cropped((3, 1, 2), (6, 5, 7)).to_dict()


def test_world_box_of_an_oblique_volume_contains_exactly_its_voxels():
    rng = np.random.default_rng(3)
    affine = oblique(rng, "LSA")
    frame = Frame.of_file(affine, SHAPE).resampled((22, 7, 9))
    boxes = random_boxes(rng, frame.cached_shape, 5)
    world = frame.to_world(boxes)
    for box, center, size in zip(frame.to_original(boxes), world["center_mm"], world["size_mm"], strict=True):
        for corner in itertools.product((0, 1), repeat=3):
            voxel = np.where(corner, box[3:], box[:3]) - 0.5  # continuous coordinate -> the affine's voxel centres
            expected = affine[:3, :3] @ voxel + affine[:3, 3]
            found = center + world["axes"] @ (size / 2 * np.where(corner, 1, -1))
            np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("axes", ["RAS", "SPL", "ILA"])
def test_orient_is_nibabels(axes):
    affine = affine_of(axes, SPACING)
    frame = Frame.of_file(affine, SHAPE)
    array = np.arange(2 * np.prod(SHAPE), dtype=np.int16).reshape(2, *SHAPE)
    for channel, found in zip(array, frame.orient(array), strict=True):
        canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(channel, affine))
        np.testing.assert_array_equal(found, np.asarray(canonical.dataobj))
    assert frame.orient(array).shape[1:] == frame.cached_shape


def test_frame_survives_json():
    frame = Frame.of_file(affine_of("PSL", SPACING), SHAPE).cropped((1, 1, 1), (5, 6, 7)).resampled((9, 9, 9))
    again = Frame.from_dict(json.loads(json.dumps(frame.to_dict())))
    assert again.to_dict() == frame.to_dict()
    boxes = random_boxes(np.random.default_rng(4), (9, 9, 9))
    np.testing.assert_array_equal(again.to_original(boxes), frame.to_original(boxes))


@pytest.mark.parametrize(
    ("affine", "shape", "text"),
    [
        (np.eye(4), (4, 4), "expected a 3D volume, got shape (4, 4)"),
        (np.eye(4), (4, 4, 4, 2), "expected a 3D volume"),
        (np.eye(4), (4, 0, 4), "expected a 3D volume"),
        (np.diag([1, 0, 1, 1]), (4, 4, 4), "no invertible"),
        (np.diag([1, np.nan, 1, 1]), (4, 4, 4), "no invertible"),
    ],
)
def test_impossible_files_are_refused(affine, shape, text):
    with pytest.raises(UserError) as error:
        Frame.of_file(affine, shape)
    assert text in str(error.value)


def slow_box(mask: np.ndarray, label: int) -> list[int]:
    where = [p for p in itertools.product(*map(range, mask.shape)) if mask[p] == label]
    return [min(p[a] for p in where) for a in range(3)] + [max(p[a] for p in where) + 1 for a in range(3)]


@pytest.mark.parametrize("filled", [0, 1, 3, 200])
def test_planes_that_hold_something(filled):
    rng = np.random.default_rng(filled)
    mask = np.zeros((5, 6, 7), dtype=np.uint8)
    for place in zip(*(rng.integers(0, size, filled) for size in mask.shape), strict=True):
        mask[place] = rng.integers(1, 4)
    for axis, found in enumerate(occupied_planes(mask)):
        assert found.tolist() == [i for i in range(mask.shape[axis]) if mask.take(i, axis).any()]
    ids, boxes = boxes_of_instances(mask)
    assert ids.tolist() == sorted(set(mask[mask > 0].tolist()))
    for instance, box in zip(ids, boxes, strict=True):
        voxels = np.argwhere(mask == instance)
        assert box.tolist() == [*voxels.min(axis=0), *voxels.max(axis=0) + 1]


def test_boxes_of_instances_by_looking_at_every_voxel():
    rng = np.random.default_rng(5)
    mask = rng.choice([0, 0, 0, 0, 0, 0, 0, 2, 5, 9], size=(5, 4, 6))
    mask[mask == 9] = 0
    mask[0, 0, 0] = 9
    ids, boxes = boxes_of_instances(mask)
    assert ids.tolist() == [2, 5, 9]
    for label, box in zip(ids, boxes, strict=True):
        assert box.tolist() == slow_box(mask, label)
    ids, boxes = boxes_of_instances(np.zeros((3, 3, 3), dtype=np.int64))
    assert ids.shape == (0,) and boxes.shape == (0, 6)


def test_boxes_of_slots_are_those_of_instances():
    rng = np.random.default_rng(6)
    slots = rng.choice([0, 0, 0, 0, 0, 1, 3], size=(2, 6, 5, 4))
    slots[1][slots[1] == 3] = 0
    boxes, present = boxes_of_slots(torch.from_numpy(slots), 4)
    assert present.tolist() == [[True, False, True, False], [True, False, False, False]]
    for sample in range(2):
        for slot in range(4):
            expected = slow_box(slots[sample], slot + 1) if present[sample, slot] else [0] * 6
            assert boxes[sample, slot].tolist() == expected


def test_flipped_boxes_are_those_of_the_flipped_mask():
    mask = np.zeros((8, 5, 6), dtype=np.int64)
    mask[1:3, 2:5, 0:1] = 1
    mask[5:8, 0:1, 3:5] = 2
    boxes = torch.from_numpy(boxes_of_instances(mask)[1])
    for axes in [(0,), (1,), (2,), (0, 2), (0, 1, 2)]:
        expected = boxes_of_instances(np.flip(mask, axes))[1]
        np.testing.assert_array_equal(flip_boxes(boxes, mask.shape, axes), expected)
        np.testing.assert_array_equal(flip_boxes(flip_boxes(boxes, mask.shape, axes), mask.shape, axes), boxes)


def test_transformed_boxes_are_the_hull_of_eight_corners():
    rng = np.random.default_rng(7)
    boxes = torch.from_numpy(random_boxes(rng, SHAPE, 6))
    matrix = torch.from_numpy(rng.normal(size=(3, 4)))
    found = transform_boxes(boxes, matrix)
    for box, hull in zip(boxes.numpy(), found.numpy(), strict=True):
        corners = [
            matrix[:, :3].numpy() @ np.where(c, box[3:], box[:3]) + matrix[:, 3].numpy()
            for c in itertools.product((0, 1), repeat=3)
        ]
        np.testing.assert_allclose(hull, np.concatenate([np.min(corners, axis=0), np.max(corners, axis=0)]))
