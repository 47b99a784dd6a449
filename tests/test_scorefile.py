"""Score files: round trip, and every mistake is one line that names file, case and value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain3d.config import UserError
from pretrain3d.evaluation.scorefile import groups_of, read, read_pair, write

BOX = [1, 2, 3, 4, 5, 6.5]


def save(path: Path, cases: Any, classes: Any = ("nodule", "cyst")) -> Path:
    path.write_text(json.dumps({"classes": classes, "cases": cases}))
    return path


def case(boxes: Any = (BOX,), labels: Any = (0,), **more: Any) -> dict[str, Any]:
    return {"boxes": boxes, "labels": labels, **more}


def test_round_trip(tmp_path: Path) -> None:
    boxes = torch.tensor([[0.1, 2, 3, 4, 5, 6], [1 / 3, 0, 0, 1, 1, 1]])
    cases = {
        "a": {"boxes": boxes, "scores": torch.tensor([0.1, 0.7]), "labels": torch.tensor([1, 0])},
        "b": {"boxes": np.zeros((0, 6)), "scores": [], "labels": np.zeros(0, int), "picture": "left out"},
    }
    write(tmp_path / "new" / "predictions.json", ["nodule", "cyst"], cases)
    back = read(tmp_path / "new" / "predictions.json", "predictions")
    assert back.classes == ["nodule", "cyst"] and list(back.cases) == ["a", "b"]
    np.testing.assert_array_equal(back.cases["a"]["boxes"], boxes.double().numpy())
    np.testing.assert_array_equal(back.cases["a"]["scores"], torch.tensor([0.1, 0.7]).double().numpy())
    assert back.cases["a"]["labels"].tolist() == [1, 0] and back.cases["b"]["boxes"].shape == (0, 6)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["predictions.json"], "no scratch file stays"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = save(tmp_path / "p.json", {"a": case(scores=[0.5])})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(path, ["nodule"], {"a": case(scores=[float("nan")])})
    assert read(path, "predictions").cases["a"]["scores"].tolist() == [0.5]
    assert [found.name for found in tmp_path.iterdir()] == ["p.json"]


def test_targets_say_what_was_annotated(tmp_path: Path) -> None:
    path = save(tmp_path / "t.json", {"a": case(), "b": case(annotated=[0]), "c": case([], [], annotated=[])})
    assert [entry["annotated"] for entry in read(path, "targets").cases.values()] == [(0, 1), (0,), ()]


def test_targets_may_say_sizes_and_patients(tmp_path: Path) -> None:
    about = {"volumes_mm3": np.array([12.5]), "spacing_mm": np.array([1.0, 1.0, 2.5]), "group": "patient 7"}
    write(tmp_path / "t.json", ["nodule"], {"a": case(**about), "b": case(group="patient 7"), "c": case()})
    cases = read(tmp_path / "t.json", "targets").cases
    assert cases["a"]["volumes_mm3"].tolist() == [12.5] and cases["a"]["spacing_mm"].tolist() == [1, 1, 2.5]
    assert "spacing_mm" not in cases["b"]
    assert groups_of(cases) == {"a": "patient 7", "b": "patient 7", "c": "case c"}
    assert groups_of({"c": cases["c"]}) is None


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (case([[4, 2, 3, 1, 5, 6]], scores=[0.5]), "box 0 [4, 2, 3, 1, 5, 6] is inverted: x2 < x1"),
        (case([[1, 2, 9, 4, 5, 6]], scores=[0.5]), "is inverted: z2 < z1"),
        (case([[1, 2, 3, 4, float("nan"), 6]], scores=[0.5]), "not a finite number"),
        (case([[1, 2, 3, 4, float("inf"), 6]], scores=[0.5]), "not a finite number"),
        (case([[1, 2, 3, 4, 5]], scores=[0.5]), "is not six numbers"),
        (case([[1, 2, 3, 4, 5, "6"]], scores=[0.5]), "not a finite number"),
        (case(labels=[2], scores=[0.5]), "label 0 is 2, not a class index of 0..1"),
        (case(labels=[-1], scores=[0.5]), "label 0 is -1"),
        (case(labels=["nodule"], scores=[0.5]), 'label 0 is "nodule"'),
        (case(labels=[True], scores=[0.5]), "label 0 is true"),
        (case(), "scores is missing"),
        (case(scores=0.5), "scores must be a list, not 0.5"),
        (case(scores=[float("nan")]), "score 0 is NaN"),
        (case(scores=[None]), "score 0 is null"),
        (case(scores=[10**400]), "score 0 is 1000"),
        (case([[1, 2, 3, 4, 5, 10**400]], scores=[0.5]), "not a finite number"),
        (case(scores=[0.5, 0.4]), "lists of different lengths: 1 boxes, 1 labels, 2 scores"),
        ([BOX], "expected an object with boxes, labels, scores"),
    ],
)
def test_a_bad_prediction_is_named(tmp_path: Path, entry: Any, said: str) -> None:
    path = save(tmp_path / "p.json", {"good": case(scores=[0.5]), "scan 7": entry})
    with pytest.raises(UserError) as caught:
        read(path, "predictions")
    text = str(caught.value)
    assert text.startswith(f"{path}: case 'scan 7': ") and said in text and "\n" not in text


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (case([[1, 2, 3, 4, 2, 6]]), "is empty: y2 = y1"),
        (case(annotated=[5]), "annotated must list class indices of 0..1, not [5]"),
        (case(annotated=1), "annotated must list class indices"),
        (case(volumes_mm3=[]), "volumes_mm3 must be 1 positive numbers, not []"),
        (case(volumes_mm3=[0]), "volumes_mm3 must be 1 positive numbers, not [0]"),
        (case(spacing_mm=[1, 1]), "spacing_mm must be 3 positive numbers, not [1, 1]"),
        (case(spacing_mm=[1, 1, 10**400]), "spacing_mm must be 3 positive numbers"),
        (case(labels=[[0]], annotated=[0]), "label 0 is [0], not a class index of 0..1"),
        (case(spacing_mm=1), "spacing_mm must be 3 positive numbers, not 1"),
        (case(group=7), "group must be a name, not 7"),
        (case(labels=[1], annotated=[0]), "has objects of class 1, which its annotated [0] leaves out"),
    ],
)
def test_a_bad_target_is_named(tmp_path: Path, entry: Any, said: str) -> None:
    path = save(tmp_path / "t.json", {"scan 7": entry})
    with pytest.raises(UserError) as caught:
        read(path, "targets")
    assert str(caught.value).startswith(f"{path}: case 'scan 7': ") and said in str(caught.value)


def test_a_prediction_without_volume_is_allowed(tmp_path: Path) -> None:
    path = save(tmp_path / "p.json", {"a": case([[1, 2, 3, 1, 5, 6]], scores=[0.5])})
    assert len(read(path, "predictions").cases["a"]["boxes"]) == 1


def test_five_problems_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    path = save(tmp_path / "p.json", {f"c{index}": case(labels=[9], scores=[0.5]) for index in range(8)})
    with pytest.raises(UserError, match=r"case 'c4': .*; and 3 more$") as caught:
        read(path, "predictions")
    assert "'c5'" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"not a score file: .*; expected JSON, .* as predict format=json and test write it$"),
        ('{"images": [], "annotations": []}', r"as predict format=json and test write it, got {\"images\": "),
        ("[]", "expected"),
        ('{"cases": {}}', "expected"),
        ('{"classes": ["x"], "case": {}}', "expected"),
        ('{"classes": [], "cases": {"a": {}}}', "classes must be a list of names"),
        ('{"classes": ["x", "x"], "cases": {"a": {}}}', "a name twice"),
        ('{"classes": ["x"], "cases": {}}', "at least one case"),
        ('{"classes": ["x"], "cases": {"a": {}, "a": {}}}', "'a' appears twice"),
        ('{"classes": ["x"], "cases": [1]}', "cases must map"),
    ],
)
def test_what_is_no_score_file(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read(path, "targets")
    assert str(path) in str(caught.value)


def test_a_table_of_boxes_is_no_score_file(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("case,class,score,x1\na,nodule,0.5,1\n")
    with pytest.raises(UserError, match=r"p\.csv: not a score file: .*; expected JSON, .* with protocol=luna16$"):
        read(tmp_path / "p.csv", "predictions")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: cannot be read: No such file"):
        read(tmp_path / "none.json", "targets")


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    found = save(tmp_path / "p.json", {"a": case([BOX, BOX], [0, 1], scores=[0.5, 0.4])}, ["cyst", "nodule"])
    true = save(tmp_path / "t.json", {"a": case()}, ["nodule", "other", "cyst"])
    classes, predictions, _ = read_pair(found, true)
    assert classes == ["nodule", "other", "cyst"] and predictions["a"]["labels"].tolist() == [2, 0]


def test_a_class_unknown_to_the_targets(tmp_path: Path) -> None:
    found = save(tmp_path / "p.json", {"a": case(scores=[0.5])}, ["nodule", "vessel"])
    with pytest.raises(UserError, match=r"p\.json: class 'vessel' is not in .*t\.json, whose classes are nodule, cyst"):
        read_pair(found, save(tmp_path / "t.json", {"a": case()}))


def test_cases_of_one_file_only(tmp_path: Path) -> None:
    found = save(tmp_path / "p.json", {"a": case(scores=[0.5]), "b": case(scores=[0.5])})
    true = save(tmp_path / "t.json", {"a": case(), "c": case()})
    with pytest.raises(UserError, match=r"case 'b' is in .*p\.json only; case 'c' is in .*t\.json only"):
        read_pair(found, true)
