"""Tables of results: one row per run, or per group of runs that differ by their seed only."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pretrain3d.config import UserError
from pretrain3d.reporting.cost import in_words
from pretrain3d.reporting.results import read_result
from pretrain3d.reporting.run_folder import AROUND, without

KEYS = ("mAP", "AP@0.10", "AP@0.50", "FROC@0.10")
CLASS_KEY = "AP@0.10"
RECONSTRUCTION = {
    "network": "network", "mean_predictor": "mean predictor", "inpainting_linear": "tri-linear in-painting",
    "network/mean_predictor": "network : mean", "network/inpainting_linear": "network : in-painting",
}  # fmt: skip
SEGMENTATION = {"dice": "Dice", "volume_error": "volume error", "trivial_dice": "Dice of everything"}
Result = dict[str, Any]


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


def make_tables(results: Sequence[Result]) -> list[Table]:
    """Two tables (all classes together, and per class) for each set of cases that the results are of.

    Numbers of different cases are not comparable, so they never share a table. Results of pretraining come last:
    errors of reconstruction (`evaluation.reconstruction`), Dice of segmentation (`evaluation.segmentation`).
    """
    tables = []
    for same_cases in by_cases(of_kind(results, "detection")).values():
        rows = [(name, group) for name, group in by_seed(same_cases).items()]
        about = describe_cases(same_cases[0])
        seeds = "; mean ± standard deviation over seeds" if any(len(group) > 1 for _, group in rows) else ""
        body = [[name, *(shown([r["metrics"].get(key) for r in group]) for key in KEYS)] for name, group in rows]
        tables.append(Table(f"{about}, 95 % intervals over patients{seeds}", ["run", *KEYS], body))
        classes = list(dict.fromkeys(name for result in same_cases for name in result["per_class"]))
        body = [[name, *(shown([_of_class(r, one) for r in group]) for one in classes)] for name, group in rows]
        tables.append(Table(f"{CLASS_KEY} per class, {about}", ["run", *classes], body))
    tables += [
        _reconstruction_table(same_cases) for same_cases in by_cases(of_kind(results, "reconstruction")).values()
    ]
    for same_cases in by_cases(of_kind(results, "segmentation")).values():
        tables += _segmentation_tables(same_cases)
    return tables


def part_tables(results: Sequence[Result]) -> list[Table]:
    """`CLASS_KEY` by object size and by every column of ``test by=COLUMN``, per set of cases; not of reconstruction.

    A run that was not measured in a part has a dash there.
    """
    tables = []
    for same_cases in by_cases(of_kind(results, "detection")).values():
        rows = by_seed(same_cases).items()
        for title in dict.fromkeys(title for result in same_cases for title in _parts(result)):
            of_title = [_parts(result).get(title, {}) for result in same_cases]
            header = {name: f"{name} ({_counted(part)})" for parts in of_title for name, part in parts.items()}
            body = [[row, *(shown([_of_part(r, title, one) for r in group]) for one in header)] for row, group in rows]
            tables.append(
                Table(f"{CLASS_KEY} by {title}, {describe_cases(same_cases[0])}", ["run", *header.values()], body)
            )
    return tables


def cost_table(costs: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """What the training of each run cost, by the name of its row; None where nothing was trained.

    Args:
        costs: see `reporting.cost.cost_of`; empty for a baseline, which gets no row.
    """
    rows = {name: in_words(cost) for name, cost in costs.items() if cost}
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


def kind_of(result: Result) -> str:
    """``"detection"``, or what a pretraining was tested on: ``"reconstruction"`` or ``"segmentation"``."""
    return {"network": "reconstruction", "dice": "segmentation"}.get(next(iter(result["metrics"]), ""), "detection")


def of_kind(results: Sequence[Result], kind: str) -> list[Result]:
    """Those of a `kind_of`."""
    return [result for result in results if kind_of(result) == kind]


def _reconstruction_table(same_cases: Sequence[Result]) -> Table:
    rows = []
    for name, group in by_seed(same_cases).items():
        asked = group[0].get("asked") or {}
        cells = [shown([result["metrics"].get(key) for result in group]) for key in RECONSTRUCTION]
        rows.append([name, str(asked.get("measure", "–")), str(asked.get("patches", "–")), *cells])
    title = f"reconstruction, held-out patches: {describe_cases(same_cases[0])}, 95 % intervals over patients"
    return Table(title, ["run", "error", "patches per case", *RECONSTRUCTION.values()], rows)


def _segmentation_tables(same_cases: Sequence[Result]) -> list[Table]:
    rows = by_seed(same_cases).items()
    about = describe_cases(same_cases[0])
    body = [[name, *(shown([result["metrics"].get(key) for result in group]) for key in SEGMENTATION)]
            for name, group in rows]  # fmt: skip
    overall = Table(f"segmentation: {about}, 95 % intervals over patients", ["run", *SEGMENTATION.values()], body)
    classes = list(dict.fromkeys(name for result in same_cases for name in result["per_class"]))
    body = [[name, *(shown([_of_class(r, one, "dice") for r in group]) for one in classes)] for name, group in rows]
    return [overall, Table(f"Dice per class, {about}", ["run", *classes], body)]


def by_cases(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by the cases that they are of, and by what was annotated there: classes, and objects of each case.

    The hash of the data is of the images alone, which may have been annotated anew or for another task.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        data = result.get("data") or {}
        cases = sorted([str(row.get("case")), row.get("objects")] for row in result["cases"])
        key = [data.get("hash"), data.get("name"), cases, sorted(result["per_class"])]
        groups.setdefault(json.dumps(key), []).append(result)
    return groups


def describe_cases(result: Result) -> str:
    """``"phantom, 24 test cases"``."""
    name = (result.get("data") or {}).get("name") or "data"
    split = (result.get("asked") or {}).get("split")
    return f"{name}, {len(result['cases'])} {f'{split} ' if split else ''}cases"


def by_seed(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Row name -> the results of that row, in the order given; runs that differ by their seed only share a row."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        key = [_seedless(result["run"], result["seed"]), _setting(result), how_tested(result)]
        groups.setdefault(json.dumps(key), []).append(result)
    rows: list[tuple[str, list[Result]]] = []
    for group in groups.values():
        if len({result["seed"] for result in group}) == len(group) > 1:
            rows.append((f"{_seedless(group[0]['run'], group[0]['seed'])} ({len(group)} seeds)", group))
        else:  # alone, or the same seed again: rows of their own
            rows += [(result["run"], [result]) for result in group]
    names: dict[str, list[Result]] = {}
    for name, group in rows:
        again = sum(other == name or other.startswith(f"{name} #") for other in names)
        names[f"{name} #{again + 1}" if again else name] = group
    return names


def how_tested(result: Result) -> list[Any]:
    """What the results of a row share besides the configuration.

    Which weights `test` took, after how many steps (unless `trainer.max_time` ended them), on what, and whether `sweep`
    had chosen the merging.
    """
    asked, trainer = result.get("asked") or {}, result["config"].get("trainer")
    timed = isinstance(trainer, Mapping) and trainer.get("max_time") is not None
    step = asked.get("step") if asked.get("checkpoint") == "last" and not timed else None
    return [*map(asked.get, ("checkpoint", "split", "patches")), asked.get("threshold") is not None, step]


def _setting(result: Result) -> Any:
    """The configuration without what a seed changes, and what the weights do not depend on."""
    return _seedless(without(result["config"], ("seed", "name", *AROUND)), result["seed"])


def _seedless(value: Any, seed: int) -> Any:
    """Names of the seed in texts (``...-s3``, also in the path of a backbone) -> ``...-s*``."""
    if isinstance(value, Mapping):
        return {key: _seedless(item, seed) for key, item in sorted(value.items())}
    if isinstance(value, list):
        return [_seedless(item, seed) for item in value]
    return re.sub(rf"-s{seed}(?!\d)", "-s*", value) if isinstance(value, str) else value


def _of_class(result: Result, name: str, key: str = CLASS_KEY) -> dict[str, Any] | None:
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
    """``0.512 [0.431, 0.580]`` of one run, ``0.512 ± 0.020`` of several, a dash where there is no value."""
    values = [entry["value"] for entry in entries if entry is not None and entry["value"] is not None]
    if not values or len(values) < len(entries):
        return "–"
    if len(values) > 1:
        return f"{mean(values):.3f} ± {stdev(values):.3f}"
    entry = entries[0]
    assert entry is not None
    if entry.get("low") is None or entry.get("high") is None:
        return f"{values[0]:.3f}"
    return f"{values[0]:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"
