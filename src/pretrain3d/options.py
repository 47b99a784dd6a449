"""The options ``key=value`` of a command, and the files that it is to write."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pretrain3d.config import UserError, parse_value, suggestion
from pretrain3d.registry import fitted

REQUIRED = object()  # default of an option that must be given


def read_options(options: Mapping[str, object], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a command, checked against what it takes.

    Args:
        options: as given. Text (from the command line) is read as the default's type; other values are checked.
        defaults: every option the command takes. `REQUIRED` or a text default keep the text as it was written; a
            default of None takes any YAML value, null included; any other default also says the type.

    Returns:
        A value for every key of ``defaults``, in its order.

    Raises:
        UserError: an unknown option, a missing required one, or a value of another type.
    """
    for key in options:
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise UserError(f"unknown option {key!r}{suggestion(key, defaults) or '.'} Options: {known}")
    missing = [key for key, default in defaults.items() if default is REQUIRED and key not in options]
    if missing:
        raise UserError("missing " + " and ".join(f"{key}=VALUE" for key in missing))
    return {
        key: _option(key, options[key], default) if key in options else default for key, default in defaults.items()
    }


def _option(key: str, value: object, default: Any) -> Any:
    if default is REQUIRED or isinstance(default, str):
        return value
    if isinstance(value, str):
        value = parse_value(value)
    if default is None:
        return value
    return fitted(value, type(default), key)


def at_least(given: dict[str, Any], **least: int) -> dict[str, Any]:
    """The options, if none of those named is below what it may be.

    Raises:
        UserError: one is.
    """
    for key, bound in least.items():
        if given[key] < bound:
            raise UserError(f"{key}={given[key]}: it must be {bound} or more")
    return given


def output_file(key: str, value: str, endings: Collection[str] = ()) -> Path:
    """The file that a command is to write, checked before anything is computed.

    Args:
        endings: one of which its name must have; default: any.

    Raises:
        UserError: another ending, a folder, or a path below a file.
    """
    path = Path(value)
    if endings and path.suffix not in endings:
        raise UserError(f"{key}={value}: the name must end in {', '.join(endings)}")
    if path.is_dir():
        raise UserError(f"{key}={value} is a folder; expected the name of a file")
    _below_folders(key, path)
    return path


def output_folder(key: str, value: str) -> Path:
    """The folder that a command is to write into, which need not exist yet.

    Raises:
        UserError: a file, a path below a file, or the folder of a run, whose results would be lost.
    """
    path = Path(value)
    if path.is_file():
        raise UserError(f"{key}={value} is a file; expected the name of a folder")
    if (path / "config.yaml").is_file():
        raise UserError(f"{key}={value} is the folder of a run, whose results would be lost; name another folder")
    _below_folders(key, path)
    return path


def _below_folders(key: str, path: Path) -> None:
    for parent in path.parents:
        if parent.is_file():
            raise UserError(f"{key}={path} cannot be written: {parent} is a file")
