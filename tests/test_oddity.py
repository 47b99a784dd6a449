"""Files that are unlikely to be the image that they are taken for are used, and said."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from raw_folder import affine_of, ct_phantom, save

from pretrain3d.__main__ import main
from pretrain3d.data.oddity import LABELS, POSITIONS, SHIFTED, oddities
from pretrain3d.data.readers import volumes

AFFINE = affine_of("LPS", (1.5, 1.5, 3.0))


def two_affines(path: Path, voxels: np.ndarray, sform: np.ndarray, qform: np.ndarray, codes: tuple[int, int]) -> Path:
    image = nib.Nifti1Image(voxels, sform)
    image.set_sform(sform, codes[0])
    image.set_qform(qform, codes[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def changed(**changes: float) -> np.ndarray:
    affine = AFFINE.copy()
    for key, value in changes.items():
        row, column = map(int, key.removeprefix("at"))
        affine[row, column] = value
    return affine


@pytest.mark.parametrize(
    ("qform", "codes", "said"),
    [
        (AFFINE, (1, 1), False),
        (changed(at03=AFFINE[0, 3] + 0.1), (1, 1), False),  # a fifteenth of a voxel
        (changed(at03=AFFINE[0, 3] + 0.3), (1, 1), True),
        (changed(at22=3.2), (2, 1), True),
        (affine_of("RPS", (1.5, 1.5, 3.0)), (1, 1), True),
        (affine_of("RPS", (1.5, 1.5, 3.0)), (0, 1), False),  # the qform is taken and nothing contradicts it
        (affine_of("RPS", (1.5, 1.5, 3.0)), (1, 0), False),
    ],
)
def test_a_header_that_places_the_voxels_twice(qform, codes, said, tmp_path):
    path = two_affines(tmp_path / "a.nii.gz", ct_phantom(np.random.default_rng(0)), AFFINE, qform, codes)
    assert volumes.has_two_positions(path) == said
    taken = volumes.read_image(path)[1]
    np.testing.assert_allclose(taken, AFFINE if codes[0] else qform, atol=1e-5)


def test_a_rotated_header_is_not_odd_by_rounding(tmp_path):
    rotation = nib.eulerangles.euler2mat(0.3, -0.7, 1.1)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = rotation @ np.diag([0.7, 0.7, 1.25]), (-211.3, -180.7, 1033.9)
    path = two_affines(tmp_path / "a.nii", np.zeros((300, 300, 8), np.int16), affine, affine, (1, 1))
    assert not volumes.has_two_positions(path)


def test_a_quaternion_that_is_none_does_not_matter(tmp_path):
    path = two_affines(tmp_path / "a.nii", ct_phantom(np.random.default_rng(0)), AFFINE, AFFINE, (1, 1))
    header = bytearray(path.read_bytes())
    header[256:268] = np.array([1, 1, 1], "<f4").tobytes()  # quatern_b, c, d
    path.write_bytes(header)
    assert not volumes.has_two_positions(path)
    np.testing.assert_allclose(volumes.read_image(path)[1], AFFINE)


def masks() -> dict[str, np.ndarray]:
    mask = np.zeros((40, 40, 30), np.uint8)
    mask[10:20, 5:15, 8:20] = 1
    many = np.kron(np.arange(125).reshape(5, 5, 5), np.ones((8, 8, 6), np.int16))
    return {"binary": mask, "float": mask * np.float32(7), "125 labels": many}


def images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    ct = ct_phantom(rng, (40, 40, 30)).astype(np.float32)
    skull = np.where(
        rng.random((40, 40, 30)) < 0.04, rng.uniform(300, 2000, (40, 40, 30)), rng.uniform(0, 80, ct.shape)
    )
    return {
        "CT": ct,
        "soft tissue alone": rng.normal(40, 20, ct.shape),
        "bone beside soft tissue, clipped at 0": skull,
        "in 0..1": (ct + 1000) / 2000,
        "8 bit": np.rint((ct.clip(-160, 240) + 160) / 400 * 255).astype(np.uint8),
        "two values, not whole": np.where(ct > 0, 0.5, 0.25),
        "two values, below 0": np.where(ct > 0, 0, -1000).astype(np.int16),
    }


@pytest.mark.parametrize("name", list(masks()))
def test_a_label_map_is_odd(name):
    assert oddities(None, masks()[name][None], ["MR"]) == [LABELS]


@pytest.mark.parametrize("name", list(images()))
def test_an_image_is_not_odd(name):
    assert oddities(None, images()[name][None], ["CT"]) == []


@pytest.mark.parametrize("added", [1000, 1024])
def test_a_ct_without_its_intercept_is_odd(added):
    ct = ct_phantom(np.random.default_rng(0), (40, 40, 30))[None] + added
    assert oddities(None, ct, ["CT"]) == [SHIFTED]
    assert oddities(None, ct, ["MR"]) == []
    assert oddities(None, np.concatenate([ct - added, ct]), ["MR", "CT"]) == [SHIFTED]


@pytest.mark.skipif("PRETRAIN3D_TESTDATA" not in os.environ, reason="PRETRAIN3D_TESTDATA is not set")
def test_real_cts_are_not_odd_and_without_their_intercept_they_are():
    paths = sorted((Path(os.environ["PRETRAIN3D_TESTDATA"]) / "data" / "openkbp" / "imagesTr").glob("*.nii.gz"))[::20]
    assert len(paths) == 5
    for path in paths:
        image, _ = volumes.read_channels([path])
        assert oddities(path, image, ["CT"]) == []
        assert oddities(path, image + 1024, ["CT"]) == [SHIFTED]


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_names_the_files(workers, tmp_path, capfd):
    raw, rng = tmp_path / "raw", np.random.default_rng(2)
    for name in "abcde":
        image = ct_phantom(rng)
        save(raw / f"{name}.nii.gz", image, AFFINE)
        save(raw / f"{name}_seg.nii.gz", (image > 0).astype(np.uint8), AFFINE)
    save(raw / "shifted.nii.gz", ct_phantom(rng) + np.int16(1024), AFFINE)
    two_affines(raw / "twice.nii.gz", ct_phantom(rng), AFFINE, affine_of("RPS", (1.5, 1.5, 3.0)), (1, 1))
    line = ["prepare", str(raw), f"out={tmp_path / 'store'}", "reader=images", "modality=CT", f"workers={workers}"]
    assert main(line) == 0
    said = [each for each in capfd.readouterr().err.splitlines() if "warning" in each]
    segmentations = ", ".join(f"{raw}/{name}_seg.nii.gz" for name in "abc")
    assert [each.split("warning: ")[1] for each in said] == [
        f"{raw / 'twice.nii.gz'}: {POSITIONS}",
        f"{segmentations} and 2 more: {LABELS}",
        f"{raw / 'shifted.nii.gz'}: {SHIFTED}",
    ]
