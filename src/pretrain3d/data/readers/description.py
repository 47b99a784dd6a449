"""dataset.json of nnDetection and nnU-Net: what its keys may hold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain3d.config import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin with a mark
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def text_of(file: Path, description: dict[str, Any], keys: Iterable[str], default: str) -> str:
    """The text under the first of some keys that is there.

    Raises:
        UserError: it is no text.
    """
    for key in keys:
        if key in description:
            if not isinstance(description[key], str):
                raise UserError(f"{file}: {key} must be a text, got {description[key]!r}")
            return str(description[key]) or default
    return default


def names_by_number(file: Path, key: str, names: Any, first: int) -> list[str]:
    """The names of ``{"0": name, "1": name, ...}``, by their number.

    Args:
        file, key: where they stand.
        names: what stands there.
        first: number.

    Raises:
        UserError: a number is missing, a name is none or occurs twice, or there is no name.
    """
    expected = [str(first + index) for index in range(len(names))] if isinstance(names, dict) else []
    if not expected or set(names) != set(expected):
        raise UserError(f"{file}: {key} must name every number from {first} on, got {names!r}")
    found = [names[number] for number in expected]
    for name in found:
        if not isinstance(name, str) or not name:
            raise UserError(f"{file}: {key} must hold names, got {name!r} among {found!r}")
    return found


def classes_by_number(file: Path, key: str, names: Any, first: int) -> list[str]:
    """`names_by_number`, each name once.

    Raises:
        UserError: as there, or a name occurs twice.
    """
    found = names_by_number(file, key, names, first)
    if twice := [name for name in found if found.count(name) > 1]:
        raise UserError(f"{file}: {key} holds {twice[0]!r} twice; every class needs a name of its own")
    return found


def mirror_pairs(file: Path, pairs: Any, *classes: list[str]) -> dict[str, str]:
    """Of ``mirror_classes``: symmetric, and only names of classes, each pair of one of their lists.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(pairs, dict) or not all(any(a in k and b in k for k in classes) for a, b in pairs.items()):
        among = " or ".join(map(str, filter(None, classes)))
        raise UserError(f"{file}: mirror_classes must map names among {among}, got {pairs!r}")
    both = {**pairs, **{b: a for a, b in pairs.items()}}
    if any(both[both[name]] != name for name in both):
        raise UserError(f"{file}: mirror_classes must be pairs, got {pairs!r}")
    return both


def groups_of(file: Path, description: dict[str, Any]) -> dict[str, str]:
    """Of ``groups``: case -> patient; a case that is not there is a patient of its own.

    Raises:
        UserError: it is something else.
    """
    groups = description.get("groups", {})
    if not isinstance(groups, dict):
        raise UserError(f"{file}: groups must be {{case: patient, ...}}, got {groups!r}")
    for case_id, group in groups.items():
        if not isinstance(group, str | int) or isinstance(group, bool) or group == "":
            raise UserError(f"{file}: groups of case {case_id!r} must be a patient's name, got {group!r}")
    return {case_id: str(group) for case_id, group in groups.items()}


def check_known(file: Path, key: str, named: Iterable[str], case_ids: Iterable[str]) -> None:
    """Refuses a case under a key of the description that is no case: a misspelled one would be passed over.

    Raises:
        UserError: there is one.
    """
    known = set(case_ids)
    for name in named:
        if name not in known:
            raise UserError(f"{file}: {key} names {name!r}, which is no case; there is {min(known)!r}, for one")
