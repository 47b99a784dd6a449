"""One YAML names one run: composition, overrides and the error a user sees.

Imports neither torch nor lightning, and omegaconf only when a value or a file is read, so that a typing mistake is
answered at once.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SECTIONS = ("name", "out", "seed", "data", "backbone", "transfer", "module", "trainer", "logger")

MAX_BASES = 3  # the ready configs are two deep at most, so that a user's own file may start from any of them

# Here `name:` is a label; elsewhere it names the component that its neighbours belong to.
_LABELLED = ("", "data", "transfer")


class UserError(ValueError):
    """A user's mistake: one clear line with what is wrong, the value, and what would be right. Exit status 2."""


def suggestion(word: str, choices: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the closest choice, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def by_text(sizes: Iterable[float]) -> str:
    """Sizes along the axes in words: "64 x 64 x 32"."""
    return " x ".join(f"{size:g}" for size in sizes)


def in_quotes(key: str, value: Any) -> str:
    """How to write a name that YAML took for a number or a truth value; nothing for other values."""
    if not isinstance(value, int | float):
        return ""
    kind = "truth value" if isinstance(value, bool) else "number"
    return f"; YAML took it for a {kind}, in quotes it is a name: {key}=\"'...'\""


def short(value: Any) -> str:
    """A value of a JSON file in words, cut after 80 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def parse_value(text: str) -> Any:
    """The YAML value of a text (``1e-3`` is a number, ``[1, 2]`` a list, nothing is null); ``${...}`` stays text."""
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
    except Exception as error:  # the parsers of YAML and of ${...} share no base class
        raise UserError(f"{text!r} is not a YAML value: {_reason(error)}") from error


def load(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads the configuration of one run.

    ``base:`` files come first (three deep at most), then the file, then the overrides, then ``${...}`` is resolved. A
    node with another ``name:`` replaces the base's node whole. ``name`` defaults to `default_name`, ``out`` to
    ``runs``, ``seed`` to 0.

    Args:
        path: a YAML file; ``configs/...`` also finds the packaged configurations.
        overrides: ``a.b=value`` for a key that the file or a base mentions, ``+a.b=value`` to add one, ``node=NAME``
            short for ``node.name=NAME``. Values are YAML.

    Returns:
        Plain containers, nothing left to resolve.

    Raises:
        UserError: no such file, not YAML, an unknown section or key, a value that is still to be given (``???``).
    """
    config = {"name": None, "out": "runs", "seed": 0} | _compose(find_config(path))
    for override in overrides:
        config = _overridden(config, override)
    for section in ("data", "backbone", "module", "trainer"):
        if not isinstance(config.get(section, {}), dict):
            raise UserError(f"{path}: {section} must be a section of `key: value` lines, got {config[section]!r}")
    if config["name"] is None:
        config["name"] = default_name(_resolved(config | {"name": ""}, path))
    config = _resolved(config, path)
    seed, out = config["seed"], config["out"]
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise UserError(f"seed must be a whole number from 0 on, got {seed!r}")
    if not isinstance(out, str) or not out:
        raise UserError(f"out must be a folder, got {out!r}{in_quotes('out', out)}")
    name = config["name"]
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        quotes = in_quotes("name", name)
        raise UserError(f"name must be a folder below `out` such as 'phantom/mae-s0', got {name!r}{quotes}")
    return {key: config[key] for key in SECTIONS if key in config}


def find_config(path: str | Path) -> Path:
    """The file itself, or for ``configs/...`` the copy inside the package (in a checkout: the checkout's).

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    package = Path(__file__).resolve().parent
    roots = [package, package.parents[1]] if path.parts[:1] == ("configs",) else []
    for candidate in [path, *(root / path for root in roots)]:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise UserError(f"{path} is a folder; --config takes a YAML file")
    beside = [(root / path).parent for root in (Path(), *roots)]
    nearby = [str(path.parent / file.name) for folder in beside for file in sorted(folder.glob("*.yaml"))]
    raise UserError(f"no configuration file {str(path)!r}{suggestion(str(path), nearby)}")


def default_name(config: Mapping[str, Any]) -> str:
    """``<dataset>/<method or detector>-<init>-<backbone>-f<fold>-s<seed>``, then ``-l<fraction>`` of labels below 1.

    A fine-tuning schedule other than ``whole`` stands after the backbone.

    The data set is ``data.name``, else the name of the folder ``data.store`` (of several, joined by +). Init is
    ``scratch`` without ``transfer.path``, else ``transfer.name``, else the name of that file without its ending.
    """
    data, module = config.get("data") or {}, config.get("module") or {}
    stores = data.get("store") or "data"
    folders = [Path(str(store)).name for store in (stores if isinstance(stores, list) else [stores])]
    dataset = data.get("name") or "+".join(folders)
    part = module.get("method") or module.get("detector") or module
    transfer = config.get("transfer") or {}
    init = "scratch"
    if transfer.get("path"):
        init = transfer.get("name") or Path(str(transfer["path"])).stem
    backbone = (config.get("backbone") or {}).get("name")
    schedule = (module.get("finetune") or {}).get("name")
    backbone = f"{backbone}-{schedule}" if schedule not in (None, "whole") else backbone
    words = [part.get("name"), init, backbone, f"f{data.get('fold', 0)}", f"s{config.get('seed', 0)}"]
    if data.get("label_fraction", 1) != 1:
        words.append(f"l{data['label_fraction']}")
    return f"{dataset}/{'-'.join(str(word) for word in words if word)}"


def read_yaml(path: str | Path) -> Any:
    """The plain content of a YAML file, ``${...}`` unresolved.

    Raises:
        UserError: not a readable YAML file; names the line.
    """
    from omegaconf import OmegaConf

    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # YAML's and omegaconf's errors share no base class
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {_reason(error)}") from error


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain containers as YAML text, keys in their order."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dict(values)))


def _compose(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file over its bases; ``above`` are the files that it is a base of."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected sections ({', '.join(SECTIONS)}), got {type(values).__name__}")
    base = values.pop("base", None)
    for section in values:
        if section not in SECTIONS:
            raise UserError(
                f"{path}: unknown section {section!r}{suggestion(str(section), (*SECTIONS, 'base')) or '.'} "
                f"Sections: base, {', '.join(SECTIONS)}"
            )
    if base is None:
        return values
    file = path.parent / str(base)
    if not file.is_file() and Path(str(base)).parts[:1] == ("configs",):
        file = find_config(str(base))
    if not file.is_file():
        raise UserError(
            f"{path}: no base file {str(file)!r} (base is relative to the file that names it, or configs/...)"
        )
    if file.resolve() in [each.resolve() for each in (*above, path)]:
        raise UserError(f"{path}: `base: {base}` leads back to {file}; a file cannot be its own base")
    if len(above) == MAX_BASES:
        raise UserError(
            f"{(*above, path)[0]} inherits more than three deep, {path} with `base: {base}` is the fourth; start from "
            "one of its bases and repeat here what those between say"
        )
    return _put(_compose(file, (*above, path)), values, "")


def _put(old: Any, new: Any, where: str) -> Any:
    """``new`` over ``old``: mappings merge, unless ``new`` names another component; all else replaces."""
    if not isinstance(old, dict) or new is None:
        return new
    if isinstance(new, str) and "name" in old:
        new = {"name": new}
    if not isinstance(new, dict):
        raise UserError(f"{where} is a section with the keys {', '.join(map(str, old))}; it cannot be set to {new!r}")
    if where not in _LABELLED and new.get("name", old.get("name")) != old.get("name"):
        return new
    return old | {key: _put(old.get(key), value, f"{where}.{key}".lstrip(".")) for key, value in new.items()}


def _overridden(config: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    adds, key = key.startswith("+"), key.removeprefix("+")
    path = key.split(".")
    if not equals or not all(path):
        raise UserError(f"cannot read the override {override!r}; write section.key=value")
    if path[0] not in SECTIONS:
        raise UserError(f"unknown section {path[0]!r} in {override!r}{_nearest(key, _dotted(config) + list(SECTIONS))}")
    node: Any = config
    for depth, part in enumerate(path):
        if node is not None and not isinstance(node, dict):
            raise UserError(
                f"{override!r}: {'.'.join(path[:depth])} is the value {node!r} and has no keys; set it whole"
            )
        if not adds and part not in (node or {}):
            nearest = _nearest(key, _dotted(config)) or "."
            raise UserError(f"the configuration has no key {key!r}{nearest} To add it, write +{override}")
        node = (node or {}).get(part)
    value = parse_value(text)
    for part in reversed(path):
        value = {part: value}
    return _put(config, value, "")


def _dotted(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in config.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            keys += _dotted(value, f"{prefix}{key}.")
    return keys


def _nearest(key: str, keys: list[str]) -> str:
    """Like `suggestion`, and finds the right last word in a wrong or forgotten section."""
    keys = [other for other in keys if not key.startswith(f"{other}.")]  # its own section is no suggestion
    same = [other for other in keys if other.split(".")[-1] == key.split(".")[-1]]
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.8) or same or difflib.get_close_matches(key, keys, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _resolved(config: dict[str, Any], path: str | Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise UserError(f"{path} leaves {error.full_key} open; give {error.full_key}=VALUE") from error
    except InterpolationKeyError as error:
        key = (re.findall(r"'(.+)'", _reason(error)) or [""])[0]
        nearest = _nearest(key, _dotted(config))
        raise UserError(f"{path}: {error.full_key} refers to ${{{key}}}, which does not exist{nearest}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The line that matters of an error of YAML's or omegaconf's."""
    return getattr(error, "problem", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
