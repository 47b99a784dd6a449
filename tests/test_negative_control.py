"""The demo's training on wrong boxes: what a detector reaches that can only know where lesions tend to be."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml

from pretrain3d.__main__ import main

EXPERIMENT = Path("experiments/demo.yaml")


@pytest.mark.slow
def test_boxes_of_other_cases_teach_nothing(tmp_path: Path) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    settings = yaml.safe_load(EXPERIMENT.read_text())["scales"]["short"]
    assert main(["phantom", f"out={raw}", f"train={settings['train']}", "unlabelled=0"]) == 0
    exchange_annotations(raw)
    assert main(["prepare", str(raw), f"out={store}", "reader=nndetection", "spacing_mm=2.5"]) == 0
    assert main([
        "fit", "--config", "configs/detect/phantom.yaml", "name=shuffled", f"out={tmp_path}", f"data.store={store}",
        f"trainer.max_steps={settings['steps']}", f"module.warmup_steps={settings['warmup']}",
        f"trainer.val_every_n_steps={settings['steps']}",
    ]) == 0  # fmt: skip
    assert main(["test", str(tmp_path / "shuffled"), "samples=50"]) == 0
    metrics = json.loads((tmp_path / "shuffled" / "result.json").read_text())["metrics"]
    assert metrics["AP@0.10"]["value"] < 0.1


def exchange_annotations(raw: Path) -> None:
    """Each training case gets the instances of the next one, at the same place of the body; test cases keep theirs."""
    names = sorted(path.name.removesuffix(".json") for path in (raw / "labelsTr").glob("*.json"))
    masks = [nibabel.load(raw / "labelsTr" / f"{name}.nii.gz") for name in names]
    arrays = [np.asarray(nibabel.as_closest_canonical(mask).dataobj) for mask in masks]
    tables = [(raw / "labelsTr" / f"{name}.json").read_text() for name in names]
    for index, (name, mask) in enumerate(zip(names, masks, strict=True)):
        other = (index + 1) % len(names)
        own = nibabel.as_closest_canonical(mask)
        moved = nibabel.Nifti1Image(about_the_centre(arrays[other], own.shape), own.affine)
        orientation = nibabel.io_orientation(mask.affine)
        to_file = nibabel.orientations.ornt_transform(nibabel.io_orientation(own.affine), orientation)
        written = moved.as_reoriented(to_file)
        assert written.shape == mask.shape and np.allclose(written.affine, mask.affine, atol=1e-4)
        left = np.unique(written.dataobj)
        table = json.loads(tables[other])
        table["instances"] = {key: value for key, value in table["instances"].items() if int(key) in left}
        nibabel.save(written, raw / "labelsTr" / f"{name}.nii.gz")
        (raw / "labelsTr" / f"{name}.json").write_text(json.dumps(table))


def about_the_centre(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Cropped or padded with 0 to ``shape``, the centre stays the centre."""
    result = np.zeros(shape, array.dtype)
    here, there = [], []
    for old, new in zip(array.shape, shape, strict=True):
        size = min(old, new)
        here.append(slice((new - size) // 2, (new - size) // 2 + size))
        there.append(slice((old - size) // 2, (old - size) // 2 + size))
    result[tuple(here)] = array[tuple(there)]
    return result
