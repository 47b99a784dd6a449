"""Experiment files: every stage is a command line that pretrain3d takes, at every scale."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pretrain3d.__main__ import COMMANDS
from pretrain3d.backbones import BACKBONES
from pretrain3d.commands.settings import check_arguments
from pretrain3d.config import load
from pretrain3d.modules.pretraining import build_method
from pretrain3d.objectives import PRETRAINING
from pretrain3d.registry import build, check_names

EXPERIMENTS = sorted(Path("experiments").glob("*.yaml"))


def runner() -> Any:
    spec = importlib.util.spec_from_file_location("run", "experiments/run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scales(path: Path) -> list[str]:
    return list(yaml.safe_load(path.read_text()).get("scales") or {"": None})


@pytest.mark.parametrize(("path", "scale"), [(path, scale) for path in EXPERIMENTS for scale in scales(path)])
def test_every_stage_is_a_command_with_a_config_that_holds(path: Path, scale: str) -> None:
    options = {"scale": scale} if scale else {}
    if "data" in yaml.safe_load(path.read_text())["values"]:
        options["data"] = "DATA"
    lines = runner().read(path, options)
    assert len({name for name, _ in lines}) == len(lines)
    runs = set()
    for name, (command, *words) in lines:
        assert command in COMMANDS and not [word for word in words if "{" in word], name
        if command == "fit":
            settings = load(words[words.index("--config") + 1], words[2:])
            check_names(settings)
            check_arguments(settings)
            source = settings["transfer"]["path"]
            assert source is None or source in runs
            runs.add(f"{settings['out']}/{settings['name']}")
        elif command == "export":
            assert words[0] in runs
            runs.add(words[1].removeprefix("out="))
        elif command in ("table", "compare"):
            assert {word for word in words if "=" not in word} <= runs
        elif command == "test":
            runs.update([words[0]] if words[0] in runs else [words[2].removeprefix("out=")])


def test_values_of_the_command_line_are_taken_as_they_are() -> None:
    odd = {"data": "/a b/{c}", "out": "/x {y}", "wandb": "offline"}
    lines = [line for _, line in runner().read(Path("experiments/openkbp.yaml"), odd)]
    assert lines[0][:3] == ["prepare", "/a b/{c}", "out=/x {y}/store"]
    assert "data.store=/x {y}/store" in lines[1] and "+logger.wandb.mode=offline" in lines[1]


def test_the_study_runs_every_method() -> None:
    lines = [line for _, line in runner().read(Path("experiments/study.yaml"), {"data": "DATA"}) if line[0] == "fit"]
    settings = [load(line[2], line[3:]) for line in lines]
    methods = [one["module"]["method"]["name"] for one in settings if one["module"]["name"] != "detection"]
    missing = sorted(set(PRETRAINING) - set(methods))
    assert not missing, f"no row under lists of experiments/study.yaml for {missing}"
    assert sum(one["module"]["name"] == "detection" for one in settings) == len(methods) + 2  # from scratch


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_the_networks_of_the_study_take_what_its_methods_show_them(scale: str) -> None:
    """Patches and views, which must be more than one voxel on the coarsest level, too."""
    lines = runner().read(Path("experiments/study.yaml"), {"data": "DATA", "scale": scale})
    networks: dict[str, Any] = {}
    for name, line in lines:
        settings = load(line[2], line[3:]) if line[0] == "fit" else {"module": {}}
        if "method" not in settings["module"]:
            continue
        key = str(settings["backbone"])
        with torch.device("meta"):
            if key not in networks:
                networks[key] = build(BACKBONES, {**settings["backbone"], "in_channels": 1}, "backbone")
            size = settings["data"]["patch_size"]
            if settings["module"]["name"] == "contrastive":
                size = build_method(networks[key], settings["module"]["method"], size).view_size  # type: ignore[assignment]
            coarsest = networks[key](torch.empty(1, 1, *size))[-1]
        assert coarsest[0, 0].numel() > 1, name


def test_a_list_becomes_stages_and_words(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "values: {out: runs, a: 1}\nlists:\n  names: {x: 'n={a}', y: ''}\nstages:\n"
        "- {name: 'do {entry}', each: names, run: 'fit {out}/{entry} {options}'}\n"
        "- {name: all, run: 'table {out}/{names}-s0 out={out}'}\n"
    )
    assert runner().read(path, {"a": "2"}) == [
        ("do x", ["fit", "runs/x", "n=2"]), ("do y", ["fit", "runs/y"]),
        ("all", ["table", "runs/x-s0", "runs/y-s0", "out=runs"]),
    ]  # fmt: skip


def test_a_folder_with_spaces_stays_one_word(tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text("values: {data: null}\nstages:\n  - {name: prepare, run: 'prepare {data} out=x'}\n")
    assert runner().read(file, {"data": "/my data/a b"}) == [("prepare", ["prepare", "/my data/a b", "out=x"])]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["experiments/none.yaml"], "experiments/none.yaml"),
        (["experiments/demo.yaml", "scale=huge"], "scale=huge is unknown; it is one of short, long"),
        (["experiments/demo.yaml", "dta=x"], "dta is unknown; it takes scale, "),
        (["experiments/openkbp.yaml"], "experiments/openkbp.yaml needs data=..."),
        ([], "python experiments/run.py"),
    ],
)
def test_a_mistake_ends_with_status_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner().main(arguments) == 2
    assert said in capsys.readouterr().err
