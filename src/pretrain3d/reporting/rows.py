"""Which results are one row of a table or of a comparison, and which of them are the folds of one cross-validation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pretrain3d.reporting.run_folder import AROUND, without

Result = dict[str, Any]


def rows_of(results: Sequence[Result]) -> dict[str, list[list[int]]]:
    """Row name -> its repetitions, whose numbers are averaged: each the places of the results that are pooled into one.

    Results share a row where configuration, name (``...-f0-s3``: both numbers may differ), data and test are the same
    but for seed and fold. All of them stay apart where a seed and fold come twice, or a fold with other cases.

    Detectors of one seed whose test cases differ altogether are the folds of a cross-validation, and one repetition;
    so are they where every fold has a seed of its own. Seeds that lack a fold are of other cases, and a row of their
    own. Folds that share test cases, as those that `test` the same held-out ones, are repetitions as seeds are, and
    so are pretrainings.
    """
    groups: dict[str, list[int]] = {}
    for index, result in enumerate(results):
        config = without(result["config"], ("seed", "name", "fold", "data.fold", *AROUND))
        name = _unnumbered([result["run"], config], {"f": _fold(result), "s": result["seed"]})
        key = json.dumps([name, _how_tested(result), data_of(result)])
        groups.setdefault(key, []).append(index)
    rows: dict[str, list[list[int]]] = {}
    for row in (row for group in groups.values() for row in _rows(results, group)):
        rows[distinct(name_of([[results[index] for index in members] for members in row]), rows)] = row
    return rows


def distinct(name: str, taken: Iterable[str]) -> str:
    """``name``, or ``name #2`` and so on where it is taken."""
    again = sum(re.sub(r" #\d+$", "", other) == name for other in taken)
    return f"{name} #{again + 1}" if again else name


def kind_of(result: Result) -> str:
    """``"detection"``, or what a pretraining was tested on: ``"reconstruction"`` or ``"segmentation"``."""
    return {"network": "reconstruction", "dice": "segmentation"}.get(next(iter(result["metrics"]), ""), "detection")


def _rows(results: Sequence[Result], group: Sequence[int]) -> list[list[list[int]]]:
    """The rows, each a list of repetitions, of results that differ by seed and fold only."""
    tested = {index: cases_of(results[index]) for index in group}
    numbers = {(results[index]["seed"], _fold(results[index])) for index in group}
    of_folds = {(_fold(results[index]), tested[index]) for index in group}
    if len(numbers) < len(group) or len(of_folds) > len({fold for fold, _ in of_folds}):
        return [[[index]] for index in group]
    seeds: dict[Any, list[int]] = {}
    for index in group:
        seeds.setdefault(results[index]["seed"], []).append(index)
    if len(seeds) == len(group) == len(set(tested.values())):  # every fold has a seed of its own
        seeds = {None: list(group)}
    if not all(_are_folds([results[index] for index in members]) for members in seeds.values()):
        return [[[index] for index in group]]
    rows: dict[Any, list[list[int]]] = {}
    for members in seeds.values():
        rows.setdefault(frozenset(case for index in members for case in tested[index]), []).append(members)
    return list(rows.values())


def _are_folds(results: Sequence[Result]) -> bool:
    """Whether these are detectors, or one, none of which was tested on a case of another."""
    cases = [case.get("case") for result in results for case in result["cases"]]
    known = all(kind_of(result) == "detection" and result["cases"] for result in results)
    return known and len(set(cases)) == len(cases)


def name_of(row: Sequence[Sequence[Result]]) -> str:
    """Of a row, given its repetitions.

    ``"x-f0-s* (3 seeds)"``, ``"x-f*-s0 (5 folds)"``, ``"x-f*-s* (3 seeds of 5 folds)"``, or ``"x-f*-s* (15 runs)"``
    where folds share cases.
    """
    members = [result for repetition in row for result in repetition]
    first, seeds, folds = members[0], {each["seed"] for each in members}, {_fold(each) for each in members}
    if len(members) == 1:
        return str(first["run"])
    varied = ({"s": first["seed"]} if len(seeds) > 1 else {}) | ({"f": _fold(first)} if len(folds) > 1 else {})
    pooled = len(row[0]) > 1
    counted = [f"{len(row)} {'seeds' if pooled or len(folds) == 1 else 'runs'}"] if len(row) > 1 else []
    counted += [f"{len(row[0])} folds"] if pooled else []
    return f"{_unnumbered(first['run'], varied)} ({' of '.join(counted)})"


def _how_tested(result: Result) -> list[Any]:
    """What the results of a row share besides the configuration.

    Which weights `test` took, after how many steps (unless `trainer.max_time` ended them), on what, and whether `sweep`
    had chosen the merging.
    """
    asked, trainer = result.get("asked") or {}, result["config"].get("trainer")
    timed = isinstance(trainer, Mapping) and trainer.get("max_time") is not None
    step = asked.get("step") if asked.get("checkpoint") == "last" and not timed else None
    return [*map(asked.get, ("checkpoint", "split", "patches")), asked.get("threshold") is not None, step]


def data_of(result: Result) -> list[Any]:
    """The data set that a result is of, and its classes.

    The hash is of the images alone, which may have been annotated anew or for another task.
    """
    data = result.get("data") or {}
    return [data.get("hash"), data.get("name"), sorted(result.get("per_class") or {})]


def cases_of(result: Result) -> tuple[str, ...]:
    """The cases that a result is of, each with its number of objects."""
    return tuple(sorted(json.dumps([case.get("case"), case.get("objects")]) for case in result.get("cases") or []))


def _fold(result: Result) -> Any:
    config = result["config"]
    return (config.get("data") or {}).get("fold", config.get("fold"))


def _unnumbered(value: Any, numbers: Mapping[str, Any]) -> Any:
    """Names of the seed and fold in texts (``...-f0-s3``, also in the path of a backbone) -> ``...-f*-s*``."""
    if isinstance(value, Mapping):
        return {key: _unnumbered(item, numbers) for key, item in sorted(value.items())}
    if isinstance(value, list):
        return [_unnumbered(item, numbers) for item in value]
    if not isinstance(value, str):
        return value
    for letter, number in numbers.items():
        value = re.sub(rf"-{letter}{number}(?!\d)", f"-{letter}*", value)
    return value
