"""One file and a NIfTI are enough: the Python object and the `predict` command on an untrained detector."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from raw_folder import affine_of, ct_phantom, save
from tiny_detector import tiny_checkpoint

from pretrain3d import api
from pretrain3d.__main__ import main
from pretrain3d.api import Detector
from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.commands.predict import image_files
from pretrain3d.config import UserError
from pretrain3d.data.cached import prepare_volume
from pretrain3d.data.oddity import POSITIONS, SHIFTED
from pretrain3d.data.readers.contract import RawVolume
from pretrain3d.detection.merge import Merging
from pretrain3d.modules.base import NOTE
from pretrain3d.modules.checkpoint import read_checkpoint, store_inference
from pretrain3d.reporting.formats.found import Found

AFFINE = affine_of("LPS", (1.0, 1.0, 1.5))
OPERATING = {"false_positives_per_case": 1.0, "threshold": 0.4, "sensitivity": 0.5, "measured": 1.0}
SWEPT = {"merging": Merging(view_iou=0.2, tile_iou=0.3).to_dict(), "operating": OPERATING, "cases": ["a"]}


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return ct_phantom(np.random.default_rng(0), (26, 24, 16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, image: np.ndarray) -> Path:
    """A checkpoint, another one, and an image file."""
    path = tmp_path_factory.mktemp("api")
    tiny_checkpoint(path / "one.ckpt")
    tiny_checkpoint(path / "other.ckpt", seed=1)
    save(path / "scan.nii.gz", image, AFFINE)
    return path


def same(a: Found, b: Found, atol: float = 1e-5) -> bool:
    one, other = a.restored(), b.restored()
    return len(a) == len(b) > 0 and all(
        np.allclose(one[key], other[key], atol=atol) for key in ("boxes", "scores", "labels", "center_mm")
    )


def test_a_file_and_an_array_give_the_same(folder: Path, image: np.ndarray) -> None:
    detector = Detector(folder / "one.ckpt")
    found = detector.predict(folder / "scan.nii.gz", threshold=0.0)
    assert detector.classes == ["nodule", "lesion"] and 20 < len(found) <= 200
    assert same(found, detector.predict(image, AFFINE, threshold=0.0))
    assert same(found, detector.predict(image[None], AFFINE, threshold=0.0))
    boxes = found.restored()["boxes"]
    assert (boxes[:, :3] > -1e-3).all() and (boxes[:, 3:] < np.array(image.shape) + 1e-3).all()
    least = float(np.median(found.scores))
    assert len(detector.predict(image, AFFINE, threshold=least)) == (found.scores >= least).sum()
    picture = detector.predict(image, AFFINE, keep_image=True).image
    assert picture is not None and picture.shape == (1, *found.frame.cached_shape)


def test_neither_the_tile_batch_nor_the_number_of_equal_folds_changes_anything(
    folder: Path, image: np.ndarray, tmp_path: Path
) -> None:
    once = Detector(folder / "one.ckpt").predict(image, AFFINE, threshold=0.0)
    assert same(once, Detector(folder / "one.ckpt", tile_batch=1).predict(image, AFFINE, threshold=0.0))
    equal = [shutil.copy(folder / "one.ckpt", tmp_path / f"fold{number}.ckpt") for number in range(3)]
    thrice = Detector(*equal).predict(image, AFFINE, threshold=0.0)
    assert same(once, thrice, atol=1e-4)
    both = Detector(folder / "one.ckpt", folder / "other.ckpt").predict(image, AFFINE, threshold=0.0)
    assert len(both) and not same(once, both)


def test_an_ensemble_may_see_the_image_at_two_spacings(folder: Path, image: np.ndarray) -> None:
    coarse = tiny_checkpoint(folder / "coarse.ckpt", spacing_mm=(1.5, 1.5, 1.5), seed=2)
    found = Detector(folder / "one.ckpt", coarse).predict(image, AFFINE, threshold=0.0)
    boxes = found.restored()["boxes"]
    assert len(found) and tuple(found.frame.spacing_mm) == pytest.approx((1, 1, 1), abs=0.05)
    assert (boxes[:, :3] > -1e-3).all() and (boxes[:, 3:] < np.array(image.shape) + 1e-3).all()


def test_the_order_of_an_ensemble_changes_nothing(image: np.ndarray, tmp_path: Path) -> None:
    """The smallest box is counted in voxels of the finest of its networks."""
    swept = {**SWEPT, "merging": Merging(min_size=5.0).to_dict()}
    fine, coarse = (
        tiny_checkpoint(tmp_path / f"{seed}.ckpt", spacing_mm=(size,) * 3, seed=seed, inference=swept)
        for seed, size in enumerate((1.0, 2.0))
    )
    found = [Detector(*both).predict(image, AFFINE, threshold=0.0) for both in ((fine, coarse), (coarse, fine))]
    assert same(*found, atol=1e-3)
    assert 4.99 < found[0].restored()["size_mm"].min() < 10


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close(folder: Path, image: np.ndarray, precision: str) -> None:
    full = Detector(folder / "one.ckpt").predict(image, AFFINE, threshold=0.0)
    half = Detector(folder / "one.ckpt", precision=precision).predict(image, AFFINE, threshold=0.0)
    assert not np.array_equal(full.scores, half.scores)  # it did happen
    assert np.abs(np.sort(full.scores)[-5:] - np.sort(half.scores)[-5:]).max() < 0.03


def test_half_precision_becomes_single_on_a_cpu_without_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = torch.load(folder / "one.ckpt", weights_only=True)
    for trained, has_bf16, used in (
        ("16-mixed", True, "32"), ("bf16-mixed", True, "bf16"), ("bf16-mixed", False, "32"), ("32-true", False, "32"),
    ):  # fmt: skip
        monkeypatch.setattr("pretrain3d.devices.cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        checkpoint["pretrain3d"]["precision"] = trained
        torch.save(checkpoint, tmp_path / "half.ckpt")
        assert Detector(tmp_path / "half.ckpt", device="cpu").members[0].precision == used
    assert Detector(tmp_path / "half.ckpt", precision="fp16", device="cpu").members[0].precision == "fp16"


def test_mirrored_views_are_merged(folder: Path, image: np.ndarray) -> None:
    mirrored = Detector(folder / "one.ckpt", mirror_axes=(0,))
    assert not same(mirrored.predict(image, AFFINE), Detector(folder / "one.ckpt").predict(image, AFFINE))
    with pytest.raises(UserError, match=r"mirror_axes is \[3\]"):
        Detector(folder / "one.ckpt", mirror_axes=[3])


def test_what_a_sweep_stored_is_used(folder: Path, image: np.ndarray, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "swept.ckpt")
    with pytest.raises(UserError, match="no operating point"):
        Detector(checkpoint).predict(image, AFFINE, threshold="operating")
    before = read_checkpoint(checkpoint)
    store_inference(checkpoint, SWEPT)
    after = read_checkpoint(checkpoint)
    assert after[NOTE] == {**before[NOTE], "inference": SWEPT}
    assert all(torch.equal(after["state_dict"][key], value) for key, value in before["state_dict"].items())
    assert [file.name for file in tmp_path.iterdir()] == ["swept.ckpt"]
    detector = Detector(checkpoint)
    assert detector.members[0].merging == Merging(view_iou=0.2, tile_iou=0.3)
    assert detector.operating_threshold == 0.4
    found = detector.predict(image, AFFINE, threshold="operating")
    assert len(found) == (detector.predict(image, AFFINE, threshold=0.0).scores >= 0.4).sum()
    with pytest.raises(UserError, match=r"one\.ckpt merges with .*`pretrain3d sweep RUN RUN \.\.\.` makes them one"):
        Detector(checkpoint, folder / "one.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "device is 'gpu'; expected cpu, cuda or cuda:0"),
        ({"device": "mps"}, "device is 'mps'; expected cpu, cuda or cuda:0"),
        ({"device": "cuda:99"}, "device is 'cuda:99', but there is (no|only [0-9]+) GPU here"),
        ({"overlap": 1.0}, r"overlap is 1\.0; expected a number from 0"),
        ({"overlap": "0.5"}, r"overlap is '0\.5'; expected a number from 0"),
        ({"mirror_axes": [0, 0]}, r"mirror_axes is \[0, 0\]; expected a list of some of 0, 1, 2"),
        ({"mirror_axes": [True]}, "mirror_axes is "),
        ({"tile_batch": 0}, "tile_batch is 0; expected a whole number from 1 on"),
    ],
)
def test_mistakes_of_a_detector(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Detector(folder / "one.ckpt", **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: (image[:0], AFFINE), r"an image is numbers \(X, Y, Z\) or \(C, X, Y, Z\), got int16 \(0, "),
        (lambda image: (image.astype(complex), AFFINE), "an image is numbers"),
        (lambda image: (image * 1e300, AFFINE), "image: values from .* which float32 does not hold"),
        (lambda image: (np.where(image > 0, np.nan, image), AFFINE), "image: .* voxels are NaN or infinite"),
        (lambda image: (image, "x"), "affine is 'x'; expected"),
        (
            lambda image: (image, AFFINE * 2),
            "image: the affine is no invertible 4 x 4 matrix of finite numbers above 0, 0, 0, 1",
        ),
        (lambda image: (image, AFFINE[:3, :3]), "image: the affine is no invertible 4 x 4 matrix"),
        (
            lambda image: (image, AFFINE @ np.diag([1e3, 1e3, 1e3, 1])),
            r"image: \(18000, 18000, 18000\) voxels at spacing_mm=\[1.0, 1.0, 1.0\] are too many; "
            r"are the file's own of \[1000.0, 1000.0, 1500.0\] mm right\?",
        ),
        (  # no side of more than 4,096 voxels, but 22 GiB
            lambda image: (image, AFFINE @ np.diag([1e2, 1e2, 1e2, 1])),
            r"image: \(1800, 1800, 1800\) voxels at spacing_mm=\[1.0, 1.0, 1.0\] are too many; ",
        ),
        (lambda image: (torch.from_numpy(image), AFFINE), "a file, a list of files .* or a numpy array, got a Tensor"),
        (lambda image: (None, None), "a file, a list of files .* or a numpy array, got a NoneType"),
        (lambda image: ([image], AFFINE), "a file, a list of files .* or a numpy array, got a ndarray"),
        (lambda image: ("scan.nii.gz", AFFINE), "affine goes with an array; a file has its own"),
    ],
)
def test_mistakes_of_an_image(folder: Path, image: np.ndarray, change: Any, message: str) -> None:
    changed, affine = change(image)
    with pytest.raises(UserError, match=message):
        Detector(folder / "one.ckpt").predict(changed, affine)


@pytest.mark.parametrize("threshold", [None, True, float("nan"), 2, "high", [0.5]])
def test_a_threshold_that_is_no_score(folder: Path, image: np.ndarray, threshold: Any) -> None:
    with pytest.raises(UserError, match=r"threshold is .*; expected a score from 0 to 1, or operating"):
        Detector(folder / "one.ckpt").predict(image, AFFINE, threshold=threshold)


def test_a_run_folder_stands_for_its_last_checkpoint(folder: Path, image: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"holds no checkpoints/last\.ckpt; is it the folder of a run\?"):
        Detector(tmp_path)
    shutil.copy(folder / "one.ckpt", tmp_path / "checkpoints" / "last.ckpt")
    found, expected = (Detector(path).predict(image, AFFINE) for path in (tmp_path, folder / "one.ckpt"))
    assert np.array_equal(found.boxes, expected.boxes) and np.array_equal(found.scores, expected.scores)
    with pytest.raises(UserError, match="is given twice"):
        Detector(tmp_path, tmp_path / "checkpoints" / "last.ckpt")


def test_what_does_not_fit_is_named(folder: Path, image: np.ndarray, tmp_path: Path) -> None:
    detector = Detector(folder / "one.ckpt")
    flat = save(tmp_path / "flat.nii.gz", image[..., 0], AFFINE)
    with pytest.raises(UserError, match=r"flat\.nii\.gz: expected a 3D volume, got shape \(26, 24\)"):
        detector.predict(flat)
    with pytest.raises(UserError, match=r"image: 2 channels; 1 are needed: CT"):
        detector.predict(np.stack([image, image]), AFFINE)
    with pytest.raises(UserError, match=r"scan\.nii\.gz: 2 channels; 1 are needed: CT"):
        detector.predict([folder / "scan.nii.gz"] * 2)
    with pytest.raises(UserError, match="an array needs its affine"):
        detector.predict(image)
    with pytest.raises(UserError, match="precision is 'fp8'"):
        Detector(folder / "one.ckpt", precision="fp8")
    with pytest.raises(UserError, match=r"organs\.ckpt finds \['liver'\], .*one\.ckpt \['nodule', 'lesion'\]"):
        Detector(folder / "one.ckpt", tiny_checkpoint(tmp_path / "organs.ckpt", classes=("liver",)))


def test_a_network_that_gives_nan_is_said_so(folder: Path, tmp_path: Path) -> None:
    broken = read_checkpoint(folder / "one.ckpt")
    broken["state_dict"]["detector.classifier.output.bias"][0] = float("nan")
    torch.save(broken, tmp_path / "broken.ckpt")
    with pytest.raises(UserError, match=r"scan\.nii\.gz: the network's outputs are NaN in precision 32"):
        Detector(tmp_path / "broken.ckpt").predict(folder / "scan.nii.gz")


def test_the_command_writes_every_format(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found"
    formats = "json,csv,coco,nndetection,nifti,slicer,png"
    line = ["predict", str(folder / "one.ckpt"), str(folder / "other.ckpt"), str(folder / "scan.nii.gz")]
    assert main([*line, f"out={out}", f"format={formats}", "threshold=0.1", "tile_batch=2"]) == 0
    assert "in 1 of 1 images" in capsys.readouterr().out
    written = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert written == {"predictions.json", "predictions.csv", "coco.json", "nndetection/scan_boxes.npz",
                       "nifti/scan.nii.gz", "nifti/scan.json", "slicer/scan.mrk.json", "png/scan.png"}  # fmt: skip
    case = json.loads((out / "predictions.json").read_text())["cases"]["scan"]
    assert len(case["boxes"]) and min(case["scores"]) >= 0.1 and case["scores"] == sorted(case["scores"], reverse=True)


def test_what_is_odd_about_an_image_is_said_and_it_is_predicted(
    folder: Path, image: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "found"
    for name, voxels in (("fine", image), ("shifted", image + 1024), ("twice", image)):
        save(scans / f"{name}.nii.gz", voxels, AFFINE)
    twice = nib.load(scans / "twice.nii.gz")
    twice.set_qform(np.diag([1, 1, 1, 1]), 1)
    nib.save(twice, scans / "twice.nii.gz")
    assert main(["predict", str(folder / "one.ckpt"), str(scans), f"out={out}"]) == 0
    printed = capsys.readouterr()
    assert "in 3 of 3 images" in printed.out
    said = [line for line in printed.err.splitlines() if line.startswith("warning: ")]
    assert said == [
        f"warning: {scans / 'twice.nii.gz'}: {POSITIONS}", f"warning: {scans / 'shifted.nii.gz'}: {SHIFTED}",
    ]  # fmt: skip
    detector = Detector(folder / "one.ckpt")
    assert detector.predict(image, AFFINE).odd == () and detector.predict(image + 1024, AFFINE).odd == (SHIFTED,)


def test_channels_are_files_and_bad_files_do_not_stop_the_rest(
    image: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "two.ckpt", modality=("CT", "CT"))
    scans = tmp_path / "scans"
    out = scans / "found"
    for case in ("a", "b"):
        for channel in range(2):
            save(scans / f"{case}_{channel:04d}.nii.gz", image, AFFINE)
    (scans / "b_0001.nii.gz").write_bytes(b"nothing")
    assert main(["predict", str(checkpoint), str(scans), f"out={out}"]) == 1
    assert list(json.loads((out / "predictions.json").read_text())["cases"]) == ["a"]
    printed = capsys.readouterr()
    assert "in 1 of 2 images" in printed.out and "b_0001.nii.gz: not a readable NIfTI file" in printed.err
    (scans / "b_0001.nii.gz").write_bytes((scans / "b_0000.nii.gz").read_bytes())
    for _ in range(2):  # what the first call wrote is no image for the second
        assert main(["predict", str(checkpoint), str(scans), f"out={out}", "format=json,nifti"]) == 0
        assert list(json.loads((out / "predictions.json").read_text())["cases"]) == ["a", "b"]
    (scans / "b_0001.nii.gz").unlink()
    assert main(["predict", str(checkpoint), str(scans), f"out={out}"]) == 2
    assert "b_0001.nii.gz: no such file, a channel of" in capsys.readouterr().err


def test_a_file_of_all_channels_is_predicted_as_a_file_of_each(
    image: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "two.ckpt", modality=("CT", "CT"))
    scans = tmp_path / "scans"
    for channel in range(2):
        save(scans / f"a_{channel:04d}.nii.gz", image + 5 * channel, AFFINE)
    save(scans / "b.nii.gz", np.stack([image, image + 5], -1), AFFINE)
    detector = Detector(checkpoint)
    each = detector.predict([scans / "a_0000.nii.gz", scans / "a_0001.nii.gz"], threshold=0.0)
    assert len(each) and same(each, detector.predict(scans / "b.nii.gz", threshold=0.0))
    line = ["predict", str(checkpoint), str(scans), f"out={tmp_path / 'out'}", "threshold=0"]
    assert main(line) == 0
    cases = json.loads((tmp_path / "out" / "predictions.json").read_text())["cases"]
    assert set(cases) == {"a", "b"} and cases["a"]["boxes"] == cases["b"]["boxes"]
    save(scans / "c_0001.nii.gz", image, AFFINE)  # without its first channel, so not one of several
    save(scans / "d.nii.gz", np.stack([image] * 3, -1), AFFINE)
    capsys.readouterr()
    assert main(line) == 1
    one, three = capsys.readouterr().err.splitlines()[-2:]
    expected = "expected 2 channels, in files <case>_0000 to _0001 or in one of shape (X, Y, Z, 2), got shape"
    assert f"c_0001.nii.gz: {expected} {image.shape}" in one
    assert f"d.nii.gz: {expected} {(*image.shape, 3)}" in three
    save(scans / "a.nii.gz", np.stack([image, image], -1), AFFINE)
    with pytest.raises(UserError, match=r"a_0000\.nii\.gz: case 'a' occurs twice, also as .*a\.nii\.gz"):
        image_files(scans, 2, tmp_path / "out")


def test_images_may_lie_where_the_boxes_go(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    shutil.copy(folder / "scan.nii.gz", scans / "a.nii.gz")
    (scans / "b.nii.gz").mkdir()  # as some data sets are unpacked
    shutil.copy(folder / "scan.nii.gz", scans / "b.nii.gz" / "b.nii.gz")
    line = ["predict", str(folder / "one.ckpt")]
    for images, cases in ((scans / "a.nii.gz", ["a"]), (scans, ["a", "b.nii.gz-b"]), (scans, ["a", "b.nii.gz-b"])):
        assert main([*line, str(images), f"out={scans}", "format=json,nifti"]) == 0
        assert list(json.loads((scans / "predictions.json").read_text())["cases"]) == cases
    masks = scans / "nifti"
    before = (masks / "a.nii.gz").read_bytes()
    capsys.readouterr()
    assert main([*line, str(masks), f"out={scans}", "format=nifti"]) == 2  # would replace what it reads
    (error,) = capsys.readouterr().err.splitlines()
    assert f"format=nifti writes into {masks}, where images lie that it reads; name another out=" in error
    assert (masks / "a.nii.gz").read_bytes() == before


def test_an_operating_point_above_all_scores_finds_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "sure.ckpt")
    store_inference(checkpoint, {**SWEPT, "operating": {**OPERATING, "threshold": 1.0000005}})
    line = ["predict", str(checkpoint), str(folder / "scan.nii.gz"), f"out={tmp_path / 'out'}", "threshold=operating"]
    assert main(line) == 0
    assert "0 boxes from score 1 on in 1 of 1 images" in capsys.readouterr().out


def test_more_channels_than_the_detector_takes_are_refused(
    folder: Path, image: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = tiny_checkpoint(tmp_path / "two.ckpt", modality=("CT", "CT"))
    scans = tmp_path / "scans"
    for channel in range(3):
        save(scans / f"c_{channel:04d}.nii.gz", image, AFFINE)
    save(scans / "patient_0001.nii.gz", image, AFFINE)  # a name like any other: there is no patient_0000
    for checkpoint, takes in ((folder / "one.ckpt", 1), (two, 2)):
        assert main(["predict", str(checkpoint), str(scans), f"out={tmp_path / 'out'}"]) == 2
        said = f"case 'c' has 3 channels, _0000 to _0002; the detector takes {takes}."
        (error,) = capsys.readouterr().err.splitlines()
        assert said in error and not (tmp_path / "out").exists()
    for channel in (1, 2):
        (scans / f"c_{channel:04d}.nii.gz").unlink()
    assert list(image_files(scans, 1, tmp_path / "out")) == ["c", "patient_0001"]
    save(scans / "labelsTr" / "c.nii.gz", image, AFFINE)
    with pytest.raises(UserError, match=r"c\.nii\.gz: labelsTr holds labels, no images; give the images' own folder$"):
        image_files(scans, 1, tmp_path / "out")


def test_luna16_calls_a_series_as_its_file_whatever_its_folder(
    image: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, luna, out = tiny_checkpoint(tmp_path / "one.ckpt", ("nodule",)), tmp_path / "luna", tmp_path / "out"
    for subset, name in enumerate(("1.3.6.1", "1.3.6.2")):
        save(luna / f"subset{subset}" / f"{name}.nii.gz", image, AFFINE)
    line = ["predict", str(checkpoint), str(luna), f"out={out}", "threshold=0"]
    assert main([*line, "format=json,luna16"]) == 0
    assert list(json.loads((out / "predictions.json").read_text())["cases"]) == ["subset0-1.3.6.1", "subset1-1.3.6.2"]
    rows = [row.split(",") for row in (out / "luna16.csv").read_text().splitlines()[1:]]
    assert {row[0] for row in rows} == {"1.3.6.1", "1.3.6.2"}
    truth = tmp_path / "annotations.csv"
    truth.write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.3.6.1,0,0,0,5\n")
    (tmp_path / "seriesuids.csv").write_text("1.3.6.1\n1.3.6.2\n")
    assert main(["score", "protocol=luna16", f"predictions={out / 'luna16.csv'}", f"targets={truth}",
                 f"cases={tmp_path / 'seriesuids.csv'}", "samples=0"]) == 0  # fmt: skip
    save(luna / "subset9" / "1.3.6.2.nii.gz", image, AFFINE)
    capsys.readouterr()
    assert main([*line, "format=luna16"]) == 2
    assert "subset9/1.3.6.2.nii.gz would both be the series 1.3.6.2" in capsys.readouterr().err


def test_out_of_memory_names_the_file_and_what_to_lower(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(ResEnc, "forward", starved)
    line = ["predict", str(folder / "one.ckpt"), str(folder / "scan.nii.gz"), f"out={tmp_path}", "tile_batch=2"]
    assert main(line) == 1
    said = "not predicted: .*scan.nii.gz: out of memory with tiles of 16 x 16 x 16, 2 at once: try a lower tile_batch"
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert re.match(said, error)


def test_a_volume_for_which_the_memory_is_too_small_is_named_and_the_others_go_on(
    folder: Path, image: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(volume: RawVolume, where: Path, *rest: Any) -> Any:
        if where.name == "a.nii.gz":
            raise MemoryError("Unable to allocate 31.6 GiB")
        return prepare_volume(volume, where, *rest)

    monkeypatch.setattr(api, "prepare_volume", starved)
    for name in ("a", "b"):
        save(tmp_path / "scans" / f"{name}.nii.gz", image, AFFINE)
    out = tmp_path / "out"
    assert main(["predict", str(folder / "one.ckpt"), str(tmp_path / "scans"), f"out={out}"]) == 1
    said = capsys.readouterr()
    assert "not predicted: " in said.err and "a.nii.gz: out of memory (Unable to allocate 31.6 GiB)" in said.err
    assert "in 1 of 2 images" in said.out and list(json.loads((out / "predictions.json").read_text())["cases"]) == ["b"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["format=jsn"], "unknown format 'jsn', did you mean 'json'?"),
        (["format=luna16"], "format=luna16 is for one class, this detector has nodule, lesion"),
        (["threshold=high"], "threshold=high: expected a score from 0 to 1, or operating"),
        (["threshold=operating"], "no operating point"),
        (["precision=64"], "precision is '64'; expected one of 32, bf16, fp16"),
        (["mirror_axes=3"], "mirror_axes is 3; expected a list of some of 0, 1, 2"),
        (["tile_batch=0"], "tile_batch is 0; expected a whole number from 1 on"),
        (["mirror_axes=[[1]]"], "mirror_axes is [[1]]; expected a list of some of 0, 1, 2"),
        ([f"out={__file__}"], "test_api.py is a file; expected the name of a folder"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    paths = [str(folder / "one.ckpt"), str(folder / "scan.nii.gz")]
    out = [] if options[0].startswith("out=") else [f"out={tmp_path / 'out'}"]
    assert main(["predict", *paths, *out, *options]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert line in error and not (tmp_path / "out").exists()


def test_a_checkpoint_is_in_an_ensemble_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(folder / name) for name in ("one.ckpt", "other.ckpt", "one.ckpt", "scan.nii.gz")]
    assert main(["predict", *paths, f"out={tmp_path / 'out'}"]) == 2
    assert "one.ckpt is given twice" in capsys.readouterr().err


def test_where_nothing_could_be_read_no_table_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, out = tmp_path / "broken.nii.gz", tmp_path / "out"
    broken.write_bytes(b"no image")
    assert main(["predict", str(folder / "one.ckpt"), str(broken), f"out={out}"]) == 1
    assert "not predicted: " in capsys.readouterr().err and not any(out.iterdir())


@pytest.mark.slow
def test_the_package_alone_stays_light() -> None:
    script = "import pretrain3d, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
