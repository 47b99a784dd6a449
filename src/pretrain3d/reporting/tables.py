"""Tables of results: one row per run, or per group of runs that differ by seed or fold only (`reporting.rows`)."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pretrain3d.config import UserError
from pretrain3d.reporting.cost import in_words
from pretrain3d.reporting.results import read_result
from pretrain3d.reporting.rows import Result, cases_of, data_of, distinct, kind_of

KEYS = ("mAP", "AP@0.10", "AP@0.50", "FROC@0.10")
CLASS_KEY = "AP@0.10"
RECONSTRUCTION = {
    "network": "network", "mean_predictor": "mean predictor", "inpainting_linear": "tri-linear in-painting",
    "copy": "copy", "network/mean_predictor": "network : mean", "network/inpainting_linear": "network : in-painting",
    "network/copy": "network : copy",
}  # fmt: skip
Rows = Mapping[str, Sequence[Result]]  # of each row its repetitions, a result each
SEGMENTATION = {"dice": "Dice", "volume_error": "volume error", "trivial_dice": "Dice of everything"}


@dataclass(frozen=True)
class Table:
    """A titled table of texts; the first column is the name of the row."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def as_markdown(self) -> str:
        """For a file."""
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"### {self.title}\n\n{body}\n"

    def as_text(self) -> str:
        """For a terminal."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        texts = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                           for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
                 for line in lines]  # fmt: skip
        return "\n".join([self.title, texts[0], "-" * len(texts[0]), *texts[1:]])

    def as_html(self) -> str:
        """For a page."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self.rows]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        title = html.escape(self.title)
        return f"<table><caption>{title}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def read_results(paths: Sequence[str | Path]) -> list[Result]:
    """The results of run folders or ``result.json`` files.

    Raises:
        UserError: none is given, one is given twice, or one is no result.
    """
    check_paths(paths)
    return [read_result(path) for path in paths]


def check_paths(paths: Sequence[str | Path]) -> None:
    """Raises UserError when no run folder or result file is given, or one twice."""
    if not paths:
        raise UserError("no run is given; expected run folders or result.json files")
    files = [Path(path) / "result.json" if Path(path).is_dir() else Path(path) for path in paths]
    for index, file in enumerate(files):
        if file.resolve() in [other.resolve() for other in files[:index]]:
            raise UserError(f"{paths[index]} is given twice")


def make_tables(rows: Rows) -> list[Table]:
    """Two tables (all classes together, and per class) for each set of cases that the results are of.

    Numbers of different cases are not comparable, so they never share a table. Results of pretraining come last:
    errors of reconstruction (`evaluation.reconstruction`), Dice of segmentation (`evaluation.segmentation`).
    """
    tables = []
    for same in by_cases(_of_kind(rows, "detection")):
        about = describe_cases(same)
        several = "; mean ± standard deviation over seeds or runs" if any(len(row) > 1 for row in same.values()) else ""
        body = [[name, *(shown([r["metrics"].get(key) for r in row]) for key in KEYS)] for name, row in same.items()]
        tables.append(Table(f"{about}, 95 % intervals over patients{several}", ["run", *KEYS], body))
        tables.append(_class_table(same, f"{CLASS_KEY} per class, {about}", CLASS_KEY))
    tables += [_reconstruction_table(same) for same in by_cases(_of_kind(rows, "reconstruction"))]
    for same in by_cases(_of_kind(rows, "segmentation")):
        about = describe_cases(same)
        body = [[name, *(shown([r["metrics"].get(key) for r in row]) for key in SEGMENTATION)]
                for name, row in same.items()]  # fmt: skip
        title = f"segmentation: {about}, 95 % intervals over patients"
        tables.append(Table(title, ["run", *SEGMENTATION.values()], body))
        tables.append(_class_table(same, f"Dice per class, {about}", "dice"))
    return tables


def part_tables(rows: Rows) -> list[Table]:
    """`CLASS_KEY` by object size and by every column of ``test by=COLUMN``, per set of cases; not of pretraining.

    A run that was not measured in a part has a dash there. Runs of a row that are of different cases stay apart: a
    third of the objects by volume is another one in each.
    """
    apart: dict[str, list[Result]] = {}
    for name, row in _of_kind(rows, "detection").items():
        if len({cases_of(result) for result in row}) == 1:
            apart[name] = row
            continue
        for result in row:
            apart[distinct(f"{name}: {result['run']}", apart)] = [result]
    tables = []
    for same in by_cases(apart):
        for title in dict.fromkeys(title for row in same.values() for result in row for title in _parts(result)):
            of_title = [_parts(result).get(title, {}) for row in same.values() for result in row]
            header = {name: f"{name} ({_counted(part)})" for parts in of_title for name, part in parts.items()}
            body = [[name, *(shown([_of_part(r, title, one) for r in row]) for one in header)]
                    for name, row in same.items()]  # fmt: skip
            tables.append(Table(f"{CLASS_KEY} by {title}, {describe_cases(same)}", ["run", *header.values()], body))
    return tables


def cost_table(costs: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """What the training of each run cost, by the name of its row; None where nothing was trained.

    Args:
        costs: see `reporting.cost.cost_of`; empty for a baseline, which gets no row.
    """
    rows = {name: words for name, cost in costs.items() if (words := in_words(cost))}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    body = [[name, *(row.get(column, "–") for column in columns)] for name, row in rows.items()]
    return Table("training", ["run", *columns], body) if rows else None


def leakage_table(results: Mapping[str, Result]) -> Table | None:
    """How many of the cases that a run was tested on its pretraining had seen, and how each was recognised.

    Args:
        results: by the name of the row.

    Returns:
        a row per run of which one was; None where none was.
    """
    found = {}
    for name, result in results.items():
        split = (result.get("asked") or {}).get("split")
        found[name] = [row["how"] for row in result.get("leakage") or [] if row["split"] == split]
    ways = list(dict.fromkeys(how for seen in found.values() for how in seen))
    body = [
        [name, f"{len(seen)} of {len(results[name]['cases'])}", *(str(seen.count(how)) for how in ways)]
        for name, seen in found.items()
        if seen
    ]
    title = "leakage: tested cases that the pretraining has seen"
    return Table(title, ["run", "tested cases", *ways], body) if body else None


def _of_kind(rows: Rows, kind: str) -> dict[str, list[Result]]:
    return {name: list(row) for name, row in rows.items() if kind_of(row[0]) == kind}


def _reconstruction_table(same: Rows) -> Table:
    body = []
    measured = {key for row in same.values() for result in row for key in result["metrics"]}
    columns = {key: name for key, name in RECONSTRUCTION.items() if key in measured}
    for name, row in same.items():
        asked = row[0].get("asked") or {}
        cells = [shown([result["metrics"].get(key) for result in row]) for key in columns]
        body.append([name, str(asked.get("measure", "–")), str(asked.get("patches", "–")), *cells])
    title = f"reconstruction, held-out patches: {describe_cases(same)}, 95 % intervals over patients"
    return Table(title, ["run", "error", "patches per case", *columns.values()], body)


def _class_table(same: Rows, title: str, key: str) -> Table:
    classes = list(dict.fromkeys(name for row in same.values() for result in row for name in result["per_class"]))
    body = [[name, *(shown([_of_class(r, one, key) for r in row]) for one in classes)] for name, row in same.items()]
    return Table(title, ["run", *classes], body)


def by_cases(rows: Rows) -> list[dict[str, list[Result]]]:
    """Rows by the cases that their results are of, and by what was annotated there: classes, and objects of each case.

    Those of all results of a row count together, as where folds share cases and are averaged.
    """
    groups: dict[str, dict[str, list[Result]]] = {}
    for name, row in rows.items():
        cases = sorted({case for result in row for case in cases_of(result)})
        groups.setdefault(json.dumps([data_of(row[0]), cases]), {})[name] = list(row)
    return list(groups.values())


def describe_cases(same: Rows) -> str:
    """``"phantom, 24 test cases"``."""
    results = [result for row in same.values() for result in row]
    name = (results[0].get("data") or {}).get("name") or "data"
    split = (results[0].get("asked") or {}).get("split")
    number = len({case.get("case", place) for one in results for place, case in enumerate(one["cases"])})
    return f"{name}, {number} {f'{split} ' if split else ''}cases"


def _of_class(result: Result, name: str, key: str) -> dict[str, Any] | None:
    return (result["per_class"].get(name) or {}).get(key)


def _parts(result: Result) -> dict[str, Any]:
    sizes = {"object size in mm3": result["by_size"]} if result.get("by_size") else {}
    return sizes | (result.get("by") or {})


def _of_part(result: Result, title: str, name: str) -> dict[str, Any] | None:
    return _parts(result).get(title, {}).get(name, {}).get("metrics", {}).get(CLASS_KEY)


def _counted(part: Mapping[str, Any]) -> str:
    """``"60 objects"`` of a bin of sizes, ``"12 cases"`` of a value of a column."""
    number, noun = (part["objects"], "object") if "objects" in part else (part["num_cases"], "case")
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shown(entries: Sequence[Mapping[str, Any] | None]) -> str:
    """``0.512 [0.431, 0.580]`` of one run, ``0.512 ± 0.020`` of several, a dash where there is no value.

    Where some of several have none, as a run without an object of a class, it says how many: ``0.5 ± 0.1 (4 of 5)``.
    """
    values = [entry["value"] for entry in entries if entry is not None and entry["value"] is not None]
    if not values:
        return "–"
    if len(entries) > 1:
        spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        return f"{mean(values):.3f}{spread}" + (
            f" ({len(values)} of {len(entries)})" if len(values) < len(entries) else ""
        )
    entry = entries[0]
    assert entry is not None
    if entry.get("low") is None or entry.get("high") is None:
        return f"{values[0]:.3f}"
    return f"{values[0]:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"
