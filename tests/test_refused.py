"""What `fit` refuses with one line, rather than train something that cannot learn or end in a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_store import tiny_store

from pretrain3d.__main__ import main
from pretrain3d.config import to_yaml
from pretrain3d.modules.reconstruction import ReconstructionModule
from pretrain3d.reporting.cost import cost_of
from pretrain3d.reporting.results import read_rows
from pretrain3d.reporting.run_folder import RunFolder

TINY = [
    "data.pool=train", "data.patch_size=[16,16,8]", "data.batch_size=2", "data.num_workers=0", "data.intensity=null",
    "+data.num_val_patches=2", "backbone={name: resenc, channels: [4, 8], blocks: [1, 1], strides: [1, 2]}",
    "module.warmup_steps=0", "trainer.max_steps=2", "trainer.val_every_n_steps=2", "trainer.checkpoint_every_n_steps=2",
    "trainer.accelerator=cpu", "trainer.precision=32-true",
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("mae", ["trainer.max_steps=-1"], "trainer.max_steps=-1: module.schedule=cosine needs the length of the run"),
        ("mae", ["trainer.max_steps=0"], "trainer.max_steps is 0; it is a number of optimiser steps, or -1"),
        ("mae", ["trainer.max_steps=null"], "trainer.max_steps is missing; it is a number of optimiser steps"),
        ("mae", ["module.warmup_steps=2"], "module.warmup_steps is 2; it must be 0 or more and below 2, the steps"),
        ("mae", ["module.warmup_steps=-1"], "module.warmup_steps is -1; it must be 0 or more and below 2, the steps"),
        *(
            ("mae", [f"trainer.precision={name}"], f"precision={name}; it is one of 32-true, bf16-mixed, 16-mixed")
            for name in ("bf16-true", "16-true", "64-true", "64")
        ),
        *(
            ("mae", [f"trainer.strategy={name}"], f"trainer.strategy={name}: it is auto, or ddp for several processes")
            for name in ("fsdp", "deepspeed_stage_2")
        ),
        ("slice_mae", ["trainer.compile=true"], "trainer.compile=true: SliceMAE calls the networks in another way in "),
        ("swin_mix", ["data.flip_axes=[0,1,2]"], "data.flip_axes=[0, 1, 2] mirrors x and y, which together is half a"),
    ],
)
def test_mistakes(config: str, overrides: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    tiny_store(tmp_path / "store")
    line = ["fit", "--config", f"configs/pretrain/{config}.yaml", "name=run", f"out={tmp_path}",
            f"data.store={tmp_path / 'store'}", *TINY, *overrides]  # fmt: skip
    assert main(line) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ("mae", "module.method.ratio=.nan", "module.method mae: ratio must be a finite number, got nan"),
        ("simclr", "module.method.crop_size=7", "simclr cuts crops of 7 x 7 x 7 out of data.patch_size [16, 16, 8]; "),
        ("voco", "module.method.grid=[16,1,1]", "voco cuts crops of 1 x 16 x 8 out of data.patch_size [16, 16, 8]; "),
        ("swin_mix", "data.flip_axes=[0,1]", "swin_mix: data.flip_axes=[0, 1] mirrors x and y"),
        ("mae", "+data.label_fraction=0.5", "data.label_fraction=0.5 is a share of the labelled cases, of which data"),
        ("swin_mix", "data.batch_size=1", "swin_mix tells the patches of a batch apart; data.batch_size is 1, take 2"),
        ("voco_v2", "data.batch_size=1 module.method.grid=[2,2,1]", "compares volumes; data.batch_size is 1, take 2"),
        ("volume_fusion", "data.batch_size=1", "volume_fusion mixes the patches of a batch; data.batch_size is 1"),
        (
            "simclr",
            "data.batch_size=1 module.method.pairs=1 module.method.crop_size=8",
            "simclr tells the pairs of a batch apart; data.batch_size and pairs are 1",
        ),
    ],
)
def test_a_mistake_leaves_no_run_behind(config: str, override: str, message: str, tmp_path: Path, capsys: Any) -> None:
    tiny_store(tmp_path / "store")
    line = ["fit", "--config", f"configs/pretrain/{config}.yaml", "name=run", f"out={tmp_path}",
            f"data.store={tmp_path / 'store'}", *TINY, "data.pool=pretrain", *override.split()]  # fmt: skip
    assert main(line) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_longer_run_goes_on_at_its_own_rate(tmp_path: Path) -> None:
    """The checkpoint of a finished run holds the rate after its last step, which is 0."""
    tiny_store(tmp_path / "store")
    line = ["fit", "--config", "configs/pretrain/mae.yaml", "name=run", f"out={tmp_path}",
            f"data.store={tmp_path / 'store'}", *TINY, "trainer.log_every_n_steps=1"]  # fmt: skip
    for steps in (2, 4):
        assert main([*line, "module.schedule=poly", f"trainer.max_steps={steps}"]) == 0
    rates = [float(row["lr/backbone"]) for row in read_rows(tmp_path / "run" / "metrics.csv")]
    assert rates == pytest.approx([1e-3 * (1 - s / n) ** 0.9 for s, n in ((0, 2), (1, 2), (2, 4), (3, 4))])


def test_a_base_config_wants_a_store(capsys: Any) -> None:
    assert main(["fit", "--config", "configs/detect/base.yaml"]) == 2
    assert capsys.readouterr().err.startswith("pretrain3d: error: data.store is not given; it is the folder that")


@pytest.mark.parametrize(("patch", "said"), [("[32,32,32]", True), ("[24,16,24]", False)])
def test_patches_of_padding_are_told(patch: str, said: bool, tmp_path: Path, capsys: Any) -> None:
    """Where less than half of them could be volume, though the backbone takes smaller ones."""
    tiny_store(tmp_path / "store")
    line = ["fit", "--config", "configs/pretrain/mae.yaml", "name=run", f"out={tmp_path}",
            f"data.store={tmp_path / 'store'}", *TINY, "data.pool=pretrain", f"data.patch_size={patch}"]  # fmt: skip
    assert main([*line, "+trainer.fast_dev_run=true"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "padding" in line]
    assert told == said * [
        "warning: most of every patch of 32 x 32 x 32 is padding: the median training volume has 24 x 12 x 20 voxels, "
        "the largest 24 x 12 x 20; data.patch_size=[24,12,20] holds them"
    ]


LEAST = {  # a config without a base that says no more than it must
    "data": {"store": "?", "patch_size": [16, 16, 8]},
    "backbone": {"name": "resenc", "channels": [4, 8], "blocks": [1, 1], "strides": [1, 2]},
    "module": {"name": "reconstruction", "method": {"name": "mae"}, "optimizer": {"name": "adamw", "lr": 0.001}},
    "trainer": {"max_steps": 1, "val_every_n_steps": 1, "checkpoint_every_n_steps": 1, "accelerator": "cpu"},
}


def test_a_config_without_a_base(tmp_path: Path, capsys: Any) -> None:
    tiny_store(tmp_path / "store")
    path = tmp_path / "run.yaml"

    def fit(settings: dict[str, Any]) -> int:
        path.write_text(to_yaml({"name": "run", "out": str(tmp_path), **settings}))
        return main(["fit", "--config", str(path)])

    least = {**LEAST, "data": {**LEAST["data"], "store": str(tmp_path / "store")}}
    for section in least:
        assert fit({key: value for key, value in least.items() if key != section}) == 2
        error = capsys.readouterr().err
        assert f"the configuration has no section '{section}'" in error and error.count("\n") == 1
    assert fit(least) == 0 and (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_a_trial_leaves_nothing_in_the_way_of_the_run(tmp_path: Path, capsys: Any) -> None:
    tiny_store(tmp_path / "store")
    line = ["fit", "--config", "configs/pretrain/mae.yaml", "name=run", f"out={tmp_path}",
            f"data.store={tmp_path / 'store'}", *TINY]  # fmt: skip
    assert main([*line, "+trainer.fast_dev_run=true"]) == 0
    assert "1 steps, tried out: no checkpoint is kept" in capsys.readouterr().out
    assert RunFolder(tmp_path / "run").state()["status"] == "running" and not list(tmp_path.rglob("*.ckpt"))
    assert main(line) == 0 and RunFolder(tmp_path / "run").state()["step"] == 2


def test_a_run_that_is_there_is_not_asked_for_without_its_length(tmp_path: Path, capsys: Any) -> None:
    settings = {"name": "run", "out": str(tmp_path), **LEAST}
    folder = RunFolder(tmp_path / "run")
    folder.open(settings)
    folder.last.parent.mkdir()
    folder.last.write_bytes(b"")
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(settings))
    for steps, said in (("null", "missing"), ("many", "'many'"), ("1.5", "1.5"), ("-2", "-2")):
        assert main(["fit", "--config", str(path), f"trainer.max_steps={steps}"]) == 2
        error = capsys.readouterr().err
        assert f"trainer.max_steps is {said}; it is a number of optimiser steps" in error and error.count("\n") == 1


def test_a_run_without_an_end_may_warm_up_and_is_ended_by_a_time_limit(tmp_path: Path, capsys: Any) -> None:
    """It goes on with a longer one; its rows and its cost are of the steps that it did."""
    tiny_store(tmp_path / "store")
    line = ["fit", "--config", "configs/pretrain/mae.yaml", "name=run", f"out={tmp_path}",
            f"data.store={tmp_path / 'store'}", *TINY, "trainer.log_every_n_steps=1", "trainer.val_every_n_steps=1000",
            "module.schedule=constant", "module.warmup_steps=3"]  # fmt: skip
    folder = RunFolder(tmp_path / "run")
    costs = []
    for _ in range(2):  # the second call finds its time used up
        assert main([*line, "trainer.max_steps=-1", "+trainer.max_time=00:00:00:01"]) == 0
        costs.append(cost_of(folder))
        steps = costs[-1]["steps"]
        said = capsys.readouterr().out
        assert f"{folder.path}: {steps} steps, stopped by trainer.max_time; a longer one goes on\n" in said
        assert folder.unfinished() == f"{folder.path} is at step {steps}, a run without an end"
    assert costs[0] == costs[1] and costs[0]["device"] and costs[0]["seconds"] > 0
    assert main([*line, f"trainer.max_steps={steps + 9}", "+trainer.max_time=01:00:00:00"]) == 0
    assert [int(row["step"]) for row in read_rows(folder.path / "metrics.csv")] == list(range(1, steps + 10))
    assert cost_of(folder)["samples"] == 2 * (steps + 9) and folder.unfinished() == ""


@pytest.mark.parametrize(
    ("step", "error", "said"),
    [
        *(
            (step, torch.OutOfMemoryError("CUDA out of memory"),
             "out of memory, with data.batch_size=2 and patches of 16 x 16 x 8: try +data.batch_size=1 ")
            for step in ("training_step", "validation_step")
        ),
        ("training_step", RuntimeError("avg_pool3d_backward_cuda does not have a deterministic implementation, but"),
         "trainer.deterministic=True: avg_pool3d_backward_cuda has no deterministic form; trainer.deterministic=warn"),
    ],
)  # fmt: skip
def test_what_a_device_refuses_is_one_line_whatever_the_config_says(
    step: str, error: Exception, said: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(ReconstructionModule, step, fails)
    tiny_store(tmp_path / "store")
    path = tmp_path / "run.yaml"
    settings = {**LEAST, "data": {**LEAST["data"], "store": str(tmp_path / "store")}}
    settings["trainer"] = {**LEAST["trainer"], "deterministic": True}
    path.write_text(to_yaml({"name": "run", "out": str(tmp_path), **settings}))
    try:
        assert main(["fit", "--config", str(path)]) == 2
    finally:
        torch.use_deterministic_algorithms(False)
    printed = capsys.readouterr().err
    assert said in printed and "tile" not in printed and printed.count("\n") == 1
