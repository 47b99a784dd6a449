"""The boxes of tested runs; those of the folds of a cross-validation are one set, as nnDetection and LUNA16 have it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain3d.config import UserError
from pretrain3d.evaluation.matching import match
from pretrain3d.evaluation.scorefile import groups_of, read_pair
from pretrain3d.evaluation.sizes import by_size, have_sizes
from pretrain3d.evaluation.statistics import SAMPLES, evaluate_with_intervals
from pretrain3d.evaluation.strata import by_stratum, strata_of
from pretrain3d.reporting.results import SCORE_FILES
from pretrain3d.reporting.rows import Result, name_of


def read_boxes(folders: Sequence[Path]) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """What `test` left in the folder of a run, or in those of the folds of a cross-validation together.

    Returns:
        classes, predictions and targets, as `matching.match` takes them.

    Raises:
        UserError: a folder without score files, or two whose classes differ or that share a case.
    """
    classes: list[str] = []
    predictions: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    for folder in folders:
        for name in SCORE_FILES:
            if not (folder / name).is_file():
                pool = ", which its fold needs to be pooled with the others; run `pretrain3d test` of it again"
                alone = f"; run `pretrain3d test {folder}` first"
                raise UserError(f"{folder} holds no {name}{pool if len(folders) > 1 else alone}")
        of_fold, found, true = read_pair(*(folder / name for name in SCORE_FILES))
        if (classes := classes or of_fold) != of_fold:
            raise UserError(f"{folder} and {folders[0]} cannot be pooled: their classes are {', '.join(of_fold)} and "
                            f"{', '.join(classes)}")  # fmt: skip
        if shared := sorted(targets.keys() & true.keys()):
            raise UserError(f"{folder} and another fold hold case {shared[0]!r}, which their result.json do not say; "
                            f"run `pretrain3d test` again")  # fmt: skip
        predictions |= found
        targets |= true
    return classes, predictions, targets


def pooled(results: Sequence[Result], folders: Sequence[Path]) -> Result:
    """One result of the folds of a cross-validation, as if all boxes were of a single run.

    Scores of different folds are ranked together as they are. Numbers by a column of ``test by=COLUMN`` are there where
    every fold has them; a line on stderr says which are left out.

    Args:
        results: of the folds.
        folders: of the same, with their score files.

    Raises:
        UserError: as `read_boxes`.
    """
    first = results[0]
    classes, predictions, targets = read_boxes(folders)
    matches, groups = match(predictions, targets, classes), groups_of(targets)
    samples = (first.get("asked") or {}).get("samples", SAMPLES)
    sizes = by_size(matches, predictions, targets, samples=samples, groups=groups) if have_sizes(targets) else {}
    scored = evaluate_with_intervals(matches, samples, groups=groups)
    name, by = name_of([results]), {}
    columns = [result.get("columns") or {} for result in results]
    for column in dict.fromkeys(key for of_fold in columns for key in of_fold):
        values = {case_id: value for of_fold in columns for case_id, value in of_fold.get(column, {}).items()}
        if set(values) == set(targets):
            strata = strata_of({case_id: values[case_id] for case_id in sorted(values)})
            by[column] = by_stratum(matches, strata, samples, groups=groups)
        else:
            lack = [str(folder) for folder, of_fold in zip(folders, columns, strict=True) if column not in of_fold]
            print(f"{name}: its numbers by {column} are left out, as {', '.join(lack)} has none; test with by={column}",
                  file=sys.stderr)  # fmt: skip
    return {**first, "run": name, **scored, "by_size": sizes, "by": by, "operating": None}
