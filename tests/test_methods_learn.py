"""Every registered method learns: on the embedded set its loss falls clearly below what knowing nothing costs."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from pretrain3d.__main__ import main
from pretrain3d.objectives import PRETRAINING

TINY = ["backbone=resenc", "+backbone.channels=[8,16,32]", "+backbone.blocks=[1,1,2]", "+backbone.strides=[1,2,2]"]
PATCH = ["data.patch_size=[32,32,32]", "data.batch_size=4"]
# What each config needs to be small; the rest of it is as it is shipped.
SETTINGS = {
    "mae": [*TINY, *PATCH],
    "s3d": [*TINY, "+backbone.masking=sparse", *PATCH],
    "slice_mae": [*TINY, *PATCH],
    "models_genesis": [*TINY, *PATCH],
    "volume_fusion": [*TINY, *PATCH],
    "swin_mix": [*TINY, *PATCH],
    "supervised": [*TINY, *PATCH],
    "simmim": PATCH,  # a small Primus
}
STEPS = {"models_genesis": 480}  # most of a patch is painted over; the others take 240
BELOW = 0.85  # of the trivial level; of VoCo's first loss, which has to fall by 20 %, 0.8
CHUNK = 20  # steps that are averaged


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAINING)
def test_it_learns(name: str, phantom_store: Path, tmp_path: Path) -> None:
    steps = STEPS.get(name, 240)
    line = ["fit", "--config", f"configs/pretrain/phantom_{name}.yaml", "name=run", f"out={tmp_path}",
            f"data.store={phantom_store}", "data.num_workers=0", "data.pool=all", f"trainer.max_steps={steps}",
            f"trainer.val_every_n_steps={steps}", f"trainer.checkpoint_every_n_steps={steps}",
            "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "module.optimizer.lr=3.0e-3",
            *SETTINGS.get(name, [])]  # fmt: skip
    assert main(line) == 0
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    columns = {key: np.array([float(row[key]) for row in rows]) for key in rows[0] if key.startswith("train/")}
    assert len(columns["train/loss"]) == steps
    if name == "voco":
        loss = columns["train/positive"] + columns["train/negative"]
        assert loss[-CHUNK:].mean() < 0.8 * loss[:CHUNK].mean()
        return
    if name == "volume_fusion":  # more than which class is common
        assert columns["train/cross_entropy"][-CHUNK:].mean() < 0.95 * columns["train/prior"][-CHUNK:].mean()
    keys = [key for key in ("trivial", "uniform", "mean_predictor") if f"train/{key}" in columns]
    level = columns[f"train/{keys[0]}"]
    if "train/copy" in columns:
        level = np.minimum(level, columns["train/copy"])
    assert columns["train/loss"][-CHUNK:].mean() < BELOW * level[-CHUNK:].mean()
