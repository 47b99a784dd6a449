"""What was pretrained on is known again: resampled, under another header, name, orientation or number type."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pretrain3d.__main__ import main
from pretrain3d.backbones import BACKBONES
from pretrain3d.backbones.transfer import export_weights, load_export
from pretrain3d.data.case import case_path
from pretrain3d.data.identity import ALIKE, _means, best_matches, signature, signature_values
from pretrain3d.data.leakage import SIGNATURE, Corpus, find, merged, warning
from pretrain3d.data.resample import resample_image
from pretrain3d.data.store import Store
from pretrain3d.registry import build


def full(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A body that is the whole image, one voxel per voxel."""
    return np.ones(image.shape[1:], dtype=bool), np.ones(3, dtype=int)


def blobs(seed: int, shape: tuple[int, int, int] = (40, 36, 44)) -> np.ndarray:
    """(1, X, Y, Z) float32: smooth noise."""
    coarse = np.random.default_rng(seed).normal(size=(8, 8, 8)).astype(np.float32)
    return resample_image(coarse, shape)[None]


def test_a_signature_survives_what_a_copy_goes_through_and_no_other_image_has_it():
    image = blobs(0)
    smaller = resample_image(image[0], (29, 30, 27))[None]
    integers = np.rint(image * 500).astype(np.int16)
    copies = [smaller, image * 3 + 100, integers, image[:, ::-1], smaller[:, :, ::-1, ::-1],
              image.transpose(0, 3, 1, 2), resample_image(image[0], (60, 36, 50))[None]]  # fmt: skip
    corpus = signature_values([signature(image, *full(image)), signature(blobs(1), *full(blobs(1)))])
    found, where = best_matches(signature_values([signature(copy, *full(copy)) for copy in copies]), corpus)
    assert (found > ALIKE).all() and (where == 0).all(), found
    others = signature_values([signature(blobs(seed), *full(blobs(seed))) for seed in range(2, 8)])
    assert (best_matches(others, corpus)[0] < 0.5).all()


def test_what_sticks_out_of_the_body_changes_no_signature():
    """A nose or a mask: as thin as a voxel, and gone in a coarser copy."""
    image = np.pad(blobs(0), ((0, 0), (0, 0), (6, 0), (0, 0)), constant_values=-3.0)
    body, step = np.zeros(image.shape[1:], dtype=bool), np.ones(3, dtype=int)
    body[:, 6:] = True
    nose = body.copy()
    nose[20, :6, 22] = True
    one, other = signature_values([signature(image, body, step), signature(image, nose, step)])
    assert one @ other > 0.99


def test_the_grid_of_a_signature_holds_means():
    values, edges = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0.5, 1.25, 3.0])
    cells = _means(edges, 4) @ values
    wanted = [(0.5 * 1 + 0.25 * 2) / 0.75, (0.75 * 2 + 1 * 4) / 1.75]
    np.testing.assert_allclose(cells, wanted, rtol=1e-6)


def test_signatures_by_their_definition():
    text = signature(blobs(0), *full(blobs(0)))
    assert len(text) == 4 * SIGNATURE // 3
    (row,) = signature_values([text])
    assert np.linalg.norm(row) == pytest.approx(1.0)
    flat = np.zeros((1, 9, 9, 9), dtype=np.int16)
    assert signature(flat, *full(flat)) == "" and not signature_values([""]).any()


def test_best_match_against_a_loop_over_orientations():
    image, other = blobs(0, (24, 24, 24)), blobs(5, (24, 24, 24))
    corpus = signature_values([signature(other, *full(other))])
    best = -1.0
    for axes in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        for flips in np.ndindex(2, 2, 2):
            turned = image[0].transpose(axes)[tuple(slice(None, None, -1 if f else 1) for f in flips)][None]
            best = max(best, float((signature_values([signature(turned, *full(turned))]) @ corpus.T).item()))
    got, _ = best_matches(signature_values([signature(image, *full(image))]), corpus)
    assert got[0] == pytest.approx(best, abs=0.02)  # quantisation rounds a turned image anew


def copy_of(path: Path, target: Path, kind: str) -> None:
    """A file of the same image that shares neither name nor, but for "renamed" and "header", its voxels."""
    file = nib.load(path)
    voxels, affine = np.asarray(file.dataobj), file.affine.copy()
    if kind == "header":
        affine[:3, 3] += 50
        affine[:3, :3] = affine[:3, :3] @ np.diag([1.0, -1.0, 1.5])
    if kind in ("resampled", "both"):
        shape = tuple(round(0.8 * size) for size in voxels.shape)
        affine[:3, :3] = affine[:3, :3] * (np.array(voxels.shape) / shape)
        voxels = np.rint(resample_image(voxels, shape)).astype(np.int16)
    if kind == "both":  # the new header says left where right is
        affine[:3, 0] *= -1
    if kind == "float":
        voxels = voxels.astype(np.float32)
    if kind == "shifted":  # as DICOM files store a CT, the intercept lost
        voxels = (voxels + 1024).clip(0).astype(np.uint16)
    target.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), target)


KINDS = ("renamed", "header", "resampled", "both", "float", "shifted")


@pytest.fixture(scope="module")
def copies(phantom_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Copies of one pretraining case each, beside images that are in no corpus."""
    folder = tmp_path_factory.mktemp("copies")
    images = sorted((phantom_raw / "imagesTr").glob("train_*.nii.gz"))
    for kind, image in zip(KINDS, images, strict=False):
        copy_of(image, folder / "raw" / f"{kind}.nii.gz", kind)
    for image in sorted((phantom_raw / "imagesTs").glob("*.nii.gz")):
        shutil.copy(image, folder / "raw" / f"new_{image.name}")
    line = ["prepare", str(folder / "raw"), f"out={folder / 'store'}", "reader=images", "modality=CT", "spacing_mm=5"]
    assert main([*line, "workers=1"]) == 0
    return Store(folder / "store")


def test_copies_are_found_and_other_cases_are_not(phantom_store: Path, copies: Store):
    store = Store(phantom_store)
    train = [case_id for case_id, case in store.cases.items() if case.split == "train"]
    corpus = Corpus.of(store, train).to_dict()
    rows = {row["case"]: row for row in find(corpus, [(copies, "test", list(copies.cases))])}
    assert set(rows) == set(KINDS)
    assert {kind: row["how"] for kind, row in rows.items()} == {
        "renamed": "same voxels", "header": "same voxels", "resampled": "copy", "both": "copy", "float": "copy",
        "shifted": "copy",
    }  # fmt: skip
    assert all(rows[kind]["similarity"] > 0.95 for kind in ("resampled", "both", "float", "shifted"))
    others = [case_id for case_id, case in store.cases.items() if case.split != "train"]
    assert others and find(corpus, [(store, "test", others)]) == []
    assert find(None, [(store, "train", train)]) == []


def test_a_patient_is_found_by_the_name_of_the_set_and_the_group(phantom_store: Path):
    store = Store(phantom_store)
    first, second, *_ = store.cases
    corpus = Corpus.of(store, [first])
    alone = Corpus(frozenset(), corpus.groups, frozenset()).to_dict()
    (row,) = find(alone, [(store, "val", [first, second])])
    assert row == {"case": first, "split": "val", "how": "same patient", "similarity": None}
    store.name = "another"
    assert find(alone, [(store, "val", [first, second])]) == []


def test_a_store_without_signatures_still_finds_the_same_voxels(phantom_store: Path, tmp_path: Path):
    shutil.copytree(phantom_store, tmp_path / "old")
    store = Store(phantom_store)
    for case_id in store.cases:
        record = json.loads(case_path(tmp_path / "old", case_id).read_text())
        assert record.pop("signature")
        case_path(tmp_path / "old", case_id).write_text(json.dumps(record))
    old, first = Store(tmp_path / "old"), next(iter(store.cases))
    corpus = Corpus.of(old, [first]).to_dict()
    assert corpus["signatures"] == ""
    (row,) = find(corpus, [(store, "test", list(store.cases))])
    assert row["case"] == first and row["how"] == "same voxels" and row["similarity"] is None


def test_a_corpus_is_small_plain_and_a_set(phantom_store: Path):
    store = Store(phantom_store)
    ids = list(store.cases)
    one, rest = Corpus.of(store, ids[:4]), Corpus.of(store, ids[2:])
    total = merged(one.to_dict(), None, rest.to_dict())
    assert total == Corpus.of(store, ids).to_dict() and total["cases"] == len(ids)
    assert Corpus.from_dict(total) == one | rest
    assert len(json.dumps(total)) < 600 * len(ids)
    assert merged(None, None) is None
    assert not any(case_id in json.dumps(total) for case_id in ids), "no names travel"


@pytest.mark.slow
def test_a_leak_is_said_and_written_into_the_result(phantom_store: Path, tmp_path: Path, capsys):
    """Weights that have seen a test and a training case under other names; fine-tuned, exported and tested."""
    store = Store(phantom_store)
    cases = [next(case_id for case_id, c in store.cases.items() if c.split == split) for split in ("test", "train")]
    node = {"name": "resenc_xxs", "in_channels": 3}
    corpus = Corpus(frozenset(), frozenset(), Corpus.of(store, cases).signatures).to_dict()
    preprocessing = {"intensity": {"scheme": "window", "low": -900.0, "high": 300.0}, "spacing_mm": [1.0, 1.0, 4.0]}
    weights = build(BACKBONES, node, "backbone").state_dict()
    export_weights(tmp_path / "mae.pt", node, weights, preprocessing, {"method": "mae"}, corpus)
    line = ["fit", "--config", "configs/detect/phantom.yaml", "name=det", f"transfer.path={tmp_path / 'mae.pt'}",
            f"out={tmp_path}", f"data.store={phantom_store}", "data.patch_size=[32,32,32]", "data.batch_size=2",
            "data.num_workers=0", "trainer.max_steps=2", "trainer.val_every_n_steps=2", "module.warmup_steps=1",
            "trainer.accelerator=cpu", "module.overlap=0"]  # fmt: skip
    assert main(line) == 0
    said = capsys.readouterr().err
    assert f"warning: leakage: what {tmp_path / 'mae.pt'} was pretrained on holds" in said
    assert f"1 test cases: {cases[0]} (copy)" in said and "pretrained at 1 x 1 x 4 mm" in said
    assert main(["test", str(tmp_path / "det"), "samples=50", "pictures=0"]) == 0
    assert "warning: leakage" in capsys.readouterr().err
    rows = json.loads((tmp_path / "det" / "result.json").read_text())["leakage"]
    assert {"case": cases[0], "split": "test", "how": "copy", "similarity": 1.0} in rows
    assert main(["export", str(tmp_path / "det"), f"out={tmp_path / 'det.pt'}"]) == 0
    after = load_export(tmp_path / "det.pt")["corpus"]
    assert Corpus.from_dict(after).signatures >= Corpus.from_dict(corpus).signatures and after["cases"] > 0


def test_the_warning_counts_by_split():
    rows = [{"case": f"c{n}", "split": "test", "how": "copy"} for n in range(5)]
    rows.append({"case": "t", "split": "train", "how": "same voxels"})
    assert warning(rows, "mae.pt") == (
        "warning: leakage: what mae.pt was pretrained on holds 5 test cases: c0 (copy), c1 (copy), c2 (copy) and 2 "
        "more; 1 train cases: t (same voxels)"
    )
    assert warning(rows[-1:], "mae.pt").startswith("note: what mae.pt was pretrained on holds 1 train cases")
