from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from tiny_store import make_case

from pretrain3d.config import UserError
from pretrain3d.data.store import Store, StoreWriter
from pretrain3d.detection.anchors import base_sizes, mean_best_iou
from pretrain3d.planning import anchors
from pretrain3d.planning.anchors import all_anchors, search_anchors
from pretrain3d.planning.patch import shared_out
from pretrain3d.planning.plan import make_plan, read_plan, write_plan

LEVEL_SCALES = (1, 2, 4, 8)


def slow_mean_best_iou(sizes: list[list[float]], boxes: np.ndarray) -> float:
    """From the definition, over every anchor of every level."""
    anchors = [(x * s, y * s, z * s) for s in LEVEL_SCALES for x in sizes[0] for y in sizes[1] for z in sizes[2]]
    best = []
    for box in boxes.astype(float):
        overlaps = []
        for anchor in anchors:
            shared = float(np.prod(np.minimum(anchor, box)))
            overlaps.append(shared / (np.prod(anchor) + np.prod(box) - shared))
        best.append(max(overlaps))
    return float(np.mean(best))


def test_anchors_find_the_sizes_that_are_there():
    """Objects of three sizes per axis, and their doubles: anchors of these sizes overlap them perfectly."""
    base = np.array([[4, 7, 9], [5, 6, 8], [3, 4, 5]], dtype=np.float32)
    rng = np.random.default_rng(0)
    boxes = np.stack([base[axis, rng.integers(0, 3, 200)] for axis in range(3)], axis=1)
    boxes *= rng.choice([1, 2, 4], (200, 1))
    found = search_anchors(torch.from_numpy(boxes.astype(np.float32)))
    assert slow_mean_best_iou(found, boxes) > 0.95
    assert all(axis == sorted(axis) and len(axis) == 3 for axis in found)


def test_anchors_are_a_maximum_and_the_same_in_any_order():
    rng = np.random.default_rng(1)
    boxes = rng.lognormal(2, 0.6, (60, 3)).astype(np.float32)
    found = search_anchors(torch.from_numpy(boxes))
    score = slow_mean_best_iou(found, boxes)
    for axis in range(3):
        for index in range(3):
            for factor in (0.8, 1.25):
                moved = [list(values) for values in found]
                moved[axis][index] *= factor
                assert slow_mean_best_iou(moved, boxes) <= score + 2e-3
    assert search_anchors(torch.from_numpy(boxes[::-1].copy())) == found
    plain = [np.quantile(boxes[:, axis], [1 / 6, 1 / 2, 5 / 6]).tolist() for axis in range(3)]
    assert score > slow_mean_best_iou(plain, boxes)


def test_anchors_serve_two_kinds_of_objects():
    """Many small ones and some large: quantiles of all boxes together are a bad place to search from (0.69)."""
    rng = np.random.default_rng(1)
    small, large = rng.normal([1.5, 1.5, 0.7], 0.3, (60, 3)), rng.normal([4, 4, 2.5], 0.3, (30, 3))
    boxes = torch.from_numpy(np.exp(np.concatenate([small, large]))).float()
    scales = [(1, 1, 1), (2, 2, 1), (4, 4, 2), (8, 8, 4)]
    found = torch.tensor(search_anchors(boxes, scales))
    assert float(mean_best_iou(all_anchors(found[None], scales)[0], boxes)) > 0.74


def test_of_very_many_boxes_every_size_is_looked_at(monkeypatch):
    monkeypatch.setattr(anchors, "MAX_BOXES", 10)
    boxes = np.array([[4, 4, 4]] * 30 + [[40, 20, 10]] * 30, np.float32)
    assert slow_mean_best_iou(search_anchors(torch.from_numpy(boxes)), boxes) > 0.95


def test_one_box_is_enough():
    found = search_anchors(torch.tensor([[9.0, 12.0, 5.0]]))
    assert slow_mean_best_iou(found, np.array([[9, 12, 5]])) > 0.97


def box_store(path, sizes, splits=None, shape=(60, 50, 40), modality="CT") -> Store:
    """One case per list of object sizes; the arrays hold nothing of interest."""
    writer = StoreWriter(path, "tiny", ["nodule", "lesion"], (1.0, 1.5, 2.0), [modality])
    rng = np.random.default_rng(0)
    image = rng.normal(0, 100, (1, *shape)).astype(np.int16)
    for index, objects in enumerate(sizes):
        split = splits[index] if splits else "train"
        case = make_case(f"c{index}", image, np.zeros(shape, np.int16), [], split=split, has_instances=False)
        boxes = np.array([[0, 0, 0, *size] for size in objects], dtype=np.float32).reshape(-1, 6)
        ids = np.arange(1, len(boxes) + 1)
        writer.add(replace(case, boxes=boxes, labels=ids % 2, instances=ids, volumes_mm3=np.ones(len(ids))), image)
    return writer.finish([f"c{index}" for index in range(len(sizes))])


def test_a_plan_fits_the_training_cases_and_not_the_test_cases(tmp_path):
    store = box_store(tmp_path, [[(8, 8, 4)], [(9, 8, 4)], [(30, 30, 30)]], ["train", "val", "test"])
    plan = make_plan(store)
    assert plan["spacing_mm"] == [1.0, 1.5, 2.0] and plan["patch_size"] == [64, 64, 48]
    assert plan["intensity"] == {
        "scheme": "ct",
        "foreground": "objects",
        "low": None,
        "high": None,
        "mean": None,
        "std": None,
    }
    assert slow_mean_best_iou(plan["anchors"]["sizes"], np.array([[8, 8, 4]])) > 0.97
    assert plan["coverage"]["objects"] == 2
    assert base_sizes(plan["anchors"]).shape == (27, 3)


def test_objects_that_only_validation_holds_are_planned_for(tmp_path):
    plan = make_plan(box_store(tmp_path, [[], [(8, 8, 4)]], ["train", "val"]))
    assert slow_mean_best_iou(plan["anchors"]["sizes"], np.array([[8, 8, 4]])) > 0.97


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((384, 384, 20), (256, 256, 128)),  # the patch: 256 x 256 x 32
        ((420, 330, 280), (128, 128, 128)),
        ((1000, 900, 3), (384, 336, 128)),
        ((600, 40, 50), (608, 128, 128)),  # all of it
        ((36, 50, 35), (128, 128, 128)),
    ],
)
def test_what_a_short_axis_leaves_of_the_patch_the_others_use(shape, expected):
    assert shared_out((128, 128, 128), shape, (16, 16, 16)) == expected


def test_the_patch_stays_in_its_budget(tmp_path):
    store = box_store(tmp_path, [[(8, 8, 4)]])
    assert make_plan(store, (48, 128, 16))["patch_size"] == [48, 64, 16]
    for wrong in ((50, 64, 64), (0, 16, 16), (16, 16)):
        with pytest.raises(UserError, match="three multiples of 16"):
            make_plan(store, wrong)


def test_objects_that_do_not_fit_are_named(tmp_path):
    usual = [[(6, 6, 6)] * 30 for _ in range(5)]
    usual[3].append((2, 50, 2))  # a thread, longer than the patch, in a case that no anchor is fitted to
    splits = ["val" if index == 3 else "train" for index in range(5)]
    coverage = make_plan(box_store(tmp_path / "a", usual, splits), (32, 32, 32))["coverage"]
    assert coverage["objects"] == 151
    assert coverage["larger_than_patch"] == ["c3/31 lesion 2x50x2"]
    assert "c3/31 lesion 2x50x2" in coverage["anchor_iou_below_0.4"]
    crowd = box_store(tmp_path / "b", [[(6, 6, 6)] * 10 + [(40, 40, 6)] * 50])
    assert make_plan(crowd, (32, 32, 32))["coverage"]["larger_than_patch"][-1] == "and 30 more"


def test_without_objects_there_are_no_anchors(tmp_path):
    plan = make_plan(box_store(tmp_path, [[], []], ["pretrain", "pretrain"], modality="MR"))
    assert plan["anchors"] is None and plan["coverage"] is None
    assert (plan["intensity"]["scheme"], plan["intensity"]["foreground"]) == ("zscore", "body")


@pytest.mark.parametrize("count", [2, 6])
def test_a_written_plan_reads_back_and_explains_itself(tmp_path, count):
    store = box_store(tmp_path / "s", [[(8, 8, 4), (20, 10, 6)]] * count)
    plan = make_plan(store)
    path = store.path / "plan.yaml"
    write_plan(path, plan, store)
    assert read_plan(path) == plan == Store(store.path).plan
    text = path.read_text()
    assert text.count("\n#") >= 7 and all(len(line) <= 121 for line in text.splitlines())
    assert ("# In fold 0: low [" in text) == (count >= 5)  # too few patients to fold, nothing to say


def test_a_plan_without_objects_reads_back(tmp_path):
    store = box_store(tmp_path / "s", [[]], ["pretrain"])
    write_plan(tmp_path / "plan.yaml", make_plan(store), store)
    assert read_plan(tmp_path / "plan.yaml") == make_plan(store)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"spacing_mm": [1, 2]}, "spacing_mm must be three sizes"),
        ({"spacing_mm": [1, 2, 0]}, "spacing_mm must be three sizes"),
        ({"patch_size": [16, 16, 16.5]}, "patch_size must be three"),
        ({"patch_size": 16}, "patch_size must be three"),
        ({"intensity": {"scheme": "hu"}}, "scheme is 'hu'; use one of ct, zscore, window"),
        ({"intensity": {"scheme": "zscore", "foreground": "images"}}, "foreground is 'images'; scheme zscore takes"),
        ({"intensity": None}, "intensity must be keys and values"),
        ({"anchors": {"sizes": [[1], [2]]}}, "anchors: "),
        ({"planned_for": 3}, "planned_for must be keys"),
        ({"detection_levels": "all"}, "detection_levels must be null or a list of levels"),
        ({"batch_size": 0}, "batch_size must be a whole number above 0"),
        ({"anker": 1}, "unknown key 'anker'"),
    ],
)
def test_a_senseless_edit_is_refused_with_the_files_name(tmp_path, change, text):
    store = box_store(tmp_path / "s", [[(8, 8, 4)]])
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**make_plan(store), **change}))
    with pytest.raises(UserError, match=text) as error:
        read_plan(path)
    assert str(path) in str(error.value)


def test_broken_yaml_and_a_missing_plan_are_refused(tmp_path):
    path = tmp_path / "plan.yaml"
    with pytest.raises(UserError, match="cannot be read"):
        read_plan(path)
    path.write_text("a: [1,")
    with pytest.raises(UserError, match="not valid YAML"):
        read_plan(path)
    path.write_text("just words")
    with pytest.raises(UserError, match="expected the keys"):
        read_plan(path)
