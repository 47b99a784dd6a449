"""Differences between tested runs, paired on the same cases, of all of them and of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.evaluation.matching import Matches, match
from pretrain3d.evaluation.scorefile import groups_of
from pretrain3d.evaluation.statistics import SAMPLES, Groups, differences, holm, intervals, row_samples
from pretrain3d.evaluation.strata import chosen_values, strata_of
from pretrain3d.reporting.pooling import read_boxes
from pretrain3d.reporting.rows import kind_of, name_of, rows_of
from pretrain3d.reporting.tables import read_results

TOLERANCE = 1e-3  # voxels between the same box of two stores


@dataclass(frozen=True)
class Repetition:
    """One run, or all folds of a seed: the boxes of a method on all cases.

    Attributes:
        name: for messages.
        matches: of all cases.
        targets: case id -> its objects.
    """

    name: str
    matches: Matches
    targets: Mapping[str, Any]


Rows = Mapping[str, Sequence[Repetition]]  # one method each: its repetitions, by a name unlike that of every other row


@dataclass(frozen=True)
class Comparison:
    """Every row against the first one.

    Attributes:
        reference: name of the first row.
        num_cases: over all sets of cases.
        num_repetitions: row -> how many repetitions (seeds) it is the mean of.
        values: row -> {"metrics", "per_class"} of ``{"value", "low", "high"}``, of all rows.
        differences: row -> {"metrics", "per_class"} of ``{"a", "b", "difference", "low", "high", "p", "p_holm"}``, of
            all rows but the first; ``p_holm`` is corrected over these rows.
        by: {column: {value: the comparison on the cases of this value}}; empty unless asked for.
    """

    reference: str
    num_cases: int
    num_repetitions: dict[str, int]
    values: dict[str, dict[str, Any]]
    differences: dict[str, dict[str, Any]]
    by: dict[str, dict[str, Comparison]] = field(default_factory=dict)


def compare(
    paths: Sequence[str | Path], samples: int = SAMPLES, seed: int = 0, by: str = "", cases: str = ""
) -> Comparison:
    """Compares tested runs, each a folder with ``result.json``, ``predictions.json`` and ``targets.json``.

    The folds of a seed are pooled; several seeds of a row are drawn, and patients together for all (`row_samples`).

    Args:
        by, cases: a column and the table that it is in, as `chosen_values` takes them: every value is compared on its
            own cases as well.

    Raises:
        UserError: fewer than two rows, a run that is no detector or was not tested, runs tested on other cases or
            targets, or no such column.
    """
    results = read_results(paths)
    for path, result in zip(paths, results, strict=True):
        if (kind := kind_of(result)) != "detection":
            raise UserError(f"{path} is a pretraining, tested on {kind}; compare takes detectors, `table` shows it")
    folders = [path if path.is_dir() else path.parent for path in map(Path, paths)]
    rows: dict[str, list[Repetition]] = {}
    for name, row in rows_of(results).items():
        for members in row:
            classes, found, true = read_boxes([folders[index] for index in members])
            own = name if len(row) == 1 else name_of([[results[index] for index in members]])
            rows.setdefault(name, []).append(Repetition(own, match(found, true, classes), true))
    if len(rows) < 2:
        raise UserError(
            f"compare needs two rows, and the {len(results)} given are one: "
            f"{next(iter(rows))} (runs that differ by seed or fold only are one row)"
        )
    truth = _common_targets(rows)
    strata, groups = strata_of(chosen_values(cases, by, truth)), groups_of(truth)
    parts = {value: _compare_rows(_of_cases(rows, part), samples, seed, groups) for value, part in strata.items()}
    return replace(_compare_rows(rows, samples, seed, groups), by={by: parts} if parts else {})


def _compare_rows(rows: Rows, samples: int, seed: int, groups: Groups | None) -> Comparison:
    runs = [[each.matches for each in row] for row in rows.values()]
    numbers = dict(zip(rows, row_samples(runs, samples, seed, groups), strict=True))
    first, *others = rows
    found = {name: differences(numbers[first], numbers[name]) for name in others}
    _correct(list(found.values()))
    return Comparison(
        first,
        len(runs[0][0].case_ids),
        {name: len(row) for name, row in rows.items()},
        {name: intervals(*of_row) for name, of_row in numbers.items()},
        found,
    )


def _of_cases(rows: Rows, case_ids: Sequence[str]) -> Rows:
    chosen = set(case_ids)
    return {name: [replace(each, matches=each.matches.of_cases(chosen)) for each in row] for name, row in rows.items()}


def _common_targets(rows: Rows) -> Mapping[str, Any]:
    """The objects of every case, which must be the same in every repetition of every row."""
    first, *others = (each for row in rows.values() for each in row)
    for each in others:
        if lonely := sorted(each.targets.keys() ^ first.targets.keys()):
            raise UserError(
                f"{each.name} was not tested on the cases of {first.name}: {lonely[0]!r} is in one of them only; "
                "only runs with the same test cases can be compared"
            )
        for case_id, entry in each.targets.items():
            if not _same_objects(entry, first.targets[case_id]):
                raise UserError(
                    f"{each.name} and {first.name} have other objects in case {case_id!r}: they were tested against "
                    "different targets and cannot be compared"
                )
    return first.targets


def _same_objects(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    if not np.array_equal(a["labels"], b["labels"]) or set(a["annotated"]) != set(b["annotated"]):
        return False
    return bool(np.allclose(a["boxes"], b["boxes"], rtol=0, atol=TOLERANCE))


def _correct(compared: Sequence[dict[str, Any]]) -> None:
    """Adds ``p_holm`` to every entry, corrected over the rows for each class and metric."""
    tables = [[one["metrics"], *one["per_class"].values()] for one in compared]
    for of_rows in zip(*tables, strict=True):
        for key in of_rows[0]:
            for row, adjusted in zip(of_rows, holm([row[key]["p"] for row in of_rows]), strict=True):
                row[key]["p_holm"] = adjusted
