"""The numbers in parts of the cases: by scanner, site, spacing or whatever a table says about each case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.delimited import number, read_table
from pretrain3d.evaluation.matching import Matches
from pretrain3d.evaluation.statistics import SAMPLES, Groups, bootstrap

MOST_NUMBERS = 6  # a column with more distinct numbers is cut into thirds
SPACING = "spacing"  # the column that needs no table


def chosen_values(table: str, column: str, targets: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What the options ``cases=TABLE by=COLUMN`` of a command say of each case; nothing where both are blank.

    Without a table `column` may be "spacing": the longest side of a case's voxels, which its targets know.

    Args:
        targets: the cases, as `scorefile.read` gives them.

    Raises:
        UserError: one of the two without the other, a case without ``spacing_mm``, or as `read_values`.
    """
    if table and not column:
        raise UserError(f"cases={table} needs by=COLUMN as well")
    if table:
        return read_values(table, column, sorted(targets))
    if column and column != SPACING:
        raise UserError(f"by={column} needs cases=TABLE as well (only by={SPACING} is known without a table)")
    if not column:
        return {}
    for case_id, entry in targets.items():
        if "spacing_mm" not in entry:
            raise UserError(f"by={SPACING}: case {case_id!r} has no spacing_mm in the targets; add it, or cases=TABLE")
    return {case_id: f"{max(targets[case_id]['spacing_mm']):.4g}" for case_id in sorted(targets)}


def read_values(path: str | Path, column: str, case_ids: Sequence[str]) -> dict[str, str]:
    """The value of a column for each of `case_ids`.

    Args:
        path: a table whose column ``case`` (or else its first one) holds the case ids; it may hold more cases.
        column: its name.

    Raises:
        UserError: no such file or column, or a case that the table lacks or holds twice.
    """
    table = read_table(path)
    key = "case" if "case" in table.header else table.header[0]
    names = table.column(key)
    line_of: dict[str, int] = {}
    for name, line in zip(names, table.lines, strict=True):
        if name in line_of:
            raise UserError(f"{table.path} line {line}: case {name!r} was in line {line_of[name]} already")
        line_of[name] = line
    missing = [case_id for case_id in case_ids if case_id not in line_of]
    if missing:
        more = f" and {len(missing) - 1} more cases" if len(missing) > 1 else ""
        held = f"holds {', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''}" if names else "is empty"
        raise UserError(f"{table.path} has no row of case {missing[0]!r}{more}; its column {key!r} {held}")
    value_of = dict(zip(names, table.column(column), strict=True))
    return {case_id: value_of[case_id] for case_id in case_ids}


def strata_of(value_of: Mapping[str, str]) -> dict[str, list[str]]:
    """The cases of every value, numbers in their order; a blank one is the value "(blank)".

    Numbers of more than six values are cut into thirds of the cases, named "0.5..0.8".
    """
    numbers = {case_id: each for case_id, value in value_of.items() if np.isfinite(each := number(value))}
    distinct = sorted(set(numbers.values()))
    strata: dict[str, list[str]] = {}
    if len(numbers) < len(value_of) or len(distinct) <= MOST_NUMBERS:
        for case_id in sorted(value_of, key=lambda i: (numbers.get(i, np.inf), value_of[i])):
            strata.setdefault(value_of[case_id] or "(blank)", []).append(case_id)
        return strata
    edges = np.quantile(list(numbers.values()), [1 / 3, 2 / 3])
    third = {case_id: int(np.searchsorted(edges, each, side="left")) for case_id, each in numbers.items()}
    for part in range(3):
        cases = [case_id for case_id in value_of if third[case_id] == part]
        if cases:
            inside = [numbers[case_id] for case_id in cases]
            strata[f"{min(inside):g}..{max(inside):g}"] = cases
    return strata


def by_stratum(
    matches: Matches, strata: Mapping[str, Sequence[str]], samples: int = SAMPLES, groups: Groups | None = None
) -> dict[str, dict[str, Any]]:
    """{value: {"num_cases", "metrics", "per_class"}}: `statistics.bootstrap` of the cases of each value."""
    result = {}
    for value, case_ids in strata.items():
        part = matches.of_cases(set(case_ids))
        result[value] = {"num_cases": len(part.case_ids), **bootstrap(part, samples, groups=groups)}
    return result
