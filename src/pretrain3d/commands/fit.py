"""`fit`: one config, one run. Assembles data, backbone and module, trains, and resumes what was killed."""

from __future__ import annotations

import errno
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain3d.commands.settings import (
    DATA,
    check_arguments,
    intensity_of_transfer,
    of_plan,
    trainer_keys,
    with_anchors,
    with_levels,
)
from pretrain3d.config import UserError, load
from pretrain3d.registry import build, check_names
from pretrain3d.reporting.run_folder import RunFolder

TAKES_CONFIG = True
USAGE = """\
pretrain3d fit --config FILE [key=value ...] [+key=value ...]

Trains one run and writes it to <out>/<name>: config.yaml, metrics.csv, checkpoints/ with last.ckpt and best.ckpt,
pictures/. Calling it again with the same config resumes an unfinished run and leaves a finished one alone;
trainer.max_steps may grow; workers, loggers and the intervals of logging and checkpoints may change.

  pretrain3d fit --config configs/detect/phantom.yaml trainer.max_steps=100 backbone=resenc_s
  pretrain3d fit --config configs/detect/phantom.yaml trainer.devices=2 trainer.strategy=ddp
  pretrain3d fit --config configs/detect/phantom.yaml +trainer.fast_dev_run=true

A key that the file or its base mentions is overridden with key=value, another argument of a component is added with
+key=value. `pretrain3d show FILE` prints the resolved config."""

WORSE_IOU = 0.03  # of the training boxes with their best anchors, against the plan, from which it is said
SPLITS = ("train", "val", "test")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
SHORT_PRECISIONS = ("32", "bf16", "16", "None")  # Lightning's other names of them
TAKEN = ("classes", "mirror_classes", "sets", "batch", "backbone", "module")  # of a note: from config, store and plan


def run(config_path: str | None, paths: list[str], overrides: list[str]) -> int:
    """Trains the run that the config names; returns the exit status."""
    if config_path is None or paths:
        stray = f", not {paths[0]!r} (a value with spaces stands in quotes)" if paths else ""
        raise UserError(f"fit takes --config FILE and key=value overrides{stray}; see `pretrain3d fit --help`")
    settings = load(config_path, overrides)
    check_names(settings)
    folder = RunFolder(Path(settings["out"]) / settings["name"])
    start = folder.start_of(settings)
    if start == "finished":
        print(f"{folder.path}: finished at step {folder.state()['step']}, nothing to do")
        return 0
    return fit(settings, folder, resume=start == "resume")


def fit(settings: dict[str, Any], folder: RunFolder, resume: bool) -> int:
    """Builds everything the config names, then trains. Arguments are checked before any data is touched.

    Returns:
        The exit status: 0, 143 when SIGTERM stopped it and 130 when Ctrl+C did.
    """
    import lightning
    import torch
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from pretrain3d.devices import is_out_of_memory
    from pretrain3d.modules.base import NOTE
    from pretrain3d.modules.checkpoint import read_checkpoint
    from pretrain3d.planning.memory import out_of_memory_advice

    check_arguments(settings)
    check_precision(settings["trainer"].get("precision"))
    quieten()
    lightning.seed_everything(settings["seed"], verbose=False)
    torch.set_float32_matmul_precision("high")
    asked = settings
    settings = of_plan(settings)
    if settings["data"]["intensity"] == "pretrained":
        settings = intensity_of_transfer(settings)
    datamodule = build(DATA, {"name": "data", **settings["data"]}, "data", seed=settings["seed"])
    module = assemble(settings, datamodule, folder)
    if trainer_keys(settings)[0].compile:
        module.compile_networks()
    if resume:
        folder.check_same(read_checkpoint(folder.last)[NOTE], {key: module.note[key] for key in TAKEN})
    trainer = make_trainer(settings, folder)
    if trainer.is_global_zero:
        folder.open(asked)
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=str(folder.last) if resume else None, weights_only=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # which name no file
            error.filename = str(folder.path)
        raise
    except SystemExit as error:  # how Lightning ends after either signal
        terminated, interrupted = isinstance(error, SIGTERMException), isinstance(error.__context__, KeyboardInterrupt)
        if not terminated and not interrupted:
            raise
        if trainer.is_global_zero:
            at = f"stopped at step {trainer.global_step} of {trainer.max_steps}"
            kept = f"continues from the checkpoint of step {folder.state()['step']}"
            begins = "begins again, there is no checkpoint yet"
            print(f"{folder.path}: {at}; the same call {kept if folder.last.is_file() else begins}", file=sys.stderr)
        return 143 if terminated else 130
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        functions = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        training = "validation_step" not in functions
        raise UserError(out_of_memory_advice(settings, datamodule.patch_size, training)) from error
    if trainer.is_global_zero:
        print(f"{folder.path}: {trainer.global_step} steps")
    return 0


def check_precision(precision: object) -> None:
    """Raises UserError for a precision of the weights in which the networks do not run."""
    if str(precision) not in PRECISIONS + SHORT_PRECISIONS:
        raise UserError(f"trainer.precision={precision}; it is one of {', '.join(PRECISIONS)}")


def quieten() -> None:
    """Silences what Lightning says at every start of a run that is as it should be."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*in eval mode at the start of training.*", ".*LeafSpec.*", ".*does not have many workers.*"):
        warnings.filterwarnings("ignore", message=message)


def assemble(settings: dict[str, Any], datamodule: Any, folder: RunFolder) -> Any:
    """The LightningModule of a config: backbone, transferred weights, and the head that the module section names."""
    from pretrain3d.backbones import BACKBONES
    from pretrain3d.backbones.transfer import transfer_into
    from pretrain3d.data.leakage import Corpus, find, merged, warning
    from pretrain3d.modules import MODULES
    from pretrain3d.modules.monitors import through_shared_stem
    from pretrain3d.reporting.results import commit

    store = datamodule.store
    backbone_node = {**settings["backbone"], "in_channels": datamodule.in_channels}
    backbone = build(BACKBONES, backbone_node, "backbone")
    check_patch(datamodule, backbone, settings)
    transfer = settings.get("transfer") or {}
    module_node = dict(settings["module"])
    given: dict[str, Any] = {"backbone": backbone, "patch_size": tuple(datamodule.patch_size)}
    method = module_node.get("method", {}).get("name", "")
    if module_node["name"] == "segmentation":
        given["label_classes"] = datamodule.label_classes
    if module_node["name"] == "detection":
        if len(datamodule.sets) > 1:
            raise UserError("data.store lists several stores; a detector is trained on one")
        detector = with_levels(module_node["detector"], store.plan, settings["backbone"]["name"])
        detector = with_anchors(detector, store.plan.get("anchors"))
        module_node["detector"] = detector
        given |= {"classes": store.classes, "mirror_classes": store.mirror_classes}
        method = detector["name"]
    shared = through_shared_stem(datamodule.sets, module_node.get("method", {}))[0]
    note = {
        "version": 1,
        "kind": module_node["name"],
        "seed": settings["seed"],
        "backbone": backbone_node,
        "module": module_node,
        "classes": list(store.classes),
        "mirror_classes": dict(store.mirror_classes),
        "preprocessing": preprocessing(settings, datamodule, shared),
        "sets": about_sets(settings, datamodule),
        "batch": {
            "batch_size": datamodule.batch_size,
            "accumulate_grad_batches": settings["trainer"].get("accumulate_grad_batches", 1),
        },
        "precision": settings["trainer"].get("precision", "32-true"),
        "source": {
            "run": settings["name"],
            "commit": commit(),
            "method": method,
            "data": "+".join(part.name for part in datamodule.sets),
            "data_hash": datamodule.data_hash,
            "licence": ", ".join(dict.fromkeys(part.store.licence for part in datamodule.sets)),
        },
        "transfer": None,
    }
    if transfer.get("path"):
        report = transfer_into(backbone, str(transfer["path"]), adapt=tuple(transfer.get("adapt") or ()))
        note["transfer"] = report.to_dict()
        note["pretrained_on"] = report.corpus
        print(f"{folder.path}: {report}")
        warn_of_spacing(report.preprocessing.get("spacing_mm"), store.spacing_mm)
    cases = [(part.store, split, getattr(part, f"{split}_ids")) for part in datamodule.sets for split in SPLITS]
    note["leakage"] = find(note.get("pretrained_on"), cases)
    note["corpus"] = merged(*(Corpus.of(part.store, part.train_ids).to_dict() for part in datamodule.sets))
    if note["leakage"]:
        print(warning(note["leakage"], str(transfer["path"])), file=sys.stderr)
    module = build(MODULES, module_node, "module", note=note, **given)
    if "anchors" in module_node.get("detector", {}) and settings["module"]["detector"].get("anchors") is None:
        warn_of_anchors(module.detector.anchors.level_sizes(), datamodule, settings["backbone"]["name"])
    return module


def check_patch(datamodule: Any, backbone: Any, settings: dict[str, Any]) -> None:
    """Raises UserError when patches are no multiple of what the backbone needs; crops of views are no patches."""
    from pretrain3d.backbones.contract import by_text

    patch, multiple = datamodule.patch_size, backbone.size_multiple
    if settings["module"]["name"] == "contrastive" or not any(s % m for s, m in zip(patch, multiple, strict=True)):
        return
    name, store = settings["backbone"]["name"], datamodule.store.path
    advice = "set data.patch_size"
    if settings["data"].get("patch_size") is None:
        advice = f"the plan's are for another backbone, `pretrain3d plan {store} backbone={name}` makes one for this"
    needed = by_text(multiple)
    raise UserError(f"patches of {by_text(patch)} do not fit {name}, which needs multiples of {needed}: {advice}")


def about_sets(settings: dict[str, Any], datamodule: Any) -> dict[str, dict[str, Any]]:
    """What a run takes from each of its stores; see docs/design.md, "Checkpoints"."""
    return {
        part.name: {
            "data_hash": part.store.data_hash,
            "label_classes": list(part.label_classes),
            "preprocessing": preprocessing(settings, datamodule, part),
        }
        for part in datamodule.sets
    }


def preprocessing(settings: dict[str, Any], datamodule: Any, part: Any) -> dict[str, Any]:
    """What must be done to a file of one data set before the network sees it; travels in checkpoints and exports."""
    from pretrain3d.data.normalise import resolve_intensity

    store, data = part.store, settings["data"]
    return {
        "axes": "RAS",
        "modality": list(store.modality),
        "spacing_mm": [float(value) for value in store.spacing_mm],
        "patch_size": list(datamodule.patch_size),
        "intensity": resolve_intensity(store, part.intensity, data["fold"], data["num_folds"]),
    }


def warn_of_spacing(pretrained_mm: Sequence[float] | None, store_mm: Sequence[float]) -> None:
    """Says so when the transferred weights know objects at another size in voxels."""
    if pretrained_mm is None or all(abs(a / b - 1) <= 0.1 for a, b in zip(pretrained_mm, store_mm, strict=True)):
        return
    texts = [" x ".join(f"{value:g}" for value in spacing) for spacing in (pretrained_mm, store_mm)]
    print(f"note: the weights were pretrained at {texts[0]} mm, the store has voxels of {texts[1]} mm", file=sys.stderr)


def warn_of_anchors(sizes: Any, datamodule: Any, backbone: str) -> None:
    """Says so when the plan's anchors, (L, A, 3) voxels on the levels of this detector, fit worse than planned."""
    import numpy as np
    import torch

    from pretrain3d.detection.anchors import mean_best_iou

    store = datamodule.store
    planned = (store.plan.get("coverage") or {}).get("mean_best_anchor_iou")
    boxes = torch.from_numpy(np.concatenate([store.cases[case_id].boxes for case_id in datamodule.train_ids]))
    if planned is None or not len(boxes):
        return
    fit = float(mean_best_iou(sizes.flatten(0, 1), boxes[:, 3:] - boxes[:, :3]))
    if fit < planned - WORSE_IOU:
        print(
            f"note: on the levels of {backbone} the plan's anchors have a mean best IoU of {fit:.2f}, planned were "
            f"{planned:.2f}; `pretrain3d plan {store.path} backbone={backbone}` finds better ones",
            file=sys.stderr,
        )


def make_trainer(settings: dict[str, Any], folder: RunFolder) -> Any:
    """Lightning's Trainer with the callbacks and loggers of the framework; epochs play no part, steps count.

    Raises:
        UserError: what Lightning refuses, such as an accelerator that is not there.
    """
    import lightning
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from pretrain3d.modules.monitors import FeatureMonitor
    from pretrain3d.reporting.callbacks import Pictures, Progress
    from pretrain3d.reporting.checkpoints import Checkpoints
    from pretrain3d.reporting.csv_logger import MetricsCSV
    from pretrain3d.reporting.throughput import Throughput
    from pretrain3d.reporting.wandb_logger import make_wandb_logger

    own, node = trainer_keys(settings)
    accumulate = int(node.get("accumulate_grad_batches", 1))
    kind = settings["module"]["name"]
    monitor, mode = {"detection": ("val/mAP", "max"), "segmentation": ("val/dice", "max")}.get(
        kind, ("val/loss", "min")
    )
    loggers: list[Any] = [MetricsCSV(folder.path)]
    wandb_logger = make_wandb_logger((settings.get("logger") or {}).get("wandb"), folder.path, settings)
    if wandb_logger is not None:
        loggers.append(wandb_logger)
    checkpoints = Checkpoints(folder.path, every_n_steps=own.checkpoint_every_n_steps, monitor=monitor, mode=mode)
    monitors = [] if kind == "detection" else [FeatureMonitor(own.probe_every_n_validations)]
    callbacks = [Progress(), Throughput(), Pictures(folder.path), *monitors, checkpoints]
    try:
        return lightning.Trainer(
            **{"num_sanity_val_steps": 0, "enable_model_summary": False, **node},
            default_root_dir=folder.path,
            max_epochs=-1,
            val_check_interval=own.val_every_n_steps * accumulate,
            check_val_every_n_epoch=None,
            use_distributed_sampler=False,
            enable_checkpointing=True,
            logger=loggers,
            callbacks=callbacks,
        )
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        sentence = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(f"trainer: {sentence}") from error
