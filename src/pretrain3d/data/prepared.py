"""What a store holds already: the note of each case, and what is taken out again.

A case is done when its note ``prepared/<case>.json`` says so, which is written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain3d.config import UserError
from pretrain3d.data.case import case_path, write_json
from pretrain3d.data.identity import files_hash
from pretrain3d.data.readers.contract import RawCase, Reader
from pretrain3d.data.store import KINDS, StoreWriter, array_path, check_case, read_index


def new_note(case: RawCase, settings: str) -> dict[str, Any]:
    """The note of a case, of its files as they are now.

    Args:
        case: raw.
        settings: a hash of all that decides the result besides the files' contents.
    """
    return {"settings": settings, "files": _stat(case), "hash": files_hash(case.sources)}


def inputs_hash(store: Path, case_ids: Iterable[str]) -> str:
    """A short hash of the files that cases of a store were prepared from: it changes with an image and with a label."""
    notes = [note_path(store, case_id) for case_id in sorted(case_ids)]
    known = [
        [path.stem, json.loads(path.read_text(encoding="utf-8"))["hash"] if path.is_file() else ""] for path in notes
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def is_done(store: Path, case: RawCase, settings: str) -> bool:
    """Whether the store holds what these files and settings give; files are read only if they were touched."""
    path = note_path(store, case.id)
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        noted, files, content = note["settings"], note["files"], note["hash"]
        stat = _stat(case)
        check_case(store, case.id)
    except (UserError, OSError, ValueError, KeyError, TypeError):  # the note, an input or the case's part of the store
        return False
    if noted != settings:
        return False
    if files == stat:
        return True
    if content != files_hash(case.sources):
        return False
    write_json(path, {**note, "files": stat})
    return True


def is_indexed(writer: StoreWriter, case_ids: set[str]) -> bool:
    """Whether the index can be read and says what it would say if it was written now."""
    try:
        index = read_index(writer.path)
    except UserError:
        return False
    expected = {**writer.index, "cases": sorted(case_ids)}
    return "data_hash" in index and {key: value for key, value in index.items() if key != "data_hash"} == expected


def _stat(case: RawCase) -> list[list[Any]]:
    stats = [(path, path.stat()) for path in case.sources]
    return [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def note_path(out: Path, case_id: str) -> Path:
    """Of the note of a case."""
    return out / "prepared" / f"{case_id}.json"


def forget(out: Path, case_id: str) -> None:
    """Takes a case out of the store, the note first: what is left after a kill is not taken for a case."""
    for path in (note_path(out, case_id), case_path(out, case_id), *(array_path(out, k, case_id) for k in KINDS)):
        path.unlink(missing_ok=True)


def claim(out: Path, reader: Reader) -> dict[str, Any]:
    """The note of an earlier call."""
    note = out / "prepare.json"
    if not note.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"out={out} exists and is not a store; choose a new or empty folder")
        return {}
    try:
        old = json.loads(note.read_text(encoding="utf-8"))
        name = old["name"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{note} is damaged; delete {out} and prepare it again") from None
    if name != reader.name:
        raise UserError(f"out={out} is the store of {name!r}, not of {reader.name!r}; choose another folder")
    return old
