import gzip
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from raw_folder import affine_of, ct_phantom, save, write_case, write_cases, write_dataset

from pretrain3d.__main__ import main
from pretrain3d.config import UserError
from pretrain3d.data.readers import READERS
from pretrain3d.data.readers.contract import Reader
from pretrain3d.data.readers.images import Images
from pretrain3d.data.readers.nndetection import NnDetection
from pretrain3d.data.readers.nnunet import NnUNet
from pretrain3d.data.readers.openkbp import DETECTION, GRID, LEFT_OUT, ORGANS, OpenKbp
from pretrain3d.data.readers.volumes import read_mask
from pretrain3d.registry import resolve

AFFINE = affine_of("LPS", (1.0, 1.0, 2.0))


@pytest.mark.parametrize("name", READERS)
def test_every_registered_reader_is_one(name):
    assert issubclass(resolve(READERS, name, "reader"), Reader)


def by_id(reader: Reader) -> dict:
    return {case.id: case for case in reader.cases()}


# nnDetection


def full_dataset(folder: Path) -> None:
    """Training, test with and without labels, unlabelled; two channels; organs."""
    write_dataset(
        folder,
        modalities={"0": "MR", "1": "MR"},
        organs={"1": "liver", "2": "lung"},
        groups={"a": "patient"},
        licence="CC0",
        mirror_classes={"nodule": "lesion", "liver": "lung"},
    )
    image = ct_phantom(np.random.default_rng(0))
    mask = np.zeros(image.shape, dtype=np.uint8)
    mask[3:5, 3:5, 3:5] = 1
    for case_id, ending, labelled in (("a", "Tr", True), ("b", "Ts", True), ("c", "Ts", False), ("d", "Un", False)):
        write_case(folder, case_id, image, mask if labelled else None, {1: 1}, AFFINE, ending)
        save(folder / f"images{ending}" / f"{case_id}_0001.nii.gz", image + 1, AFFINE)
    save(folder / "organsTr" / "a.nii.gz", mask * 2, AFFINE)


@pytest.mark.parametrize("place", ["", "raw_splitted"])
def test_nndetection_reads_every_kind_of_case(tmp_path, place):
    full_dataset(tmp_path / place)
    if place:
        (tmp_path / place / "dataset.json").rename(tmp_path / "dataset.json")
    reader = NnDetection(tmp_path)
    assert reader.classes == ["nodule", "lesion"] and reader.modality == ["MR", "MR"] and reader.name == "tiny"
    assert reader.semantic_classes == ["liver", "lung"] and reader.licence == "CC0"
    assert reader.mirror_classes == {"nodule": "lesion", "lesion": "nodule", "liver": "lung", "lung": "liver"}
    cases = by_id(reader)
    assert {name: case.split for name, case in cases.items()} == {
        "a": "train",
        "b": "test",
        "c": "test",
        "d": "pretrain",
    }
    assert [cases[name].group for name in "ab"] == ["patient", "b"]
    volumes = {name: reader.read(case) for name, case in cases.items()}
    image = ct_phantom(np.random.default_rng(0))
    for volume in volumes.values():
        assert volume.image.dtype == np.int16
        np.testing.assert_array_equal(volume.image, [image, image + 1])
        np.testing.assert_allclose(volume.affine, AFFINE)
    for name in "ab":
        assert volumes[name].labels == {1: 1} and volumes[name].annotated == (0, 1)
        assert volumes[name].instances.sum() == 8
    for name in "cd":
        assert volumes[name].instances is None and volumes[name].annotated == () and volumes[name].labels == {}
    assert volumes["a"].semantic.max() == 2 and volumes["b"].semantic is None
    affine, shape = reader.geometry(cases["a"])
    assert shape == image.shape
    np.testing.assert_allclose(affine, AFFINE)


def test_nndetection_below_raw_splitted(tmp_path):
    full_dataset(tmp_path / "raw_splitted")
    (tmp_path / "raw_splitted" / "dataset.json").rename(tmp_path / "dataset.json")
    assert len(NnDetection(tmp_path / "raw_splitted").cases()) == 4


def test_a_case_without_objects_is_annotated(tmp_path):
    write_dataset(tmp_path)
    image = ct_phantom(np.random.default_rng(0))
    write_case(tmp_path, "empty", image, np.zeros(image.shape, np.uint8), {}, AFFINE)
    reader = NnDetection(tmp_path)
    volume = reader.read(reader.cases()[0])
    assert volume.labels == {} and not volume.instances.any() and volume.annotated == (0, 1)


def spoil_json(path: Path, content: object) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def decay(path: Path) -> None:
    """Still voxels from end to end, of which some are not those that were written: only the checksum tells."""
    content = gzip.decompress(path.read_bytes())
    changed = gzip.compress(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    path.write_bytes(changed[:-8] + gzip.compress(content)[-8:])


def resave(path: Path, change=lambda voxels: voxels, affine=None) -> None:
    image = nib.load(path)
    voxels = change(np.asarray(image.dataobj).copy())
    save(path, voxels, image.affine if affine is None else affine)


DAMAGE = [
    ("labelsTr/case_1.json", lambda p: spoil_json(p, {"instances": {"1": 0}}), "only in the mask [2], only in"),
    ("labelsTr/case_1.json", lambda p: spoil_json(p, {"instances": {"1": 0, "2": 1, "3": 0}}), "only in the JSON [3]"),
    ("labelsTr/case_1.json", lambda p: spoil_json(p, {"instances": {"1": 0, "2": 2}}), "instance 2 has class 2"),
    ("labelsTr/case_1.json", lambda p: spoil_json(p, {"instances": [1]}), "expected {"),
    ("labelsTr/case_1.json", lambda p: spoil_json(p, "{"), "not readable as JSON"),
    ("labelsTr/case_1.json", lambda p: spoil_json(p, []), "expected a JSON object, got list"),
    ("labelsTr/case_1.json", Path.unlink, "no such file"),
    ("labelsTr/case_1.nii.gz", Path.unlink, "no such file"),
    ("labelsTr/case_1.nii.gz", truncate, "damaged"),
    ("labelsTr/case_1.nii.gz", decay, "damaged (BadGzipFile: CRC check failed"),
    ("labelsTr/case_1.nii.gz", lambda p: resave(p, lambda v: v[:-1]), "shape (29, 28, 24) differs from (30, 28, 24)"),
    ("labelsTr/case_1.nii.gz", lambda p: resave(p, affine=affine_of("RPS", (1, 1, 2))), "lies elsewhere"),
    ("labelsTr/case_1.nii.gz", lambda p: resave(p, lambda v: v * np.float32(0.7)), "must be whole numbers"),
    ("labelsTr/case_1.nii.gz", lambda p: resave(p, lambda v: -v.astype(np.int16)), "must be 0..65535"),
    ("imagesTr/case_1_0000.nii.gz", truncate, "damaged"),
    ("imagesTr/case_1_0000.nii.gz", decay, "damaged (BadGzipFile: CRC check failed"),
    ("imagesTr/case_1_0000.nii.gz", lambda p: p.write_bytes(b"no image"), "not a readable NIfTI file"),
    ("imagesTr/case_1_0000.nii.gz", lambda p: resave(p, lambda v: v[..., 0]), "expected a 3D volume, got"),
    ("imagesTr/case_1_0000.nii.gz", lambda p: resave(p, lambda v: np.stack([v, v], -1)), "expected a 3D volume"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "text"), DAMAGE)
def test_what_is_wrong_with_a_file_is_said_with_its_name(tmp_path, name, spoil, text):
    write_cases(tmp_path, 2)
    reader = NnDetection(tmp_path)
    case = by_id(reader)["case_1"]
    reader.read(case)
    spoil(tmp_path / name)
    with pytest.raises(UserError) as error:
        reader.read(case)
    assert text in str(error.value) and str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_in_the_place_of_a_file_is_called_one(tmp_path):
    write_cases(tmp_path, 1)
    (tmp_path / "labelsTr" / "case_0.nii.gz").unlink()
    (tmp_path / "labelsTr" / "case_0.nii.gz").mkdir()
    reader = NnDetection(tmp_path)
    with pytest.raises(UserError, match=r"labelsTr/case_0\.nii\.gz: a folder without DICOM slices; expected an image"):
        reader.read(reader.cases()[0])


def test_trailing_axes_of_length_one_are_no_axes(tmp_path):
    write_cases(tmp_path, 1)
    resave(tmp_path / "imagesTr/case_0_0000.nii.gz", lambda v: v[..., None])
    reader = NnDetection(tmp_path)
    assert reader.read(reader.cases()[0]).image.shape == (1, 30, 28, 24)


def test_scaled_integers_become_floats(tmp_path):
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(0.5, 1)
    nib.save(image, tmp_path / "scan.nii")
    reader = Images(tmp_path)
    found = reader.read(reader.cases()[0]).image
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], np.arange(24).reshape(2, 3, 4) * 0.5 + 1)


@pytest.mark.parametrize(("voxel", "fine"), [(np.float32(1.0000001), True), (1 + 9e-4, True), (1.01, False)])
def test_labels_may_miss_a_whole_number_by_rounding(tmp_path, voxel, fine):
    mask = np.zeros((4, 4, 4), dtype=np.float32)
    mask[1, 2, 3], mask[2, 2, 2] = voxel, 256 - 1e-5
    save(tmp_path / "mask.nii.gz", mask, np.eye(4))
    if not fine:
        with pytest.raises(UserError, match=r"mask.nii.gz: labels must be whole numbers, found 1.01"):
            read_mask(tmp_path / "mask.nii.gz", tmp_path / "mask.nii.gz")
        return
    found = read_mask(tmp_path / "mask.nii.gz", tmp_path / "mask.nii.gz")
    assert found.dtype == np.uint16 and found[1, 2, 3] == 1 and found[2, 2, 2] == 256 and found.sum() == 257


def test_a_second_channel_on_another_grid_is_refused(tmp_path):
    full_dataset(tmp_path)
    resave(tmp_path / "imagesTr/a_0001.nii.gz", affine=affine_of("LPS", (1, 1, 1)))
    reader = NnDetection(tmp_path)
    with pytest.raises(UserError, match=r"a_0001.nii.gz: lies elsewhere"):
        reader.read(by_id(reader)["a"])


def test_an_organ_without_name_is_refused(tmp_path):
    full_dataset(tmp_path)
    resave(tmp_path / "organsTr/a.nii.gz", lambda v: v * 2)
    reader = NnDetection(tmp_path)
    with pytest.raises(UserError, match=r"organsTr/a.nii.gz: label 4 has no name"):
        reader.read(by_id(reader)["a"])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"labels": {"1": "a"}}, r"dataset\.json: labels must name every number from 0 on"),
        ({"labels": ["a"]}, "labels must name every number from 0 on"),
        ({"labels": {}}, "labels must name every number from 0 on"),
        ({"labels": {"0": "a", "1": "a"}}, "labels holds 'a' twice"),
        ({"labels": {"0": None}}, "labels must hold names, got None"),
        ({"modalities": {"0": "CT", "2": "CT"}}, "modalities must name every number from 0 on"),
        ({"modalities": {}}, "modalities must name every number from 0 on"),
        ({"organs": {"0": "background"}}, "organs must name every number from 1 on"),
        ({"organs": {"1": "liver", "2": "liver"}}, "organs holds 'liver' twice"),
        ({"mirror_classes": {"nodule": "other"}}, "mirror_classes must map names among"),
        ({"mirror_classes": {"nodule": ["lesion"]}}, "mirror_classes must map names among"),
        ({"mirror_classes": {"nodule": "liver"}, "organs": {"1": "liver"}}, "mirror_classes must map names among"),
        ({"groups": ["a"]}, "groups must be"),
        ({"groups": {"a": None}}, "groups of case 'a' must be a patient's name, got None"),
        ({"name": ["a"]}, "name must be a text"),
        ({"licence": 3}, "licence must be a text, got 3"),
    ],
)
def test_a_wrong_description_is_refused(tmp_path, content, text):
    write_dataset(tmp_path, **content)
    with pytest.raises(UserError, match=text):
        NnDetection(tmp_path)


def test_a_misspelled_case_of_a_group_is_refused(tmp_path):
    full_dataset(tmp_path)
    description = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**description, "groups": {"A": "p"}}))
    with pytest.raises(UserError, match="groups names 'A', which is no case; there is 'a', for one"):
        NnDetection(tmp_path).cases()


@pytest.mark.parametrize("instances", [[0], None, {"1": 0.7}, {"1": True}, {"1": "nodule"}, {"1": -1}, {"one": 0}])
def test_instances_that_are_no_classes_by_number_are_refused(tmp_path, instances):
    full_dataset(tmp_path)
    (tmp_path / "labelsTr/a.json").write_text(json.dumps({"instances": instances}))
    reader = NnDetection(tmp_path)
    with pytest.raises(UserError, match=r'labelsTr/a.json: expected \{"instances": \{"1": 0, ...\}\}, got'):
        reader.read(by_id(reader)["a"])


@pytest.mark.parametrize("folder", ["labelsTr", "labelsTs", "labels", "seg-lungs-LUNA16"])
def test_plain_images_refuse_labels(tmp_path, folder):
    save(tmp_path / "imagesTr" / "a.nii.gz", np.zeros((4, 4, 4), np.int16), np.eye(4))
    assert len(Images(tmp_path).cases()) == 1
    save(tmp_path / folder / "a.nii.gz", np.zeros((4, 4, 4), np.uint8), np.eye(4))
    with pytest.raises(UserError, match=f"a.nii.gz: {folder} holds labels, no images"):
        Images(tmp_path).cases()


def test_a_folder_without_data_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"no dataset\.json"):
        NnDetection(tmp_path)
    write_dataset(tmp_path)
    with pytest.raises(UserError, match="no image imagesTr/"):
        NnDetection(tmp_path).cases()
    with pytest.raises(UserError, match=r"no image in it \(\.nii\.gz, \.nii, \.mhd, "):
        Images(tmp_path).cases()
    with pytest.raises(UserError, match="expected openkbp/"):
        OpenKbp(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["imagesTr/x.nii.gz", "imagesTr/a_0002.nii.gz", "imagesUn/e_0001.nii.gz", "imagesTs/f_0000.img",
     "labelsTr/z.nii.gz", "labelsTr/a.nii", "organsTr/z.nii.gz"],
)  # fmt: skip
def test_nndetection_refuses_a_file_that_no_case_uses(tmp_path, name):
    full_dataset(tmp_path)
    for fine in ("imagesTr/README", "imagesTr/.DS_Store", "labelsTr/notes.json", "labelsTr/.x.nii.gz"):
        (tmp_path / fine).write_text("fine")
    reader = NnDetection(tmp_path)
    assert len(reader.cases()) == 4
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=rf"{name}: no case uses it; expected images <case>_0000 to _0001") as error:
        reader.cases()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reader", [NnDetection, NnUNet])
def test_a_subfolder_of_images_is_not_passed_over(tmp_path, reader):
    write_cases(tmp_path, 2)
    if reader is NnUNet:
        labels = {"background": 0, "nodule": 1, "lesion": 2}
        spoil_json(tmp_path / "dataset.json", {"channel_names": {"0": "CT"}, "labels": labels})
    (tmp_path / "imagesTr" / "pictures").mkdir()
    (tmp_path / "imagesTr" / "pictures" / "a.png").write_text("fine")
    assert len(reader(tmp_path).cases()) == 2
    (tmp_path / "imagesTr" / "case_0_0000.nii.gz").rename(tmp_path / "imagesTr" / "pictures" / "case_9_0000.nii.gz")
    (tmp_path / "labelsTr" / "case_0.nii.gz").unlink()
    (tmp_path / "labelsTr" / "case_0.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"imagesTr/pictures: no case uses it; expected images <case>_0000"):
        reader(tmp_path).cases()


def test_of_many_unused_files_the_first_are_named(tmp_path):
    write_cases(tmp_path, 5)
    for path in (tmp_path / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace("_0000", "")))
    with pytest.raises(UserError, match=r"imagesTr/case_0\.nii\.gz, .*case_2\.nii\.gz and 7 more: no case uses them"):
        NnDetection(tmp_path).cases()


# images


def test_images_are_cases_for_pretraining(tmp_path):
    image = ct_phantom(np.random.default_rng(0))
    for name in ("x.nii.gz", "deep/er/x.nii", ".hidden.nii.gz"):
        save(tmp_path / name, image, AFFINE)
    (tmp_path / "notes.txt").write_text("no image")
    reader = Images(tmp_path)
    cases = reader.cases()
    assert {(case.id, case.split) for case in cases} == {("x", "pretrain"), ("deep-er-x", "pretrain")}
    volume = reader.read(cases[0])
    np.testing.assert_array_equal(volume.image[0], image)
    assert volume.instances is None and volume.semantic is None


@pytest.mark.parametrize("name", ["b.NII.GZ", "sub/b.nii.GZ", "b.Nrrd"])
def test_an_ending_in_capitals_is_not_passed_over(tmp_path, name, capsys):
    save(tmp_path / "raw" / "a.nii.gz", ct_phantom(np.random.default_rng(0)), np.eye(4))
    odd = tmp_path / "raw" / name
    odd.parent.mkdir(exist_ok=True)
    odd.write_bytes(b"")
    line = ["prepare", str(tmp_path / "raw"), f"out={tmp_path / 'store'}", "reader=images", "modality=CT"]
    assert main(line) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"pretrain3d: error: {odd}: its ending must be in lower case, one of .nii.gz, ")


def test_images_of_several_channels_are_grouped(tmp_path):
    image = ct_phantom(np.random.default_rng(0))
    for name in ("x_0000", "x_0001", "deep/x_0000", "deep/x_0001"):
        save(tmp_path / f"{name}.nii.gz", image + int(name[-1]), AFFINE)
    reader = Images(tmp_path)
    reader.modality = ["MR"]
    assert set(by_id(reader)) == {"x_0000", "x_0001", "deep-x_0000", "deep-x_0001"}
    reader.modality = ["MR", "MR"]
    cases = by_id(reader)
    assert set(cases) == {"x", "deep-x"}
    np.testing.assert_array_equal(reader.read(cases["deep-x"]).image, [image, image + 1])
    save(tmp_path / "all.nii.gz", np.stack([image, image + 1], -1), AFFINE)
    whole = by_id(reader)
    assert set(whole) == {"all", "x", "deep-x"} and reader.geometry(whole["all"])[1] == image.shape
    np.testing.assert_array_equal(reader.read(whole["all"]).image, [image, image + 1])
    for name in ("y_0000", "x_0002"):
        path = save(tmp_path / f"{name}.nii.gz", image, AFFINE)
        with pytest.raises(UserError, match=rf"{name}.nii.gz: modality has 2 entries, expected the files <case>_0000"):
            reader.cases()
        path.unlink()


# OpenKBP


def write_sparse(path: Path, values: np.ndarray, mask: bool) -> None:
    """A (128, 128, 128) array as the collection is released: what is not 0, one row each."""
    flat = values.reshape(-1)
    rows = [f"{i}," if mask else f"{i},{float(flat[i])}" for i in np.flatnonzero(flat)]
    path.write_text("\n".join([",data", *rows]) + "\n")


def release(folder: Path, image: np.ndarray, organs: np.ndarray, affine: np.ndarray) -> None:
    """A patient as released, from a volume along left, posterior, superior whose affine tells its place."""
    folder.mkdir(parents=True)
    spacing = np.abs(np.diag(affine)[:3])
    start = np.round(affine[:3, 3] / np.diag(affine)[:3]).astype(int)
    place = tuple(slice(a, a + size) for a, size in zip(start, image.shape, strict=True))

    def released(volume: np.ndarray) -> np.ndarray:
        grid = np.zeros(GRID, dtype=volume.dtype)
        grid[place] = volume
        return grid[:, :, ::-1].swapaxes(0, 1)  # rows, columns, slices from the head down

    write_sparse(folder / "ct.csv", released(image.astype(np.int32) + 1024), mask=False)
    for label, name in enumerate(ORGANS.values(), start=1):
        if (organs == label).any():
            write_sparse(folder / f"{name}.csv", released(organs == label), mask=True)
    (folder / "voxel_dimensions.csv").write_text("".join(f"{value}\n" for value in spacing))


def small_kbp(shape=(20, 14, 12), start=(30, 40, 50)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A body that fills the volume but for two voxels in the axial plane, as the NIfTI files are cropped."""
    rng = np.random.default_rng(0)
    image = np.full(shape, -1024, dtype=np.int16)
    image[2:-2, 2:-2] = rng.integers(-1000, 3000, image[2:-2, 2:-2].shape)
    organs = np.zeros(shape, dtype=np.uint8)
    organs[3:5, 3:5, 1:9] = 2
    organs[8:10, 3:6, 2:4] = 3
    organs[8:9, 8:9, 2:4] = 3  # a second component
    affine = np.diag([-4.5, -4.5, 3.0, 1.0])
    affine[:3, 3] = np.diag(affine)[:3] * start
    return image, organs, affine


def write_kbp(folder: Path) -> None:
    """Both NIfTI folders and the release, of the same three patients."""
    image, organs, affine = small_kbp()
    for number in (2, 206, 1):
        kind = "openkbp" if number in DETECTION else "openkbp_pretrain"
        name = f"openkbp_pt_{number}.nii.gz"
        save(folder / "nifti" / kind / "imagesTr" / name, image, affine)
        save(folder / "nifti" / kind / "labels_oar" / name, organs, affine)
        split = "train-pats" if number <= 200 else "validation-pats"
        release(folder / "csv" / "provided-data" / split / f"pt_{number}", image, organs, affine)


def assert_same(one: Reader, other: Reader) -> None:
    assert [(c.id, c.split, c.group) for c in one.cases()] == [(c.id, c.split, c.group) for c in other.cases()]
    for a, b in zip(one.cases(), other.cases(), strict=True):
        first, second = one.read(a), other.read(b)
        np.testing.assert_array_equal(first.image, second.image)
        assert first.image.dtype == second.image.dtype == np.int16
        np.testing.assert_allclose(first.affine, second.affine, atol=1e-4)
        np.testing.assert_array_equal(first.semantic, second.semantic)
        assert first.labels == second.labels and first.annotated == second.annotated
        np.testing.assert_allclose(one.geometry(a)[0], other.geometry(b)[0], atol=1e-4)
        assert one.geometry(a)[1] == other.geometry(b)[1] == first.image.shape[1:]


def test_openkbp_as_released_is_openkbp_in_nifti(tmp_path):
    write_kbp(tmp_path)
    nifti, released = OpenKbp(tmp_path / "nifti"), OpenKbp(tmp_path / "csv")
    assert_same(nifti, released)
    cases = by_id(released)
    assert {name: case.split for name, case in cases.items()} == {"pt_1": "pretrain", "pt_2": "train", "pt_206": "val"}
    volume = released.read(cases["pt_2"])
    assert volume.labels == {2: 1, 3: 2} and volume.annotated == (1, 2)  # one box per organ, whatever its components
    unlabelled = released.read(cases["pt_1"])
    assert unlabelled.instances is None and unlabelled.annotated == () and unlabelled.semantic.max() == 3


@pytest.mark.parametrize("kind", ["openkbp", "openkbp_pretrain"])
def test_openkbp_passes_over_no_file(tmp_path, kind):
    write_kbp(tmp_path)
    assert len(OpenKbp(tmp_path / "nifti").cases()) == 3
    image = min((tmp_path / "nifti" / kind / "imagesTr").glob("*"))
    image.rename(image.with_name(image.name.removeprefix("openkbp_")))
    expected = (
        rf"imagesTr/pt_\d+\.nii\.gz, .*labels_oar/{image.name}: no case uses them; expected openkbp_pt_<N>\.nii\.gz"
    )
    with pytest.raises(UserError, match=expected):
        OpenKbp(tmp_path / "nifti").cases()


def test_left_and_right_parotid_are_mirrored(tmp_path):
    write_kbp(tmp_path)
    reader = OpenKbp(tmp_path / "nifti")
    assert reader.mirror_classes == {"left_parotid": "right_parotid", "right_parotid": "left_parotid"}
    assert reader.classes[2:4] == ["right_parotid", "left_parotid"]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("ct.csv", ",data\n1,\n2,\n", "has no column of intensities"),
        ("ct.csv", ",data\n1,x\n", "not readable as sparse CSV"),
        ("ct.csv", ",data\n3000000,5\n", "index 3000000 lies outside"),
        ("ct.csv", ",data\n1,0.0\n", "every voxel is air"),
        ("voxel_dimensions.csv", "1\n2\n", "expected three sizes in mm"),
        ("voxel_dimensions.csv", "a\nb\nc\n", "not readable as three numbers"),
    ],
)
def test_a_damaged_release_is_named(tmp_path, name, content, text):
    folder = tmp_path / "provided-data" / "train-pats" / "pt_2"
    release(folder, *small_kbp())
    (folder / name).write_text(content)
    reader = OpenKbp(tmp_path)
    with pytest.raises(UserError, match=text) as error:
        reader.read(reader.cases()[0])
    assert str(folder / name) in str(error.value)


def test_the_real_openkbp(testdata, tmp_path):
    """Counts and splits of the real files, and two patients written as released and read back."""
    reader = OpenKbp(testdata / "data")
    cases = reader.cases()
    splits = [case.split for case in cases]
    assert {split: splits.count(split) for split in set(splits)} == {
        "train": 56,
        "val": 12,
        "test": 32,
        "pretrain": 186,
    }
    table = {c["case"]: c for c in json.loads((testdata / "data" / "openkbp" / "cases.json").read_text())}
    assert {f"pt_{number}" for number in DETECTION} == set(table)
    assert not {f"pt_{number}" for number in LEFT_OUT} & {case.id for case in cases}
    original = {"train": "train-pats", "val": "validation-pats", "test": "test-pats"}
    assert all(table[c.id]["split"] == original[c.split] for c in cases if c.id in table)
    chosen = [case for case in cases if case.id in ("pt_206", "pt_143")]
    for case in chosen:
        volume = reader.read(case)
        split = "validation-pats" if case.id == "pt_206" else "train-pats"
        release(tmp_path / "provided-data" / split / case.id, volume.image[0], volume.semantic, volume.affine)
    again = OpenKbp(tmp_path)
    assert len(again.cases()) == 2
    for case, other in zip(chosen, again.cases(), strict=True):
        first, second = reader.read(case), again.read(other)
        np.testing.assert_array_equal(first.image, second.image)
        np.testing.assert_array_equal(first.semantic, second.semantic)
        np.testing.assert_allclose(first.affine, second.affine, atol=1e-4)
        assert (case.id, case.split, first.labels) == (other.id, other.split, second.labels)


# ---- nnU-Net


def nnunet_folder(folder: Path, description: dict[str, Any]) -> Path:
    """Two training cases of two channels and a test case without labels; label 2 is in one case only."""
    for name in ("a", "b", "t"):
        for channel in range(2):
            target = folder / ("imagesTs" if name == "t" else "imagesTr") / f"{name}_{channel:04d}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            values = np.random.default_rng(channel).integers(0, 99, (8, 9, 10)).astype(np.int16)
            nib.save(nib.Nifti1Image(values, np.eye(4)), target)
        if name != "t":
            labels = np.zeros((8, 9, 10), dtype=np.uint8)
            labels[2:4], labels[5] = 1, 2 if name == "a" else 0
            (folder / "labelsTr").mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / "labelsTr" / f"{name}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


CHANNELS = {"0": "T1", "1": "T2"}


@pytest.mark.parametrize(
    "description",
    [
        {"channel_names": CHANNELS, "labels": {"background": 0, "liver": 1, "tumour": 2}, "file_ending": ".nii.gz"},
        {"modality": CHANNELS, "labels": {"0": "background", "1": "liver", "2": "tumour"}},
    ],
)
def test_both_versions_of_nnunet(tmp_path: Path, description: dict[str, Any]) -> None:
    reader = NnUNet(nnunet_folder(tmp_path, {**description, "name": "set", "annotated": {"b": ["liver"]}}))
    assert reader.semantic_classes == ["liver", "tumour"] and reader.modality == ["T1", "T2"] and reader.classes == []
    cases = by_id(reader)
    assert {name: case.split for name, case in cases.items()} == {"a": "train", "b": "train", "t": "test"}
    volume = reader.read(cases["a"])
    assert volume.image.shape == (2, 8, 9, 10) and volume.instances is None and volume.semantic is not None
    assert np.unique(volume.semantic).tolist() == [0, 1, 2] and volume.semantic_annotated == (0, 1)
    assert reader.read(cases["b"]).semantic_annotated == (0,)
    assert reader.read(cases["t"]).semantic is None


@pytest.mark.parametrize("name", ["imagesTr/x.nii.gz", "imagesTr/a_0002.nii.gz", "labelsTr/z.nii.gz"])
def test_nnunet_refuses_a_file_that_no_case_uses(tmp_path: Path, name: str) -> None:
    description = {"channel_names": CHANNELS, "labels": {"background": 0, "liver": 1, "tumour": 2}}
    reader = NnUNet(nnunet_folder(tmp_path, description))
    assert len(reader.cases()) == 3
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=rf"{name}: no case uses it; expected images <case>_0000 to _0001"):
        reader.cases()


def test_what_nobody_looked_at_is_annotated_nowhere(tmp_path: Path) -> None:
    labels = {"background": 0, "liver": 1, "ignore": 2}
    reader = NnUNet(nnunet_folder(tmp_path, {"channel_names": CHANNELS, "labels": labels}))
    assert reader.read(by_id(reader)["a"]).semantic_annotated == (0,)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ({"background": 0}, "labels must name every number from 1 on"),
        ({"background": 0, "liver": 2}, "labels must name every number from 1 on"),
        (["liver"], "labels must name every number from 1 on"),
    ],
)
def test_labels_of_nnunet_that_cannot_be_read(tmp_path: Path, labels: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        NnUNet(nnunet_folder(tmp_path, {"channel_names": CHANNELS, "labels": labels}))


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"annotated": ["a"]}, r"annotated must be \{case: \[names of labels\], ...\}, got \['a'\]"),
        ({"annotated": {"a": "liver"}}, "annotated must be"),
        ({"annotated": {"a": ["lung"]}}, "annotated of a has 'lung', which is no label"),
        ({"annotated": {"x": ["liver"]}}, "annotated names 'x', which is no case; there is 'a', for one"),
        ({"groups": {"x": "p"}}, "groups names 'x', which is no case"),
    ],
)
def test_keys_of_nnunet_that_cannot_be_read(tmp_path: Path, more: dict[str, Any], text: str) -> None:
    description = {"channel_names": CHANNELS, "labels": {"background": 0, "liver": 1, "tumour": 2}, **more}
    with pytest.raises(UserError, match=text):
        NnUNet(nnunet_folder(tmp_path, description)).cases()
