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
from pretrain3d.reporting.results import read_rows

MODES = ("offline", "online", "disabled")
KEYS = ("mode", "project", "entity", "group", "job_type", "tags", "notes")
LIMITS = {"init_timeout": 30, "finish_timeout": 600}  # seconds without a network; older W&B knows the first only
STEP = "trainer/global_step"  # the x axis
BEST = {"val/mAP": "max", "val/AP@": "max", "val/FROC@": "max", "val/dice": "max", "val/loss": "min"}  # by prefix
CLASS_KEYS = ("AP@0.10", "dice")  # of each class, in the summary of a tested run


def make_wandb_logger(
    node: Mapping[str, Any] | None, run_folder: str | Path, config: Mapping[str, Any], resume: bool = False
) -> Any:
    """The logger that ``logger.wandb`` of a config asks for.

    Args:
        node: ``{"mode": "offline" | "online" | "disabled", ...}`` and what W&B calls by the other names of `KEYS`, all
            optional; None: no W&B.
        run_folder: where ``wandb/`` goes.
        config: the resolved configuration.
        resume: whether to go on with the W&B run of that folder, if there is one. A training that begins again is
            another run: its steps would come after those of the one before. Offline each part of a run is a file of its
            own, of which `wandb sync` lets the last take the place of all others: so it begins with what they hold.

    Returns:
        A `RunLogger`, or None: not asked for, not the first process, or (with a warning) the package is missing or
        does not start.

    Raises:
        UserError: an unknown mode or key.
    """
    if node is None:
        return None
    check_node(node)
    mode = node.get("mode", "offline")
    if mode == "disabled" or getattr(rank_zero_only, "rank", 0) > 0:  # one process logs
        return None
    folder = Path(run_folder)
    options = {key: value for key, value in node.items() if key not in ("mode", "project")}
    try:
        import wandb

        limits: dict[str, Any] = {key: value for key, value in LIMITS.items() if key in wandb.Settings.model_fields}
        logger = RunLogger(
            name=str(config.get("name") or folder.name),
            project=str(node.get("project") or "pretrain3d"),
            id=_run_id(folder, resume),
            save_dir=str(folder),
            config=dict(config),
            mode=mode,
            settings=wandb.Settings(silent=True, **limits),
            **options,
        )
        _ = logger.experiment  # starts the W&B run
        if resume and mode == "offline":
            logger.repeat(folder)
    except Exception as error:
        _warn("no W&B log of this run", error)
        return None
    return logger


def check_node(node: Mapping[str, Any]) -> None:
    """Raises UserError for an unknown key of ``logger.wandb``, or another mode than `MODES`."""
    for key in node:
        if key not in KEYS:
            raise UserError(f"unknown key logger.wandb.{key}{suggestion(key, KEYS) or ';'} it takes {', '.join(KEYS)}")
    mode = node.get("mode", "offline")
    if mode not in MODES:
        raise UserError(f"logger.wandb.mode is {mode!r}{suggestion(str(mode), MODES) or ';'} it is {', '.join(MODES)}")


class RunLogger(WandbLogger):
    """Lightning's W&B logger with the steps of ``metrics.csv``; after a failure it warns once and stays silent."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._wandb_init.pop("anonymous")  # wandb warns about the key itself
        if arguments.get("mode") == "offline":
            self._wandb_init.pop("resume")  # which it cannot, and says so
        self._broken = False
        self._summed_up: set[str] = set()

    @rank_zero_only
    def repeat(self, folder: Path) -> None:
        """Logs once more what a run's folder holds: the rows of ``metrics.csv`` and the pictures that were kept."""
        path, pictures = folder / "metrics.csv", sorted((folder / "pictures").glob("step*_*.png"))
        rows = {int(row.pop("step")): row for row in (read_rows(path) if path.is_file() else [])}
        images = {(int(step.removeprefix("step")), name): file
                  for file in pictures for step, _, name in [file.stem.partition("_")]}  # fmt: skip
        for step in sorted(rows | dict.fromkeys(step for step, _ in images)):
            for name in (name for at, name in images if at == step):
                self.log_image(f"pictures/{name}", [str(images[step, name])], step - 1)
            self.log_metrics({key: float(text) for key, text in rows.get(step, {}).items()}, step - 1)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs at the number of optimiser steps taken (Lightning counts one less).

        It is W&B's own count of steps too, so that what a resumed run repeats is not there twice: W&B keeps the first.
        """
        assert step is not None, "a point of a curve needs a step"
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        self._try(self._log_metrics, values, step + 1)

    def _log_metrics(self, values: dict[str, Any], step: int) -> None:
        for key in values.keys() - self._summed_up:
            self._summed_up.add(key)
            best = next((best for prefix, best in BEST.items() if key.startswith(prefix)), None)
            if best is not None:  # key by key: a pattern does not count beside Lightning's "*"
                escaped = key.replace(".", "\\.")  # a dot would be the path to a part of a value
                self.experiment.define_metric(escaped, step_metric=STEP, summary=f"{best},last")
        self.experiment.log({**values, STEP: step}, step=step)

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self._try(super().log_image, key, images, step, **kwargs)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved configuration was given to W&B at the start."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the W&B run: the next run of this process is another one."""
        try:
            self.experiment.finish(exit_code=0 if status == "success" else 1)
        except Exception as error:
            self._fail(error)

    @rank_zero_only
    def log_result(self, result: Mapping[str, Any]) -> None:
        """Logs the final table, the per-class table, the FROC curves and the precision-recall curves of a result."""
        self._try(self._log_result, result)

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
        if (step := (result.get("asked") or {}).get("step")) is not None:
            logged[STEP] = step
        self.experiment.log(logged)
        summary = {f"test/{key}": entry["value"] for key, entry in result["metrics"].items()}
        for name, keys in result["per_class"].items():
            summary |= {f"test/{key}/{name}": keys[key]["value"] for key in CLASS_KEYS if key in (keys or {})}
        self.experiment.summary.update({key: value for key, value in summary.items() if value is not None})

    def _try(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self._broken:
            return
        try:
            action(*args, **kwargs)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._broken:
            _warn("no more W&B log of this run", error)
        self._broken = True


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
    logger = make_wandb_logger(node, run_folder, config, resume=True)
    if logger is not None:
        logger.log_result(result)
        logger.finalize("success")


def _run_id(folder: Path, keep: bool) -> str:
    """The id of the W&B run of this folder: the one it has, or a new one."""
    path = folder / "wandb" / "run-id.txt"
    if not (keep and path.is_file()):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def _warn(what: str, error: Exception) -> None:
    warnings.warn(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}", UserWarning, stacklevel=2)
