"""What the config of a run says, checked and completed before anything is built: arguments, plan, transfer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pretrain3d.config import UserError, suggestion
from pretrain3d.registry import check, checked_arguments, resolve, takes

DATA = {"data": "pretrain3d.data.module:DataModule"}
TRAINER = {"trainer": "lightning:Trainer"}
SECTIONS = {"transfer": ("path", "adapt", "name"), "logger": ("wandb",)}  # those that no component's signature checks

TRAINER_SET = {  # arguments of Lightning's Trainer that `fit` sets itself, and what is there for the user instead
    "max_epochs": "set trainer.max_steps",
    "val_check_interval": "set trainer.val_every_n_steps",
    "check_val_every_n_epoch": "set trainer.val_every_n_steps",
    "enable_checkpointing": "set trainer.checkpoint_every_n_steps",
    "logger": "set the section logger",
    "default_root_dir": "set out and name",
    "enable_progress_bar": "the bar is on terminals only",
    "callbacks": "they are those of the framework",
    "use_distributed_sampler": "the samplers are those of the framework",
}
TRAINER_LEAST = {"log_every_n_steps": 1, "accumulate_grad_batches": 1, "gradient_clip_val": 0}  # unchecked by Lightning


@dataclass(frozen=True)
class TrainerKeys:
    """The keys of `trainer` that are ours; all others are those of Lightning's Trainer.

    Attributes:
        val_every_n_steps: optimiser steps between validations.
        checkpoint_every_n_steps: optimiser steps between checkpoints.
        probe_every_n_validations: how often frozen features are probed for organs in pretraining; 0 never.
        compile: the networks go through `torch.compile`.

    Raises:
        UserError: a number below what it may be.
    """

    val_every_n_steps: int
    checkpoint_every_n_steps: int
    probe_every_n_validations: int = 1
    compile: bool = False

    def __post_init__(self) -> None:
        least = {"val_every_n_steps": 1, "checkpoint_every_n_steps": 1, "probe_every_n_validations": 0}
        for key, bound in least.items():
            if getattr(self, key) < bound:
                raise UserError(f"trainer.{key} is {getattr(self, key)}; {bound} or more")


def trainer_keys(settings: dict[str, Any]) -> tuple[TrainerKeys, dict[str, Any]]:
    """Our keys of `trainer`, and the rest.

    Raises:
        UserError: no such section or no length of the run; one of ours is missing or of another type; one that `fit`
            sets itself; a number below what it may be.
    """
    if not isinstance(settings.get("trainer"), dict):
        raise UserError("the configuration has no section 'trainer'")
    steps = settings["trainer"].get("max_steps")
    if type(steps) is not int or (steps < 1 and steps != -1):
        said = "missing" if steps is None else repr(steps)
        raise UserError(
            f"trainer.max_steps is {said}; it is a number of optimiser steps, or -1 for a run without an end"
        )
    names = {field.name for field in fields(TrainerKeys)}
    own = {key: value for key, value in settings["trainer"].items() if key in names}
    rest = {key: value for key, value in settings["trainer"].items() if key not in names}
    for key in rest:
        if key in TRAINER_SET:
            raise UserError(f"trainer.{key} cannot be set, `fit` does: {TRAINER_SET[key]}")
    for key, least in TRAINER_LEAST.items():
        value = rest.get(key)
        if isinstance(value, (int, float)) and not value >= least:
            raise UserError(f"trainer.{key} is {value}; {least} or more")
    return TrainerKeys(**checked_arguments(TrainerKeys, own, "trainer")), rest


def check_arguments(settings: dict[str, Any]) -> None:
    """Binds and type-checks the arguments of every component.

    Raises:
        UserError: an argument that a component does not take, lacks, or of another type.
    """
    from pretrain3d.backbones import BACKBONES
    from pretrain3d.data.views import ViewAugmentation
    from pretrain3d.detection import DETECTORS
    from pretrain3d.detection.merge import Merging
    from pretrain3d.modules import FINETUNE, MODULES
    from pretrain3d.modules.averaging import StochasticAveraging
    from pretrain3d.modules.optim import OPTIMIZERS
    from pretrain3d.objectives import PRETRAINING

    check_sections(settings)
    module = settings["module"]
    planned = [key for key in ("batch_size",) if settings["data"].get(key, 0) is None]
    check(DATA, {"name": "data", **settings["data"]}, "data", given=("seed", "validation", *planned))
    check(BACKBONES, settings["backbone"], "backbone", given=("in_channels",))
    follows = {"detection": ("classes", "mirror_classes"), "segmentation": ("label_classes",)}
    given = ("backbone", "patch_size", "note", *follows.get(module["name"], ()))
    check(MODULES, module, "module", given=given)
    if module["name"] == "detection":
        detector = with_anchors(module["detector"], {})
        check(DETECTORS, detector, "module.detector", given=("levels", "num_classes"))
    else:
        check_method(settings)
        labels = ("classes", "make_stem") if module["name"] == "segmentation" else ()
        method_given = ("levels", "in_channels", "patch_size", "decoder", *labels)
        check(PRETRAINING, module["method"], "module.method", given=method_given)
    optimizer = {key: value for key, value in module["optimizer"].items() if key != "weight_decay"}
    check(OPTIMIZERS, optimizer, "module.optimizer", given=("groups",))
    if module.get("finetune"):
        check(FINETUNE, module["finetune"], "module.finetune", given=("schedule", "warmup_steps", "max_steps"))
    if module.get("merging"):
        checked_arguments(Merging, module["merging"], "module.merging")
    if module.get("swa"):
        checked_arguments(StochasticAveraging, module["swa"], "module.swa")
    if module.get("views"):
        checked_arguments(ViewAugmentation, module["views"], "module.views")
    _, known = trainer_keys(settings)
    planned = [key for key in ("accumulate_grad_batches",) if known.get(key, 0) is None]
    check(TRAINER, {"name": "trainer", **known}, "trainer", given=tuple(planned))


def check_sections(settings: dict[str, Any]) -> None:
    """Raises UserError for an unknown key of `transfer` or `logger`, or a value of another form."""
    from pretrain3d.reporting.wandb_logger import check_node

    for section, known in SECTIONS.items():
        node = settings.get(section) or {}
        if not isinstance(node, dict):
            raise UserError(f"{section} must be a section of `key: value` lines, got {node!r}")
        for key in node:
            if key not in known:
                hint = suggestion(key, known) or ";"
                raise UserError(f"unknown key {section}.{key}{hint} it takes {', '.join(known)}")
    adapt = (settings.get("transfer") or {}).get("adapt")
    if not isinstance(adapt, list | None):
        raise UserError(f"transfer.adapt={adapt}: expected a list, such as [channels]")
    wandb = (settings.get("logger") or {}).get("wandb")
    if not isinstance(wandb, dict | None):
        raise UserError(f"logger.wandb={wandb}: expected a section, such as {{mode: offline}}")
    check_node(wandb or {})


def check_method(settings: dict[str, Any]) -> None:
    """Raises UserError when a method is given to a module that cannot train it, or a segmentation has no labels."""
    from pretrain3d.objectives import PRETRAINING

    module, method = settings["module"]["name"], settings["module"]["method"]
    if takes(PRETRAINING, method, "module.method", "make_stem"):
        right = "segmentation"
    else:
        views = hasattr(resolve(PRETRAINING, method["name"], "module.method"), "after_step")
        right = "contrastive" if views else "reconstruction"
    if module != right:
        why = ", as it has no after_step()" if module == "contrastive" and right == "reconstruction" else ""
        raise UserError(f"module.method={method['name']} is trained by module.name={right}, not {module}{why}")
    if module == "segmentation" and settings["data"].get("labels") is None:
        raise UserError("module.name=segmentation: set data.labels to semantic (maps of organs) or objects")


def of_plan(settings: dict[str, Any]) -> dict[str, Any]:
    """The config with the plan's batch size and accumulation where it says null.

    Raises:
        UserError: the store's plan has none, or was made for another backbone.
    """
    from pretrain3d.data.store import Store

    data, trainer = dict(settings["data"]), dict(settings["trainer"])
    wanted = [
        (section, key)
        for section, key in ((data, "batch_size"), (trainer, "accumulate_grad_batches"))
        if key in section and section[key] is None
    ]
    if not wanted:
        return settings
    if not isinstance(data["store"], str):
        raise UserError(f"{wanted[0][1]}=null takes the plan's of one store; with several give a number")
    plan, backbone = Store(Path(data["store"])).plan, settings["backbone"]["name"]
    planned = (plan.get("planned_for") or {}).get("backbone")
    for section, key in wanted:
        if planned != backbone or plan.get(key) is None:
            said = f"is for {planned}" if planned else f"has no {key}"
            raise UserError(
                f"{key}=null takes the plan's, but {data['store']}/plan.yaml {said}; call `pretrain3d plan "
                f"{data['store']} backbone={backbone}` or give a number"
            )
        section[key] = plan[key]
    return {**settings, "data": data, "trainer": trainer}


def with_levels(detector: dict[str, Any], plan: dict[str, Any], backbone: str) -> dict[str, Any]:
    """The node of a detector with the planned pyramid levels, when it takes levels and anchors and names neither.

    Levels are indices into the pyramid of the backbone that they were planned for; another one ignores them.
    """
    from pretrain3d.detection import DETECTORS

    takes_both = all(takes(DETECTORS, detector, "module.detector", key) for key in ("detection_levels", "anchors"))
    named = any(detector.get(key) is not None for key in ("detection_levels", "anchors"))
    levels = plan.get("detection_levels")
    if not takes_both or named or levels is None or (plan.get("planned_for") or {}).get("backbone") != backbone:
        return dict(detector)
    return {**detector, "detection_levels": levels}


def with_anchors(detector: dict[str, Any], planned: dict[str, Any] | None) -> dict[str, Any]:
    """The node of a detector with the planned anchors, when it takes anchors and names none itself."""
    from pretrain3d.detection import DETECTORS

    if detector.get("anchors") is not None or not takes(DETECTORS, detector, "module.detector", "anchors"):
        return dict(detector)
    return {**detector, "anchors": planned}


def intensity_of_transfer(settings: dict[str, Any]) -> dict[str, Any]:
    """The config with ``data.intensity: pretrained`` replaced by what the transferred file was trained on.

    Raises:
        UserError: nothing is transferred, or its file does not say.
    """
    from pretrain3d.backbones.transfer import load_export

    path = (settings.get("transfer") or {}).get("path")
    if not path:
        raise UserError("data.intensity=pretrained takes the normalisation of transfer.path, which is not given")
    intensity = load_export(path)["preprocessing"].get("intensity")
    if intensity is None:
        raise UserError(f"data.intensity=pretrained: {path} does not say how its images were normalised; import it "
                        "with intensity=..., or set data.intensity")  # fmt: skip
    return {**settings, "data": {**settings["data"], "intensity": intensity}}
