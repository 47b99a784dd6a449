"""Differences between tested runs, paired on the same cases, of all of them and of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.evaluation.matching import Matches, match
from pretrain3d.evaluation.scorefile import groups_of, read_pair
from pretrain3d.evaluation.statistics import SAMPLES, Groups, differences, holm, intervals, row_samples
from pretrain3d.evaluation.strata import chosen_strata
from pretrain3d.reporting.results import SCORE_FILES
from pretrain3d.reporting.rows import rows_of
from pretrain3d.reporting.tables import kind_of, read_results

TOLERANCE = 1e-3  # voxels between the same box of two stores


@dataclass(frozen=True)
class Row:
    """One method: a run, or its trainings that differ by seed or fold only.

    Attributes:
        name: unlike that of every other row.
        paths: the runs, as given.
        runs: their matchings, in the same order.
    """

    name: str
    paths: list[Path]
    runs: list[Matches]


@dataclass(frozen=True)
class Comparison:
    """Every row against the first one.

    Attributes:
        reference: name of the first row.
        num_cases: over all sets of cases.
        num_runs: row -> how many runs it is the mean of.
        values: row -> {"metrics", "per_class"} of ``{"value", "low", "high"}``, of all rows.
        differences: row -> {"metrics", "per_class"} of ``{"a", "b", "difference", "low", "high", "p", "p_holm"}``, of
            all rows but the first; ``p_holm`` is corrected over these rows.
        by: {column: {value: the comparison on the cases of this value}}; empty unless asked for.
    """

    reference: str
    num_cases: int
    num_runs: dict[str, int]
    values: dict[str, dict[str, Any]]
    differences: dict[str, dict[str, Any]]
    by: dict[str, dict[str, Comparison]] = field(default_factory=dict)


def compare(
    paths: Sequence[str | Path], samples: int = SAMPLES, seed: int = 0, by: str = "", cases: str = ""
) -> Comparison:
    """Compares tested runs, each a folder with ``result.json``, ``predictions.json`` and ``targets.json``.

    Patients are drawn together for all runs; several seeds or folds of a row are drawn too (`row_samples`).

    Args:
        by, cases: a column and the table that it is in, as `chosen_strata` takes them: every value is compared on its
            own cases as well.

    Raises:
        UserError: fewer than two rows, a run that is no detector or was not tested, runs tested on other cases or
            targets, or no such column.
    """
    results = read_results(paths)
    targets: dict[Path, Any] = {}
    matches: dict[Path, Matches] = {}
    for path, result in zip(map(Path, paths), results, strict=True):
        if (kind := kind_of(result)) != "detection":
            raise UserError(f"{path} is a pretraining, tested on {kind}; compare takes detectors, `table` shows it")
        folder = path if path.is_dir() else path.parent
        for name in SCORE_FILES:
            if not (folder / name).is_file():
                raise UserError(f"{folder} holds no {name}; run `pretrain3d test {folder}` first")
        classes, predictions, targets[path] = read_pair(*(folder / name for name in SCORE_FILES))
        matches[path] = match(predictions, targets[path], classes)
    grouped = rows_of(results)
    rows = []
    for name, members in grouped.items():
        own = [Path(paths[index]) for index in members]
        rows.append(Row(name, own, [matches[path] for path in own]))
    if len(rows) < 2:
        raise UserError(
            f"compare needs two rows, and the {len(results)} given are one: "
            f"{rows[0].name} (runs that differ by seed or fold only are one row)"
        )
    _check_cases(rows, targets)
    everything = {case_id: entry for of_run in targets.values() for case_id, entry in of_run.items()}
    strata, groups = chosen_strata(cases, by, everything), groups_of(everything)
    parts = {value: _compare_rows(_of_cases(rows, part), samples, seed, groups) for value, part in strata.items()}
    return replace(_compare_rows(rows, samples, seed, groups), by={by: parts} if parts else {})


def _compare_rows(rows: Sequence[Row], samples: int, seed: int, groups: Groups | None) -> Comparison:
    numbers = row_samples([row.runs for row in rows], samples, seed, groups)
    found = {row.name: differences(numbers[0], of_row) for row, of_row in zip(rows[1:], numbers[1:], strict=True)}
    _correct(list(found.values()))
    return Comparison(
        rows[0].name,
        len({case_id for run in rows[0].runs for case_id in run.case_ids}),
        {row.name: len(row.runs) for row in rows},
        {row.name: intervals(*of_row) for row, of_row in zip(rows, numbers, strict=True)},
        found,
    )


def _of_cases(rows: Sequence[Row], case_ids: Sequence[str]) -> list[Row]:
    """The rows on some of the cases, without runs (folds) that were tested on none of them."""
    chosen = set(case_ids)
    parts = []
    for row in rows:
        kept = [at for at, run in enumerate(row.runs) if chosen.intersection(run.case_ids)]
        parts.append(Row(row.name, [row.paths[at] for at in kept], [row.runs[at].of_cases(chosen) for at in kept]))
    return parts


def _check_cases(rows: Sequence[Row], targets: Mapping[Path, Any]) -> None:
    """The same cases with the same objects in every row."""
    first = rows[0]
    known = {tuple(run.case_ids): path for run, path in zip(first.runs, first.paths, strict=True)}
    for row in rows:
        sets = {tuple(run.case_ids) for run in row.runs}
        if sets != set(known):
            odd = sorted(sets ^ set(known), key=len)[0]
            others = {case for case_ids in sets ^ set(known) if case_ids != odd for case in case_ids}
            lonely = sorted(set(odd) ^ others) or sorted(odd)
            raise UserError(
                f"{row.name} was not tested on the cases of {first.name}: {lonely[0]!r} is in one of them only; "
                "only runs with the same test cases can be compared"
            )
        for run, path in zip(row.runs, row.paths, strict=True):
            other = known[tuple(run.case_ids)]
            for case_id in run.case_ids:
                if not _same_objects(targets[path][case_id], targets[other][case_id]):
                    raise UserError(
                        f"{path} and {other} have other objects in case {case_id!r}: they were tested against "
                        "different targets and cannot be compared"
                    )


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
