"""Public data sets as they are released: label maps whose components are objects, the Decathlon, RibFrac."""

from __future__ import annotations

import json
import re
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
from pretrain3d.data.readers.ribfrac import RibFrac
from pretrain3d.data.store import Store
from pretrain3d.geometry import boxes_of_instances

AFFINE = affine_of("LPS", (1.0, 1.0, 2.0))
LABELS = {"0": "background", "1": "pancreas", "2": "cancer", "3": "cyst"}


def write_description(folder: Path, **more: Any) -> Path:
    """dataset.json as the Decathlon has it; ``more`` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"name": "Pancreas", "modality": {"0": "CT"}, "labels": LABELS, "licence": "CC-BY-SA 4.0", **more}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def label_map(seed: int = 0) -> np.ndarray:
    """An organ with lesions that touch it and each other by faces, edges and corners, and specks."""
    labels = np.zeros((30, 28, 24), dtype=np.uint8)
    labels[8:20, 8:20, 8:16] = 1
    labels[9:12, 9:12, 9:11] = 2
    labels[12:14, 12:15, 11:13] = 2  # shares a corner with the one above: one object
    labels[16:18, 9:12, 9:12] = 2
    labels[16:18, 12:14, 9:12] = 3  # shares a face, and is of another class: an object of its own
    labels[15, 18, 14] = 2  # a speck
    labels[18:20, 18:20, 9] = 3  # four voxels
    labels[21 + seed : 23 + seed, 20, 17:19] = 2  # four voxels outside the organ
    return labels


def write_case(folder: Path, case_id: str, labels: np.ndarray | None, ending: str = "Tr", channel: str = "") -> None:
    image = ct_phantom(np.random.default_rng(len(case_id)))
    save(folder / f"images{ending}" / f"{case_id}{channel}.nii.gz", image, AFFINE)
    if labels is not None:
        save(folder / f"labels{ending}" / f"{case_id}.nii.gz", labels, AFFINE)


def read_only(folder: Path) -> RawVolume:
    reader = NnUNet(folder)
    return reader.read(reader.cases()[0])


def flood(mask: np.ndarray) -> list[np.ndarray]:
    """The connected components of a mask, (N, 3) voxels each, walked from voxel to neighbour."""
    left = {tuple(voxel) for voxel in np.argwhere(mask).tolist()}
    steps = [(i, j, k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)]
    found = []
    while left:
        todo, component = [left.pop()], []
        while todo:
            x, y, z = todo.pop()
            component.append((x, y, z))
            near = {(x + i, y + j, z + k) for i, j, k in steps} & left
            left -= near
            todo += near
        found.append(np.array(component))
    return found


def objects_of(volume: RawVolume) -> set[tuple[int, tuple[int, ...], int]]:
    """(class, box, voxels) of every object of a case."""
    assert volume.instances is not None
    ids, boxes = boxes_of_instances(volume.instances)
    assert set(ids.tolist()) == volume.labels.keys()
    sizes = np.bincount(volume.instances.reshape(-1))
    return {
        (volume.labels[i], tuple(int(v) for v in box), int(sizes[i]))
        for i, box in zip(ids.tolist(), boxes, strict=True)
    }


def expected_objects(
    labels: np.ndarray, values: dict[int, int], fewest: dict[int, int]
) -> set[tuple[int, tuple[int, ...], int]]:
    return {
        (index, (*component.min(axis=0).tolist(), *(component.max(axis=0) + 1).tolist()), len(component))
        for index, value in values.items()
        for component in flood(labels == value)
        if len(component) >= fewest[index]
    }


@pytest.mark.parametrize("fewest", [(1, 1), (2, 1), (5, 5), (1000, 3)])
@pytest.mark.parametrize("channel", ["", "_0000"])
def test_components_of_a_label_are_its_objects(tmp_path, fewest, channel):
    cancer, cyst = fewest
    write_description(tmp_path, objects={"cyst": cyst, "cancer": cancer})
    labels = label_map()
    write_case(tmp_path, "a", labels, channel=channel)
    assert NnUNet(tmp_path).classes == ["cyst", "cancer"]  # in the order of "objects"
    volume = read_only(tmp_path)
    expected = expected_objects(labels, {0: 3, 1: 2}, {0: cyst, 1: cancer})
    assert objects_of(volume) == expected
    assert volume.specks == len(flood(labels == 2)) + len(flood(labels == 3)) - len(expected)
    assert volume.annotated == (0, 1) and volume.semantic_annotated == (0, 1, 2)
    np.testing.assert_array_equal(volume.semantic, labels)  # specks and all


def test_without_objects_the_map_is_all_there_is(tmp_path):
    write_case(write_description(tmp_path), "a", label_map())
    reader = NnUNet(tmp_path)
    volume = read_only(tmp_path)
    assert reader.classes == [] and volume.instances is None and volume.annotated == () and volume.specks == 0
    assert reader.settings(reader.cases()[0]) == [], "stores of before are up to date"


def test_a_label_that_was_not_annotated_has_no_objects(tmp_path):
    write_description(tmp_path, objects={"cancer": 1, "cyst": 1}, annotated={"a": ["pancreas", "cyst"], "b": []})
    labels = label_map()
    write_case(tmp_path, "a", labels)
    write_case(tmp_path, "b", labels)
    reader = NnUNet(tmp_path)
    first, second = (reader.read(case) for case in reader.cases())
    assert first.annotated == (1,) and objects_of(first) == expected_objects(labels, {1: 3}, {1: 1})
    assert second.annotated == () and second.instances is None and second.semantic_annotated == ()
    assert len({str(reader.settings(case)) for case in reader.cases()}) == 2


def test_where_voxels_were_not_looked_at_no_object_is_known(tmp_path):
    write_description(tmp_path, labels={**LABELS, "4": "ignore"}, objects={"cancer": 1})
    labels = label_map()
    write_case(tmp_path, "a", labels)
    labels[1, 1, 1] = 4
    write_case(tmp_path, "b", labels)
    reader = NnUNet(tmp_path)
    known, unknown = (reader.read(case) for case in reader.cases())
    assert known.annotated == (0,) and len(known.labels) == 4
    assert unknown.annotated == () and unknown.instances is None and unknown.labels == {}
    assert known.semantic_annotated == unknown.semantic_annotated == (0, 1, 2)


def test_test_cases_need_no_labels(tmp_path):
    write_description(tmp_path, objects={"cancer": 1})
    write_case(tmp_path, "a", label_map())
    write_case(tmp_path, "b", None, "Ts")
    write_case(tmp_path, "c", label_map(), "Ts")
    reader = NnUNet(tmp_path)
    cases = {case.id: case for case in reader.cases()}
    assert {name: case.split for name, case in cases.items()} == {"a": "train", "b": "test", "c": "test"}
    assert reader.read(cases["b"]).annotated == () and reader.read(cases["c"]).annotated == (0,)
    assert reader.licence == "CC-BY-SA 4.0" and reader.name == "Pancreas" and reader.modality == ["CT"]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"objects": ["cancer"]}, r"objects must be {name of a label: fewest voxels of an object, from 1}, got \["),
        ({"objects": {"cancer": 0}}, "objects must be"),
        ({"objects": {"cancer": 2.5}}, "objects must be"),
        ({"objects": {"cancer": True}}, "objects must be"),
        ({"objects": {"tumour": 1}}, r"objects has 'tumour'; expected names among \['pancreas', 'cancer', 'cyst'\]"),
        ({"objects": {"ignore": 1}, "labels": {**LABELS, "4": "ignore"}}, "objects has 'ignore'; expected names"),
    ],
)
def test_mistakes_in_dataset_json_are_one_line(tmp_path, more, text):
    write_case(write_description(tmp_path, **more), "a", label_map())
    with pytest.raises(UserError, match=text) as error:
        NnUNet(tmp_path).cases()
    assert "\n" not in str(error.value)


def test_too_many_components_are_named(tmp_path):
    write_description(tmp_path, objects={"cancer": 1})
    labels = np.zeros((84, 84, 84), dtype=np.uint8)
    labels[::2, ::2, ::2] = 2  # 74,088 single voxels
    save(tmp_path / "imagesTr" / "a.nii.gz", labels, AFFINE)
    save(tmp_path / "labelsTr" / "a.nii.gz", labels, AFFINE)
    with pytest.raises(UserError, match="74088 components of 'cancer' are too many for objects; state more voxels"):
        read_only(tmp_path)


def test_files_with_and_without_a_channel_number_are_not_mixed(tmp_path):
    write_description(tmp_path, objects={"cancer": 1})
    write_case(tmp_path, "a", label_map(), channel="_0000")
    write_case(tmp_path, "b", None)
    with pytest.raises(UserError, match=r"imagesTr/b\.nii\.gz: no case uses it; expected images <case>_0000"):
        NnUNet(tmp_path).cases()


def linked(folder: Path, images: Path, labels: Path, channel: str, number: int = 1000) -> Path:
    """The raw layout, of links to the first files of two folders."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for path in sorted(labels.glob("*.nii.gz"))[:number]:
        (folder / "labelsTr" / path.name).symlink_to(path)
        (folder / "imagesTr" / path.name.replace(".nii", f"{channel}.nii")).symlink_to(images / path.name)
    return folder


def test_real_hippocampi_are_objects(testdata, tmp_path):
    """Anterior and posterior part, as released and with channel numbers, against SciPy's components of each map."""
    real = testdata / "data" / "msd_hippocampus"
    readers = []
    for channel in ("", "_0000"):
        folder = linked(tmp_path / f"raw{channel}", real / "imagesTr", real / "labelsTr", channel, 12)
        labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
        readers.append(NnUNet(write_description(folder, labels=labels, objects={"Anterior": 10, "Posterior": 10})))
    for one, other in zip(*(reader.cases() for reader in readers), strict=True):
        volume = readers[0].read(one)
        expected = set()
        for index in range(2):
            components, number = ndimage.label(volume.semantic == index + 1, ndimage.generate_binary_structure(3, 3))
            for voxels in (np.argwhere(components == component) for component in range(1, number + 1)):
                expected.add((index, (*voxels.min(axis=0).tolist(), *(voxels.max(axis=0) + 1).tolist()), len(voxels)))
        assert objects_of(volume) == objects_of(readers[1].read(other)) == {o for o in expected if o[2] >= 10}
        assert one.id == other.id and volume.specks + len(volume.labels) == len(expected) >= 2


def test_real_target_volumes_have_the_known_components(testdata, tmp_path):
    """OpenKBP's targets: 368 components of at least 10 voxels, and the specks that its table counts with them."""
    real = testdata / "data" / "openkbp"
    names = ["PTV56", "PTV63", "PTV70"]
    folder = linked(tmp_path / "raw", real / "labels_ptv", real / "labels_ptv", "_0000")  # maps read faster than CTs
    labels = {"background": 0, **{name: label for label, name in enumerate(names, start=1)}}
    reader = NnUNet(write_description(folder, labels=labels, objects=dict.fromkeys(names, 10)))
    table = {row["case"]: row["ptv_components"] for row in json.loads((real / "cases.json").read_text())}
    volumes = {case.id.removeprefix("openkbp_"): reader.read(case) for case in reader.cases()}
    assert sum(len(volume.labels) for volume in volumes.values()) == 368
    for name, volume in volumes.items():
        assert len(volume.labels) + volume.specks == sum(table[name].values()), name


# the commands


TINY = [
    "data.patch_size=[16,16,16]", "data.batch_size=2", "data.num_workers=0", "data.num_folds=2",
    "module.warmup_steps=0", "module.overlap=0", "trainer.max_steps=1", "trainer.val_every_n_steps=1",
    "trainer.checkpoint_every_n_steps=1", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu",
]  # fmt: skip


def test_the_decathlon_is_prepared_trained_on_and_tested(tmp_path, capsys):
    raw = write_description(
        tmp_path / "Task07_Pancreas", objects={"cancer": 2, "cyst": 1}, annotated={"pancreas_4": ["pancreas"]}
    )
    for index in range(5):
        write_case(raw, f"pancreas_{index}", label_map(index))
    write_case(raw, "pancreas_9", label_map(), "Ts")
    (raw / "imagesTr" / "._pancreas_0.nii.gz").write_bytes(b"of a Mac")
    store = tmp_path / "store"
    line = ["prepare", str(raw), f"out={store}", "reader=nnunet", "spacing_mm=2", "patch_size=16", "workers=1"]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert (
        f"1 files ._* are left-overs of macOS and not read, the first {raw / 'imagesTr' / '._pancreas_0.nii.gz'}"
        in said
    )
    assert "6 cases, 25 objects" in said and "note: 5 specks in 5 cases are no objects" in said
    assert "note: in 1 of 5 training cases no class was annotated, the first pancreas_4" in said
    prepared = Store(store)
    assert prepared.classes == ["cancer", "cyst"] and prepared.semantic_classes == ["pancreas", "cancer", "cyst"]
    assert all(case.has_semantic and case.specks == case.has_instances for case in prepared.cases.values())
    assert main(["show", str(store)]) == 0 and "5 too small to be objects" in capsys.readouterr().out
    out = [f"out={tmp_path}", f"data.store={store}", *TINY]
    assert main(["fit", "--config", "configs/detect/phantom.yaml", "name=det", *out]) == 0
    assert main(["test", str(tmp_path / "det"), "samples=10", "pictures=0"]) == 0
    result = json.loads((tmp_path / "det" / "result.json").read_text())
    assert result["data"]["name"] == "Pancreas" and set(result["per_class"]) == {"cancer", "cyst"}
    truth = json.loads((tmp_path / "det" / "targets.json").read_text())["cases"]["pancreas_9"]
    expected = expected_objects(label_map(), {0: 2, 1: 3}, {0: 2, 1: 1})
    assert {
        (i, tuple(np.rint(b).astype(int).tolist())) for i, b in zip(truth["labels"], truth["boxes"], strict=True)
    } == {(index, box) for index, box, _ in expected}


def test_other_objects_or_annotations_prepare_the_cases_again(tmp_path):
    raw, store = tmp_path / "raw", tmp_path / "store"
    write_description(raw)
    for name in ("a", "b"):
        write_case(raw, name, label_map())
    for fewest, annotated, done in (
        (1, {}, ["a", "b"]),
        (1, {}, []),
        (5, {}, ["a", "b"]),
        (5, {"a": ["pancreas"]}, ["a"]),
        (5, {"a": []}, ["a"]),
    ):
        write_description(raw, objects={"cancer": fewest}, annotated=annotated)
        assert prepare(NnUNet(raw), store, (2.0, 2.0, 2.0), workers=1, progress=False).done == done
    found = {name: (len(case.labels), case.specks) for name, case in Store(store).cases.items()}
    assert found == {"a": (0, 0), "b": (2, 2)}


# RibFrac


def write_ribfrac(folder: Path) -> np.ndarray:
    """One patient of each archive, as unpacked; the labels' headers are not those of the images."""
    mask = np.zeros((30, 28, 24), dtype=np.uint8)
    mask[3:6, 4:6, 5:9] = 1
    mask[3:6, 9:12, 5:9] = 1  # drawn over two ribs as one
    mask[20:22, 20:22, 20:22] = 3
    other = affine_of("LPS", (1.0, 1.0, 1.25), (0.0, 0.0, 0.0))
    for number, images, labels in (
        (300, "Part1", "Part1"), (301, "Part2", "labels/Part2"), (421, "ribfrac-val-images", "ribfrac-val-labels"),
        (501, "ribfrac-test-images", None),
    ):  # fmt: skip
        image = ct_phantom(np.random.default_rng(number))
        save(folder / images / f"RibFrac{number}-image.nii.gz", image, AFFINE)
        if labels:
            content = mask if number != 421 else 0 * mask
            save(folder / labels / f"RibFrac{number}-label.nii.gz", content, other)
    (folder / "ribfrac-val-info.csv").write_text("public_id,label_id,label_code\nRibFrac421,0,0\n")
    return mask


def test_ribfrac_as_released(tmp_path):
    mask = write_ribfrac(tmp_path)
    (tmp_path / "Part1" / "._RibFrac300-image.nii.gz").write_bytes(b"of a Mac")
    reader = RibFrac(tmp_path)
    cases = reader.cases()
    assert [(case.id, case.split) for case in cases] == [
        ("RibFrac300", "train"), ("RibFrac301", "train"), ("RibFrac421", "train"), ("RibFrac501", "test"),
    ]  # fmt: skip
    volumes = [reader.read(case) for case in cases]
    for volume in volumes[:2]:
        assert volume.labels == {1: 0, 3: 0} and volume.annotated == (0,)
        np.testing.assert_array_equal(volume.instances, mask)
        np.testing.assert_allclose(volume.affine, AFFINE)
    assert volumes[2].labels == {} and volumes[2].annotated == (0,) and not volumes[2].instances.any()
    assert volumes[3].instances is None and volumes[3].annotated == ()
    assert main(["show", str(tmp_path)]) == 0


def test_files_that_are_nearly_of_ribfrac_are_named(tmp_path, capsys):
    write_ribfrac(tmp_path / "raw")
    assert RibFrac(tmp_path / "raw").remarks() == []
    for path in sorted((tmp_path / "raw").rglob("RibFrac301-*")):
        path.rename(path.with_name(path.name.replace("-", "_")))
    raw, store = str(tmp_path / "raw"), f"out={tmp_path / 'store'}"
    assert main(["prepare", raw, store, "reader=ribfrac", "spacing_mm=2", "workers=1"]) == 0
    said = capsys.readouterr()
    assert re.search(r"warning: 2 image files RibFrac\* .*, and not read; the first .*RibFrac301_\w+\.nii", said.err)
    assert "3 cases, 2 objects" in said.out and "note: in 1 of 1 test cases no class was annotated" in said.out


def test_cases_without_labels_are_not_tested(tmp_path, capsys):
    write_ribfrac(tmp_path / "raw")
    store = tmp_path / "store"
    assert len(prepare(RibFrac(tmp_path / "raw"), store, (2.0, 2.0, 2.0), workers=1, progress=False).done) == 4
    line = ["test", "baseline=mean_box", f"store={store}", "num_folds=3", "samples=5"]
    assert main([*line, f"out={tmp_path / 'a'}"]) == 2
    assert capsys.readouterr().err == (
        f"pretrain3d: error: {store}: no class was annotated in its 1 test cases, nothing can be scored; split=val "
        "scores those of the validation fold\n"
    )
    assert main([*line, f"out={tmp_path / 'a'}", "split=val"]) == 0


def test_mistakes_in_ribfrac_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no RibFrac<N>-image\.nii\.gz in it or below"):
        RibFrac(tmp_path)
    mask = write_ribfrac(tmp_path)
    label = tmp_path / "Part1" / "RibFrac300-label.nii.gz"
    save(label, mask[1:], AFFINE)
    reader = RibFrac(tmp_path)
    with pytest.raises(UserError, match=r"RibFrac300-label\.nii\.gz: shape \(29, 28, 24\) differs from \(30, 28, 24\)"):
        reader.read(reader.cases()[0])
    label.unlink()
    reader = RibFrac(tmp_path)
    with pytest.raises(UserError, match=r"Part1/RibFrac300-label\.nii\.gz: no such file"):
        reader.read(reader.cases()[0])
    (tmp_path / "Part2" / "RibFrac301-image.nii.gz").unlink()
    with pytest.raises(UserError, match=r"RibFrac301-label\.nii\.gz: no RibFrac301-image\.nii\.gz below .* of 1 label"):
        RibFrac(tmp_path).cases()
    save(tmp_path / "copy" / "RibFrac421-image.nii.gz", mask, AFFINE)
    with pytest.raises(UserError, match=r"RibFrac421-image\.nii\.gz is a file of the same name; keep one of them"):
        RibFrac(tmp_path)
