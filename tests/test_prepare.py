import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
import pytest
import yaml
from raw_folder import affine_of, ct_phantom, save, write_case, write_cases, write_dataset

from pretrain3d.__main__ import main
from pretrain3d.config import UserError
from pretrain3d.data import prepare as prepare_module
from pretrain3d.data.body import body_mask, body_on_grid, crop_to
from pretrain3d.data.prepare import prepare
from pretrain3d.data.readers.nndetection import NnDetection
from pretrain3d.data.resample import resample_image, resample_labels
from pretrain3d.data.splits import fold_cases
from pretrain3d.data.store import Store
from pretrain3d.geometry import Frame, boxes_of_instances


def run(raw: Path, out: Path, **options):
    return prepare(NnDetection(raw), out, workers=1, progress=False, **options)


# resampling


def slow_resample(signal_in: np.ndarray, size: int, kernel, radius: float) -> np.ndarray:
    """One axis, from the definition: the kernel's weights at the distances of the voxel centres, summing to 1."""
    step = len(signal_in) / size
    width = max(step, 1)
    out = []
    for i in range(size):
        weights = [kernel(((j + 0.5) - (i + 0.5) * step) / width) for j in range(len(signal_in))]
        out.append(sum(w * v for w, v in zip(weights, signal_in, strict=True)) / sum(weights))
    return np.array(out)


def keys(x: float) -> float:
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


@pytest.mark.parametrize("size", [4, 7, 11, 12, 13, 30])
def test_resampling_one_axis_by_the_definition(size):
    values = np.random.default_rng(0).normal(size=12)
    expected = np.clip(slow_resample(values, size, keys, 2), values.min(), values.max())
    for axis in range(3):
        shape = [3, 3, 3]
        shape[axis] = 12
        image = np.broadcast_to(values.reshape([12 if a == axis else 1 for a in range(3)]), shape)
        target = tuple(size if a == axis else 3 for a in range(3))
        np.testing.assert_allclose(np.moveaxis(resample_image(image, target), axis, 0)[:, 1, 1], expected, atol=1e-5)


def test_resampling_keeps_constants_range_and_identity():
    image = np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32)
    np.testing.assert_array_equal(resample_image(image, image.shape), image)
    np.testing.assert_allclose(resample_image(np.full((9, 8, 7), 3.5), (4, 20, 7)), 3.5, rtol=1e-6)
    for shape in [(4, 4, 4), (20, 9, 15)]:
        found = resample_image(image, shape)
        assert found.shape == shape and found.min() >= image.min() and found.max() <= image.max()


def test_a_ramp_stays_where_it_is():
    """Edges are aligned: the value at world place x stays at x. Half a voxel of shift would be 0.5."""
    ramp = np.broadcast_to((np.arange(40) + 0.5)[:, None, None], (40, 2, 2))
    for size in (80, 25, 13):
        found = resample_image(ramp, (size, 2, 2))[:, 0, 0]
        inner = slice(size // 4, -size // 4)
        np.testing.assert_allclose(found[inner], ((np.arange(size) + 0.5) * 40 / size)[inner], atol=0.01)


def test_shrinking_does_not_alias():
    stripes = np.broadcast_to((np.arange(64) % 2)[:, None, None] * 100.0, (64, 2, 2))
    assert np.ptp(resample_image(stripes, (21, 2, 2))[3:-3]) < 5  # every third voxel alone would give 0 and 100


def resampled_frame(shape, cached):
    return Frame.of_file(np.eye(4), shape).resampled(cached)


@pytest.mark.parametrize("cached", [(20, 24, 22), (40, 60, 30), (9, 12, 30), (27, 25, 23)])
def test_labels_keep_their_place_to_half_a_voxel(cached):
    mask = np.zeros((20, 24, 22), dtype=np.int32)
    mask[3:9, 4:12, 5:13] = 1
    mask[9:17, 4:12, 5:13] = 2  # touches 1
    mask[4:16, 15:22, 1:20] = 300
    frame = resampled_frame(mask.shape, cached)
    found = resample_labels(mask, frame, keep_all=True)
    assert found.dtype == np.uint16 and found.shape == cached
    ids, boxes = boxes_of_instances(found.astype(np.int32))
    assert ids.tolist() == [1, 2, 300]
    assert np.abs(boxes - frame.from_original(boxes_of_instances(mask)[1])).max() <= 0.5 + 1e-6
    # no gap between the two that touch: every voxel whose centre lies well inside them is labelled
    inside = frame.from_original(np.array([[4, 5, 6, 16, 11, 12]]))[0]
    region = tuple(slice(int(np.ceil(a)), int(b)) for a, b in zip(inside[:3], inside[3:], strict=True))
    assert (found[region] > 0).all()


def test_no_instance_vanishes():
    rng = np.random.default_rng(0)
    mask = np.zeros((40, 40, 40), dtype=np.int32)
    places = rng.permutation(10**3)[:60]
    for label, place in enumerate(places, start=1):
        x, y, z = np.array(np.unravel_index(place, (10, 10, 10))) * 4 + rng.integers(0, 4, 3)
        mask[x, y, z] = label
    frame = resampled_frame(mask.shape, (13, 13, 40))
    assert len(boxes_of_instances(resample_labels(mask, frame, keep_all=False).astype(int))[0]) < 60
    found = resample_labels(mask, frame, keep_all=True)
    ids, boxes = boxes_of_instances(found.astype(np.int32))
    assert ids.tolist() == list(range(1, 61))
    exact = frame.from_original(boxes_of_instances(mask)[1])
    for box, true in zip(boxes, exact, strict=True):
        assert (box[:3] < true[3:] + 1).all() and (box[3:] > true[:3] - 1).all()  # where it is or right beside it


def test_a_speck_of_an_instance_keeps_its_box():
    mask = np.zeros((24, 24, 24), dtype=np.int32)
    mask[2:9, 2:9, 2:9] = 1
    mask[20, 20, 20] = 1
    frame = resampled_frame(mask.shape, (8, 8, 8))
    found = boxes_of_instances(resample_labels(mask, frame, keep_all=True).astype(np.int32))[1]
    np.testing.assert_allclose(found, frame.from_original(boxes_of_instances(mask)[1]), atol=0.7)


@pytest.mark.parametrize("cached", [(14, 13, 60), (16, 16, 8), (9, 31, 24)])
def test_what_is_thin_is_as_long_as_it_was(cached):
    mask = np.zeros((32, 31, 24), dtype=np.int32)
    mask[3:5, 4, 3:17] = 1  # covers less than half of each voxel of a grid that is twice as coarse
    mask[9:30, 12, 20] = 2
    x, y, z = np.ogrid[:32, :31, :24]
    mask[(x - 20.0) ** 2 / 9 + (y - 20) ** 2 / 16 + (z - 10) ** 2 / 6 <= 1] = 3  # its poles do, too
    frame = resampled_frame(mask.shape, cached)
    found = boxes_of_instances(resample_labels(mask, frame, keep_all=True).astype(np.int32))[1]
    exact = frame.from_original(boxes_of_instances(mask)[1])
    off = np.abs(found - exact).reshape(-1, 2, 3)
    thin = (exact[:, 3:] - exact[:, :3] < 1)[:, None]  # of these, one voxel that holds some of it
    assert off.max(where=~thin, initial=0) <= 0.5 + 1e-6 and off.max(where=thin, initial=0) < 1
    assert ((found[:, 3:] - found[:, :3] == 1) | ~thin[:, 0]).all()


def test_a_lost_instance_takes_the_voxel_that_it_covers_most():
    mask = np.zeros((8, 8, 8), dtype=np.int32)
    mask[5, 2, 6] = 1
    found = resample_labels(mask, resampled_frame(mask.shape, (2, 2, 2)), keep_all=True)
    assert np.argwhere(found).tolist() == [[1, 0, 1]]


def test_instances_with_too_few_voxels_for_them_are_an_error():
    mask = np.zeros((4, 4, 4), dtype=np.int32)
    mask[0, 0, 0], mask[3, 3, 3] = 1, 2
    with pytest.raises(UserError, match="no voxel of its own"):
        resample_labels(mask, resampled_frame(mask.shape, (1, 1, 1)), keep_all=True)


# body


def test_the_crop_holds_the_body_and_leaves_the_table():
    image = np.full((1, 60, 50, 40), -1000, dtype=np.int16)
    image[0, 15:45, 15:40, 0:40] = 30
    image[0, 20:30, 20:30, 0:40] = -800  # lung, open at both ends
    image[0, 5:58, 3:4, :] = -300  # table
    image[0, 50, 45, 20] = 500  # a speck
    spacing = np.array([1.5, 1.5, 3.0])
    mask, step = body_mask(image, ["CT"], spacing)
    assert step.tolist() == [2, 2, 1]
    start, stop = crop_to(mask, step, image.shape[1:], [], spacing, 3.0)
    for axis, (low, high) in enumerate([(15, 45), (15, 40), (0, 40)]):
        assert max(low - 6, 0) <= start[axis] <= max(low - 2, 0), axis
        assert min(high + 2, image.shape[axis + 1]) <= stop[axis] <= high + 6, axis
    body = body_on_grid(mask, step, start, np.ones(3), tuple(b - a for a, b in zip(start, stop, strict=True)))
    assert body[10:15, 10:15, 20].all()  # the lung is body
    assert not body[0].any()


def test_the_crop_never_cuts_a_labelled_voxel():
    image = np.full((1, 30, 30, 30), -1000, dtype=np.int16)
    image[0, 10:20, 10:20, 10:20] = 30
    labels = np.zeros((30, 30, 30), dtype=np.int32)
    labels[0, 29, 15] = 1
    mask, step = body_mask(image, ["CT"], np.ones(3))
    start, stop = crop_to(mask, step, labels.shape, [labels], np.ones(3), 2.0)
    assert start[0] == 0 and stop[1] == 30 and start[2] > 0 and stop[2] < 30


def test_mr_is_cropped_to_what_is_not_background():
    rng = np.random.default_rng(0)
    image = np.zeros((1, 30, 30, 30), dtype=np.float32)
    image[0, 10:20, 5:25, 8:22] = rng.uniform(1, 900, (10, 20, 14))
    mask, step = body_mask(image, ["MR"], np.full(3, 3.0))
    assert crop_to(mask, step, image.shape[1:], [], np.full(3, 3.0), 0.0) == ((10, 5, 8), (20, 25, 22))
    everywhere = rng.uniform(1, 900, image.shape)
    assert body_mask(everywhere, ["MR"], np.full(3, 3.0))[0].all()


# whole cases


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SLA", "AIR"])
def test_boxes_are_exact_in_the_world(tmp_path, axes):
    """The same objects, stored along other axes and resampled: their world boxes are those of the input mask."""
    write_cases(tmp_path / "raw", 1, axes)
    run(tmp_path / "raw", tmp_path / "out", spacing_mm=(1.3, 0.8, 1.7))
    store = Store(tmp_path / "out")
    case = store.cases["case_0"]
    assert case.labels.tolist() == [0, 1] and case.instances.tolist() == [1, 2] and case.annotated == (0, 1)
    original = [[9, 8, 7, 13, 12, 9], [18, 17, 15, 19, 18, 16]]
    np.testing.assert_allclose(case.frame.to_original(case.boxes), original, atol=1e-5)
    affine = affine_of(axes, (1.0, 1.0, 2.0))
    world = case.frame.to_world(case.boxes)
    np.testing.assert_allclose(world["center_mm"][0], affine[:3, :3] @ [10.5, 9.5, 7.5] + affine[:3, 3], atol=1e-5)
    np.testing.assert_allclose(world["size_mm"], [[4, 4, 4], [1, 1, 2]], atol=1e-5)
    np.testing.assert_allclose(case.volumes_mm3, [64, 2])
    mask = store.read("case_0", "instances", (0, 0, 0), case.shape).astype(np.int32)
    ids, boxes = boxes_of_instances(mask)
    assert ids.tolist() == [1, 2] and np.abs(boxes[0] - case.boxes[0]).max() <= 0.5 + 1e-5
    np.testing.assert_allclose(case.frame.spacing_mm, store.spacing_mm, rtol=0.05)


def test_voxels_are_those_of_the_file_when_nothing_is_resampled(tmp_path):
    write_cases(tmp_path / "raw", 1, "LIP")
    run(tmp_path / "raw", tmp_path / "out")
    store = Store(tmp_path / "out")
    case = store.cases["case_0"]
    assert store.spacing_mm == (1.0, 2.0, 1.0)  # right, anterior (the file's last axis), superior
    image = ct_phantom(np.random.default_rng(0))
    canonical = nib.as_closest_canonical(nib.load(tmp_path / "raw/imagesTr/case_0_0000.nii.gz"))
    region = tuple(slice(a, a + n) for a, n in zip(case.frame.crop_start, case.shape, strict=True))
    found = store.read("case_0", "image", (0, 0, 0), case.shape)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found[0], np.asarray(canonical.dataobj)[region])
    body = found[0] > -500
    assert body.sum() == (image > -500).sum()  # nothing of the body is lost
    objects = store.read("case_0", "instances", (0, 0, 0), case.shape) > 0
    assert case.histograms["objects"][0].total == objects.sum() == 33
    assert case.histograms["objects"][0].mean == pytest.approx(found[0][objects].mean())
    assert case.histograms["body"][0].total > body.sum()  # with the hole in it


def test_mr_channels_stay_floats(tmp_path):
    rng = np.random.default_rng(0)
    write_dataset(tmp_path / "raw", modalities={"0": "MR", "1": "MR"})
    image = rng.uniform(0, 2000, (20, 20, 20)).astype(np.float32)
    affine = affine_of("RAS", (1.0, 1.0, 1.0))
    write_case(tmp_path / "raw", "a", image, np.zeros(image.shape, np.uint8), {}, affine)
    save(tmp_path / "raw/imagesTr/a_0001.nii.gz", (image * 3).astype(np.int16), affine)
    run(tmp_path / "raw", tmp_path / "out")
    store = Store(tmp_path / "out")
    found = store.read("a", "image", (0, 0, 0), (20, 20, 20))
    assert found.dtype == np.float32 and store.modality == ["MR", "MR"]
    np.testing.assert_allclose(found[0], image, rtol=1e-6)
    np.testing.assert_allclose(found[1], (image * 3).astype(np.int16))


BAD = [
    (lambda v: np.full_like(v, -1000), "the image is empty, every voxel is -1000"),
    (lambda v: np.where(v > 0, np.nan, v.astype(np.float32)), "voxels are NaN or infinite"),
    (lambda v: v[..., 0], "expected a 3D volume"),
]


@pytest.mark.parametrize(("change", "text"), BAD)
def test_an_unusable_image_is_named(tmp_path, change, text):
    write_cases(tmp_path / "raw", 2)
    path = tmp_path / "raw/imagesTr/case_0_0000.nii.gz"
    image = nib.load(path)
    save(path, change(np.asarray(image.dataobj)), image.affine)
    summary = run(tmp_path / "raw", tmp_path / "out")
    assert summary.done == ["case_1"] and list(summary.failed) == ["case_0"]
    assert text in summary.failed["case_0"] and str(path) in summary.failed["case_0"]
    assert list(Store(tmp_path / "out").cases) == ["case_1"]


def test_the_channel_of_an_unusable_image_is_named(tmp_path):
    write_dataset(tmp_path / "raw", modalities={"0": "MR", "1": "MR"})
    affine = affine_of("RAS", (1.0, 1.0, 1.0))
    for case, spoilt in (("a", np.nan), ("b", 0.0)):
        image = np.random.default_rng(0).uniform(0, 2000, (20, 20, 20)).astype(np.float32)
        write_case(tmp_path / "raw", case, image, np.zeros(image.shape, np.uint8), {}, affine)
        save(tmp_path / f"raw/imagesTr/{case}_0001.nii.gz", np.where(image < 3000, spoilt, image), affine)
    write_case(tmp_path / "raw", "c", image, np.zeros(image.shape, np.uint8), {}, affine)
    save(tmp_path / "raw/imagesTr/c_0001.nii.gz", image, affine)
    failed = run(tmp_path / "raw", tmp_path / "out").failed
    assert "a_0000.nii.gz: channel 1 (MR): 8000 voxels are NaN or infinite" in failed["a"]
    assert "b_0000.nii.gz: channel 1 (MR): the image is empty, every voxel is 0" in failed["b"]


# the run over cases


def modified(out: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in sorted(out.rglob("*")) if p.is_file()}


def test_a_second_call_does_nothing_and_a_change_only_its_case(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_cases(raw, 3)
    assert run(raw, out).done == ["case_0", "case_1", "case_2"]
    before, data_hash = modified(out / "image"), Store(out).data_hash
    summary = run(raw, out)
    assert (summary.done, summary.reused) == ([], ["case_0", "case_1", "case_2"])
    os.utime(raw / "imagesTr/case_1_0000.nii.gz", (1, 1))  # touched, the same bytes
    assert run(raw, out).done == [] and modified(out / "image") == before
    image, affine = ct_phantom(np.random.default_rng(9)), affine_of("LPS", (1, 1, 2))
    write_case(raw, "case_1", image, np.zeros(image.shape, np.uint8), {}, affine)
    summary = run(raw, out)
    assert (summary.done, summary.reused) == (["case_1"], ["case_0", "case_2"])
    assert Store(out).data_hash != data_hash and len(Store(out).cases["case_1"].boxes) == 0


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("spoil", [cut, Path.unlink, lambda path: path.write_text("{}")])
@pytest.mark.parametrize(
    "name", ["image/case_1.b2nd", "instances/case_1.b2nd", "cases/case_1.json", "prepared/case_1.json"]
)
def test_a_damaged_case_is_prepared_again(tmp_path, name, spoil):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_cases(raw, 3)
    run(raw, out)
    before = Store(out).data_hash
    whole = {kind: (out / kind / "case_1.b2nd").read_bytes() for kind in ("image", "instances")}
    spoil(out / name)
    summary = run(raw, out)
    assert (summary.done, summary.reused) == (["case_1"], ["case_0", "case_2"])
    assert whole == {kind: (out / kind / "case_1.b2nd").read_bytes() for kind in whole}
    assert Store(out).data_hash == before and run(raw, out).done == []


@pytest.mark.parametrize(
    "spoil", [cut, Path.unlink, lambda path: path.write_text("{}"), lambda path: path.write_text("[]"),
              lambda path: path.write_text(path.read_text().replace('"case_1", ', ""))]
)  # fmt: skip
def test_a_damaged_index_is_written_again(tmp_path, capsys, spoil):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_cases(raw, 3)
    command = ["prepare", str(raw), f"out={out}", "reader=nndetection", "workers=1"]
    assert main(command) == 0
    before = (out / "index.json").read_text()
    spoil(out / "index.json")
    capsys.readouterr()
    assert main(command) == 0 and (out / "index.json").read_text() == before
    assert "0 cases prepared, 3 were up to date" in capsys.readouterr().out
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().out


def test_a_damaged_note_of_the_store_is_named(tmp_path):
    write_cases(tmp_path / "raw", 1)
    run(tmp_path / "raw", tmp_path / "out")
    cut(tmp_path / "out/prepare.json")
    with pytest.raises(UserError, match=r"prepare\.json is damaged; delete .*out and prepare it again"):
        run(tmp_path / "raw", tmp_path / "out")


def test_other_settings_are_another_store(tmp_path):
    write_cases(tmp_path / "raw", 2)
    run(tmp_path / "raw", tmp_path / "out")
    assert run(tmp_path / "raw", tmp_path / "out", spacing_mm=(2.0, 2.0, 2.0)).done == ["case_0", "case_1"]
    assert Store(tmp_path / "out").spacing_mm == (2.0, 2.0, 2.0)
    assert run(tmp_path / "raw", tmp_path / "out").done == []  # the spacing is kept
    assert run(tmp_path / "raw", tmp_path / "out", keep_spacing=False).spacing_mm == (1.0, 1.0, 2.0)


def test_a_removed_case_leaves_the_store(tmp_path):
    write_cases(tmp_path / "raw", 3)
    run(tmp_path / "raw", tmp_path / "out")
    for name in ("imagesTr/case_1_0000.nii.gz", "labelsTr/case_1.nii.gz", "labelsTr/case_1.json"):
        (tmp_path / "raw" / name).unlink()
    assert run(tmp_path / "raw", tmp_path / "out").removed == ["case_1"]
    assert list(Store(tmp_path / "out").cases) == ["case_0", "case_2"]
    assert not list((tmp_path / "out").rglob("*case_1*"))


def test_a_stopped_run_goes_on_and_is_no_store_meanwhile(tmp_path, monkeypatch):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_cases(raw, 3)
    run(raw, tmp_path / "whole")
    real = prepare_module.prepare_case

    def stops(reader, case, *rest):
        if case.id == "case_1":
            raise KeyboardInterrupt
        return real(reader, case, *rest)

    monkeypatch.setattr(prepare_module, "prepare_case", stops)
    with pytest.raises(KeyboardInterrupt):
        run(raw, out)
    with pytest.raises(UserError, match="is not a store"):
        Store(out)
    monkeypatch.undo()
    summary = run(raw, out)
    assert (summary.done, summary.reused) == (["case_1", "case_2"], ["case_0"])
    assert Store(out).data_hash == Store(tmp_path / "whole").data_hash
    assert not [p for p in out.rglob("*") if "tmp" in p.name]


def test_a_strange_failure_of_one_case_does_not_stop_the_rest(tmp_path, monkeypatch):
    write_cases(tmp_path / "raw", 2)
    real = prepare_module.prepare_case

    def fails(reader, case, *rest):
        if case.id == "case_0":
            raise MemoryError("no room")
        return real(reader, case, *rest)

    monkeypatch.setattr(prepare_module, "prepare_case", fails)
    summary = run(tmp_path / "raw", tmp_path / "out")
    assert summary.done == ["case_1"]
    assert re.search(r"case_0_0000.nii.gz: MemoryError: no room", summary.failed["case_0"])


def test_a_full_disk_stops_and_is_no_fault_of_the_case(tmp_path, monkeypatch, capsys):
    write_cases(tmp_path / "raw", 3)
    real, written = blosc2.asarray, []

    def fills(*arguments, **options):
        written.append(options["urlpath"])
        if len(written) > 3:  # the instances of the second case
            raise RuntimeError("Error while creating the NDArray")
        return real(*arguments, **options)

    call = ["prepare", str(tmp_path / "raw"), f"out={tmp_path / 'out'}", "reader=nndetection", "workers=1"]
    monkeypatch.setattr(blosc2, "asarray", fills)
    assert main(call) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == (
        f"pretrain3d: error: {tmp_path / 'out/instances/case_1.b2nd'}: cannot be written whole; is the disk full?"
    )
    assert len(written) == 4  # nothing of the third case
    monkeypatch.setattr(blosc2, "asarray", real)
    summary = run(tmp_path / "raw", tmp_path / "out")
    assert (summary.reused, summary.done) == (["case_0"], ["case_1", "case_2"])


def test_when_no_case_is_good_there_is_no_store(tmp_path):
    write_cases(tmp_path / "raw", 1)
    (tmp_path / "raw/labelsTr/case_0.json").unlink()
    with pytest.raises(UserError, match=r"none of 1 cases could be prepared.*case_0.json: no such file"):
        run(tmp_path / "raw", tmp_path / "out")


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    write_cases(tmp_path / "raw", 1)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a store"):
        run(tmp_path / "raw", tmp_path)
    run(tmp_path / "raw", tmp_path / "out")
    write_dataset(tmp_path / "raw", name="other")
    with pytest.raises(UserError, match="is the store of 'tiny', not of 'other'"):
        run(tmp_path / "raw", tmp_path / "out")


def test_the_same_id_twice_is_refused(tmp_path):
    write_cases(tmp_path / "raw", 1)
    shutil.copytree(tmp_path / "raw/imagesTr", tmp_path / "raw/imagesUn")
    with pytest.raises(UserError, match="'case_0' occurs twice"):
        run(tmp_path / "raw", tmp_path / "out")


# the command


def test_the_command_prepares_plans_and_says_so(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_cases(raw, 3)
    command = ["prepare", str(raw), f"out={out}", "reader=nndetection", "workers=1"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "3 cases prepared" in text and "6 objects" in text
    plan = (out / "plan.yaml").read_text()
    assert yaml.safe_load(plan)["spacing_mm"] == [1.0, 1.0, 2.0]
    before = modified(out)
    assert main(command) == 0
    assert "nothing to do" in capsys.readouterr().out and modified(out) == before


def test_objects_thinner_than_a_voxel_are_counted(tmp_path, capsys):
    image = ct_phantom(np.random.default_rng(0), (32, 32, 32))
    mask = np.zeros(image.shape, np.uint8)
    mask[10:12, 10:18, 10:18], mask[20:24, 20:24, 20:24] = 1, 2  # 2 x 8 x 8 and 4 x 4 x 4 mm
    write_dataset(tmp_path / "raw")
    write_case(tmp_path / "raw", "a", image, mask, {1: 0, 2: 1}, affine_of("RAS", (1.0, 1.0, 1.0)))
    for spacing, said in (
        (4, "note: 1 of 2 objects are thinner than a voxel along an axis, at worst 0.5 of one"),
        (2, ""),
    ):
        line = [str(tmp_path / "raw"), f"out={tmp_path / str(spacing)}", "reader=nndetection", "workers=1"]
        assert main(["prepare", *line, f"spacing_mm={spacing}"]) == 0
        printed = capsys.readouterr().out
        assert said in printed and ("note:" in printed) == bool(said)


def test_the_command_names_bad_files_and_returns_1(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_cases(raw, 3)
    path = raw / "imagesTr/case_1_0000.nii.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    command = ["prepare", str(raw), f"out={out}", "reader=nndetection", "workers=1"]
    assert main(command) == 1
    captured = capsys.readouterr()
    failures = [line for line in captured.err.splitlines() if "failed:" in line]
    assert len(failures) == 1 and "case_1" in failures[0] and str(path) in failures[0] and "damaged" in failures[0]
    assert "1 failed" in captured.out and len(Store(out).cases) == 2
    assert not (out / "plan.yaml").exists() and "not planned, as cases failed; repair" in captured.err
    path.write_bytes(whole)
    assert main(command) == 0
    assert "1 cases prepared, 2 were up to date" in capsys.readouterr().out
    assert Store(out).plan["coverage"]["objects"] == 6


def test_the_command_takes_the_folds_of_a_splits_file(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_cases(raw, 3)
    command = ["prepare", str(raw), f"out={out}", "reader=nndetection", "workers=1"]
    assert main(command) == 0
    folds = [{"train": ["case_0", "case_2"], "val": ["case_1"]}, {"train": ["case_1"], "val": ["case_2"]}]
    (raw / "splits_final.json").write_text(json.dumps(folds))
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr()
    assert "0 cases prepared, 3 were up to date" in said.out and "2 given folds" in said.out
    assert "fold 1 leaves out 1 training cases, the first 'case_0'" in said.err
    assert fold_cases(Store(out), 1)["val"] == ["case_2"]
    assert main(["show", str(out)]) == 0 and "fold 0 of 2 (given)" in capsys.readouterr().out
    folds[1]["val"] = ["case_3"]
    (raw / "splits_final.json").write_text(json.dumps(folds))
    assert main(command) == 2 and "fold 1: there is no case 'case_3'" in capsys.readouterr().err
    assert Store(out).folds[1]["val"] == ["case_2"]
    (raw / "splits_final.json").unlink()
    assert main(command) == 0 and Store(out).folds == []


def test_the_command_warns_of_an_image_that_is_there_twice(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_cases(raw, 3)
    command = ["prepare", str(raw), f"out={out}", "reader=nndetection", "workers=1"]
    assert main(command) == 0 and "warning" not in capsys.readouterr().err
    for name in ("imagesTs/x", "imagesTs/y"):
        (raw / name).parent.mkdir(exist_ok=True)
        shutil.copy(raw / "imagesTr/case_0_0000.nii.gz", raw / f"{name}_0000.nii.gz")
    assert main(command) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert lines == ["  warning: the same image twice: case_0 (train) = x (test), case_0 (train) = y (test)"]


def test_the_command_warns_of_patients_with_training_and_test_cases(tmp_path, capsys):
    write_cases(tmp_path / "raw", 2)
    image = ct_phantom(np.random.default_rng(7))
    write_case(tmp_path / "raw", "held_out", image, None, {}, affine_of("LPS", (1.0, 1.0, 2.0)), "Ts")
    call = ["prepare", str(tmp_path / "raw"), "reader=nndetection", "workers=1"]
    write_dataset(tmp_path / "raw", groups={"case_0": "ann", "case_1": "bob", "held_out": "bob"})
    assert main([*call, f"out={tmp_path / 'a'}"]) == 0
    told = "1 patients have training and test cases, the first 'bob': case_1 (train), held_out (test)"
    assert told in capsys.readouterr().err
    write_dataset(tmp_path / "raw", groups={"case_0": "bob", "case_1": "bob"})
    assert main([*call, f"out={tmp_path / 'b'}"]) == 0
    assert "patients" not in capsys.readouterr().err


def test_ct_is_ct_in_small_letters(tmp_path):
    write_cases(tmp_path / "raw", 1)
    write_dataset(tmp_path / "raw", modalities={"0": "ct"})
    assert main(["prepare", str(tmp_path / "raw"), f"out={tmp_path / 'out'}", "reader=nndetection", "workers=1"]) == 0
    store = Store(tmp_path / "out")
    assert store.modality == ["CT"] and store.plan["intensity"]["scheme"] == "ct"


def test_a_plan_stays_while_cases_fail_and_replan_takes_it_away(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_cases(raw, 3)
    command = ["prepare", str(raw), f"out={out}", "reader=nndetection", "workers=1"]
    assert main(command) == 0
    before = (out / "plan.yaml").read_text()
    path = raw / "imagesTr/case_1_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:-100])
    assert main(command) == 1 and (out / "plan.yaml").read_text() == before
    assert main([*command, "replan=true"]) == 1 and not (out / "plan.yaml").exists()
    assert main(["plan", str(out)]) == 0 and Store(out).plan["coverage"]["objects"] == 4


def test_an_edited_plan_is_respected(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_cases(raw, 2)
    command = ["prepare", str(raw), f"out={out}", "reader=nndetection", "workers=1"]
    main(command)
    plan = out / "plan.yaml"
    made = yaml.safe_load(plan.read_text())
    edited = plan.read_text().replace("scheme: ct", "scheme: ct  # mine")
    plan.write_text(edited)
    assert main(command) == 0 and plan.read_text() == edited
    edited = edited.replace("\nspacing_mm: [1.0, 1.0, 2.0]", "\nspacing_mm: [0.5, 0.5, 1.0]")
    plan.write_text(edited.replace("low: null", "low: -500"))
    with pytest.raises(UserError, match=r"\[0\.5, 0\.5, 1\.0\], but the cases were prepared at \[1\.0, 1\.0, 2\.0\]"):
        _ = Store(out).plan  # nobody trains on voxels of another size than the plan says
    capsys.readouterr()
    assert main(command) == 0
    text = "planned again for voxels of 0.5 x 0.5 x 1 mm, was 1 x 1 x 2 mm"
    assert text in capsys.readouterr().out and Store(out).spacing_mm == (0.5, 0.5, 1.0)
    again = Store(out).plan
    assert again["spacing_mm"] == again["planned_for"]["spacing_mm"] == [0.5, 0.5, 1.0]
    assert again["intensity"]["low"] == -500 and again["planned_for"]["backbone"] == made["planned_for"]["backbone"]
    np.testing.assert_allclose(np.mean(again["anchors"]["sizes"]), 2 * np.mean(made["anchors"]["sizes"]), rtol=0.2)
    assert again["patch_size"] != made["patch_size"]
    before = modified(out)
    assert main(command) == 0 and modified(out) == before
    assert main([*command, "spacing_mm=1.5"]) == 2 and "replan=true" in capsys.readouterr().err
    assert main([*command, "patch_size=32"]) == 2
    assert main([*command, "spacing_mm=1.5", "patch_size=16", "replan=true"]) == 0
    assert Store(out).plan["spacing_mm"] == [1.5] * 3 and Store(out).plan["patch_size"] == [16] * 3
    assert Store(out).spacing_mm == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["reader=nndetection"], "missing out="),
        (["out=o"], "missing reader="),
        (["out=o", "reader=nndetektion"], "nndetection"),
        (["out=o", "reader=nndetection", "spacing_mm=0"], "spacing_mm=0: expected"),
        (["out=o", "reader=nndetection", "spacing_mm=[1,2]"], "expected one or three"),
        (["out=o", "reader=nndetection", "patch_size=50"], "multiples of 16"),
        (["out=o", "reader=nndetection", "workers=0"], "workers=0"),
        (["out=o", "reader=nndetection", "worker=1"], "workers"),
        (["out=o", "reader=nndetection", "modality=[CT,CT]"], "the data set has 1 channels"),
        (["out=o", "reader=images"], "give modality=CT"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, options, text):
    write_cases(tmp_path / "raw", 1)
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "raw", "workers=1" if "workers=0" not in options else "replan=false", *options]) == 2
    error = capsys.readouterr().err
    assert text in error and len(error.splitlines()) == 1


def test_plain_images_need_only_a_modality(tmp_path, capsys):
    affine = affine_of("LPS", (1.0, 1.0, 2.0))
    for index in range(2):
        save(tmp_path / "scans" / f"{index}.nii.gz", ct_phantom(np.random.default_rng(index)), affine)
    out = tmp_path / "out"
    assert main(["prepare", str(tmp_path / "scans"), f"out={out}", "reader=images", "modality=CT", "workers=1"]) == 0
    store = Store(out)
    assert store.plan["anchors"] is None and store.plan["intensity"]["foreground"] == "body"
    assert [case.split for case in store.cases.values()] == ["pretrain"] * 2
    assert not any(case.has_instances or case.annotated for case in store.cases.values())


@pytest.mark.slow
def test_two_workers_and_a_kill(tmp_path):
    """Killed for real with two workers at work; the next call ends with the store of a call that was not killed."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_dataset(raw)
    for index in range(12):
        image = ct_phantom(np.random.default_rng(index), (160, 150, 120))
        mask = np.zeros(image.shape, dtype=np.uint8)
        mask[60:70, 60:70, 50:60] = 1
        write_case(raw, f"case_{index:02d}", image, mask, {1: 0}, affine_of("LPS", (1, 1, 2)))
    command = [
        sys.executable,
        "-m",
        "pretrain3d",
        "prepare",
        str(raw),
        "reader=nndetection",
        "spacing_mm=[1.2,1.2,1.5]",
    ]
    process = subprocess.Popen([*command, f"out={out}"], start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((out / "prepared").glob("case_*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list((out / "prepared").glob("case_*.json")))
    assert 3 <= done < 12 and not (out / "index.json").exists()
    finished = subprocess.run([*command, f"out={out}"], capture_output=True, text=True, check=True)
    assert f"{12 - done} cases prepared, {done} were up to date" in finished.stdout
    subprocess.run([*command, f"out={tmp_path / 'whole'}", "workers=1"], check=True, capture_output=True)
    one, other = Store(out), Store(tmp_path / "whole")
    assert one.data_hash == other.data_hash and list(one.cases) == list(other.cases)
    for name, case in one.cases.items():
        assert json.dumps(case.to_dict()) == json.dumps(other.cases[name].to_dict())
        for kind in ("image", "instances"):
            a, b = (store.read(name, kind, (0, 0, 0), case.shape) for store in (one, other))
            np.testing.assert_array_equal(a, b)
