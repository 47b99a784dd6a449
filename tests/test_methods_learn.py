"""Every pretraining config of the embedded set learns: its losses fall clearly below what knowing nothing costs.

The runs are short, and otherwise as the configs are shipped but for what `RUNS` names. No features collapse, and a
detector starts from each of them.
"""

from __future__ import annotations

import csv
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain3d.__main__ import main
from pretrain3d.config import load
from pretrain3d.objectives import PRETRAINING
from pretrain3d.objectives.collapse import MIN_RANK, MIN_STD

CONFIGS = Path("configs/pretrain")
CLEARLY = 0.85  # a loss has to end below this share of what knowing nothing costs; VoCo's, by a fifth
CHUNK = 20  # steps that are averaged
PRIMUS = (  # the backbone of two configs; strides 2, 4, 8 of the pyramid made of it
    "backbone={name: primus, embed_dim: 96, depth: 4, heads: 4, patch: 4, image_size: [24, 24, 24]}",
    "module.detector.detection_levels=[0,1,2]",
)


@dataclass(frozen=True)
class Run:
    """Steps, what else differs from the config as it is shipped, and what the detector needs to take the backbone."""

    steps: int
    settings: tuple[str, ...] = ()
    detector: tuple[str, ...] = ()


RUNS = {
    "mae": Run(100, ("data.batch_size=4", "module.optimizer.lr=3.0e-3")),
    "mae_primus": Run(240, detector=PRIMUS),
    "simmim": Run(240, detector=PRIMUS),
    "s3d": Run(100),
    "slice_mae": Run(100),
    "models_genesis": Run(240),
    "volume_fusion": Run(160),
    # from here on regions that fit into volumes of 4 mm
    "swin_mix": Run(160, ("data.patch_size=[40,40,24]",)),
    "simclr": Run(240, ("data.patch_size=[40,40,24]", "module.method.crop_size=16")),
    "voco": Run(120, ("data.patch_size=[48,48,16]",)),
    "voco_v2": Run(240, ("data.patch_size=[48,48,16]",)),
    "supervised": Run(120),
}
Columns = dict[str, np.ndarray]


def method_of(config: str) -> str:
    return load(CONFIGS / f"phantom_{config}.yaml", [])["module"]["method"]["name"]


def test_every_method_and_every_config_is_run() -> None:
    assert {f"phantom_{config}.yaml" for config in RUNS} == {path.name for path in CONFIGS.glob("phantom_*.yaml")}
    missing = sorted(set(PRETRAINING) - {method_of(config) for config in RUNS})
    assert not missing, f"no phantom_*.yaml in {CONFIGS} and no run here for {missing}"


@pytest.mark.slow
@pytest.mark.parametrize("config", RUNS)
def test_it_learns_and_a_detector_starts_from_it(config: str, phantom_store: Path, tmp_path: Path) -> None:
    run = RUNS[config]
    common = [f"out={tmp_path}", f"data.store={phantom_store}", "data.num_workers=0", "trainer.accelerator=cpu"]
    line = ["fit", "--config", str(CONFIGS / f"phantom_{config}.yaml"), "name=run", *common, "data.pool=all",
            *every(run.steps), *run.settings]  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(line) == 0
    assert not [str(entry.message) for entry in caught if "collapsed" in str(entry.message)]
    trained, last = rows_of(tmp_path / "run")
    assert len(trained["loss"]) == run.steps
    for name, loss, allowed in losses(method_of(config), trained):
        reached, level = loss[-CHUNK:].mean(), allowed[-CHUNK:].mean()
        assert reached < level, f"{name}: {reached:.4f}, allowed {level:.4f}"
    assert last["feature_std"] > 2 * MIN_STD and last["effective_rank"] > 2 * MIN_RANK

    exported = tmp_path / "run.pt"
    assert main(["export", str(tmp_path / "run"), f"out={exported}"]) == 0
    detect = ["fit", "--config", "configs/detect/phantom.yaml", "name=det", f"transfer.path={exported}", *common,
              *every(2), "data.batch_size=2", "module.warmup_steps=1", "module.overlap=0", *run.detector]  # fmt: skip
    assert main(detect) == 0
    note = torch.load(tmp_path / "det" / "checkpoints" / "last.ckpt", weights_only=True)["pretrain3d"]
    assert note["transfer"]["source"]["method"] == method_of(config)


def every(steps: int) -> list[str]:
    """A run of that many steps, validated and saved at its end."""
    return [f"trainer.max_steps={steps}", f"trainer.val_every_n_steps={steps}",
            f"trainer.checkpoint_every_n_steps={steps}", "trainer.log_every_n_steps=1"]  # fmt: skip


def rows_of(folder: Path) -> tuple[Columns, dict[str, float]]:
    """The training's columns without their prefix, and the last validation's values."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row.get("train/loss")]
    names = [key for key in trained[0] if key.startswith("train/")]
    columns = {name.removeprefix("train/"): np.array([float(row[name]) for row in trained]) for name in names}
    last = [row for row in rows if row.get("val/feature_std")][-1]
    values = {key: value for key, value in last.items() if key.startswith("val/") and value}
    return columns, {key.removeprefix("val/"): float(value) for key, value in values.items()}


def losses(method: str, columns: Columns) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Name, values and what is allowed, step by step."""
    loss = columns["loss"]
    if method == "voco":
        placed = columns["positive"] + columns["negative"]
        first = np.full_like(placed, placed[:CHUNK].mean())
        return [("placed", placed, 0.8 * np.minimum(first, columns["trivial"]))]
    if method == "volume_fusion":  # also more than which class is common
        entropy = columns["cross_entropy"]
        return [("loss", loss, CLEARLY * columns["uniform"]), ("cross_entropy", entropy, 0.95 * columns["prior"])]
    if method == "models_genesis":
        return [("loss", loss, CLEARLY * np.minimum(columns["mean_predictor"], columns["copy"]))]
    if method == "swin_mix":
        levels = {"loss": columns["trivial"], "reconstruction": columns["mean_predictor"]}
        levels |= {"rotation": np.full_like(loss, math.log(4)), "contrast": np.full_like(loss, math.log(2 * 4 - 1))}
        return [(name, columns[name], CLEARLY * level) for name, level in levels.items()]
    level = columns["trivial"] if "trivial" in columns else columns["mean_predictor"]
    return [("loss", loss, CLEARLY * level)]
