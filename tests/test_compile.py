"""`trainer.compile=true`: the networks go through `torch.compile`, the losses and the names of the weights stay."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain3d.__main__ import main

STEPS = 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("config", ["detect/phantom", "pretrain/phantom_mae"])
def test_a_compiled_run_equals_an_eager_one(config: str, phantom_store: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    runs = {}
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        assert main([
            "fit", "--config", f"configs/{config}.yaml", f"name={name}", f"out={tmp_path}",
            f"data.store={phantom_store}", "data.batch_size=2", "data.num_workers=0", "module.warmup_steps=1",
            "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.log_every_n_steps=1",
            f"trainer.max_steps={STEPS}", f"trainer.val_every_n_steps={STEPS}", f"trainer.compile={compiled}",
            f"trainer.checkpoint_every_n_steps={STEPS}",
        ]) == 0  # fmt: skip
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == (compiled == "true")
        weights = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        runs[name] = losses(tmp_path / name), list(weights)
    assert len(runs["eager"][0]) == STEPS
    np.testing.assert_allclose(runs["compiled"][0], runs["eager"][0], rtol=1e-3)
    assert runs["compiled"][1] == runs["eager"][1]


def losses(folder: Path) -> list[float]:
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
