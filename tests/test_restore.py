"""From the input file's voxels through resampling, mirrored views, tiles and merging back: nothing of a box is lost.

nnDetection's own chain takes a perfect detector down to an IoU of 0.50 for 3^3-voxel objects by its mirrored views
alone, and by restoring to 0.77-0.84 (2 mm slices resampled to 1 mm) and 0.59 (1.0 mm resampled to 1.6 mm) for spheres
of 3 mm radius.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from raw_folder import affine_of
from test_tiles import PerfectDetector, coordinates, spread_objects

from pretrain3d.data.resample import resample_labels
from pretrain3d.detection.ensemble import merge_members
from pretrain3d.detection.merge import Merging, merge
from pretrain3d.detection.tiles import predict_views
from pretrain3d.evaluation.matching import box_iou
from pretrain3d.geometry import Frame, boxes_of_instances

PATCH = (32, 32, 32)


def oblique_affine() -> np.ndarray:
    """Voxels of 1 x 1 x 2 mm, file axes towards S, R and P, turned by 15 degrees."""
    affine = affine_of("SRP", (2.0, 1.0, 1.0))
    a = np.deg2rad(15)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    return affine


def frame_of(affine: np.ndarray, shape: tuple[int, ...], spacing_mm: float | None) -> Frame:
    """Reoriented, cropped by a few voxels, and resampled unless ``spacing_mm`` is None."""
    frame = Frame.of_file(affine, shape)
    frame = frame.cropped((2, 0, 1), tuple(size - 1 for size in frame.cached_shape))
    if spacing_mm is None:
        return frame
    size = [round(n * mm / spacing_mm) for n, mm in zip(frame.crop_shape, frame.input_spacing_mm, strict=True)]
    return frame.resampled(tuple(size))


def through(frame: Frame, cached_boxes: np.ndarray, method: str, axes: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    """The boxes of a detector that sees exactly ``cached_boxes``, in the voxels of the input file."""
    boxes = torch.from_numpy(cached_boxes).float()
    detector = PerfectDetector(boxes, torch.zeros(len(boxes), dtype=torch.long))
    image = coordinates(frame.cached_shape)
    views = predict_views(detector, image, PATCH, 0.5, 4, -1.0, mirror_axes=axes)
    return frame.to_original(merge(views, Merging(method=method)).boxes.numpy())


@pytest.mark.parametrize("method", ["clustering", "nms"])
@pytest.mark.parametrize("affine", [affine_of("LPS", (1.0, 1.0, 1.0)), oblique_affine()], ids=["LPS", "oblique"])
@pytest.mark.parametrize(("spacing_mm", "least"), [(None, 0.9999), (1.3, 0.99)])
def test_a_perfect_detector_of_small_objects_comes_back(
    affine: np.ndarray, spacing_mm: float | None, least: float, method: str
) -> None:
    shape = (50, 44, 40)
    true = spread_objects(tuple(size - 10 for size in shape), 3, 3, seed=1).numpy().astype(np.float64) + 5
    true = true[::4]  # fewer than the 100 boxes that merging keeps
    frame = frame_of(affine, shape, spacing_mm)
    back = through(frame, frame.from_original(true), method)
    assert len(back) == len(true)
    assert box_iou(true, back).max(axis=1).min() >= least


@pytest.mark.parametrize(
    ("spacing", "target_mm", "nndetection"), [((1.0, 1.0, 2.0), 1.0, 0.84), ((1.0, 1.0, 1.0), 1.6, 0.59)]
)
def test_resampling_costs_what_its_discretisation_costs(
    spacing: tuple[float, ...], target_mm: float, nndetection: float
) -> None:
    """The detector sees the objects of the resampled mask; mapping those boxes back is all that may be lost."""
    shape, radius_mm = (44, 42, 30), 3.0
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1) * spacing
    mask = np.zeros(shape, np.uint8)
    for number, corner in enumerate(np.ndindex(3, 3, 2)):
        center = (np.array(corner) + 0.5) * np.array(shape) * spacing / (3, 3, 2) + rng.uniform(-1, 1, 3)
        mask[np.linalg.norm(grid - center, axis=-1) <= radius_mm] = number + 1
    _, true = boxes_of_instances(mask)
    frame = frame_of(affine_of("LPS", spacing), shape, target_mm)
    region = tuple(slice(a, a + n) for a, n in zip(frame.crop_start, frame.crop_shape, strict=True))
    _, cached = boxes_of_instances(resample_labels(frame.orient(mask)[region], frame, keep_all=True))
    direct = box_iou(true, frame.to_original(cached)).max(axis=1)
    back = box_iou(true, through(frame, cached, "clustering")).max(axis=1)
    np.testing.assert_allclose(back, direct, atol=1e-4)
    assert back.mean() > nndetection + 0.01, back.mean()
    exact = box_iou(true, through(frame, frame.from_original(true), "clustering")).max(axis=1)
    assert exact.min() >= 0.99  # a detector need not share the grid's corners


def test_an_ensemble_over_two_spacings_is_exact_and_twice_the_same_network_is_once() -> None:
    shape = (44, 40, 36)
    true = spread_objects(tuple(size - 12 for size in shape), 4, 9, seed=3).numpy().astype(np.float64) + 6
    frames = [frame_of(oblique_affine(), shape, 1.3), frame_of(oblique_affine(), shape, 1.0)]
    members = []
    for frame in frames:
        boxes = torch.from_numpy(frame.from_original(true)).float()
        detector = PerfectDetector(boxes, torch.arange(len(boxes)) % 2)
        members.append(predict_views(detector, coordinates(frame.cached_shape), PATCH, 0.5, 8, -1.0))
    found = merge_members(members, frames, Merging())
    assert len(found) == len(true) and found.scores.min() == pytest.approx(0.9)
    assert box_iou(true, frames[0].to_original(found.boxes.numpy())).max(axis=1).min() >= 0.99
    alone = merge(members[0], Merging())
    twice = merge_members([members[0]] * 2, [frames[0]] * 2, Merging())
    torch.testing.assert_close(twice.scores, alone.scores)
    torch.testing.assert_close(twice.boxes, alone.boxes)
