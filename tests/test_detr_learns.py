"""Deformable DETR learns on a CPU: eight volumes of the embedded set, from random mirrored crops, as a user would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pretrain3d.__main__ import main


@pytest.mark.slow
def test_it_overfits_eight_volumes(tmp_path: Path) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    assert main(["phantom", f"out={raw}", "train=8", "test=0", "unlabelled=0"]) == 0
    add_twins(raw)
    assert main(["prepare", str(raw), f"out={store}", "reader=nndetection", "spacing_mm=2.5"]) == 0
    assert main([
        "fit", "--config", "configs/detect/phantom_detr.yaml", "name=eight", f"out={tmp_path}", f"data.store={store}",
        "data.num_folds=2", "data.num_workers=0", "trainer.accelerator=cpu",
    ]) == 0  # fmt: skip
    assert main(["test", str(tmp_path / "eight"), "split=val", "samples=50", "pictures=0"]) == 0
    result = json.loads((tmp_path / "eight" / "result.json").read_text())
    assert result["metrics"]["AP@0.10"]["value"] > 0.9
    assert result["cost"]["seconds"] < 30 * 60


def add_twins(raw: Path) -> None:
    """Copies every training case; of two folds, one then holds the cases and the other their copies."""
    description = json.loads((raw / "dataset.json").read_text())
    groups = {}
    for table in sorted((raw / "labelsTr").glob("*.json")):
        groups |= {table.stem: "first", f"{table.stem}_again": "second"}
        for folder in ("imagesTr", "labelsTr", "organsTr"):
            for path in sorted((raw / folder).glob(f"{table.stem}[._]*")):
                shutil.copy(path, path.with_name(path.name.replace(table.stem, f"{table.stem}_again", 1)))
    (raw / "dataset.json").write_text(json.dumps(description | {"groups": groups}))
