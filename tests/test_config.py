"""Composition, overrides, options and the binding of arguments; every message a user may see is spelled out."""

from __future__ import annotations

import importlib
import inspect
import shlex
from pathlib import Path
from typing import Any, Literal

import pytest

from pretrain3d import config
from pretrain3d.config import UserError, load
from pretrain3d.options import REQUIRED, read_options
from pretrain3d.registry import build, check, check_names, resolve
from pretrain3d.signatures import hints

CONFIGS = Path(__file__).parents[1] / "configs"
REGISTRIES = {
    "BACKBONES": "pretrain3d.backbones",
    "DETECTORS": "pretrain3d.detection",
    "PRETRAINING": "pretrain3d.objectives",
    "MODULES": "pretrain3d.modules",
    "FINETUNE": "pretrain3d.modules",
    "OPTIMIZERS": "pretrain3d.modules.optim",
}
BASE = """
data: {store: stores/toy, fold: 1, patch_size: [32, 32, 32]}
backbone: {name: resenc_xs, width: 8}
transfer: {path: null}
module:
  name: detection
  detector: {name: retina_unet, classes: 3, loss: {name: focal, gamma: 2}}
  optimizer: {name: adamw, lr: 1e-3}
trainer: {max_steps: 10, log_every: "${trainer.max_steps}"}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "child.yaml").write_text("base: base.yaml\ntrainer: {max_steps: 20}\n")
    return tmp_path


def message(call: Any, *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- composition


def test_base_is_inherited_and_plain(folder: Path) -> None:
    values = load(folder / "child.yaml")
    assert values == {
        "name": "toy/retina_unet-scratch-resenc_xs-f1-s0",
        "out": "runs",
        "seed": 0,
        "data": {"store": "stores/toy", "fold": 1, "patch_size": [32, 32, 32]},
        "backbone": {"name": "resenc_xs", "width": 8},
        "transfer": {"path": None},
        "module": {
            "name": "detection",
            "detector": {"name": "retina_unet", "classes": 3, "loss": {"name": "focal", "gamma": 2}},
            "optimizer": {"name": "adamw", "lr": 0.001},
        },
        "trainer": {"max_steps": 20, "log_every": 20},
    }
    assert type(values["data"]) is dict and type(values["data"]["patch_size"]) is list


def test_the_written_config_loads_to_itself(folder: Path) -> None:
    values = load(folder / "child.yaml", ["seed=3"])
    (folder / "config.yaml").write_text(config.to_yaml(values))
    assert load(folder / "config.yaml") == values


def test_another_name_replaces_the_node_whole(folder: Path) -> None:
    (folder / "other.yaml").write_text("base: base.yaml\nmodule: {detector: {loss: {name: dice}}}\nbackbone: vit\n")
    values = load(folder / "other.yaml")
    assert values["module"]["detector"] == {"name": "retina_unet", "classes": 3, "loss": {"name": "dice"}}
    assert values["backbone"] == {"name": "vit"}


def test_the_same_name_merges(folder: Path) -> None:
    (folder / "same.yaml").write_text("base: base.yaml\nbackbone: {name: resenc_xs, depth: 2}\n")
    assert load(folder / "same.yaml")["backbone"] == {"name": "resenc_xs", "width": 8, "depth": 2}


def test_the_name_of_data_is_a_label(folder: Path) -> None:
    (folder / "label.yaml").write_text("base: base.yaml\ndata: {name: liver}\n")
    values = load(folder / "label.yaml", ["data.name=spleen"])
    assert values["data"]["store"] == "stores/toy" and values["name"].startswith("spleen/")


def test_three_levels_of_base_at_most(folder: Path) -> None:
    for name, base in (("second", "child"), ("third", "second"), ("fourth", "third")):
        (folder / f"{name}.yaml").write_text(f"base: {base}.yaml\nseed: 4\n")
    assert load(folder / "third.yaml")["trainer"]["max_steps"] == 20
    assert message(load, folder / "fourth.yaml") == (
        f"{folder}/fourth.yaml inherits more than three deep, {folder}/child.yaml with `base: base.yaml` is the "
        "fourth; start from one of its bases and repeat here what those between say"
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_every_ready_config_can_be_the_base_of_ones_own(path: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: configs/{path.parent.name}/{path.name}\nname: mine\n")
    assert load(tmp_path / "mine.yaml") == load(path) | {"name": "mine"}


@pytest.mark.parametrize("files", [["a"], ["a", "b"]])
def test_a_file_that_is_its_own_base(folder: Path, files: list[str]) -> None:
    for name, base in zip(files, [*files[1:], files[0]], strict=True):
        (folder / f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    last = folder / f"{files[-1]}.yaml"
    assert message(load, folder / "a.yaml") == (
        f"{last}: `base: a.yaml` leads back to {folder}/a.yaml; a file cannot be its own base"
    )


def test_a_missing_base(folder: Path) -> None:
    (folder / "lost.yaml").write_text("base: nothing.yaml\n")
    assert message(load, folder / "lost.yaml") == (
        f"{folder}/lost.yaml: no base file '{folder}/nothing.yaml' "
        "(base is relative to the file that names it, or configs/...)"
    )
    (folder / "own.yaml").write_text("base: configs/pretrain/base.yaml\nname: own\ndata: {store: x}\n")
    assert load(folder / "own.yaml")["module"]["name"] == "reconstruction"


def test_interpolation_follows_overrides(folder: Path) -> None:
    values = load(folder / "child.yaml", ["trainer.max_steps=7", "module.optimizer.lr=${trainer.max_steps}"])
    assert values["trainer"] == {"max_steps": 7, "log_every": 7} and values["module"]["optimizer"]["lr"] == 7


def test_the_default_name_can_be_referred_to(folder: Path) -> None:
    values = load(folder / "child.yaml", ["+logger.group=${name}"])
    assert values["logger"]["group"] == values["name"] == "toy/retina_unet-scratch-resenc_xs-f1-s0"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["seed=2", "data.fold=0"], "toy/retina_unet-scratch-resenc_xs-f0-s2"),
        (["transfer.path=exports/mae.pt"], "toy/retina_unet-mae-resenc_xs-f1-s0"),
        (["transfer.path=exports/mae.pt", "+transfer.name=mae800"], "toy/retina_unet-mae800-resenc_xs-f1-s0"),
        (["+data.label_fraction=0.1"], "toy/retina_unet-scratch-resenc_xs-f1-s0-l0.1"),
        (["name=mine/first"], "mine/first"),
    ],
)
def test_default_name(folder: Path, overrides: list[str], name: str) -> None:
    assert load(folder / "child.yaml", overrides)["name"] == name


def test_the_name_of_pretraining() -> None:
    settings = {"data": {"name": "ct"}, "backbone": {"name": "l"}, "module": {"name": "reconstruction"}, "seed": 1}
    settings["module"]["method"] = {"name": "mae"}  # type: ignore[index]
    assert config.default_name(settings) == "ct/mae-scratch-l-f0-s1"


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp", "''", "5"])
def test_a_name_stays_below_out(folder: Path, name: str) -> None:
    text = message(load, folder / "child.yaml", [f"name={name}"])
    assert text.startswith("name must be a folder below `out` such as 'phantom/mae-s0', got ")


@pytest.mark.parametrize(("name", "kind"), [("1e5", "number"), ("007", "number"), ("yes", "truth value")])
def test_a_name_that_yaml_takes_for_something_else_stands_in_quotes(folder: Path, name: str, kind: str) -> None:
    for key in ("name", "out"):
        text = message(load, folder / "child.yaml", [f"{key}={name}"])
        assert text.endswith(f"; YAML took it for a {kind}, in quotes it is a name: {key}=\"'...'\"")
        assert load(folder / "child.yaml", [f"{key}='{name}'"])[key] == name


# ---- overrides


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("trainer.max_steps=5", "trainer.max_steps", 5),
        ("module.optimizer.lr=1e-4", "module.optimizer.lr", 0.0001),
        ("data.patch_size=[64, 48, 32]", "data.patch_size", [64, 48, 32]),
        ("data.store=null", "data.store", None),
        ("data.store=a=b", "data.store", "a=b"),
        ("transfer=null", "transfer", None),
        ("backbone=resenc_xs", "backbone", {"name": "resenc_xs", "width": 8}),
        ("backbone=resenc_s", "backbone", {"name": "resenc_s"}),
        ("backbone.name=resenc_s", "backbone", {"name": "resenc_s"}),
        ("backbone={name: resenc_s, width: 2}", "backbone", {"name": "resenc_s", "width": 2}),
        ("module.detector=detr", "module.detector", {"name": "detr"}),
        ("+trainer.fast_dev_run=true", "trainer.fast_dev_run", True),
        ("+logger.wandb.mode=offline", "logger", {"wandb": {"mode": "offline"}}),
    ],
)
def test_override(folder: Path, override: str, where: str, value: Any) -> None:
    node: Any = load(folder / "child.yaml", [override])
    for key in where.split("."):
        node = node[key]
    assert node == value and type(node) is type(value)


def test_overrides_apply_in_order(folder: Path) -> None:
    values = load(folder / "child.yaml", ["backbone=vit", "+backbone.depth=2", "backbone.depth=3"])
    assert values["backbone"] == {"name": "vit", "depth": 3}


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "trainer.max_step=5",
            "the configuration has no key 'trainer.max_step', did you mean 'trainer.max_steps'? "
            "To add it, write +trainer.max_step=5",
        ),
        (
            "trainer.lr=5",
            "the configuration has no key 'trainer.lr', did you mean 'module.optimizer.lr'? "
            "To add it, write +trainer.lr=5",
        ),
        ("data.zzz=5", "the configuration has no key 'data.zzz'. To add it, write +data.zzz=5"),
        ("lr=5", "unknown section 'lr' in 'lr=5', did you mean 'module.optimizer.lr'?"),
        (
            "+trainr.max_steps=5",
            "unknown section 'trainr' in '+trainr.max_steps=5', did you mean 'trainer.max_steps'?",
        ),
        (
            "trainer.max_steps.a=5",
            "'trainer.max_steps.a=5': trainer.max_steps is the value 20 and has no keys; set it whole",
        ),
        (
            "+data.patch_size.0=5",
            "'+data.patch_size.0=5': data.patch_size is the value [32, 32, 32] and has no keys; set it whole",
        ),
        ("trainer=5", "trainer is a section with the keys max_steps, log_every; it cannot be set to 5"),
        ("=5", "cannot read the override '=5'; write section.key=value"),
        ("seed", "cannot read the override 'seed'; write section.key=value"),
    ],
)
def test_bad_override(folder: Path, override: str, text: str) -> None:
    assert message(load, folder / "child.yaml", [override]) == text


@pytest.mark.parametrize("value", ["[1", "${a"])
def test_a_value_that_is_not_yaml(folder: Path, value: str) -> None:
    text = message(load, folder / "child.yaml", [f"seed={value}"])
    assert text.startswith(f"'{value}' is not a YAML value: ")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("seed=${sead}", "seed refers to ${sead}, which does not exist, did you mean 'seed'?"),
        ("seed=${seed}", "seed: Recursive interpolation detected"),
        ("seed=???", "PATH leaves seed open; give seed=VALUE"),
    ],
)
def test_unresolvable(folder: Path, override: str, text: str) -> None:
    file = str(folder / "child.yaml")
    assert message(load, file, [override]).removeprefix(f"{file}: ").replace(file, "PATH") == text


# ---- files


def test_unknown_section(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("trainr: {}\n")
    assert message(load, tmp_path / "a.yaml") == (
        f"{tmp_path}/a.yaml: unknown section 'trainr', did you mean 'trainer'? "
        "Sections: base, name, out, seed, data, backbone, transfer, module, trainer, logger"
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("seed: a\nout: b: c", "line 2: not valid YAML: mapping values are not allowed"),
        ("seed: 1\nseed: 2", "line 2: not valid YAML: found duplicate key seed"),
        ("- 1", "expected sections (name, out, seed, data, backbone, transfer, module, trainer, logger), got list"),
        ("trainer: 5", "trainer must be a section of `key: value` lines, got 5"),
    ],
)
def test_bad_file(tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    assert (
        message(load, tmp_path / "a.yaml").replace(f"{tmp_path}/a.yaml", "").lstrip(": ").startswith(text)
    )  # YAML's words vary


def test_missing_file(folder: Path) -> None:
    wrong = folder / "chold.yaml"
    assert message(load, wrong) == f"no configuration file '{wrong}', did you mean '{folder}/child.yaml'?"
    assert message(load, folder) == f"{folder} is a folder; --config takes a YAML file"


def test_packaged_configs_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.find_config("configs/detect/phantom.yaml").is_file()
    assert load("configs/detect/phantom.yaml")["module"]["name"] == "detection"
    assert "did you mean 'configs/detect/phantom.yaml'" in message(load, "configs/detect/phantm.yaml")
    (tmp_path / "configs/detect").mkdir(parents=True)
    (tmp_path / "configs/detect/phantom.yaml").write_text("name: mine\n")  # the user's own comes first
    assert load("configs/detect/phantom.yaml")["name"] == "mine"


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.relative_to(CONFIGS).as_posix())
def test_every_shipped_configuration_binds(file: Path) -> None:
    from pretrain3d.commands.settings import check_arguments

    values = load(file, ["data.store=somewhere"])  # a base leaves it open
    check_names(values)
    check_arguments(values)


@pytest.mark.parametrize("file", ["mae", "s3d", "models_genesis", "volume_fusion", "swin_mix"])
def test_the_published_recipe_that_base_names_fits_every_cnn_method(file: str) -> None:
    from pretrain3d.commands.settings import check_arguments

    lines = (CONFIGS / "pretrain/base.yaml").read_text().splitlines()
    recipe = shlex.split(" ".join(line[1:] for line in lines if line.startswith("#   ")))
    recipe += ["+backbone.masking=sparse"] if file == "s3d" else []
    values = load(f"configs/pretrain/{file}.yaml", ["data.store=x", *recipe])
    check_names(values)
    check_arguments(values)
    optimizer = {"name": "sgd", "lr": 1e-2, "momentum": 0.99, "weight_decay": 3e-5}
    assert values["module"]["optimizer"] == optimizer and values["trainer"]["gradient_clip_val"] == 12.0
    # Models Genesis flips by itself; Volume Fusion and the Swin mix turn nothing but what they are made of
    spatial = values["data"]["augment"]["spatial"], values["data"]["flip_axes"]
    flips = {"models_genesis": [], "swin_mix": [0, 2]}.get(file, [0, 1, 2])
    assert spatial == (file in ("mae", "s3d"), flips)


@pytest.mark.parametrize(
    ("file", "override", "expected"),
    [
        (
            "mae",
            "module.method=simclr",
            "module.method=simclr is trained by module.name=contrastive, not reconstruction",
        ),
        ("mae", "module.method=voco", "module.method=voco is trained by module.name=contrastive, not reconstruction"),
        ("simclr", "module.method=mae", "module.method=mae is trained by module.name=reconstruction, not contrastive"),
        ("mae", "module.method=supervised", "module.method=supervised is trained by module.name=segmentation, not "),
        ("mae", "module.name=contrastive", "module contrastive: argument 'method' is missing; it takes: method, "),
        ("simclr", "module.name=segmentation", "module segmentation: argument 'method' is missing; it takes: method, "),
        ("mae", "module.name=detection", "module detection: argument 'detector' is missing; it takes: detector, "),
    ],
)
def test_modules_and_methods_belong_together(file: str, override: str, expected: str) -> None:
    from pretrain3d.commands.settings import check_arguments

    values = load(f"configs/pretrain/{file}.yaml", ["data.store=x", override])
    check_names(values)
    assert message(check_arguments, values).startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("val_every_n_steps=often", "trainer: val_every_n_steps must be int, got 'often'"),
        ("val_every_n_steps=0", "trainer.val_every_n_steps is 0; 1 or more"),
        ("checkpoint_every_n_steps=-1", "trainer.checkpoint_every_n_steps is -1; 1 or more"),
        ("probe_every_n_validations=-1", "trainer.probe_every_n_validations is -1; 0 or more"),
        ("compile=3", "trainer: compile must be bool, got 3"),
        ("log_every_n_steps=0", "trainer.log_every_n_steps is 0; 1 or more"),
        ("accumulate_grad_batches=0", "trainer.accumulate_grad_batches is 0; 1 or more"),
        ("gradient_clip_val=-1", "trainer.gradient_clip_val is -1; 0 or more"),
    ],
)
def test_keys_of_the_trainer_that_are_ours(override: str, expected: str) -> None:
    from pretrain3d.commands.settings import trainer_keys

    keys, rest = trainer_keys(load("configs/pretrain/base.yaml", ["data.store=x"]))
    assert keys.val_every_n_steps == 100 and "max_steps" in rest and "compile" not in rest
    values = load("configs/pretrain/base.yaml", ["data.store=x", f"trainer.{override}"])
    assert message(trainer_keys, values) == expected


def test_arguments_of_the_trainer_that_are_set() -> None:
    """All that `make_trainer` passes, and the bar, which has a callback of its own."""
    from pretrain3d.commands.settings import TRAINER_SET, trainer_keys

    for key, instead in TRAINER_SET.items():
        values = load("configs/pretrain/base.yaml", ["data.store=x", f"+trainer.{key}=3"])
        assert message(trainer_keys, values) == f"trainer.{key} cannot be set, `fit` does: {instead}"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("accelerator=gppu", "trainer: You selected an invalid accelerator name: `accelerator='gppu'`"),
        ("+strategy=dpd", "trainer: You selected an invalid strategy name: `strategy='dpd'`"),
        ("devices=0", "trainer: `Trainer(devices=0)` value is not a valid input using cpu accelerator."),
        ("accelerator=tpu", "trainer: Requirement 'torch_xla>=1.13' not met"),
    ],
)
def test_what_lightning_refuses(tmp_path: Path, override: str, expected: str) -> None:
    from pretrain3d.commands.fit import make_trainer
    from pretrain3d.reporting.run_folder import RunFolder

    added = f"+trainer.{override[1:]}" if override.startswith("+") else f"trainer.{override}"
    values = load("configs/pretrain/base.yaml", ["data.store=x", "trainer.accelerator=cpu", added])
    assert message(make_trainer, values, RunFolder(tmp_path / "run")).startswith(expected)


def test_a_trial_leaves_no_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain3d.commands.fit import log_to_wandb, make_trainer
    from pretrain3d.reporting import wandb_logger
    from pretrain3d.reporting.run_folder import RunFolder

    asked: list[tuple[Any, bool]] = []
    monkeypatch.setattr(wandb_logger, "make_wandb_logger", lambda node, _, __, resume: asked.append((node, resume)))
    for added in ("+trainer.fast_dev_run=true", "seed=1"):
        overrides = ["data.store=x", "trainer.accelerator=cpu", "+logger.wandb.mode=offline", added]
        values, folder = load("configs/pretrain/base.yaml", overrides), RunFolder(tmp_path / "run")
        log_to_wandb(make_trainer(values, folder), values, folder, True)
    assert asked == [(None, True), ({"mode": "offline"}, True)]


def test_tasks_of_slurm_that_lightning_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain3d.commands.fit import make_trainer
    from pretrain3d.reporting.run_folder import RunFolder

    for key, value in {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(key, value)
    values = load("configs/pretrain/base.yaml", ["data.store=x", "trainer.accelerator=cpu"])
    said = message(make_trainer, values, RunFolder(tmp_path / "run"))
    assert said.startswith("trainer: You set `--ntasks=4`") and "HINT: Use `--ntasks-per-node=4` instead" in said


# ---- names and arguments


def test_check_names(folder: Path) -> None:
    values = load(folder / "child.yaml")
    check_names(values)
    values["backbone"]["name"] = "resnc_s"
    text = message(check_names, values)
    assert text.startswith("unknown backbone 'resnc_s', did you mean 'resenc_s'? Known: ") and " resenc_l," in text
    del values["backbone"]
    assert message(check_names, values) == "the configuration has no section 'backbone'"


class Component:
    def __init__(
        self,
        levels: int,
        size: tuple[int, int, int],
        ratio: float = 0.5,
        norm: Literal["batch", "none"] | None = None,
        names: list[str] | None = None,
        deep: bool = False,
        free: Any = None,
    ) -> None:
        self.values = (levels, size, ratio, norm, names, deep, free)


REGISTRY = {"component": f"{__name__}:Component", "torchless": "no.such:module"}


def test_build_binds_converts_and_supplies() -> None:
    node = {"name": "component", "size": [1, 2, 3], "ratio": 1, "names": ["a"], "norm": "batch", "levels": None}
    built = build(REGISTRY, node, "part", levels=4)
    assert built.values == (4, (1, 2, 3), 1.0, "batch", ["a"], False, None) and type(built.values[2]) is float
    assert node["size"] == [1, 2, 3]


def test_resolve() -> None:
    assert resolve(REGISTRY, "component", "part") is Component
    assert message(resolve, REGISTRY, "torchles", "part") == (  # no.such is not imported to say so
        "unknown part 'torchles', did you mean 'torchless'? Known: component, torchless"
    )
    assert message(resolve, REGISTRY, "zzz", "part") == "unknown part 'zzz'. Known: component, torchless"


TAKES = "It takes: size, ratio, norm, names, deep, free"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"sise": 1}, f"unknown argument 'sise', did you mean 'size'? {TAKES}"),
        ({"zzz": 1}, f"unknown argument 'zzz'. {TAKES}"),
        (
            {"size": [1, 2, 3], "levels": 3},
            "levels follows from the rest of the configuration and cannot be set; remove it",
        ),
        ({}, f"argument 'size' is missing; {TAKES[0].lower() + TAKES[1:]}"),
        ({"size": [1, 2]}, "size must be a list of 3 int, got [1, 2]"),
        ({"size": [1, 2, 3.5]}, "size must be a list of 3 int, got [1, 2, 3.5]"),
        ({"size": [1, 2, 3], "ratio": "half"}, "ratio must be float, got 'half'"),
        ({"size": [1, 2, 3], "ratio": True}, "ratio must be float, got True"),
        ({"size": [1, 2, 3], "ratio": float("nan")}, "ratio must be a finite number, got nan"),
        ({"size": [1, 2, 3], "norm": "bach"}, "norm must be 'batch' or 'none' or null, got 'bach'"),
        ({"size": [1, 2, 3], "names": "a"}, "names must be a list of str or null, got 'a'"),
        ({"size": [1, 2, 3], "deep": 1}, "deep must be bool, got 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], text: str) -> None:
    assert message(check, REGISTRY, {"name": "component", **arguments}, "part", given=("levels",)) == (
        f"part component: {text}"
    )


@pytest.mark.parametrize("where", ["BACKBONES", "DETECTORS", "PRETRAINING", "MODULES", "FINETUNE", "OPTIMIZERS"])
def test_the_arguments_of_every_component_are_type_checked(where: str) -> None:
    registry = getattr(importlib.import_module(REGISTRIES[where]), where)
    given = {"PRETRAINING": {"levels", "in_channels", "patch_size", "decoder"}, "DETECTORS": {"levels"}}
    for name in registry:
        target = resolve(registry, name, where)
        set_by_users = set(inspect.signature(target).parameters) - given.get(where, set())
        assert set_by_users <= set(hints(target)), f"{name}: an argument has no annotation"
        assert not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(target).parameters.values()), name


def test_a_detector_of_another_type_of_argument() -> None:
    node = {"name": "retina_unet", "num_convs": "two"}
    registry, given = {"retina_unet": "pretrain3d.detection.retina:RetinaUNet"}, ("levels", "num_classes", "anchors")
    assert message(check, registry, node, "detector", given) == (
        "detector retina_unet: num_convs must be int, got 'two'"
    )


def test_check_accepts_what_build_accepts() -> None:
    check(REGISTRY, {"name": "component", "size": (1, 2, 3), "norm": None, "free": {"a": 1}}, "part", given=("levels",))


def test_a_node_without_a_name() -> None:
    assert message(check, REGISTRY, {"size": 1}, "part") == (
        "part needs a name, one of component, torchless; got {'size': 1}"
    )


# ---- options of commands

DEFAULTS = {"out": REQUIRED, "cases": 4, "scale": 0.5, "fast": False, "limit": None, "label": "x"}


def test_options_from_text() -> None:
    text = {"out": "007", "cases": "8", "scale": "1", "fast": "true", "limit": "3", "label": "1e3"}
    assert read_options(text, DEFAULTS) == {
        "out": "007",
        "cases": 8,
        "scale": 1.0,
        "fast": True,
        "limit": 3,
        "label": "1e3",
    }
    assert read_options({"out": Path("a"), "limit": "null"}, DEFAULTS) == DEFAULTS | {"out": Path("a")}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "missing out=VALUE"),
        (
            {"out": "a", "case": "3"},
            "unknown option 'case', did you mean 'cases'? Options: out, cases, scale, fast, limit, label",
        ),
        ({"out": "a", "cases": "three"}, "cases must be int, got 'three'"),
        ({"out": "a", "cases": "2.5"}, "cases must be int, got 2.5"),
        ({"out": "a", "fast": "1"}, "fast must be bool, got 1"),
    ],
)
def test_bad_options(options: dict[str, object], text: str) -> None:
    assert message(read_options, options, DEFAULTS) == text


def test_a_command_without_options() -> None:
    assert message(read_options, {"x": "1"}, {}) == "unknown option 'x'. Options: none"
