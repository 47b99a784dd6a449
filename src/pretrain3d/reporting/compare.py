"""Differences between tested runs: paired on the same cases, as tables, files and a figure."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from pretrain3d.config import UserError
from pretrain3d.evaluation.matching import Matches, match
from pretrain3d.evaluation.scorefile import groups_of, read_pair
from pretrain3d.evaluation.statistics import SAMPLES, differences, holm, intervals, row_samples
from pretrain3d.reporting.figures import COLOURS, STYLE
from pretrain3d.reporting.tables import CLASS_KEY, KEYS, Result, Table, read_results

LEVEL = 0.05
HEADER = ("run", "class", "metric", "reference", "value", "reference_value", "difference", "low", "high", "p", "p_holm")
FILES = ("predictions.json", "targets.json")
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
    """

    reference: str
    num_cases: int
    num_runs: dict[str, int]
    values: dict[str, dict[str, Any]]
    differences: dict[str, dict[str, Any]]


def compare(paths: Sequence[str | Path], samples: int = SAMPLES, seed: int = 0) -> Comparison:
    """Compares tested runs, each a folder with ``result.json``, ``predictions.json`` and ``targets.json``.

    Patients are drawn together for all runs; several seeds or folds of a row are drawn too (`row_samples`).

    Raises:
        UserError: fewer than two rows, a run that was not tested, or runs tested on other cases or targets.
    """
    results = read_results(paths)
    targets: dict[Path, Any] = {}
    matches: dict[Path, Matches] = {}
    for path in map(Path, paths):
        folder = path if path.is_dir() else path.parent
        for name in FILES:
            if not (folder / name).is_file():
                raise UserError(f"{folder} holds no {name}; run `pretrain3d test {folder}` first")
        classes, predictions, targets[path] = read_pair(*(folder / name for name in FILES))
        matches[path] = match(predictions, targets[path], classes)
    grouped = group_rows(results)
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
    numbers = row_samples([row.runs for row in rows], samples, seed, groups_of(everything))
    found = {row.name: differences(numbers[0], of_row) for row, of_row in zip(rows[1:], numbers[1:], strict=True)}
    _correct(list(found.values()))
    return Comparison(
        rows[0].name,
        len(everything),
        {row.name: len(row.runs) for row in rows},
        {row.name: intervals(*of_row) for row, of_row in zip(rows, numbers, strict=True)},
        found,
    )


def group_rows(results: Sequence[Result]) -> dict[str, list[int]]:
    """Row name -> places of its results; results that differ by seed or fold only share a row."""
    groups: dict[str, list[int]] = {}
    for index, result in enumerate(results):
        config = {key: value for key, value in result["config"].items() if key not in ("seed", "name", "out", "fold")}
        if isinstance(config.get("data"), Mapping):
            config["data"] = {key: value for key, value in config["data"].items() if key != "fold"}
        groups.setdefault(json.dumps(_unnumbered([result["run"], config], result)), []).append(index)
    rows: dict[str, list[int]] = {}
    for group in groups.values():
        apart = {(results[index]["seed"], _fold(results[index])) for index in group}
        together = len(apart) == len(group) > 1
        for members in [group] if together else [[index] for index in group]:
            first = results[members[0]]
            name = f"{_unnumbered(first['run'], first)} ({len(group)} runs)" if together else first["run"]
            again = sum(other == name or other.startswith(f"{name} #") for other in rows)
            rows[f"{name} #{again + 1}" if again else name] = members
    return rows


def _fold(result: Result) -> Any:
    config = result["config"]
    return (config.get("data") or {}).get("fold", config.get("fold"))


def _unnumbered(value: Any, result: Result) -> Any:
    """Names of the seed and fold in texts (``...-f0-s3``) -> ``...-f*-s*``."""
    if isinstance(value, Mapping):
        return {key: _unnumbered(item, result) for key, item in sorted(value.items())}
    if isinstance(value, list):
        return [_unnumbered(item, result) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(rf"-f{_fold(result)}(?!\d)", "-f*", value)
    return re.sub(rf"-s{result['seed']}(?!\d)", "-s*", value)


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


def comparison_tables(comparison: Comparison) -> list[Table]:
    """A table per metric of all classes together, then one per class."""
    several = len(comparison.differences) > 1
    notes = ["difference with 95 % interval, paired bootstrap over patients"]
    if max(comparison.num_runs.values()) > 1:
        notes.append("means over runs, drawn too")
    about = f"{comparison.num_cases} cases; {'; '.join(notes)}"
    tables = []
    for key in KEYS:
        entries = {name: row["metrics"].get(key) for name, row in comparison.differences.items()}
        tables.append(_table(f"{key}, {about}", key, comparison, entries, "metrics", several))
    for name in comparison.values[comparison.reference]["per_class"]:
        entries = {row: found["per_class"][name][CLASS_KEY] for row, found in comparison.differences.items()}
        tables.append(_table(f"{CLASS_KEY} of {name}", CLASS_KEY, comparison, entries, name, several))
    return tables


def _table(title: str, key: str, comparison: Comparison, entries: Mapping[str, Any], part: str, several: bool) -> Table:
    values = comparison.values[comparison.reference]
    reference = (values["metrics"] if part == "metrics" else values["per_class"][part])[key]["value"]
    rows = [[comparison.reference, _number(reference), "reference", "", *([""] if several else [])]]
    for name, entry in entries.items():
        low, high = entry["low"], entry["high"]
        bounds = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
        difference = "–" if entry["difference"] is None else f"{entry['difference']:+.3f}{bounds}"
        p_values = [entry["p"], entry["p_holm"]] if several else [entry["p"]]
        rows.append([name, _number(entry["b"]), difference, *map(_number, p_values)])
    return Table(title, ["run", key, "difference", "p", *(["p (Holm)"] if several else [])], rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def as_csv(comparison: Comparison) -> str:
    """One line per row, class (blank: all) and metric; see `HEADER`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for name, row in comparison.differences.items():
        for of_class, keys in {"": row["metrics"], **row["per_class"]}.items():
            for key, entry in keys.items():
                numbers = [entry[part] for part in ("b", "a", "difference", "low", "high", "p", "p_holm")]
                cells = ["" if number is None else f"{number:.6g}" for number in numbers]
                writer.writerow([name, of_class, key, comparison.reference, *cells])
    return text.getvalue()


def comparison_figure(comparison: Comparison) -> Figure:
    """A panel per metric: the difference of each row from the reference with its interval.

    A full dot: the (corrected) p value is below 0.05.
    """
    names = list(comparison.differences)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.7 * len(KEYS) + 2.0, 1.5 + 0.34 * len(names)), layout="constrained")
        panels = figure.subplots(1, len(KEYS), sharey=True)
        for axes, key in zip(panels, KEYS, strict=True):
            axes.axvline(0, color="#555555", linewidth=1)
            for place, name in enumerate(names):
                _draw(axes, place, comparison.differences[name]["metrics"][key], COLOURS[place % len(COLOURS)])
            axes.set(title=key, ylim=(len(names) - 0.5, -0.5))
            axes.margins(x=0.12)
        panels[0].set_yticks(range(len(names)), names)
        figure.supxlabel(
            f"difference from {comparison.reference} (bars: 95 % interval, full dots: p < {LEVEL:g})", fontsize=9
        )
    return figure


def _draw(axes: Any, place: int, entry: Mapping[str, Any], colour: str) -> None:
    if entry["difference"] is None:
        return
    if entry["low"] is not None:
        axes.plot([entry["low"], entry["high"]], [place, place], color=colour, linewidth=1.8)
    sure = entry["p_holm"] is not None and entry["p_holm"] < LEVEL
    axes.plot([entry["difference"]], [place], "o", color=colour, markerfacecolor=colour if sure else "white")
