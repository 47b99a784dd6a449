"""MetaImage and NRRD: the same voxels in the same place as NIfTI, whatever is wrong with a file in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from raw_folder import affine_of, ct_phantom, save, write_case, write_dataset
from scipy.spatial.transform import Rotation
from tiny_detector import tiny_checkpoint

from pretrain3d.__main__ import main
from pretrain3d.config import UserError
from pretrain3d.data.prepare import prepare
from pretrain3d.data.readers import volumes
from pretrain3d.data.readers.images import Images
from pretrain3d.data.readers.nndetection import NnDetection
from pretrain3d.data.store import Store

HEADER = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = {matrix}
Offset = {offset}
ElementSpacing = {spacing}
DimSize = {size}
ElementType = MET_SHORT
ElementDataFile = {data}
"""


@pytest.fixture
def itk() -> Any:
    return pytest.importorskip("SimpleITK", reason="SimpleITK is not installed: pip install 'pretrain3d[itk]'")


def text(values: Any) -> str:
    return " ".join(f"{value:.17g}" for value in np.ravel(values))


def write_mhd(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    """(X, Y, Z) int16 voxels with an affine to RAS mm as .mhd and .raw, by hand."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    raw = path.with_suffix(".raw")
    path.write_text(HEADER.format(
        matrix=text((lps[:, :3] / spacing).T), offset=text(lps[:, 3]), spacing=text(spacing), size=text(voxels.shape),
        data=raw.name,
    ))  # fmt: skip
    raw.write_bytes(voxels.astype("<i2").tobytes(order="F"))
    return path


def oblique(axes: str = "LPS", spacing_mm: tuple[float, ...] = (0.7, 0.9, 2.5)) -> np.ndarray:
    affine = affine_of(axes, spacing_mm)
    affine[:3, :3] = Rotation.from_euler("xyz", (20, -10, 30), degrees=True).as_matrix() @ affine[:3, :3]
    return affine


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr"])
def test_every_format_is_the_same_volume_as_nifti(itk: Any, tmp_path: Path, suffix: str, compressed: bool) -> None:
    voxels = np.random.default_rng(0).integers(-1000, 1000, (7, 6, 5)).astype(np.int16)  # z, y, x
    turned = Rotation.from_euler("xyz", (20, -100, 30), degrees=True).as_matrix()
    for direction in (np.eye(3), np.diag([-1.0, -1.0, 1.0]), turned, turned * [1, 1, -1]):
        image = itk.GetImageFromArray(voxels)
        image.SetSpacing((0.7, 0.9, 2.5))
        image.SetOrigin((11.0, -22.0, 33.0))
        image.SetDirection(direction.ravel().tolist())
        path = tmp_path / f"a{suffix}"
        itk.WriteImage(image, str(path), compressed)
        itk.WriteImage(image, str(tmp_path / "a.nii.gz"))
        read, affine = volumes.read_image(path)
        same, same_affine = volumes.read_image(tmp_path / "a.nii.gz")  # through nibabel; its affine is float32
        assert read.dtype == np.int16 and read.shape == (5, 6, 7)
        np.testing.assert_array_equal(read, same)
        np.testing.assert_allclose(affine, same_affine, atol=1e-5)
        point = np.array(image.TransformIndexToPhysicalPoint((4, 3, 2))) * [-1, -1, 1]
        np.testing.assert_allclose(affine @ [4, 3, 2, 1], [*point, 1], atol=1e-12)
        geometry, shape = volumes.read_geometry(path)
        assert shape == (5, 6, 7) and np.array_equal(geometry, affine)


@pytest.mark.parametrize(
    ("space", "sign"),
    [("left-posterior-superior", -1), ("right-anterior-superior", 1), ("RAS", 1), ("scanner-xyz", -1)],
)
def test_the_space_of_a_nrrd_file_counts(itk: Any, tmp_path: Path, space: str, sign: int) -> None:
    (tmp_path / "a.nrrd").write_bytes(
        b"NRRD0004\ntype: short\ndimension: 3\nspace: " + space.encode() + b"\nsizes: 2 3 4\n"
        b"space directions: (1,0,0) (0,2,0) (0,0,3)\nendian: little\nencoding: raw\nspace origin: (5,6,7)\n\n"
        + np.arange(24, dtype="<i2").tobytes()
    )
    voxels, affine = volumes.read_image(tmp_path / "a.nrrd")
    assert voxels[1, 2, 3] == 23 and voxels[1, 0, 0] == 1
    np.testing.assert_array_equal(
        affine[:3], np.array([[1, 0, 0, 5], [0, 2, 0, 6], [0, 0, 3, 7]]) * np.c_[[sign, sign, 1]]
    )


def test_real_nrrd_files(itk: Any, testdata: Path, tmp_path: Path) -> None:
    folder = testdata / "data" / "pyradiomics"
    for name in ("brain1", "breast1"):
        image = folder / f"{name}_image.nrrd"
        voxels, affine = volumes.read_image(image)
        itk.WriteImage(itk.ReadImage(str(image)), str(tmp_path / "same.nii.gz"))
        same = nib.load(tmp_path / "same.nii.gz")
        np.testing.assert_array_equal(voxels, np.asarray(same.dataobj))
        np.testing.assert_allclose(affine, same.affine, atol=1e-5)
        mask = volumes.read_mask(folder / f"{name}_label.nrrd", image)
        assert mask.dtype == np.uint8 and mask.any() and mask.shape == voxels.shape
    cases = Images(folder).cases()
    assert len(cases) == 10 and Images(folder).read(cases[0]).image.shape == (1, 256, 256, 25)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-200] ^= 4
    path.write_bytes(content)


def say(path: Path, old: str, new: str) -> None:
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))


DAMAGE = [
    ("a.mhd", False, "a.raw", Path.unlink, "a.raw: no such file; the voxels of "),
    ("a.mhd", False, "a.raw", cut, "a.raw: cannot read the voxels, the file is damaged (it ends too early, after"),
    ("a.mhd", True, "a.zraw", cut, "a.zraw: cannot read the voxels, the file is damaged (it ends too early"),
    ("a.mhd", True, "a.zraw", flip, "a.zraw: cannot read the voxels, the file is damaged (Error -3"),
    ("a.mha", False, "a.mha", cut, "a.mha: cannot read the voxels, the file is damaged (it ends too early, after"),
    ("a.mha", True, "a.mha", flip, "a.mha: cannot read the voxels, the file is damaged (Error -3"),
    ("a.mhd", False, "a.mhd", Path.unlink, "a.mhd: no such file"),
    ("a.mhd", False, "a.mhd", lambda p: p.write_bytes(b"no image"), "a.mhd: not a readable MetaImage or NRRD file (it"),
    ("a.mhd", False, "a.mhd", lambda p: say(p, "DimSize = 20", "DimSize = x"), "a.mhd: not a readable MetaImage or"),
    ("a.mhd", False, "a.mhd", lambda p: say(p, "a.raw", "a%03d.raw 1 9 1"), "a.mhd: its voxels are in numbered files"),
    ("a.mhd", False, "a.mhd", lambda p: say(p, "= 1 0 0", "= 0 0 0"), "a.mhd: cannot read the voxels"),
    ("a.nrrd", False, "a.nrrd", lambda p: say(p, "left-posterior", "left-anterior"), "its space is left-anterior-"),
    ("a.nrrd", False, "a.nrrd", cut, "a.nrrd: cannot read the voxels, the file is damaged"),
    ("a.nrrd", True, "a.nrrd", flip, "a.nrrd: cannot read the voxels, the file is damaged"),
    ("a.nhdr", False, "a.raw", Path.unlink, "a.raw: no such file; the voxels of "),
    ("a.nhdr", True, "a.raw.gz", cut, "a.nhdr: cannot read the voxels, the file is damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "compressed", "spoiled", "spoil", "said"), DAMAGE)
def test_what_is_wrong_with_a_file_is_said_with_its_name(
    itk: Any, tmp_path: Path, capfd: Any, name: str, compressed: bool, spoiled: str, spoil: Any, said: str
) -> None:
    voxels = np.random.default_rng(0).integers(-1000, 1000, (9, 10, 20)).astype(np.int16)
    itk.WriteImage(itk.GetImageFromArray(voxels), str(tmp_path / name), compressed)
    volumes.read_image(tmp_path / name)
    spoil(tmp_path / spoiled)
    with pytest.raises(UserError) as error:
        volumes.read_image(tmp_path / name)
    assert said in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert "data not read" not in capfd.readouterr().err  # said once, not by the library too


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_only_volumes_of_single_values_are_images(itk: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    for shape, vector, said in (
        ((4, 5, 6, 2), True, "every voxel is a vector of 2 values"),
        ((2, 4, 5, 6), False, "expected a 3D volume, got shape (6, 5, 4, 2)"),
        ((4, 5), False, "expected a 3D volume, got shape (5, 4)"),
    ):
        itk.WriteImage(itk.GetImageFromArray(np.zeros(shape, np.int16), isVector=vector), str(path))
        with pytest.raises(UserError) as error:
            volumes.read_image(path)
        assert said in str(error.value) and str(path) in str(error.value)
    itk.WriteImage(itk.GetImageFromArray(np.ones((1, 4, 5, 6), np.float64), isVector=False), str(path))
    voxels, affine = volumes.read_image(path)  # trailing axes of length 1 are no axes
    assert voxels.shape == (6, 5, 4) and voxels.dtype == np.float32
    np.testing.assert_array_equal(affine, np.diag([-1, -1, 1, 1]))


def test_slices_in_a_list_of_files(itk: Any, tmp_path: Path) -> None:
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4, order="F")
    path = write_mhd(tmp_path / "a.mhd", voxels, np.eye(4))
    for z in range(4):
        (tmp_path / f"{z}.raw").write_bytes(voxels[..., z].tobytes(order="F"))
    (tmp_path / "a.raw").unlink()
    say(path, "a.raw", "LIST\n0.raw\n1.raw\n2.raw\n3.raw")
    assert volumes.files_of(path) == (path, *(tmp_path / f"{z}.raw" for z in range(4)))
    np.testing.assert_array_equal(volumes.read_image(path)[0], voxels)


def test_without_simpleitk_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    write_mhd(tmp_path / "raw" / "a.mhd", np.zeros((4, 5, 6), np.int16), np.eye(4))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    line = ["prepare", str(tmp_path / "raw"), f"out={tmp_path / 'store'}", "reader=images", "modality=CT"]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "a.mhd needs SimpleITK: pip install 'pretrain3d[itk]'" in said


def as_mhd(folder: Path) -> None:
    """NIfTI files of a folder, rewritten."""
    for path in folder.rglob("*.nii.gz"):
        image = nib.load(path)
        write_mhd(path.with_name(volumes.stem(path) + ".mhd"), np.asarray(image.dataobj), image.affine)
        path.unlink()


def test_the_nndetection_layout_in_metaimage_is_the_same_store(itk: Any, tmp_path: Path) -> None:
    image = ct_phantom(np.random.default_rng(0))
    mask = np.zeros(image.shape, np.uint8)
    mask[9:13, 8:12, 7:9] = 1
    stores = []
    for name in ("nii", "mhd"):
        write_dataset(tmp_path / name)
        for case in "ab":
            write_case(tmp_path / name, case, image + ord(case), mask, {1: 1}, oblique())
        if name == "mhd":
            as_mhd(tmp_path / name)
        out = tmp_path / f"{name}-store"
        prepare(NnDetection(tmp_path / name), out, (1.5, 1.5, 1.5), workers=1, progress=False)
        stores.append(Store(out))
    one, other = (store.cases["a"] for store in stores)
    assert one.content_hash == other.content_hash and one.shape == other.shape
    np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-5)
    np.testing.assert_allclose(one.frame.affine, other.frame.affine, atol=1e-5)

    raw = tmp_path / "mhd" / "imagesTr" / "a_0000.raw"
    raw.write_bytes((image + 7).astype("<i2").tobytes(order="F"))  # the header stays
    summary = prepare(NnDetection(tmp_path / "mhd"), out, workers=1, progress=False)
    assert (summary.done, summary.reused) == (["a"], ["b"])
    assert Store(out).cases["a"].content_hash != other.content_hash

    (tmp_path / "mhd" / "imagesTr" / "c_0000.raw").write_bytes(b"")
    with pytest.raises(UserError, match=r"c_0000\.raw: no case uses it"):
        NnDetection(tmp_path / "mhd").cases()


def test_predict_takes_any_format(itk: Any, tmp_path: Path) -> None:
    image, affine = ct_phantom(np.random.default_rng(0), (26, 24, 16)), oblique("LPI", (1.0, 1.0, 1.5))
    checkpoint = tiny_checkpoint(tmp_path / "one.ckpt")
    save(tmp_path / "scan.nii.gz", image, affine)
    write_mhd(tmp_path / "scan.mhd", image, affine)
    itk.WriteImage(itk.ReadImage(str(tmp_path / "scan.mhd")), str(tmp_path / "scan.mha"), True)
    found = {}
    for name in ("scan.nii.gz", "scan.mha"):
        out = tmp_path / f"of-{name}"
        line = ["predict", str(checkpoint), str(tmp_path / name), f"out={out}", "format=json,nifti", "threshold=0"]
        assert main(line) == 0
        case = json.loads((out / "predictions.json").read_text())["cases"]["scan"]
        found[name] = case, nib.load(out / "nifti" / "scan.nii.gz")
    (one, one_mask), (other, other_mask) = found.values()
    assert len(one["boxes"]) > 20
    for key in ("boxes", "center_mm", "size_mm", "axes", "scores"):
        np.testing.assert_allclose(one[key], other[key], atol=1e-3)
    np.testing.assert_allclose(one_mask.affine, other_mask.affine, atol=1e-5)
    assert one_mask.shape == other_mask.shape == image.shape
