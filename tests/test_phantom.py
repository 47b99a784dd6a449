"""The embedded data set: what a case holds, how it is written, and that it is neither trivial nor impossible."""

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from pretrain3d.commands import phantom as command
from pretrain3d.config import UserError
from pretrain3d.data.phantom import CLASSES, ORGANS, generate, make_case
from pretrain3d.data.phantom import case as case_module
from pretrain3d.data.phantom.anatomy import Body
from pretrain3d.data.phantom.canvas import Canvas, chain, tree
from pretrain3d.data.phantom.lesions import COUNTS, EMPTY_EVERY, Lump, Placer, counts
from pretrain3d.evaluation.average_precision import average_precision
from pretrain3d.evaluation.baselines import ThresholdBaseline
from pretrain3d.evaluation.matching import match

SMALL = {"num_train": 1, "num_test": 1, "num_unlabelled": 1, "workers": 1, "progress": False}


@pytest.fixture(scope="module")
def cases():
    return [make_case(0, index, split) for split, index in (("train", 0), ("train", 1), ("test", 2), ("test", 4))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("phantom") / "set"
    generate(path, **SMALL)
    return path


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()
    }


def organ(case, name: str) -> np.ndarray:
    return case.organs == ORGANS.index(name) + 1


def test_same_arguments_same_case_and_others_differ():
    first, again = make_case(3, 0, "train"), make_case(3, 0, "train")
    assert np.array_equal(first.image, again.image) and np.array_equal(first.instances, again.instances)
    assert np.array_equal(first.affine, again.affine) and first.labels == again.labels
    others = [
        make_case(4, 0, "train"),
        make_case(3, 1, "train"),
        make_case(3, 0, "unlabelled"),
    ]
    assert all(
        other.image.shape != first.image.shape or not np.array_equal(other.image, first.image) for other in others
    )


def test_volumes_agree_and_are_a_torso(cases):
    for case in cases:
        assert case.image.dtype == np.int16 and case.image.min() >= -1024 and case.image.max() <= 3071
        assert case.image.shape == case.instances.shape == case.organs.shape
        spacing = np.linalg.norm(case.affine[:3, :3], axis=0)
        assert np.count_nonzero(np.abs(case.affine[:3, :3]) > 1e-6) == 3  # a flip and permutation
        assert (spacing >= 1.95).all() and (spacing <= 4.05).all()
        extent = np.sort(spacing * case.image.shape)
        assert extent[0] > 140 and extent[2] < 260
        assert set(np.unique(case.organs)) == set(range(len(ORGANS) + 1))


def test_organs_have_the_attenuation_of_their_tissue(cases):
    limits = {"lung": (-900, -780), "liver": (85, 125), "kidney": (100, 220), "heart": (80, 200), "bone": (220, 450)}
    for case in cases:
        for name, (low, high) in limits.items():
            inside = organ(case, name) if name == "bone" else ndimage.binary_erosion(organ(case, name))
            assert low < np.median(case.image[inside]) < high, name


def test_liver_is_right_and_heart_in_front_of_the_spine(cases):
    for case in cases:
        centre = {
            name: nib.affines.apply_affine(case.affine, np.argwhere(organ(case, name)).mean(axis=0)) for name in ORGANS
        }
        assert centre["liver"][0] > centre["spleen"][0] + 40  # RAS: x grows to the patient's right
        assert centre["heart"][1] > centre["aorta"][1]
        assert centre["lung"][2] > centre["liver"][2] > centre["kidney"][2]


def test_objects_are_numbered_labelled_apart_and_in_their_organ(cases):
    # with the object itself, which the map gives to the organ
    homes = {"nodule": "lung", "liver_lesion": "liver", "bone_lesion": "bone"}
    for case in cases:
        ids = np.unique(case.instances)
        assert ids.tolist() == list(range(len(case.labels) + 1)) and set(case.labels) == set(ids[1:].tolist())
        assert ndimage.label(case.instances > 0, np.ones((3, 3, 3)))[1] == len(case.labels)
        for number, label in case.labels.items():
            mask = case.instances == number
            assert organ(case, homes[CLASSES[label]])[ndimage.binary_dilation(mask)].mean() > 0.4


def test_large_objects_have_the_attenuation_of_their_class(cases):
    seen = set()
    for case in cases:
        liver = np.median(case.image[ndimage.binary_erosion(organ(case, "liver"), iterations=2)])
        limits = {0: (0, 60), 1: (liver - 50, liver - 25), 2: (30, 80)}
        for number, label in case.labels.items():
            core = ndimage.binary_erosion(case.instances == number, iterations=2)
            if core.sum() >= 12:
                low, high = limits[label]
                assert low - 18 < case.image[core].mean() < high + 18, CLASSES[label]
                seen.add(label)
    assert seen == {0, 1, 2}


def test_noise_remains_after_smoothing(cases):
    for case in cases:
        liver = ndimage.binary_erosion(organ(case, "liver"), iterations=2) & (case.instances == 0)
        voxels = case.image[liver].astype(float)
        spread = 1.4826 * np.median(np.abs(voxels - np.median(voxels)))  # not moved by vessels and cysts
        assert 14 < spread < 30


def test_noise_of_a_slice_averages_out_faster_than_white_noise():
    noise = case_module._noise(np.random.default_rng(0), (64, 64, 24))
    assert noise.std() == pytest.approx(1.0, abs=0.01)
    spots = ndimage.uniform_filter(noise, (5, 5, 1))
    assert spots.std() < 0.8 / 5  # white noise: 1/5


def test_a_lump_cut_in_two_stays_one_piece():
    rng = np.random.default_rng(0)
    canvas = Canvas(rng, (24, 24, 24), (2.0, 2.0, 2.0), (-24.0, -24.0, -24.0), warp_mm=0.0)
    disc = 2.6 - np.abs(canvas.z) + 0 * canvas.x  # the host is what lies above and below
    placer = Placer(Body(canvas, None), rng)
    placed = placer.place(Lump(rng, 20.0), np.abs(canvas.z - 6) < 1, disc)
    assert placed is not None
    assert ndimage.label(placed.occupancy >= 0.4)[1] == 1


def test_a_lump_does_not_hide_in_what_looks_like_it():
    rng = np.random.default_rng(0)
    canvas = Canvas(rng, (24, 24, 24), (2.0, 2.0, 2.0), (-24.0, -24.0, -24.0), warp_mm=0.0)
    everywhere, vessel = np.full(canvas.shape, -20.0), np.abs(canvas.x) - 6 + 0 * canvas.z
    placer = Placer(Body(canvas, None), rng)
    assert placer.place(Lump(rng, 6.0), vessel < -3, everywhere, beside=vessel) is None
    assert placer.place(Lump(rng, 6.0), vessel < -3, everywhere) is not None


def test_every_twelfth_case_is_empty_and_classes_are_equally_frequent():
    wanted = np.array([counts(index) for index in range(EMPTY_EVERY * 3)])
    assert (wanted.sum(axis=1) == 0).sum() == 3
    assert len(set(wanted.sum(axis=0).tolist())) == 1
    assert 5 <= np.median(wanted.sum(axis=1)) <= 9
    empty = make_case(0, len(COUNTS), "train")
    assert not empty.labels and not empty.instances.any()


@pytest.mark.parametrize("diameter", [6.0, 12.0, 24.0])
def test_a_lump_has_the_volume_of_its_sphere_and_is_none(diameter):
    rng = np.random.default_rng(0)
    canvas = Canvas(rng, (40, 40, 40), (1.0, 1.0, 1.0), (-20.0, -20.0, -20.0))
    lump = Lump(rng, diameter)
    _, occupancy = lump.occupancy(canvas, np.array([0.3, 0.2, -0.4]))
    assert occupancy.sum() == pytest.approx(np.pi / 6 * diameter**3, rel=0.06)
    rim = lump._unit(rng.standard_normal((300, 3))) * diameter / 2
    assert np.ptp(lump.distance(rim)) > 0.1 * diameter  # a sphere: 0


def test_tube_distance_is_that_of_its_definition():
    canvas = Canvas(np.random.default_rng(0), (12, 13, 14), (2.0, 2.0, 3.0), (-12.0, -13.0, -20.0), warp_mm=0.0)
    p, q, radius = np.array([-3.0, 1.0, -4.0]), np.array([5.0, -2.0, 6.0]), 2.5
    sdf = canvas.tubes(chain(np.stack([p, q]), radius))
    near = np.argwhere(sdf < 2)
    assert len(near) > 20
    for voxel in near:
        x = canvas.origin_mm + voxel * canvas.spacing_mm
        along = np.clip((x - p) @ (q - p) / ((q - p) @ (q - p)), 0, 1)
        assert sdf[tuple(voxel)] == pytest.approx(np.linalg.norm(x - p - along * (q - p)) - radius, abs=1e-3)


def test_world_undoes_the_warp():
    canvas = Canvas(np.random.default_rng(1), (30, 30, 30), (4.0, 4.0, 4.0), (-60.0, -60.0, -60.0), scale=1.05)
    voxel = (11, 17, 8)
    model = np.array([[grid[voxel] for grid in (canvas.x, canvas.y, canvas.z)]], dtype=float)
    assert canvas.world(model)[0] == pytest.approx(canvas.origin_mm + np.array(voxel) * 4.0, abs=0.05)


def test_a_tree_reaches_its_targets_and_gets_thinner():
    rng = np.random.default_rng(0)
    targets = rng.uniform(-40, 40, (30, 3))
    segments = tree(rng, np.zeros(3), targets, tip_mm=0.8)
    ends = segments[:, 3:6]
    assert all(np.linalg.norm(ends - target, axis=1).min() < 1e-6 for target in targets)
    assert segments[0, 6] == segments[:, 6].max() and segments[:, 7].min() == pytest.approx(0.72)


def test_written_files_hold_the_case(folder):
    case = make_case(0, 0, "train")
    image = nib.load(folder / "imagesTr/train_000_0000.nii.gz")
    assert np.array_equal(np.asarray(image.dataobj), case.image) and image.get_data_dtype() == np.int16
    assert image.affine == pytest.approx(case.affine, abs=1e-4)
    for name, volume in (("labelsTr", case.instances), ("organsTr", case.organs)):
        written = nib.load(folder / name / "train_000.nii.gz")
        assert np.array_equal(np.asarray(written.dataobj), volume) and np.array_equal(written.affine, image.affine)
    instances = json.loads((folder / "labelsTr/train_000.json").read_text())["instances"]
    assert {int(key): label for key, label in instances.items()} == case.labels
    dataset = json.loads((folder / "dataset.json").read_text())
    assert dataset["labels"] == {"0": "nodule", "1": "liver_lesion", "2": "bone_lesion"}
    assert dataset["modalities"] == {"0": "CT"} and dataset["target_class"] is None and dataset["test_labels"] is True
    assert dataset["dim"] == 3 and dataset["organs"]["1"] == "lung"
    assert (folder / "imagesTs/test_000_0000.nii.gz").exists() and (folder / "labelsTs/test_000.json").exists()
    assert [p.name for p in (folder / "imagesUn").iterdir()] == ["unlabelled_000_0000.nii.gz"]


def test_second_call_writes_nothing_and_an_interrupted_one_is_finished(folder):
    before = files(folder)
    summary = generate(folder, **SMALL)
    assert summary.written == 0 and summary.reused == len(before) - 1 and files(folder) == before
    lost = folder / "labelsTs/test_000.nii.gz"
    content = gzip.decompress(lost.read_bytes())
    lost.unlink()
    assert generate(folder, **SMALL).written == 1
    assert gzip.decompress(lost.read_bytes()) == content
    after = files(folder)
    assert after.keys() == before.keys()  # no temporary file stays
    assert [name for name in before if before[name] != after[name]] == ["labelsTs/test_000.nii.gz"]


def test_other_parameters_or_another_folder_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="seed=0, not 1"):
        generate(folder, **SMALL, seed=1)
    (tmp_path / "thesis.docx").write_text("mine")
    with pytest.raises(UserError, match="not a phantom data set"):
        generate(tmp_path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.docx"]
    with pytest.raises(UserError, match="train=-1: must be at least 0"):
        generate(tmp_path / "new", **{**SMALL, "num_train": -1})


def test_a_file_that_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch):
    from pretrain3d.data.phantom import write

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pretrain3d.files.os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write._write_missing(tmp_path / "a.nii.gz", lambda: b"half")
    assert not list(tmp_path.iterdir())


def test_command_writes_says_so_and_says_when_there_was_nothing_to_do(folder, capsys):
    options = {"out": str(folder), "train": 1, "test": 1, "unlabelled": 1, "workers": 1}
    assert command.run([], options) == 0
    printed = capsys.readouterr().out
    assert "nothing written" in printed and "nodule" in printed
    with pytest.raises(UserError, match="unlabelled"):
        command.run([], {"out": str(folder), "unlabeled": 3})
    with pytest.raises(UserError, match="out=DIR"):
        command.run([str(folder)], {})


def test_command_draws_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PICTURED", (("train", 0),) * 2)
    command.draw(tmp_path / "deep" / "phantom.png")
    assert (tmp_path / "deep" / "phantom.png").read_bytes().startswith(b"\x89PNG")


def test_test_bodies_come_from_wider_ranges_than_training_bodies():
    train, test = case_module.TRAINING, case_module.TEST
    assert test.noise[0] > train.noise[0] and test.noise[1] > train.noise[1] and test.noise == (18.0, 25.0)
    assert test.scale != train.scale and test.spongy[0] < train.spongy[0] and test.spongy[1] > train.spongy[1]


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(folder, tmp_path):
    generate(tmp_path / "two", **{**SMALL, "workers": 2})
    for name in files(folder):
        assert (folder / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.slow
def test_default_test_set_has_forty_objects_of_each_class_over_all_sizes():
    diameters = {label: [] for label in range(len(CLASSES))}
    for index in range(24):
        case = make_case(0, index, "test")
        voxel = abs(np.linalg.det(case.affine))
        for number, label in case.labels.items():
            diameters[label].append((6 / np.pi * voxel * (case.instances == number).sum()) ** (1 / 3))
    for values in diameters.values():
        assert len(values) >= 40
        assert min(values) < 6 and max(values) > 18
        assert max(values) < 25.5
        assert 7.5 < np.median(values) < 14  # log-uniform 4 to 24: 9.8


@pytest.mark.slow
def test_threshold_and_components_do_not_solve_the_set():
    def volume(index, split):
        case = make_case(0, index, split)
        as_ras = [nib.as_closest_canonical(nib.Nifti1Image(v, case.affine)) for v in (case.image, case.instances)]
        image, instances = (np.asarray(v.dataobj) for v in as_ras)
        boxes = [[s.start for s in found] + [s.stop for s in found] for found in ndimage.find_objects(instances)]
        return image, np.array(boxes, float).reshape(-1, 6), np.array(list(case.labels.values()), int)

    baseline = ThresholdBaseline((2.0, 2.0, 2.4)).fit([volume(index, "train") for index in range(16)])
    predictions, targets = {}, {}
    for index in range(24):
        image, boxes, labels = volume(index, "test")
        found = dict(zip(("boxes", "scores", "labels"), baseline.predict(image), strict=True))
        predictions[str(index)], targets[str(index)] = found, {"boxes": boxes, "labels": labels}
    matches = match(predictions, targets, list(CLASSES), np.array([0.10])).per_class
    values = [average_precision(found, np.ones((1, 24)))[0, 0] for found in matches]
    assert 0.05 < np.mean(values) < 0.3
