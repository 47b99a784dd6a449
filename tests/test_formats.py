"""Boxes leave in the voxels of the input file and in world millimetres, whatever its orientation."""

import csv
import json

import numpy as np
import pytest

from pretrain3d.evaluation import scorefile
from pretrain3d.geometry import Frame
from pretrain3d.reporting.formats import Found, write_boxes_csv, write_boxes_json

CLASSES = ["nodule", "lesion, bone"]


@pytest.fixture
def found():
    """A volume stored left-posterior-superior with 2 mm slices first, cropped and resampled."""
    affine = np.array([[0, -1.0, 0, 90], [0, 0, -1.0, 80], [2.0, 0, 0, -50], [0, 0, 0, 1]])
    frame = Frame.of_file(affine, (30, 60, 50)).cropped((10, 5, 0), (50, 45, 30)).resampled((40, 40, 60))
    in_file = np.array([[4, 20, 12, 8, 30, 18], [10, 15, 20, 11, 25, 30]], np.float64)
    return in_file, Found(frame, frame.from_original(in_file), np.array([0.25, 0.75], np.float32), np.array([1, 0]))


def test_json_is_a_score_file_with_millimetres(found, tmp_path):
    in_file, boxes = found
    empty = Found(boxes.frame, np.zeros((0, 6)), np.zeros(0), np.zeros(0, np.int64))
    write_boxes_json(tmp_path / "boxes.json", CLASSES, {"a": boxes, "empty": empty})
    cases = scorefile.read(tmp_path / "boxes.json", "predictions").cases
    assert np.allclose(cases["a"]["boxes"], in_file[::-1])  # best first, in the voxels of the file
    assert cases["a"]["scores"].tolist() == [0.75, 0.25] and cases["a"]["labels"].tolist() == [0, 1]
    assert len(cases["empty"]["boxes"]) == 0
    world = json.loads((tmp_path / "boxes.json").read_text())["cases"]["a"]
    corners = np.array([boxes.frame.affine @ [*corner, 1] for corner in ([10, 15, 20], [10, 24, 29])])[:, :3]
    assert np.allclose(world["center_mm"][0], corners.mean(axis=0))  # the middle of the outermost voxel centres
    assert np.allclose(world["size_mm"][0], [2, 10, 10])
    assert np.allclose(world["axes"], [[0, -1, 0], [0, 0, -1], [1, 0, 0]])


def test_csv_names_classes_and_reads_back(found, tmp_path):
    in_file, boxes = found
    write_boxes_csv(tmp_path / "boxes.csv", CLASSES, {"a": boxes})
    with open(tmp_path / "boxes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["nodule", "lesion, bone"]
    assert [float(row["score"]) for row in rows] == [0.75, 0.25]
    voxels = [[float(row[key]) for key in ("x1", "y1", "z1", "x2", "y2", "z2")] for row in rows]
    assert np.allclose(voxels, in_file[::-1], atol=1e-3)
    assert [float(rows[1][f"size_{axis}_mm"]) for axis in "xyz"] == [8, 10, 6]
