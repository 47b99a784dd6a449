"""`result.json`, the one source of every table and report, and files that are whole or absent."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pretrain3d.config import UserError, short
from pretrain3d.files import write_text

SHAPES: dict[str, tuple[type, ...]] = {
    "run": (str,), "metrics": (dict,), "per_class": (dict,), "cases": (list,), "config": (dict,), "seed": (int,),
}  # fmt: skip
OPTIONAL = (  # objects or null
    "curves", "commit", "environment", "cost", "data", "backbone", "asked", "by_size", "by", "columns",
)  # fmt: skip
SCORE_FILES = ("predictions.json", "targets.json")  # beside the result of a detector or baseline
PACKAGES = ("torch", "lightning", "monai", "numpy")


def write_json(path: str | Path, value: Any) -> None:
    """Writes plain values as JSON, atomically; a NaN or an infinity becomes null, which is what JSON can say."""
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: there is no such file, or it is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a JSON file ({error})") from None


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a ``metrics.csv``, texts as written, without empty cells."""
    with open(path, encoding="utf-8", newline="") as file:
        return [{key: text for key, text in row.items() if text} for row in csv.DictReader(file)]


def write_result(
    folder: str | Path,
    *,
    run: str,
    metrics: Mapping[str, Mapping[str, float | None]],
    per_class: Mapping[str, Mapping[str, Mapping[str, float | None]]],
    curves: Mapping[str, Any],
    cases: list[dict[str, Any]],
    config: Mapping[str, Any],
    seed: int,
    data: Mapping[str, Any],
    cost: Mapping[str, Any] | None = None,
    backbone: Mapping[str, Any] | None = None,
    asked: Mapping[str, Any] | None = None,
    test_seconds: float | None = None,
    operating: Mapping[str, float | None] | None = None,
    by_size: Mapping[str, Any] | None = None,
    leakage: list[dict[str, Any]] | None = None,
) -> Path:
    """Writes ``<folder>/result.json``; commit and environment are filled in.

    Args:
        folder: the run's folder; made when missing.
        run: name of the row in a table.
        metrics: ``{key: {"value", "low", "high"}}``; the 95 % interval over patients, None without one.
        per_class: ``{class: {key: {"value", "low", "high"}}}``.
        curves: ``{"froc": {"false_positives_per_case": [...], "sensitivity": [...]}, "pr": {...}}``.
        cases: one row per case.
        config: the resolved configuration.
        seed: of the run.
        data: ``{"hash", "name", "licence", "cases"}``.
        cost: see `reporting.cost.cost_of`; None for a baseline that was not trained.
        backbone: ``{"name", "fingerprint", "init"}``; None for a baseline.
        asked: what the result was made from; see `is_current`.
        test_seconds: wall time of prediction.
        operating: ``{"threshold", "sensitivity", "false_positives_per_case"}`` at a score chosen on other cases.
        by_size: ``{"0-1200": {"low_mm3", "high_mm3", "objects", "metrics", "per_class"}, ...}``, bins of object volume.
        leakage: ``{"case", "split", "how", "similarity"}`` per case, of whatever split, that the corpus of the
            pretraining holds; None for a baseline.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "run": run, "metrics": metrics, "per_class": per_class, "curves": curves, "cases": cases, "config": config,
        "commit": commit(), "environment": environment(), "seed": seed, "cost": cost, "data": data,
        "backbone": backbone, "asked": asked, "test_seconds": test_seconds, "operating": operating,
        "by_size": by_size, "leakage": leakage,
    }  # fmt: skip
    write_json(folder / "result.json", result)
    return folder / "result.json"


def read_result(path: str | Path) -> dict[str, Any]:
    """Reads the ``result.json`` of a run folder, or that file itself.

    Raises:
        UserError: there is none, or it is not a result; names what is wrong with which part of it.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "result.json").exists():
            raise UserError(f"{path} holds no result.json; run `pretrain3d test {path}` first")
        path = path / "result.json"
    result = read_json(path)
    if not isinstance(result, dict):
        raise UserError(f"{path} is not a result: expected a JSON object, got a {type(result).__name__}")
    missing = [key for key in SHAPES if key not in result]
    if missing:
        raise UserError(f"{path} is not a result: it lacks {', '.join(missing)}")
    for key, shape in (SHAPES | dict.fromkeys(OPTIONAL, (dict, type(None)))).items():
        if not isinstance(result.get(key), shape):
            names = " or ".join(_SAID[kind] for kind in shape)
            raise UserError(f"{path}: {key} is {short(result[key])}; expected {names}")
    for case in result["cases"]:
        if not isinstance(case, dict):
            raise UserError(f"{path}: cases holds {short(case)}; expected an object for each case")
    for key, entry in _entries(result):
        if not isinstance(entry, dict) or "value" not in entry or not all(map(_is_number, map(entry.get, _NUMBERS))):
            raise UserError(f"{path}: {key} is {short(entry)}; expected {{value, low, high}}")
    return result


def is_current(path: str | Path, asked: Mapping[str, Any]) -> bool:
    """Whether there is a result at ``path`` that was made from exactly ``asked`` (weights, split, samples, ...)."""
    path = Path(path)
    return path.is_file() and read_result(path).get("asked") == _plain(asked)


_SAID = {str: "a text", dict: "an object", list: "a list", int: "a whole number", type(None): "null"}
_NUMBERS = ("value", "low", "high")


def _entries(result: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every {"value", "low", "high"}, of all classes, of each and of parts; whatever stands where one should."""
    tables = {"": result["metrics"], **{f"{name} ": keys for name, keys in result["per_class"].items()}}
    parts = {"by_size": result.get("by_size"), **(result.get("by") or {})}
    for title, values in parts.items():
        for name, part in values.items() if isinstance(values, dict) else ():
            tables[f"{title} {name} "] = part.get("metrics") if isinstance(part, dict) else part
    for name, keys in tables.items():
        if isinstance(keys, dict):
            yield from ((f"{name}{key}", entry) for key, entry in keys.items())
        elif keys is not None:
            yield name.strip(), keys


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def environment() -> dict[str, Any]:
    """Versions and machine, as a result records them."""
    import torch

    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"python": platform.python_version(), **versions, "cpu": _cpu(), "cores": _cores(), "gpu": gpu}


def device_name(device: Any) -> str:
    """Of a `torch.device`: the GPU, or the processor of this machine."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()


def commit() -> dict[str, Any] | None:
    """``{"hash", "dirty"}`` of the checkout that this package lies in; None outside one (an installed wheel)."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        if not git("ls-files", "results.py"):  # an ignored environment inside someone else's checkout
            return None
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _plain(value: Any) -> Any:
    """Numpy and torch scalars and arrays, paths and tuples -> what JSON holds."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
