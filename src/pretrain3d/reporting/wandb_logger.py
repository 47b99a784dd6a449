"""Weights & Biases: offline unless asked, and never a reason to stop a run. The only file that imports wandb."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from pretrain3d.config import UserError, suggestion
from pretrain3d.files import write_text

MODES = ("offline", "online", "disabled")
KEYS = ("mode", "project", "entity", "group", "tags")


def make_wandb_logger(node: Mapping[str, Any] | None, run_folder: str | Path, config: Mapping[str, Any]) -> Any:
    """The logger that ``logger.wandb`` of a config asks for.

    Args:
        node: ``{"mode": "offline" | "online" | "disabled", "project", "entity", "group", "tags"}``, all optional;
            None: no W&B.
        run_folder: where ``wandb/`` goes; a run that is resumed there goes on as the same W&B run.
        config: the resolved configuration.

    Returns:
        A `RunLogger`, or None: not asked for, not the first process, or (with a warning) the package is missing or
        does not start.

    Raises:
        UserError: an unknown mode or key.
    """
    if node is None:
        return None
    for key in node:
        if key not in KEYS:
            raise UserError(f"unknown key logger.wandb.{key}{suggestion(key, KEYS) or ';'} it takes {', '.join(KEYS)}")
    mode = node.get("mode", "offline")
    if mode not in MODES:
        raise UserError(f"logger.wandb.mode is {mode!r}{suggestion(str(mode), MODES) or ';'} it is {', '.join(MODES)}")
    if mode == "disabled" or getattr(rank_zero_only, "rank", 0) > 0:  # one process logs
        return None
    folder = Path(run_folder)
    options = {key: value for key, value in node.items() if key not in ("mode", "project")}
    try:
        import wandb

        logger = RunLogger(
            name=str(config.get("name") or folder.name),
            project=str(node.get("project") or "pretrain3d"),
            id=_run_id(folder),
            save_dir=str(folder),
            config=dict(config),
            mode=mode,
            settings=wandb.Settings(init_timeout=30, silent=True),
            **options,
        )
        logger.start()
    except Exception as error:
        _warn("no W&B log of this run", error)
        return None
    return logger


class RunLogger(WandbLogger):
    """Lightning's W&B logger with the steps of ``metrics.csv``; after a failure it warns once and stays silent."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._wandb_init.pop("anonymous")  # wandb warns about the key itself
        self._broken = False

    @rank_zero_only
    def start(self) -> None:
        """Starts the W&B run and says which extreme of a metric sums up a run."""
        run = self.experiment
        for key, best in (("val/loss", "min"), ("train/loss", "min"), ("val/mAP", "max"), ("val/AP@*", "max")):
            run.define_metric(key, step_metric="trainer/global_step", summary=best)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs at the number of optimiser steps taken (Lightning counts one less)."""
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        self._try(super().log_metrics, values, None if step is None else step + 1)

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self._try(super().log_image, key, images, step, **kwargs)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved configuration was given to W&B at the start."""

    def finalize(self, status: str) -> None:
        self._try(super().finalize, status)

    @rank_zero_only
    def log_result(self, result: Mapping[str, Any]) -> None:
        """Logs the final table, the per-class table, the FROC curves and the precision-recall curves of a result."""
        self._try(self._log_result, result)

    @rank_zero_only
    def close(self) -> None:
        """Ends the W&B run, so that another one can start in this process."""
        self._try(self.experiment.finish)

    def _log_result(self, result: Mapping[str, Any]) -> None:
        import wandb

        rows = [[key, *(entry.get(part) for part in ("value", "low", "high"))]
                for key, entry in result["metrics"].items()]  # fmt: skip
        classes = [[name, key, *(entry.get(part) for part in ("value", "low", "high"))]
                   for name, keys in result["per_class"].items() for key, entry in (keys or {}).items()]  # fmt: skip
        logged: dict[str, Any] = {
            "test/table": wandb.Table(columns=["metric", "value", "low", "high"], data=rows),
            "test/classes": wandb.Table(columns=["class", "metric", "value", "low", "high"], data=classes),
        }
        for name, (curves, x, y) in result_curves(result).items():
            logged[f"test/{name}"] = wandb.plot.line_series(
                xs=[curve[x] for curve in curves.values()], ys=[curve[y] for curve in curves.values()],
                keys=list(curves), title=name, xname=x.replace("_", " "),
            )  # fmt: skip
        self.experiment.log(logged)
        for key, entry in result["metrics"].items():
            self.experiment.summary[f"test/{key}"] = entry["value"]

    def _try(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self._broken:
            return
        try:
            action(*args, **kwargs)
        except Exception as error:
            self._broken = True
            _warn("no more W&B log of this run", error)


def result_curves(result: Mapping[str, Any]) -> dict[str, tuple[dict[str, Any], str, str]]:
    """``{name: ({line: curve}, key of x, key of y)}`` of the curves in a result that have points."""
    curves = result.get("curves") or {}
    found: dict[str, tuple[dict[str, Any], str, str]] = {}
    for suffix in ("", "@0.50"):
        froc = {"all classes": curves.get(f"froc{suffix}"), **(curves.get(f"froc_per_class{suffix}") or {})}
        kinds = {
            "FROC": (froc, "false_positives_per_case", "sensitivity"),
            "precision-recall": (curves.get(f"pr{suffix}") or {}, "recall", "precision"),
        }
        for name, (lines, x, y) in kinds.items():
            drawn = {line: curve for line, curve in lines.items() if curve and curve.get(x)}
            if drawn:
                found[f"{name} at IoU {suffix.removeprefix('@') or '0.10'}"] = (drawn, x, y)
    return found


def log_result(
    node: Mapping[str, Any] | None, run_folder: str | Path, config: Mapping[str, Any], result: Mapping[str, Any]
) -> None:
    """Adds a result to the W&B run of a run folder, as far as its config asks for one."""
    logger = make_wandb_logger(node, run_folder, config)
    if logger is not None:
        logger.log_result(result)
        logger.close()


def _run_id(folder: Path) -> str:
    """The id that this run folder keeps."""
    path = folder / "wandb" / "run-id.txt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def _warn(what: str, error: Exception) -> None:
    warnings.warn(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}", UserWarning, stacklevel=3)
