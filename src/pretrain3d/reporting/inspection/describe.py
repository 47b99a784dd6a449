"""Which kind of thing a path is, and the lines about it."""

from __future__ import annotations

import zipfile
from pathlib import Path

from pretrain3d.config import UserError
from pretrain3d.registry import resolve
from pretrain3d.reporting.inspection import KINDS
from pretrain3d.reporting.inspection.predicted import is_predicted


def describe(path: Path, overrides: list[str]) -> list[str]:
    """The lines about one path, the first one saying what it is.

    Args:
        path: file or folder.
        overrides: ``key=value`` for a configuration.

    Raises:
        UserError: no such path, nothing that pretrain3d knows, damaged, or overrides for something else.
    """
    kind = _kind_of(path)
    if overrides and kind != "configuration":
        raise UserError(f"{overrides[0]} overrides a configuration, and {path} is none")
    say = resolve(KINDS, kind, "kind")
    return say(path, overrides) if kind == "configuration" else say(path)


def _kind_of(path: Path) -> str:
    if not path.exists() and path.parts[:1] != ("configs",):
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        for kind, file in (("store", "index.json"), ("run", "config.yaml"), ("raw data", "dataset.json")):
            if (path / file).is_file():
                return kind
        return "predictions" if is_predicted(path) else "raw data"
    if path.suffix in (".yaml", ".yml"):
        return "plan" if path.name == "plan.yaml" else "configuration"
    if path.suffix == ".json":
        return "JSON"
    if zipfile.is_zipfile(path):  # the container of torch.save
        return "weights"
    raise UserError(
        f"{path} is nothing that show knows: raw data, a store, a plan, a configuration, a run, a checkpoint, "
        "an exported backbone, a result or a score file"
    )
