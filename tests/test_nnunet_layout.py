"""The layouts of nnU-Net and the Decathlon: files of all channels, regions of several labels, voxels to ignore."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_folder import affine_of, ct_phantom, save
from scipy import ndimage

from pretrain3d.__main__ import main
from pretrain3d.config import UserError
from pretrain3d.data.prepare import prepare
from pretrain3d.data.readers.contract import RawVolume
from pretrain3d.data.readers.nnunet import NnUNet
from pretrain3d.data.semantic import SemanticMaps
from pretrain3d.data.store import Store
from pretrain3d.geometry import boxes_of_instances

AFFINE = affine_of("LPS", (1.0, 1.0, 2.0))
CHANNELS = {"0": "T2", "1": "ADC"}
REGIONS = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3}
NAMES = ["1 of whole tumor", "2 of whole tumor+tumor core", "enhancing tumor"]


def write_description(folder: Path, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"name": "Tumours", "channel_names": CHANNELS, "labels": REGIONS, "regions_class_order": [1, 2, 3]}
    (folder / "dataset.json").write_text(json.dumps({**content, **more}))
    return folder


def label_map() -> np.ndarray:
    """Two tumours, one of all three labels, and a speck of its core away from it."""
    labels = np.zeros((30, 28, 24), dtype=np.uint8)
    labels[8:14, 8:14, 8:14] = 1
    labels[9:12, 9:12, 9:12] = 2
    labels[13:15, 13:15, 13:15] = 3  # touches its oedema by a face, and its core not at all
    labels[18:20, 18:21, 14:16] = 2
    return labels


def channels(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [ct_phantom(rng), 2 * ct_phantom(rng)]


def write_case(folder: Path, case_id: str, labels: np.ndarray | None, whole: bool = True, ending: str = "Tr") -> None:
    """Two channels, in one file or in one each."""
    images = channels(len(case_id))
    if whole:
        save(folder / f"images{ending}" / f"{case_id}.nii.gz", np.stack(images, -1), AFFINE)
    for number, image in enumerate([] if whole else images):
        save(folder / f"images{ending}" / f"{case_id}_{number:04d}.nii.gz", image, AFFINE)
    if labels is not None:
        save(folder / f"labels{ending}" / f"{case_id}.nii.gz", labels, AFFINE)


def read_only(folder: Path) -> RawVolume:
    reader = NnUNet(folder)
    return reader.read(reader.cases()[0])


# a file of all channels


@pytest.mark.parametrize("extra", [(), (1,)])
def test_a_file_of_all_channels_is_read_as_a_file_of_each(tmp_path: Path, extra: tuple[int, ...]) -> None:
    """Also with an axis of length 1 before the channels, as ANTs writes vectors."""
    images = channels()
    save(write_description(tmp_path) / "imagesTr" / "a.nii.gz",
         np.stack(images, -1).reshape(*images[0].shape, *extra, 2), AFFINE)  # fmt: skip
    save(tmp_path / "labelsTr" / "a.nii.gz", label_map(), AFFINE)
    reader = NnUNet(tmp_path)
    (case,) = reader.cases()
    affine, shape = reader.geometry(case)
    assert shape == images[0].shape
    np.testing.assert_allclose(affine, AFFINE)
    volume = reader.read(case)
    assert volume.image.dtype == np.int16
    np.testing.assert_array_equal(volume.image, images)
    np.testing.assert_array_equal(volume.semantic, label_map())


def test_both_layouts_give_the_same_store(tmp_path: Path) -> None:
    """Voxels, statistics, what identifies an image, and objects."""
    stores = []
    for name, whole in (("whole", True), ("each", False)):
        raw = write_description(tmp_path / name, objects={"tumor core": 1})
        write_case(raw, "a", label_map(), whole)
        write_case(raw, "bc", None, whole, "Ts")
        reader = NnUNet(raw)
        assert prepare(reader, tmp_path / f"{name}.store", None, workers=1, progress=False).done == ["a", "bc"]
        stores.append(Store(tmp_path / f"{name}.store"))
    one, other = stores
    assert one.modality == other.modality == ["T2", "ADC"] and one.spacing_mm == other.spacing_mm
    assert one.data_hash == other.data_hash
    for case_id, case in one.cases.items():
        assert case.to_dict() == other.cases[case_id].to_dict()
        assert case.channels == 2 and len(case.moments) == 2 and case.signature
        for kind in ("image", "instances", "semantic") if case_id == "a" else ("image",):
            arrays = [store.read(case_id, kind, (0, 0, 0), case.shape) for store in stores]
            np.testing.assert_array_equal(*arrays)


def test_another_number_of_channels_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_description(tmp_path / "raw", channel_names={"0": "T1", "1": "T2", "2": "FLAIR"})
    write_case(raw, "a", label_map())
    line = ["prepare", str(raw), f"out={tmp_path / 'store'}", "reader=nnunet", "workers=1"]
    assert main(line) == 2
    said = (
        f"{raw / 'imagesTr' / 'a.nii.gz'}: expected 3 channels, in files <case>_0000 to _0002 or in one of shape "
        "(X, Y, Z, 3), got shape (30, 28, 24, 2)"
    )
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("pretrain3d: error: ") and error.endswith(said)
    write_description(raw)
    save(raw / "imagesTr" / "b.nii.gz", channels()[0], AFFINE)  # a single channel
    save(raw / "labelsTr" / "b.nii.gz", label_map(), AFFINE)
    assert main(line) == 1  # the other case goes on
    (failed,) = [row for row in capsys.readouterr().err.splitlines() if "failed: b: " in row]
    assert "b.nii.gz: expected 2 channels" in failed and failed.endswith("got shape (30, 28, 24)")
    assert list(Store(tmp_path / "store").cases) == ["a"]


def test_a_map_beside_a_file_of_all_channels_has_its_grid(tmp_path: Path) -> None:
    write_case(write_description(tmp_path), "a", label_map()[1:])
    with pytest.raises(UserError, match=r"shape \(29, 28, 24\) differs from \(30, 28, 24\) of .*imagesTr/a\.nii\.gz"):
        read_only(tmp_path)
    save(tmp_path / "labelsTr" / "a.nii.gz", np.stack([label_map()] * 2, -1), AFFINE)
    with pytest.raises(UserError, match=r"labelsTr/a\.nii\.gz: expected a 3D volume, got shape \(30, 28, 24, 2\)"):
        read_only(tmp_path)


# regions


def components(mask: np.ndarray, fewest: int) -> set[tuple[tuple[int, ...], int]]:
    """(box, voxels) of each component of enough voxels."""
    labelled, number = ndimage.label(mask, ndimage.generate_binary_structure(3, 3))
    found = [np.argwhere(labelled == index) for index in range(1, number + 1)]
    return {
        ((*voxels.min(axis=0).tolist(), *(voxels.max(axis=0) + 1).tolist()), len(voxels))
        for voxels in found
        if len(voxels) >= fewest
    }


def objects_of(volume: RawVolume, index: int) -> set[tuple[tuple[int, ...], int]]:
    assert volume.instances is not None
    ids, boxes = boxes_of_instances(volume.instances)
    assert set(ids.tolist()) == volume.labels.keys()
    return {
        (tuple(int(v) for v in box), int((volume.instances == i).sum()))
        for i, box in zip(ids.tolist(), boxes, strict=True)
        if volume.labels[i] == index
    }


@pytest.mark.parametrize(("name", "fewest"), [("whole tumor", 1), ("tumor core", 1), ("tumor core", 10),
                                              ("enhancing tumor", 1)])  # fmt: skip
def test_the_components_of_a_region_are_its_objects(tmp_path: Path, name: str, fewest: int) -> None:
    write_case(write_description(tmp_path, objects={name: fewest}), "a", label_map())
    reader, volume = NnUNet(tmp_path), read_only(tmp_path)
    values = REGIONS[name] if isinstance(REGIONS[name], list) else [REGIONS[name]]
    inside = np.isin(label_map(), values)
    assert objects_of(volume, 0) == components(inside, fewest) and len(volume.labels) == {
        ("whole tumor", 1): 2, ("tumor core", 1): 3, ("tumor core", 10): 2, ("enhancing tumor", 1): 1,
    }[name, fewest]  # fmt: skip
    assert volume.specks == len(components(inside, 1)) - len(volume.labels)
    assert reader.classes == [name] and volume.annotated == (0,)
    assert reader.semantic_classes == NAMES and volume.semantic_annotated == (0, 1, 2)
    np.testing.assert_array_equal(volume.semantic, label_map())


def test_regions_that_share_no_label_are_objects_beside_each_other(tmp_path: Path) -> None:
    """KiTS23: the cyst has no name of its own, and is in two regions."""
    labels = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": [2], "rim": 4}
    write_description(tmp_path, labels=labels, objects={"rim": 1, "masses": 1})
    drawn = label_map()
    drawn[15:17, 13:15, 13:15] = 4  # touches the mass, and is of another class
    write_case(tmp_path, "a", drawn)
    volume = read_only(tmp_path)
    assert NnUNet(tmp_path).semantic_classes == ["1 of kidney", "tumor", "3 of kidney+masses", "rim"]
    assert objects_of(volume, 0) == components(drawn == 4, 1)
    assert objects_of(volume, 1) == components(np.isin(drawn, (2, 3)), 1)


def test_regions_may_be_lateral(tmp_path: Path) -> None:
    labels = {"background": 0, "left lung": [1, 2], "right lung": [3, 4]}
    names = {"1 of left lung": "3 of right lung", "2 of left lung": "4 of right lung"}
    write_description(
        tmp_path, labels=labels, objects={"left lung": 1, "right lung": 1},
        mirror_classes={"left lung": "right lung", **names},
    )  # fmt: skip
    assert NnUNet(tmp_path).mirror_classes["right lung"] == "left lung"
    write_description(tmp_path, labels=labels, mirror_classes={"left lung": "right lung"})
    with pytest.raises(UserError, match=r"mirror_classes must map names among \['1 of left lung', "):
        NnUNet(tmp_path)


def test_nested_regions_are_not_objects_of_one_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_description(tmp_path / "raw", objects={"enhancing tumor": 1, "tumor core": 1})
    write_case(raw, "a", label_map())
    assert main(["prepare", str(raw), f"out={tmp_path / 'store'}", "reader=nnunet"]) == 2
    assert capsys.readouterr().err == (
        f"pretrain3d: error: {raw / 'dataset.json'}: objects has 'enhancing tumor' and 'tumor core', which share label "
        "3, but a voxel is of one object; name one of them, and prepare a store for each\n"
    )


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ({"whole": [1, "2"]}, r"labels must be {name: number or \[numbers\]}, got {'whole': \[1, '2'\]}"),
        ({"whole": []}, r"labels must be {name: number or \[numbers\]}, got {'whole': \[\]}"),
        ({"whole": [True, 2]}, "labels must be {name: number"),
        ({"whole": 1.0}, "labels must be {name: number"),
        ({"": 1}, "labels must be {name: number"),
        ({"whole": [1, 3]}, "labels must name every number from 1 on, got"),
        ({"whole": [0, 1]}, "labels must name every number from 1 on, got"),
        ({"whole": [1, 2], "background": [1]}, "labels must have background 0 and for ignore one number, got"),
        ({"whole": [1], "ignore": [2, 3]}, "labels must have background 0 and for ignore one number, got"),
        ({"whole": [1, 2], "core": [2, 1]}, r"labels has 'whole' and 'core' for the same number, \[1, 2\] and \[2, 1"),
        ({"whole": 1, "core": 1}, "labels has 'whole' and 'core' for the same number, 1 and 1; expected one of them"),
        ({"whole": [1, 2], "ignore": 2}, "labels has 'whole' and 'ignore' for the same number"),
    ],
)
def test_labels_that_cannot_be_read_are_one_line(tmp_path: Path, labels: dict[str, Any], text: str) -> None:
    write_description(tmp_path, labels={"background": 0, **labels})
    with pytest.raises(UserError, match=rf"dataset\.json: {text}") as error:
        NnUNet(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("annotated", "labels", "objects"),
    [
        (["whole tumor", "tumor core", "enhancing tumor"], (0, 1, 2), (0,)),
        (["whole tumor", "tumor core"], (0,), (0,)),  # which part of the core enhances was not said
        (["whole tumor"], (), ()),
        (["enhancing tumor"], (2,), ()),
        (["whole tumor", "enhancing tumor"], (2,), ()),
        ([], (), ()),
    ],
)
def test_a_label_is_known_where_the_annotated_regions_tell_it_from_all_others(
    tmp_path: Path, annotated: list[str], labels: tuple[int, ...], objects: tuple[int, ...]
) -> None:
    write_description(tmp_path, objects={"tumor core": 1}, annotated={"a": annotated})
    write_case(tmp_path, "a", label_map())
    volume = read_only(tmp_path)
    assert volume.semantic_annotated == labels and volume.annotated == objects


def test_labels_that_no_region_tells_apart_were_drawn_together(tmp_path: Path) -> None:
    write_description(tmp_path, labels={"background": 0, "lesion": [1, 2], "organ": 3}, annotated={"a": ["lesion"]})
    write_case(tmp_path, "a", label_map())
    assert read_only(tmp_path).semantic_annotated == (0, 1)


def test_other_regions_prepare_the_cases_again(tmp_path: Path) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    write_case(write_description(raw, objects={"whole tumor": 1}), "a", label_map())
    for core, whole, done in (([2, 3], [1, 2, 3], ["a"]), ([2, 3], [1, 2, 3], []), ([2, 3], [1, 2], ["a"])):
        labels = {**REGIONS, "tumor core": core, "whole tumor": whole}
        write_description(raw, labels=labels, objects={"whole tumor": 1})
        assert NnUNet(raw).semantic_classes == NAMES  # which do not show what the whole holds of label 3
        assert prepare(NnUNet(raw), store, (2.0, 2.0, 2.0), workers=1, progress=False).done == done
    (case,) = Store(store).cases.values()
    assert len(case.labels) == 2 and case.volumes_mm3.sum() == 2 * np.isin(label_map(), (1, 2)).sum()


# voxels that nobody looked at


def test_voxels_to_ignore_beside_regions(tmp_path: Path) -> None:
    """They teach nothing, no patch is placed on them, and a case with any has no objects."""
    raw = write_description(tmp_path / "raw", labels={**REGIONS, "ignore": 4}, objects={"whole tumor": 1})
    drawn = label_map()
    write_case(raw, "a", drawn)
    drawn[6, 8:20, 8:16] = 4
    write_case(raw, "bc", drawn)
    reader = NnUNet(raw)
    assert reader.semantic_classes == [*NAMES, "ignore"]
    known, unknown = (reader.read(case) for case in reader.cases())
    assert known.annotated == (0,) and len(known.labels) == 2 and unknown.annotated == () and not unknown.labels
    assert known.semantic_annotated == unknown.semantic_annotated == (0, 1, 2)
    prepare(reader, tmp_path / "store", (1.0, 1.0, 2.0), workers=1, progress=False)
    store = Store(tmp_path / "store")
    case = store.cases["bc"]
    labels = store.read("bc", "semantic", (0, 0, 0), case.shape)
    assert (labels == 4).any()
    maps, rng = SemanticMaps(store, [case]), np.random.default_rng(0)
    met = {int(labels[tuple(voxel)]) for _ in range(60) if (voxel := maps.voxel(case, rng)) is not None}
    assert met == {1, 2, 3}
    write_description(raw, labels={**REGIONS, "ignore": 4}, objects={"ignore": 1})
    with pytest.raises(UserError, match=r"objects has 'ignore'; expected names among \['whole tumor', 'tumor core', "):
        NnUNet(raw)


# the commands


TINY = [
    "data.patch_size=[16,16,16]", "data.batch_size=2", "data.num_workers=0", "data.num_folds=2",
    "module.warmup_steps=0", "module.overlap=0", "trainer.max_steps=1", "trainer.val_every_n_steps=1",
    "trainer.checkpoint_every_n_steps=1", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu",
    "data.intensity=null",
]  # fmt: skip


def test_a_region_of_the_decathlons_channels_is_trained_on_and_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, store = write_description(tmp_path / "Task01_BrainTumour", objects={"whole tumor": 2}), tmp_path / "store"
    for index in range(1, 5):
        write_case(raw, "BRATS_"[:index] + str(index), label_map())
    write_case(raw, "test", label_map(), ending="Ts")
    line = ["prepare", str(raw), f"out={store}", "reader=nnunet", "workers=1"]
    assert main([*line, "spacing_mm=2", "patch_size=16"]) == 0 and "5 cases, 10 objects" in capsys.readouterr().out
    assert main(["show", str(raw)]) == 0
    shown = capsys.readouterr().out
    assert "reader=nnunet" in shown and ", ".join(NAMES) in shown and "T2, ADC" in shown
    assert main(line) == 0 and "nothing to do" in capsys.readouterr().out
    out = [f"out={tmp_path}", f"data.store={store}", *TINY]
    assert main(["fit", "--config", "configs/detect/phantom.yaml", "name=det", *out]) == 0
    scan = str(raw / "imagesTs" / "test.nii.gz")
    assert main(["predict", str(tmp_path / "det"), scan, f"out={tmp_path / 'found'}", "threshold=0"]) == 0
    found = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert found["classes"] == ["whole tumor"] and found["cases"]["test"]["boxes"]
    line = ["fit", "--config", "configs/pretrain/phantom_supervised.yaml", "name=sup", *out]
    assert main([*line, "data.labels=semantic"]) == 0
    header = (tmp_path / "sup" / "metrics.csv").read_text().splitlines()[0]
    assert all(f"val/dice/{name}" in header for name in NAMES)
