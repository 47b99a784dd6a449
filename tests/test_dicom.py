"""DICOM series: the same voxels in the same place as NIfTI, whatever is wrong with a folder in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from raw_folder import affine_of, ct_phantom, save
from scipy.spatial.transform import Rotation
from tiny_detector import tiny_checkpoint

from pretrain3d.__main__ import main
from pretrain3d.config import UserError
from pretrain3d.data.prepare import prepare
from pretrain3d.data.readers import dicom, volumes
from pretrain3d.data.readers.images import Images
from pretrain3d.data.store import Store

SERIES = "1.2.826.0.1.3680043.8.498.1"


@pytest.fixture
def itk() -> Any:
    return pytest.importorskip("SimpleITK", reason="SimpleITK is not installed: pip install 'pretrain3d[itk]'")


def oblique(spacing_mm: tuple[float, ...] = (0.7, 0.9, 2.5)) -> np.ndarray:
    affine = affine_of("LPS", spacing_mm)
    affine[:3, :3] = Rotation.from_euler("xyz", (20, -10, 30), degrees=True).as_matrix() @ affine[:3, :3]
    return affine


def write_slice(itk: Any, path: Path, layer: np.ndarray, affine: np.ndarray, z: int, **tags: str) -> None:
    """(X, Y) int16 HU as slice ``z`` of a grid with an affine to RAS mm; stored with an intercept of -1024."""
    lps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3]
    step = np.linalg.norm(lps[:, :2], axis=0)
    place, axes = lps @ [0, 0, z, 1], (lps[:, :2] / step).T
    image = itk.GetImageFromArray(layer.T[None].astype(np.int16))
    image.SetSpacing((*map(float, step), 1.0))
    image.SetOrigin([float(value) for value in place])
    image.SetDirection(np.column_stack([*axes, np.cross(*axes)]).ravel().tolist())
    values = {
        "0008|0060": "CT", "0020|000e": SERIES, "0018|0050": "9", "0028|1052": "-1024", "0028|1053": "1",
        "0020|0032": "\\".join(f"{value:.10g}" for value in place),
        "0020|0037": "\\".join(f"{value:.10g}" for value in axes.ravel()),
        **{key.replace("_", "|"): value for key, value in tags.items()},
    }  # fmt: skip
    for key, value in values.items():
        image.SetMetaData(key, value)
    writer = itk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(path))
    writer.Execute(image)


def write_series(itk: Any, folder: Path, voxels: np.ndarray, affine: np.ndarray, **tags: str) -> Path:
    """A series whose names do not follow the positions."""
    folder.mkdir(parents=True)
    for z in range(voxels.shape[2]):
        write_slice(itk, folder / f"{(z * 7) % voxels.shape[2]:03d}.dcm", voxels[..., z], affine, z, **tags)
    return folder


@pytest.fixture
def voxels() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 2000, (7, 5, 6)).astype(np.int16)


@pytest.mark.parametrize("sheared", [False, True])
def test_a_series_is_the_same_volume_as_nifti(itk: Any, tmp_path: Path, voxels: np.ndarray, sheared: bool) -> None:
    affine = oblique()
    if sheared:  # a tilted gantry: slices move along their own rows
        affine[:3, 2] += 0.8 * affine[:3, 1]
    folder = write_series(itk, tmp_path / "series", voxels, affine)
    (folder / "LICENSE").write_text("free")
    (folder / ".hidden.dcm").write_text("left over")
    got, got_affine = volumes.read_image(folder)
    flip = bool(np.dot(got_affine[:3, 2], affine[:3, 2]) < 0)  # the direction in which slices are stacked is free
    np.testing.assert_array_equal(got[..., ::-1] if flip else got, voxels)
    expected = affine.copy()
    if flip:
        expected[:3, 2], expected[:3, 3] = -affine[:3, 2], (affine @ [0, 0, voxels.shape[2] - 1, 1])[:3]
    np.testing.assert_allclose(got_affine, expected, atol=1e-6)
    assert volumes.read_geometry(folder)[1] == voxels.shape and got.dtype.kind == "i"
    assert len(volumes.files_of(folder)) == voxels.shape[2]


def test_every_slice_has_a_scale_of_its_own(itk: Any, tmp_path: Path) -> None:
    """As PET has: what is stored differs by slice, the values do not."""
    folder = tmp_path / "pet"
    folder.mkdir()
    for z, slope in enumerate(("1", "3", "2")):
        tags = {"0008_0060": "PT", "0028_1053": slope, "0028_1052": "0"}
        write_slice(itk, folder / f"{z}.dcm", np.full((4, 4), 12 * (z + 1)), np.diag([-1, -1, 1, 1]), z, **tags)
    stored = [itk.ReadImage(str(folder / f"{z}.dcm")).GetMetaData("0028|1053").strip() for z in range(3)]
    assert stored == ["1", "3", "2"]
    np.testing.assert_array_equal(volumes.read_image(folder)[0], np.broadcast_to([12, 24, 36], (4, 4, 3)))


def test_real_series(itk: Any, testdata: Path) -> None:
    """JPEG 2000 slices that say 3 mm thickness, 2 mm apart; a mask drawn on it is the reference."""
    folder = testdata / "data" / "totalsegmentator_examples" / "ct_dicom_20slices"
    image, affine = volumes.read_image(folder / "dicom")
    mask = nib.load(folder / "example_seg_dicom.nii.gz")
    mirrored = affine @ np.array([[1, 0, 0, 0], [0, -1, 0, 511], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(mirrored, mask.affine, atol=1e-4)
    assert image.shape == mask.shape and affine[2, 2] == 2
    assert (image.min(), image.max(), image.dtype) == (-1024, 1839, np.int16)
    organs = image[:, ::-1][np.asarray(mask.dataobj) > 0]
    assert -200 < np.percentile(organs, 5) < np.median(organs) < 200  # HU of soft tissue; most of the image is air
    small = testdata / "data" / "dcmqi" / "segmentations" / "24x38x3"
    other_affine, other_shape = volumes.read_geometry(small / "nrrd" / "label.nrrd")
    affine, shape = volumes.read_geometry(small / "image")
    assert shape == other_shape
    np.testing.assert_allclose(affine, other_affine, atol=1e-6)


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def test_what_is_wrong_with_a_series_is_said_with_its_name(itk: Any, tmp_path: Path, voxels: np.ndarray) -> None:
    def said(name: str) -> str:
        with pytest.raises(UserError) as error:
            volumes.read_image(tmp_path / name)
        assert "\n" not in str(error.value)
        return str(error.value)

    def series(name: str) -> Path:
        return write_series(itk, tmp_path / name, voxels, np.diag([1, 1, 2.5, 1]))

    at = {z: f"{(z * 7) % 6:03d}.dcm" for z in range(6)}
    series("gap").joinpath(at[3]).unlink()
    assert f"gap: its slices are not evenly spaced, 5 mm between {at[2]} and {at[4]}, 2.5 mm elsewhere" in said("gap")
    write_slice(itk, series("twice") / "again.dcm", voxels[..., 2], np.diag([1, 1, 2.5, 1]), 2)
    assert f"{at[2]} and " in said("twice") and "lie in the same place" in said("twice")
    write_slice(itk, series("two") / "b.dcm", voxels[..., 2], np.diag([1, 1, 2.5, 1]), 6, **{"0020_000e": "1.2"})
    assert "two: slices of 2 series; give each series a folder of its own" in said("two")
    write_slice(itk, series("size") / "z.dcm", voxels[:5, :, 2], np.diag([1, 1, 2.5, 1]), 6)
    assert "z.dcm: another size, voxel size or direction than" in said("size")
    write_slice(itk, series("turned") / "z.dcm", voxels[..., 2], oblique((1, 1, 2.5)), 6)
    assert "z.dcm: another size, voxel size or direction than" in said("turned")
    remove(series("one"), *(at[z] for z in range(1, 6)))
    assert "one: 1 DICOM slices; a volume needs two at least" in said("one")
    series("text").joinpath(at[0]).write_text("<html>not found</html>")
    assert f"{at[0]}: not a DICOM file, among the slices of" in said("text")
    cut(series("short") / at[4], 0.99)
    assert f"{at[4]}: not a readable DICOM image, or cut off" in said("short")
    cut(series("header") / at[4], 0.3)
    assert f"{at[4]}: not a readable DICOM image, or cut off" in said("header")


def test_what_is_no_slice_is_refused(itk: Any, testdata: Path) -> None:
    folder = testdata / "data" / "dcmqi" / "segmentations" / "24x38x3"
    for name, problem in (("seg", "label.seg: a SEG of 3 frames"), ("multiframe", "mf.dcm: a CT of 3 frames")):
        with pytest.raises(UserError, match=problem):
            volumes.read_image(folder / name)


def test_without_simpleitk_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "1.dcm").write_bytes(bytes(128) + dicom.MAGIC)
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    line = ["prepare", str(tmp_path / "raw"), f"out={tmp_path / 'store'}", "reader=images", "modality=CT"]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "1.dcm needs SimpleITK: pip install 'pretrain3d[itk]'" in said


def test_prepare_takes_series_beside_files(itk: Any, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "store"
    image = ct_phantom(np.random.default_rng(0))
    series = write_series(itk, raw / "patient" / "study" / "chest", image, oblique((1.0, 1.0, 1.5)))
    save(raw / "scan.nii.gz", image, oblique((1.0, 1.0, 1.5)))
    reader = Images(raw)
    reader.modality = ["CT"]
    summary = prepare(reader, out, (1.5, 1.5, 1.5), workers=1, progress=False)
    assert summary.done == ["patient-study-chest", "scan"]
    one, other = (Store(out).cases[name] for name in summary.done)
    assert one.shape == other.shape and one.id != other.id
    images = [Store(out).read(case.id, "image", (0, 0, 0), case.shape) for case in (one, other)]
    np.testing.assert_array_equal(*images)

    write_slice(itk, series / "000.dcm", image[..., 0] + 1, oblique((1.0, 1.0, 1.5)), 0)
    again = prepare(reader, out, (1.5, 1.5, 1.5), workers=1, progress=False)
    assert again.reused == ["scan"]


def test_predict_takes_a_series(itk: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    image, affine = ct_phantom(np.random.default_rng(0), (26, 24, 16)), oblique((1.0, 1.0, 1.5))
    checkpoint = tiny_checkpoint(tmp_path / "one.ckpt")
    series = write_series(itk, tmp_path / "studies" / "scan", image, affine)
    save(tmp_path / "scan.nii.gz", image, affine)
    found = []
    monkeypatch.chdir(series)
    for index, name in enumerate((tmp_path / "scan.nii.gz", series, series.parent, ".")):
        out = tmp_path / f"out{index}"
        assert (
            main(["predict", str(checkpoint), str(name), f"out={out}", "format=json,nifti,slicer", "threshold=0"]) == 0
        )
        found.append(json.loads((out / "predictions.json").read_text())["cases"]["scan"])
        mask = nib.load(out / "nifti" / "scan.nii.gz")
        assert mask.shape == image.shape
    assert len(found[0]["boxes"]) > 20
    for other in found[1:]:
        np.testing.assert_allclose(found[0]["scores"], other["scores"], atol=1e-3)
        np.testing.assert_allclose(found[0]["center_mm"], other["center_mm"], atol=1e-3)
    capsys.readouterr()
    assert main(["predict", str(checkpoint), str(series / "000.dcm"), f"out={tmp_path / 'file'}"]) == 2
    assert "000.dcm is not an image file" in capsys.readouterr().err
