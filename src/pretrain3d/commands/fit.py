"""`fit`: one config, one run. Trains it, and resumes what was killed."""

from __future__ import annotations

import errno
import logging
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from pretrain3d.commands.assemble import assemble
from pretrain3d.commands.settings import DATA, check_arguments, intensity_of_transfer, of_plan, trainer_keys
from pretrain3d.config import UserError, load
from pretrain3d.registry import build, check_names, resolve
from pretrain3d.reporting.run_folder import RunFolder

TAKES_CONFIG = True
USAGE = """\
pretrain3d fit --config FILE [key=value ...] [+key=value ...]

Trains one run and writes it to <out>/<name>: config.yaml, metrics.csv, checkpoints/ with last.ckpt and best.ckpt,
pictures/. Calling it again with the same config resumes an unfinished run and leaves a finished one alone;
trainer.max_steps may grow; trainer.max_time, workers, loggers and the intervals of logging and checkpoints may change.

  pretrain3d fit --config configs/detect/phantom.yaml trainer.max_steps=100 backbone=resenc_s
  pretrain3d fit --config configs/detect/phantom.yaml trainer.devices=2 trainer.strategy=ddp
  pretrain3d fit --config configs/detect/phantom.yaml +trainer.fast_dev_run=true

A key that the file or its base mentions is overridden with key=value, another argument of a component is added with
+key=value. `pretrain3d show FILE` prints the resolved config."""

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
    trainer_keys(settings)
    if settings["data"].get("store") is None:
        raise UserError("data.store is not given; it is the folder that `pretrain3d prepare` wrote, or a list of them")
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

    from pretrain3d.devices import short_precision
    from pretrain3d.modules import MODULES
    from pretrain3d.modules.base import NOTE
    from pretrain3d.modules.checkpoint import read_checkpoint

    check_arguments(settings)
    check_precision(settings["trainer"].get("precision"))
    check_strategy(settings["trainer"].get("strategy", "auto"))
    quieten()
    lightning.seed_everything(settings["seed"], verbose=False)
    asked = settings
    settings = of_plan(in_arithmetic_of_device(settings))
    precision = settings["trainer"].get("precision")
    # TF32 for networks in float32; beside half precision only what bears no rounding is left in float32
    torch.set_float32_matmul_precision("high" if short_precision(precision) == "32" else "highest")
    if settings["data"].get("intensity") == "pretrained":
        settings = intensity_of_transfer(settings)
    validation = resolve(MODULES, settings["module"]["name"], "module").validates_on
    node = {"name": "data", **settings["data"]}
    datamodule = build(DATA, node, "data", seed=settings["seed"], validation=validation)
    module = assemble(settings, datamodule, folder)
    if trainer_keys(settings)[0].compile:
        module.compile_networks()
    if resume:
        folder.check_same(read_checkpoint(folder.last)[NOTE], {key: module.note[key] for key in TAKEN})
    trainer = make_trainer(settings, folder)
    method: Any = getattr(module, "method", None)
    if hasattr(method, "check_batch"):
        method.check_batch(datamodule.batch_size, trainer.world_size)
    module.trainer = trainer
    module.configure_optimizers()  # Lightning does it again; a mistake there leaves neither folder nor W&B run behind
    if trainer.is_global_zero:
        folder.open(asked)
        if precision != (half := asked["trainer"].get("precision")):
            print(f"{folder.path}: trainer.precision={half} is slow on this CPU, which has no such arithmetic; it "
                  "trains in float32", file=sys.stderr)  # fmt: skip
    log_to_wandb(trainer, settings, folder, resume)
    folder.drop_requeued()
    try:
        train(trainer, module, datamodule, folder.last if resume else None)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # which name no file
            error.filename = str(folder.path)
        raise
    except SystemExit as error:  # how Lightning ends after either signal
        if not isinstance(error, SIGTERMException) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        say_stopped(trainer, folder)
        return 143 if isinstance(error, SIGTERMException) else 130
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith("DataLoader worker") and (trainer.received_sigterm or module.told_to_stop):
            say_stopped(trainer, folder)  # who ends a job tells all its processes, and the workers heed it at once
            return 143
        if advice := advice_on(error, settings, module, datamodule):
            raise UserError(advice) from error
        raise
    if trainer.is_global_zero:
        timed_out = settings["trainer"].get("max_time") is not None and folder.state()["status"] == "running"
        why = ", stopped by trainer.max_time; a longer one goes on" if timed_out else ""
        why = ", tried out: no checkpoint is kept" if trainer.fast_dev_run else why
        print(f"{folder.path}: {trainer.global_step} steps{why}")
    return 0


def advice_on(error: RuntimeError | MemoryError, settings: dict[str, Any], module: Any, datamodule: Any) -> str | None:
    """What to change in the config so that a training goes without the error; None where nobody knows."""
    from pretrain3d.devices import is_out_of_memory
    from pretrain3d.planning.memory import out_of_memory_advice

    if found := re.match(r"(\w+) does not have a deterministic implementation", str(error)):
        return (
            f"trainer.deterministic={settings['trainer'].get('deterministic')}: {found[1]} has no deterministic "
            "form; trainer.deterministic=warn goes on without one"
        )
    if not is_out_of_memory(error):
        return None
    functions = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    tiles = getattr(module, "tile_batch", None) if "validation_step" in functions else None
    return out_of_memory_advice(settings, datamodule.batch_size, datamodule.patch_size, tiles)


def say_stopped(trainer: Any, folder: RunFolder) -> None:
    """Prints at which step a signal ended the training, and from which one the same call goes on."""
    if trainer.is_global_zero:
        end = f" of {trainer.max_steps}" if trainer.max_steps > 0 else ""
        at = f"stopped at step {trainer.global_step}{end}"
        kept = f"continues from the checkpoint of step {folder.state()['step']}"
        begins = "begins again, there is no checkpoint yet"
        print(f"{folder.path}: {at}; the same call {kept if folder.last.is_file() else begins}", file=sys.stderr)


def train(trainer: Any, module: Any, datamodule: Any, checkpoint: Path | None) -> None:
    """Trains from a checkpoint on; no process that was started for it outlives an error of this one."""
    from pretrain3d.modules.stopping import end_others

    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    except BaseException:
        end_others(trainer)
        raise


def check_precision(precision: object) -> None:
    """Raises UserError for a precision of the weights in which the networks do not run."""
    if str(precision) not in PRECISIONS + SHORT_PRECISIONS:
        raise UserError(f"trainer.precision={precision}; it is one of {', '.join(PRECISIONS)}")


def check_strategy(strategy: object) -> None:
    """Raises UserError for one that shards weights: gradients would be clipped by the norm of a part."""
    if not str(strategy).startswith(("auto", "ddp", "single_device")):
        raise UserError(f"trainer.strategy={strategy}: it is auto, or ddp for several processes with the whole network")


def in_arithmetic_of_device(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, with float32 in place of a half precision that the CPU it will run on only imitates."""
    import torch

    from pretrain3d.devices import computes_in, short_precision

    trainer = settings["trainer"]
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    on_cpu = trainer.get("accelerator", "auto") == "cpu" or not gpu
    if not on_cpu or computes_in(short_precision(trainer.get("precision")), "cpu"):
        return settings
    return {**settings, "trainer": {**trainer, "precision": "32-true"}}


def quieten() -> None:
    """Silences what Lightning says of every run that is as it should be."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    messages = (".*in eval mode at the start of training.*", ".*LeafSpec.*", ".*does not have many workers.*")
    for message in (*messages, ".*recommended to use `self.log.*sync_dist=True.*"):  # such values are all processes'
        warnings.filterwarnings("ignore", message=message)


def make_trainer(settings: dict[str, Any], folder: RunFolder) -> Any:
    """Lightning's Trainer with the framework's callbacks and ``metrics.csv``; epochs play no part, steps count.

    Raises:
        UserError: what Lightning refuses, such as an accelerator that is not there.
    """
    import lightning
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from pretrain3d.modules.monitors import FeatureMonitor
    from pretrain3d.modules.stopping import Stopping
    from pretrain3d.reporting.callbacks import Pictures, Progress
    from pretrain3d.reporting.checkpoints import Checkpoints
    from pretrain3d.reporting.csv_logger import MetricsCSV
    from pretrain3d.reporting.throughput import Throughput

    own, node = trainer_keys(settings)
    accumulate = int(node.get("accumulate_grad_batches", 1))
    kind = settings["module"]["name"]
    monitor, mode = {"detection": ("val/mAP", "max"), "segmentation": ("val/dice", "max")}.get(
        kind, ("val/loss", "min")
    )
    checkpoints = Checkpoints(folder.path, every_n_steps=own.checkpoint_every_n_steps, monitor=monitor, mode=mode)
    monitors = [] if kind == "detection" else [FeatureMonitor(own.probe_every_n_validations)]
    kept = [] if node.get("fast_dev_run") else [checkpoints]  # a trial leaves nothing that a run would resume
    callbacks = [Stopping(), Progress(), Throughput(), Pictures(folder.path), *monitors, *kept]
    usual = {"num_sanity_val_steps": 0, "enable_model_summary": False}
    usual["benchmark"] = not node.get("deterministic")  # cuDNN tries out its 3D convolutions; shapes do not change
    try:
        return lightning.Trainer(
            **{**usual, **node},
            default_root_dir=folder.path,
            max_epochs=-1,
            val_check_interval=own.val_every_n_steps * accumulate,
            check_val_every_n_epoch=None,
            use_distributed_sampler=False,
            enable_checkpointing=bool(kept),
            logger=MetricsCSV(folder.path),
            callbacks=callbacks,
        )
    except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
        sentence = re.split(r"\. (?!HINT)", " ".join(str(error).split()))[0]
        raise UserError(f"trainer: {sentence}") from error


def log_to_wandb(trainer: Any, settings: dict[str, Any], folder: RunFolder, resume: bool) -> None:
    """Adds W&B to the loggers of a trainer where the config asks for it; a trial (``fast_dev_run``) logs nothing.

    Args:
        resume: whether the run of that folder goes on.
    """
    from pretrain3d.reporting.wandb_logger import make_wandb_logger

    asked = None if trainer.fast_dev_run else (settings.get("logger") or {}).get("wandb")
    logger = make_wandb_logger(asked, folder.path, settings, resume)
    if logger is not None:
        trainer.loggers = [*trainer.loggers, logger]
