"""Boxes leave in the voxels of the input file and in world millimetres, whatever its orientation, and come back."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pretrain3d.config import UserError
from pretrain3d.evaluation import scorefile
from pretrain3d.geometry import Frame
from pretrain3d.registry import resolve
from pretrain3d.reporting.formats import FILES, TABLES
from pretrain3d.reporting.formats.found import Found
from pretrain3d.reporting.formats.overlay import write_png
from pretrain3d.reporting.formats.slicer import write_slicer
from pretrain3d.reporting.formats.tables import write_coco, write_csv, write_json_boxes, write_luna16
from pretrain3d.reporting.formats.volumes import box_mask, write_nifti, write_nndetection

CLASSES = ["nodule", "lesion, bone"]
IN_FILE = np.array([[4, 20, 12, 8, 30, 18], [10, 15, 20, 11, 25, 30]], np.float64)  # scores 0.25 and 0.75


def left_posterior() -> np.ndarray:
    """A volume stored slice axis first, then towards left and posterior; 2 mm slices; left-handed."""
    return np.array([[0, -1.0, 0, 90], [0, 0, -1.0, 80], [2.0, 0, 0, -50], [0, 0, 0, 1]])


def oblique() -> np.ndarray:
    """Rotated by 20 and 30 degrees, voxels of 1 x 0.5 x 3 mm, the second axis running backwards."""
    a, b = np.deg2rad([20, 30])
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn * np.array([1.0, -0.5, 3.0])
    affine[:3, 3] = [12.5, -40.0, 300.25]
    return affine


@pytest.fixture(params=[left_posterior, oblique])
def found(request: pytest.FixtureRequest) -> Found:
    """Two boxes, the better one last, of a volume that was reoriented, cropped and resampled."""
    frame = Frame.of_file(request.param(), (30, 60, 50))
    start = np.minimum(frame.cached_shape, 1)
    frame = frame.cropped(tuple(start), frame.cached_shape).resampled((40, 44, 60))
    return Found(frame, frame.from_original(IN_FILE), np.array([0.25, 0.75], np.float32), np.array([1, 0]))


def corners(box: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(8, 3) RAS mm of the corners of a half-open box: the affine takes voxel centres."""
    points = np.array(list(itertools.product(*zip(box[:3], box[3:], strict=True)))) - 0.5
    return points @ affine[:3, :3].T + affine[:3, 3]


def around(center: np.ndarray, size: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """(8, 3) corners of a box given by its centre, its size and its axes (columns)."""
    return center + np.array(list(itertools.product(*[(-0.5, 0.5)] * 3))) * size @ axes.T


def same_points(a: np.ndarray, b: np.ndarray) -> bool:
    distance = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return bool((distance.min(axis=0) < 1e-6).all() and (distance.min(axis=1) < 1e-6).all())


def test_json_is_a_score_file_with_millimetres(found: Found, tmp_path: Path) -> None:
    empty = Found(found.frame, np.zeros((0, 6)), np.zeros(0), np.zeros(0, np.int64))
    write_json_boxes(tmp_path, CLASSES, {"a": found, "empty": empty})
    cases = scorefile.read(tmp_path / "predictions.json", "predictions").cases
    assert np.allclose(cases["a"]["boxes"], IN_FILE[::-1])  # best first, in the voxels of the file
    assert cases["a"]["scores"].tolist() == [0.75, 0.25] and cases["a"]["labels"].tolist() == [0, 1]
    assert len(cases["empty"]["boxes"]) == 0
    world = json.loads((tmp_path / "predictions.json").read_text())["cases"]["a"]
    for index, box in enumerate(IN_FILE[::-1]):
        given = around(*(np.array(world[key][index]) for key in ("center_mm", "size_mm")), np.array(world["axes"]))
        assert same_points(given, corners(box, found.frame.affine))


def test_csv_names_classes_and_reads_back(found: Found, tmp_path: Path) -> None:
    write_csv(tmp_path, CLASSES, {"a": found})
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["nodule", "lesion, bone"]
    assert [float(row["score"]) for row in rows] == [0.75, 0.25]
    voxels = [[float(row[key]) for key in ("x1", "y1", "z1", "x2", "y2", "z2")] for row in rows]
    assert np.allclose(voxels, IN_FILE[::-1], atol=1e-3)
    spacing = np.linalg.norm(found.frame.affine[:3, :3], axis=0)
    assert np.allclose([float(rows[1][f"size_{axis}_mm"]) for axis in "xyz"], [4, 10, 6] * spacing, atol=1e-3)


def test_luna16_has_the_centres_in_lps_millimetres(found: Found, tmp_path: Path) -> None:
    write_luna16(tmp_path, ["nodule"], {"1.3.6": found})
    with open(tmp_path / "luna16.csv", newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["seriesuid", "coordX", "coordY", "coordZ", "probability"]
    assert [row[0] for row in rows] == ["1.3.6"] * 2 and [float(row[4]) for row in rows] == [0.75, 0.25]
    for row, box in zip(rows, IN_FILE[::-1], strict=True):
        ras = corners(box, found.frame.affine).mean(axis=0)
        assert np.allclose([float(value) for value in row[1:4]], ras * [-1, -1, 1], atol=1e-5)
    with pytest.raises(UserError, match="has 2: nodule, lesion, bone"):
        write_luna16(tmp_path, CLASSES, {"a": found})


def test_coco_has_corner_and_size(found: Found, tmp_path: Path) -> None:
    write_coco(tmp_path, CLASSES, {"none": Found(found.frame, np.zeros((0, 6)), np.zeros(0), np.zeros(0)), "a": found})
    content = json.loads((tmp_path / "coco.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "nodule"}, {"id": 2, "name": "lesion, bone"}]
    assert [image["file_name"] for image in content["images"]] == ["none", "a"]
    assert [content["images"][1][key] for key in ("width", "height", "depth")] == [30, 60, 50]
    boxes = np.array([row["bbox"] for row in content["annotations"]])
    assert np.allclose(np.hstack([boxes[:, :3], boxes[:, :3] + boxes[:, 3:]]), IN_FILE[::-1])
    assert [row["category_id"] for row in content["annotations"]] == [1, 2]
    assert {row["image_id"] for row in content["annotations"]} == {2}
    assert [row["area"] for row in content["annotations"]] == pytest.approx([100, 240])


def test_nndetection_boxes_read_back_without_pickle(found: Found, tmp_path: Path) -> None:
    write_nndetection(tmp_path, "a", CLASSES, found)
    with np.load(tmp_path / "nndetection" / "a_boxes.npz", allow_pickle=False) as file:
        data = dict(file)
    assert data["pred_scores"].tolist() == [0.75, 0.25] and data["pred_labels"].tolist() == [0, 1]
    # nnDetection's own inverse is int(low) + 1 : int(high) on the array axes z, y, x
    a0_low, a1_low, a0_high, a1_high, a2_low, a2_high = np.rint(data["pred_boxes"]).astype(int).T
    lows, highs = np.array([a2_low, a1_low, a0_low]).T + 1, np.array([a2_high, a1_high, a0_high]).T
    assert np.array_equal(np.hstack([lows, highs]), IN_FILE[::-1])
    assert data["original_size_of_raw_data"].tolist() == [50, 60, 30]
    direction = data["itk_direction"].reshape(3, 3)  # ITK: point = origin + direction @ (spacing * index), LPS
    index = np.array([3.0, 7, 5])
    point = data["itk_origin"] + direction @ (data["itk_spacing"] * index)
    ras = found.frame.affine[:3, :3] @ index + found.frame.affine[:3, 3]
    assert np.allclose(point * [-1, -1, 1], ras)


def test_a_nifti_mask_of_the_boxes_lies_on_the_files_grid(found: Found, tmp_path: Path) -> None:
    write_nifti(tmp_path, "a", CLASSES, found)
    image = nib.load(tmp_path / "nifti" / "a.nii.gz")
    assert np.allclose(image.affine, found.frame.affine)
    mask = np.asarray(image.dataobj)
    assert mask.shape == (30, 60, 50) and mask.dtype == np.uint16
    for value, box in enumerate(IN_FILE[::-1].astype(int), start=1):
        where = np.argwhere(mask == value)
        assert [*where.min(axis=0), *(where.max(axis=0) + 1)] == box.tolist()
        assert len(where) == np.prod(box[3:] - box[:3])
    about = json.loads((tmp_path / "nifti" / "a.json").read_text())
    assert about["instances"] == {"1": 0, "2": 1} and about["scores"] == {"1": 0.75, "2": 0.25} and not about["hidden"]


def test_masks_show_the_better_box_and_never_lose_a_small_one() -> None:
    frame = Frame.of_file(np.eye(4), (10, 10, 10))
    boxes = np.array(
        [[2.0, 2, 2, 6, 6, 6], [2.4, 2.6, 2, 5.4, 5.6, 7], [3, 3, 3, 4, 4, 4], [8.6, 8.7, 9.6, 9, 8.9, 10]]
    )
    mask = box_mask(boxes, frame)
    assert (mask[2:6, 2:6, 2:6] == 1).all() and (mask == 1).sum() == 64
    assert (mask[2:5, 3:6, 6] == 2).all() and (
        mask == 2
    ).sum() == 9  # voxel centres inside; the rest lies behind the first
    assert not (mask == 3).any()
    assert np.argwhere(mask == 4).tolist() == [[8, 8, 9]]
    assert box_mask(np.zeros((0, 6)), frame).max() == 0


def test_hidden_boxes_of_a_mask_are_named(tmp_path: Path) -> None:
    frame = Frame.of_file(np.eye(4), (10, 10, 10))
    boxes = np.array([[3.0, 3, 3, 4, 4, 4], [2, 2, 2, 6, 6, 6]])
    write_nifti(tmp_path, "a", CLASSES, Found(frame, boxes, np.array([0.2, 0.9]), np.array([1, 0])))
    about = json.loads((tmp_path / "nifti" / "a.json").read_text())
    assert about["hidden"] == [2] and about["instances"] == {"1": 0}


def test_slicer_rois_have_the_corners_of_the_boxes(found: Found, tmp_path: Path) -> None:
    write_slicer(tmp_path, "a", CLASSES, found)
    content = json.loads((tmp_path / "slicer" / "a.mrk.json").read_text())
    assert content["@schema"].endswith("markups-schema-v1.0.3.json#")
    assert [roi["name"] for roi in content["markups"]] == ["nodule 1: 0.75", "lesion, bone 2: 0.25"]
    for roi, box in zip(content["markups"], IN_FILE[::-1], strict=True):
        assert roi["type"] == "ROI" and roi["roiType"] == "Box" and roi["coordinateSystem"] == "LPS"
        axes = np.array(roi["orientation"]).reshape(3, 3)  # row by row: elements 0, 3, 6 are the ROI's x axis
        assert np.allclose(axes.T @ axes, np.eye(3)) and np.linalg.det(axes) == pytest.approx(1)  # a rotation
        lps = around(np.array(roi["center"]), np.array(roi["size"]), axes)
        assert same_points(lps * [-1, -1, 1], corners(box, found.frame.affine))
        assert roi["controlPoints"][0]["position"] == roi["center"]


@pytest.mark.parametrize("count", [2, 0])
def test_a_picture_is_drawn_with_and_without_boxes(count: int, tmp_path: Path) -> None:
    frame = Frame.of_file(oblique(), (40, 44, 60))
    image = np.random.default_rng(0).random((2, 40, 44, 60), np.float32)
    boxes, scores = frame.from_original(IN_FILE[:count]), np.array([0.25, 0.75])[:count]
    write_png(tmp_path, "a", CLASSES, Found(frame, boxes, scores, np.array([1, 0])[:count], image))
    content = (tmp_path / "png" / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000


def test_every_format_has_a_writer() -> None:
    for registry in (TABLES, FILES):
        assert all(callable(resolve(registry, name, "format")) for name in registry)
    assert not TABLES.keys() & FILES.keys()
