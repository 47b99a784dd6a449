"""The score file: boxes of any detector, or the objects they are judged by, as JSON (docs/design.md section 5)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pretrain3d.config import UserError, short
from pretrain3d.files import write_text

Kind = Literal["predictions", "targets"]
FORM = (
    '{"classes": [...], "cases": {id: {"boxes": ..., "labels": ..., "scores": ...}}}, as predict format=json and test '
    "write it"
)
SHOWN = 5  # problems named in one error; the rest are counted


@dataclass(frozen=True)
class ScoreFile:
    """A validated score file.

    Attributes:
        classes: class names; labels index into them.
        cases: case id -> "boxes" (N, 6) float64 voxels of the input file, "labels" (N,) int64, and "scores" (N,)
            float64 (predictions) or "annotated" tuple of class indices (targets). Targets may also hold "volumes_mm3"
            (N,) of the objects, "spacing_mm" (3,), the size of a voxel, and "group", the patient.
    """

    path: Path
    classes: list[str]
    cases: dict[str, dict[str, Any]]


def read(path: str | Path, kind: Kind) -> ScoreFile:
    """Reads and checks one file.

    Raises:
        UserError: naming the file and up to five cases with what is wrong in them: inverted or non-finite boxes, labels
            out of range, missing or non-finite scores, lists of different lengths, objects of classes not annotated.
    """
    path = Path(path)
    content = _load(path)
    classes, cases = content["classes"], content["cases"]
    problems: list[str] = []
    checked = {case_id: _check_case(case_id, entry, kind, len(classes), problems) for case_id, entry in cases.items()}
    _refuse(problems, f"{path}: ")
    return ScoreFile(path, classes, checked)


def read_pair(predictions: str | Path, targets: str | Path) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Reads both files and brings the predictions' labels into the targets' class order, by name.

    Returns:
        classes of the targets; predictions and targets as `matching.match` takes them.

    Raises:
        UserError: as `read`; also a class that only the predictions have, or a case in one file only.
    """
    found, true = read(predictions, "predictions"), read(targets, "targets")
    unknown = [name for name in found.classes if name not in true.classes]
    _refuse(
        [f"class {name!r} is not in {true.path}, whose classes are {', '.join(true.classes)}" for name in unknown],
        f"{found.path}: ",
    )
    lonely = [f"case {case_id!r} is in {found.path} only" for case_id in found.cases if case_id not in true.cases]
    lonely += [f"case {case_id!r} is in {true.path} only" for case_id in true.cases if case_id not in found.cases]
    _refuse(lonely, "both files must list the same cases, a case without boxes with empty lists: ")
    index = np.array([true.classes.index(name) for name in found.classes], np.int64)
    renamed = {case_id: {**entry, "labels": index[entry["labels"]]} for case_id, entry in found.cases.items()}
    return true.classes, renamed, true.cases


def write(path: str | Path, classes: Sequence[str], cases: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes a score file atomically, from arrays, tensors or lists; keys other than the format's are left out."""
    keys = ("boxes", "scores", "labels", "annotated", "volumes_mm3", "spacing_mm", "group")
    plain = {i: {key: _plain(entry[key]) for key in keys if key in entry} for i, entry in cases.items()}
    write_text(path, json.dumps({"classes": list(classes), "cases": plain}, allow_nan=False) + "\n")


def groups_of(targets: Mapping[str, Mapping[str, Any]]) -> dict[str, str] | None:
    """The patient of every case, as `statistics.bootstrap` takes it; None where no case names one.

    A case that names none is a patient of its own.
    """
    if not any("group" in entry for entry in targets.values()):
        return None
    return {case_id: entry.get("group", f"case {case_id}") for case_id, entry in targets.items()}


def _plain(values: Any) -> Any:
    if isinstance(values, str):
        return values
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _load(path: Path) -> dict[str, Any]:
    """The file's content with its outer shape checked."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        hint = "; a submission to LUNA16 is scored with protocol=luna16" if path.suffix in (".csv", ".tsv") else ""
        raise UserError(f"{path}: not a score file: {error}; expected JSON, {FORM}{hint}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a score file: {error}") from None
    if not isinstance(content, dict) or not {"classes", "cases"} <= set(content):
        raise UserError(f"{path}: not a score file: expected {FORM}, got {short(content)}")
    classes = content["classes"]
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path}: classes must be a list of names, not {short(classes)}")
    if len(set(classes)) < len(classes):
        raise UserError(f"{path}: classes holds a name twice: {', '.join(classes)}")
    if not isinstance(content["cases"], dict) or not content["cases"]:
        raise UserError(f"{path}: cases must map at least one case id to its boxes, not {short(content['cases'])}")
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
    return result


def _check_case(case_id: str, entry: Any, kind: Kind, num_classes: int, problems: list[str]) -> dict[str, Any]:
    """The case's arrays; or its problems added to the list, and nothing to use."""
    keys = ("boxes", "labels", "scores") if kind == "predictions" else ("boxes", "labels")
    found = _list_problems(entry, keys) or [*_value_problems(entry, kind, num_classes)]
    problems += [f"case {case_id!r}: {text}" for text in found]
    if found:
        return {}
    arrays = {
        "boxes": np.array(entry["boxes"], np.float64).reshape(-1, 6),
        "labels": np.array(entry["labels"], np.int64),
    }
    if kind == "predictions":
        return arrays | {"scores": np.array(entry["scores"], np.float64)}
    about = {key: np.array(entry[key], np.float64) for key in ("volumes_mm3", "spacing_mm") if key in entry}
    about |= {"group": entry["group"]} if "group" in entry else {}
    return arrays | about | {"annotated": tuple(entry.get("annotated", range(num_classes)))}


def _list_problems(entry: Any, keys: tuple[str, ...]) -> list[str]:
    """Lists that are missing, are none, or differ in length."""
    if not isinstance(entry, dict):
        return [f"expected an object with {', '.join(keys)}, not {short(entry)}"]
    found = [f"{key} is missing" for key in keys if key not in entry]
    wrong = [key for key in keys if key in entry and not isinstance(entry[key], list)]
    found += [f"{key} must be a list, not {short(entry[key])}" for key in wrong]
    if not found and len({len(entry[key]) for key in keys}) > 1:
        found = ["lists of different lengths: " + ", ".join(f"{len(entry[key])} {key}" for key in keys)]
    return found


def _value_problems(entry: dict[str, Any], kind: Kind, num_classes: int) -> Iterator[str]:
    """Boxes, labels, scores and annotated classes that cannot be."""
    for index, box in enumerate(entry["boxes"]):
        if reason := _box_problem(box, kind):
            yield f"box {index} {short(box)} {reason}"
    for index, label in enumerate(entry["labels"]):
        if not _is_label(label, num_classes):
            yield f"label {index} is {short(label)}, not a class index of 0..{num_classes - 1}"
    if kind == "predictions":
        for index, score in enumerate(entry["scores"]):
            if not _is_finite(score):
                yield f"score {index} is {short(score)}, not a finite number"
        return
    yield from _about_problems(entry)
    if "annotated" in entry:
        annotated = entry["annotated"]
        if not isinstance(annotated, list) or not all(_is_label(label, num_classes) for label in annotated):
            yield f"annotated must list class indices of 0..{num_classes - 1}, not {short(annotated)}"
            return
        for label in dict.fromkeys(label for label in entry["labels"] if _is_label(label, num_classes)):
            if label not in annotated:
                yield f"has objects of class {label}, which its annotated {annotated} leaves out"


def _about_problems(entry: dict[str, Any]) -> Iterator[str]:
    """What may stand beside the objects of a case."""
    for key, count in (("volumes_mm3", len(entry["boxes"])), ("spacing_mm", 3)):
        values = entry.get(key, [1.0] * count)
        if not isinstance(values, list) or len(values) != count or not all(_is_finite(v) and v > 0 for v in values):
            yield f"{key} must be {count} positive numbers, not {short(values)}"
    if not isinstance(entry.get("group", ""), str):
        yield f"group must be a name, not {short(entry['group'])}"


def _box_problem(box: Any, kind: Kind) -> str:
    """What is wrong with one box, or nothing. A prediction without volume is allowed: it hits nothing."""
    if not isinstance(box, list) or len(box) != 6:
        return "is not six numbers x1, y1, z1, x2, y2, z2"
    if not all(_is_finite(value) for value in box):
        return "holds a value that is not a finite number"
    for axis in range(3):
        if box[axis + 3] < box[axis]:
            return f"is inverted: {'xyz'[axis]}2 < {'xyz'[axis]}1"
        if box[axis + 3] == box[axis] and kind == "targets":
            return f"is empty: {'xyz'[axis]}2 = {'xyz'[axis]}1"
    return ""


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and bool(abs(value) <= sys.float_info.max)  # JSON's integers have no end


def _is_label(value: Any, num_classes: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_classes


def _refuse(problems: list[str], prefix: str) -> None:
    """Raises one line with the first problems and how many more there are."""
    if problems:
        rest = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(prefix + "; ".join(problems[:SHOWN]) + rest)
