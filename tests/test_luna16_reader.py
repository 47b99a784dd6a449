"""LUNA16 as it is downloaded: balls, folds, what is missing, and the way from the files to the official score."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_folder import affine_of, save
from scipy.spatial.transform import Rotation
from test_itk import oblique, write_mhd

from pretrain3d.__main__ import main
from pretrain3d.config import UserError
from pretrain3d.data.prepare import prepare
from pretrain3d.data.readers.luna16 import Luna16, draw_balls
from pretrain3d.data.splits import fold_cases
from pretrain3d.data.store import Store
from pretrain3d.evaluation.luna16 import score_files
from pretrain3d.geometry import Frame, boxes_of_instances
from pretrain3d.reporting.formats.found import Found
from pretrain3d.reporting.formats.tables import write_luna16

LPS = np.array([-1.0, -1.0, 1.0])


def slow_ball(shape: tuple[int, ...], affine: np.ndarray, center_mm: np.ndarray, diameter_mm: float) -> np.ndarray:
    """Voxel by voxel: is its centre in the ball, or the ball's centre in it?"""
    inside = np.zeros(shape, bool)
    for voxel in itertools.product(*map(range, shape)):
        world = affine[:3, :3] @ voxel + affine[:3, 3]
        middle = np.linalg.solve(affine[:3, :3], center_mm - affine[:3, 3]) - voxel
        inside[voxel] = np.linalg.norm(world - center_mm) <= diameter_mm / 2 or bool((np.abs(middle) < 0.5).all())
    return inside


@pytest.mark.parametrize("affine", [oblique("LPS", (1.0, 1.5, 2.5)), affine_of("LAI", (0.8, 0.8, 2.0)), np.eye(4)])
def test_a_ball_by_the_definition(affine: np.ndarray) -> None:
    for center, diameter in (((8.2, 7.7, 4.4), 9.3), ((5.1, 6.4, 2.7), 0.2), ((0.3, 9.0, 8.4), 12.0)):
        center_mm = affine[:3, :3] @ center + affine[:3, 3]
        mask = draw_balls((15, 12, 9), affine, [(center_mm, diameter)])
        np.testing.assert_array_equal(mask == 1, slow_ball((15, 12, 9), affine, center_mm, diameter))
    assert (draw_balls((15, 12, 9), affine, [(affine[:3, 3], 0.2)]) == 1).sum() == 1


def test_balls_that_meet_keep_their_ids_and_the_small_one_its_voxels() -> None:
    small, large = (np.array([9.0, 8, 8]), 3.0), (np.array([8.0, 8, 8]), 9.0)
    for balls in ([small, large], [large, small]):
        mask = draw_balls((16, 16, 16), np.eye(4), balls)
        own = {index: draw_balls((16, 16, 16), np.eye(4), [ball]) == 1 for index, ball in enumerate(balls)}
        first = 0 if balls[0] is small else 1
        assert (mask == first + 1).sum() == own[first].sum()
        np.testing.assert_array_equal(mask == 2 - first, own[1 - first] & ~own[first])
    many = [(np.array([8.0, 8, 8]), 1.0)] * 300
    assert draw_balls((16, 16, 16), np.eye(4), many).dtype == np.uint16


def uid(subset: int, number: int) -> str:
    return f"1.3.6.1.4.1.14519.5.2.1.6279.6001.10{subset}{number}"


def write_luna(folder: Path, rows: list[tuple[Any, ...]], subsets: Any = range(10), count: int = 2) -> Path:
    """A LUNA16 folder of small NIfTI files (any format will do) and the given rows of annotations.csv."""
    for subset, number in itertools.product(subsets, range(count)):
        image = np.zeros((6, 6, 6), np.int16)
        save(folder / f"subset{subset}" / f"{uid(subset, number)}.nii.gz", image, affine_of("LPS", (2.0, 2.0, 2.0)))
    lines = ["seriesuid,coordX,coordY,coordZ,diameter_mm", *(",".join(map(str, row)) for row in rows)]
    (folder / "annotations.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_every_subset_is_tested_once_and_no_fold_mixes(tmp_path: Path) -> None:
    reader = Luna16(write_luna(tmp_path, []))
    ids = {case.id for case in reader.cases()}
    folds = reader.folds()
    assert len(ids) == 20 and len(folds) == 10 and reader.remarks() == []
    for number, fold in enumerate(folds):
        assert fold["test"] == [uid(number, 0), uid(number, 1)]
        assert fold["val"] == [uid((number + 1) % 10, 0), uid((number + 1) % 10, 1)]
        assert len(fold["train"]) == 16 and {*fold["train"], *fold["val"], *fold["test"]} == ids


def test_some_subsets_will_do_and_what_is_not_there_is_said(tmp_path: Path, capsys: Any) -> None:
    rows = [(uid(0, 0), 0, 0, 0, 5), (uid(3, 0), 0, 0, 0, 5), (uid(3, 0), 9, 0, 0, 5), (uid(7, 1), 0, 0, 0, 5)]
    reader = Luna16(write_luna(tmp_path, rows, (0, 4, 9)))
    (tmp_path / "subset5").mkdir()  # nothing unpacked into it
    folds = reader.folds()
    assert [fold["test"] for fold in folds if fold["test"]] == [[uid(i, 0), uid(i, 1)] for i in (0, 4, 9)]
    assert [fold["val"][0] for fold in folds] == [uid(i, 0) for i in (4, 4, 4, 4, 9, 9, 9, 9, 9, 0)]
    assert all(fold["train"] and not set(fold["train"]) & {*fold["val"], *fold["test"]} for fold in folds)
    said = reader.remarks()
    assert "subset1, subset2, subset3, subset5, subset6, subset7, subset8 not there; the folds are of the o" in said[0]
    assert f"2 of 3 series with nodules are not there, and so 3 nodules; the first {uid(3, 0)}" in said[1]
    assert main(["show", str(tmp_path)]) == 0
    assert "reader=luna16" in (shown := capsys.readouterr().out) and "3 nodules; the first" in shown
    few = Luna16(write_luna(tmp_path / "few", [], (0, 1)))
    assert few.folds() == [] and "too few are there for the official folds" in few.remarks()[0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(uid(0, 0), 0, 0, "x", 5)], "annotations.csv line 2: coordZ is 'x', not a finite number"),
        ([(uid(0, 0), 0, 0, 0, -1)], "annotations.csv line 2: diameter_mm is -1; expected mm above 0"),
        ([(uid(0, 0), 1, 2, 3, 5)] * 2, "annotations.csv line 3: the nodule was listed in line 2 already"),
        ([(uid(0, 0), 0, 0)], "annotations.csv line 2: 3 cells, but the header names 5"),
        ([(uid(0, 0), -7, 30, 14, 4), (uid(0, 0), 70, 30, 14, 4)], "line 3: the nodule at [70.0, 30.0, 14.0] lies out"),
        ([(uid(0, 0), -7, 30, 14, 0.1), (uid(0, 0), -7, 30, 14.1, 0.1)], "line 2: the nodule at [-7.0, 30.0, 14.0]"),
    ],
)
def test_nodules_that_cannot_be_are_refused(tmp_path: Path, rows: list[tuple[Any, ...]], said: str) -> None:
    write_luna(tmp_path, rows, (0,))
    with pytest.raises(UserError) as error:
        reader = Luna16(tmp_path)
        reader.read(reader.cases()[0])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_folders_that_are_no_luna16_are_refused(tmp_path: Path) -> None:
    write_luna(tmp_path, [], (0,))
    (tmp_path / "subset0" / "alone.raw").write_bytes(b"")
    with pytest.raises(UserError, match=r"alone\.raw: no case uses it; expected <seriesuid>\.mhd and"):
        Luna16(tmp_path).cases()
    (tmp_path / "annotations.csv").unlink()
    with pytest.raises(UserError, match=r"expected annotations\.csv and folders subset0 to subset9"):
        Luna16(tmp_path)
    (tmp_path / "empty" / "subset3").mkdir(parents=True)
    write_luna(tmp_path / "empty", [], ())
    with pytest.raises(UserError, match=r"no <seriesuid>\.mhd in subset3"):
        Luna16(tmp_path / "empty").cases()


def perfect(store: Store) -> dict[str, Found]:
    """What is to be found, as a detector would say it."""
    return {
        case.id: Found(case.frame, case.boxes, np.ones(len(case.boxes)), case.labels) for case in store.cases.values()
    }


def test_from_the_files_to_the_official_score(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("SimpleITK", reason="SimpleITK is not installed: pip install 'pretrain3d[itk]'")
    rng = np.random.default_rng(0)
    affines = [affine_of("LPS", (0.8, 0.8, 2.5)), affine_of("RAS", (0.8, 0.8, 2.5)), oblique("LPS"), oblique("RAI")]
    shape, rows = (48, 44, 20), []
    for number, affine in enumerate(affines):
        image = np.full(shape, -1000, np.int16)
        image[4:-4, 4:-4, 2:-2] = rng.normal(40, 20, (40, 36, 16))
        write_mhd(tmp_path / "raw" / f"subset{number}" / f"{uid(number, 0)}.mhd", image, affine)
        for place in ((12, 12, 5), (33, 14, 13), (20, 30, 9))[: 3 * (number > 0)]:  # the first scan has none
            center = affine[:3, :3] @ (place + rng.uniform(-0.5, 0.5, 3)) + affine[:3, 3]
            rows.append([uid(number, 0), *(center * LPS).tolist(), float(rng.uniform(3.2, 9))])
    write_luna(tmp_path / "raw", rows, ())
    reader = Luna16(tmp_path / "raw")
    summary = prepare(reader, tmp_path / "store", (1.0, 1.0, 1.5), workers=1, progress=False)
    assert summary.folds == 10 and summary.said == reader.remarks() and "subset4" in summary.said[0]
    store = Store(tmp_path / "store")
    empty = store.cases[uid(0, 0)]
    assert len(empty.boxes) == 0 and empty.annotated == (0,) and empty.has_instances
    assert [len(case.boxes) for case in store.cases.values()] == [0, 3, 3, 3]
    changed = [row if row[0] != uid(2, 0) else [*row[:4], row[4] + 1] for row in rows]
    again = prepare(Luna16(write_luna(tmp_path / "raw", changed, ())), tmp_path / "store", workers=1, progress=False)
    assert again.done == [uid(2, 0)] and len(again.reused) == 3  # its nodules are others
    write_luna(tmp_path / "raw", rows, ())
    prepare(Luna16(tmp_path / "raw"), tmp_path / "store", workers=1, progress=False)
    parts = fold_cases(store, 1)
    assert (parts["test"], parts["val"]) == ([uid(1, 0)], [uid(2, 0)])
    assert parts["train"] == [uid(0, 0), uid(3, 0)]
    assert fold_cases(store, 5)["test"] == []  # its subset is not there

    write_luna16(tmp_path, store.classes, perfect(store))
    (tmp_path / "seriesuids.csv").write_text("\n".join(store.cases) + "\n")
    line = [f"predictions={tmp_path / 'luna16.csv'}", f"targets={tmp_path / 'raw' / 'annotations.csv'}"]
    line += [f"cases={tmp_path / 'seriesuids.csv'}", f"out={tmp_path / 'score.json'}", "samples=0"]
    assert main(["score", "protocol=luna16", *line]) == 0
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["CPM"] == 1 and score["counts"]["TP"] == 9 and score["counts"]["FP"] == 0
    capsys.readouterr()


def test_official_nodules_in_made_volumes_have_a_perfect_score(testdata: Path, tmp_path: Path) -> None:
    """Boxes of masks of official nodules, on grids of LUNA16's spacings, however they are turned."""
    official = testdata / "data" / "luna16_froc" / "official"
    (tmp_path / "subset0").mkdir()
    (tmp_path / "annotations.csv").write_bytes((official / "annotations.csv").read_bytes())
    nodules = Luna16(tmp_path).nodules
    assert len(nodules) == 601 and sum(map(len, nodules.values())) == 1186
    rng, found, chosen = np.random.default_rng(0), {}, sorted(nodules)[::60]
    for number, name in enumerate(chosen):
        affine = np.eye(4)
        turned = Rotation.random(random_state=number).as_matrix() * [1, 1, (-1) ** number]
        affine[:3, :3] = (turned if number % 3 else np.diag(LPS)) * rng.uniform((0.46, 0.46, 0.6), (0.98, 0.98, 2.5))
        balls = [(nodule.center_mm, nodule.diameter_mm) for nodule in nodules[name]]
        places = np.array([center for center, _ in balls]) @ np.linalg.inv(affine[:3, :3]).T
        low, high = places.min(axis=0) - 40 + rng.uniform(size=3), places.max(axis=0) + 40
        affine[:3, 3] = affine[:3, :3] @ low
        shape = tuple(int(size) for size in np.ceil(high - low))
        boxes = boxes_of_instances(draw_balls(shape, affine, balls))[1]
        frame = Frame.of_file(affine, shape)
        found[name] = Found(frame, frame.from_original(boxes), np.ones(len(boxes)), np.zeros(len(boxes)))
    write_luna16(tmp_path, ["nodule"], found)
    (tmp_path / "chosen.csv").write_text("\n".join(chosen) + "\n")
    score = score_files(tmp_path / "luna16.csv", official / "annotations.csv", tmp_path / "chosen.csv",
                        official / "annotations_excluded.csv.gz")  # fmt: skip
    assert score["CPM"] == 1 and score["counts"]["TP"] == sum(len(nodules[name]) for name in chosen)
