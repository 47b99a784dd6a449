"""What `compare` found, as tables, as CSV and as a figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from pretrain3d.delimited import as_csv
from pretrain3d.reporting.compare import Comparison
from pretrain3d.reporting.figures import COLOURS, STYLE
from pretrain3d.reporting.tables import CLASS_KEY, KEYS, Table, shown

LEVEL = 0.05
FEW = 5  # seeds of a row, below which chance gives a p value below 0.05 clearly more often: see `row_samples`
HEADER = ("run", "part", "class", "metric", "reference", "value", "reference_value", "difference", "low", "high", "p",
          "p_holm")  # fmt: skip


def comparison_tables(comparison: Comparison) -> list[Table]:
    """A table per metric of all classes together, one per class, and per metric one by the values of a column."""
    notes = ["95 % intervals, paired bootstrap over patients"]
    if max(comparison.num_repetitions.values()) > 1:
        notes.append("means over seeds, drawn too")
    if any(1 < number < FEW for number in comparison.num_repetitions.values()):
        notes.append("p is too small where a seed matters much, for the seeds are few")
    if min(comparison.num_repetitions.values()) == 1:
        notes.append("a row of one seed does not know what another seed changes")
    about = f"{comparison.num_cases} cases; {'; '.join(notes)}"
    header = ["difference", "p", *(["p (Holm)"] if len(comparison.differences) > 1 else [])]
    tables = [Table(f"{key}, {about}", ["run", key, *header], _rows(comparison, key)) for key in KEYS]
    for name in comparison.values[comparison.reference]["per_class"]:
        rows = _rows(comparison, CLASS_KEY, name)
        tables.append(Table(f"{CLASS_KEY} of {name}", ["run", CLASS_KEY, *header], rows))
    for column, parts in comparison.by.items():
        for key in KEYS:
            rows = [[first, value, str(part.num_cases), *rest]
                    for value, part in parts.items() for first, *rest in _rows(part, key)]  # fmt: skip
            tables.append(Table(f"{key} by {column}", ["run", column, "cases", key, *header], rows))
    return tables


def _rows(comparison: Comparison, key: str, of_class: str | None = None) -> list[list[str]]:
    """Run, value, difference (both with their interval) and p values of every row, the reference first."""

    def entry_of(row: Mapping[str, Any]) -> dict[str, float | None]:
        entry: dict[str, float | None] = (row["metrics"] if of_class is None else row["per_class"][of_class])[key]
        return entry

    several = len(comparison.differences) > 1
    values = {name: shown([entry_of(row)]) for name, row in comparison.values.items()}
    rows = [[comparison.reference, values[comparison.reference], "reference", "", *([""] if several else [])]]
    for name, row in comparison.differences.items():
        entry = entry_of(row)
        low, high = entry["low"], entry["high"]
        bounds = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
        difference = "–" if entry["difference"] is None else f"{entry['difference']:+.3f}{bounds}"
        p_values = [entry["p"], entry["p_holm"]] if several else [entry["p"]]
        rows.append([name, values[name], difference, *map(_number, p_values)])
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def comparison_csv(comparison: Comparison) -> str:
    """One line per row, part of the cases (``column=value``; blank: all), class (blank: all) and metric; `HEADER`."""
    parts = {f"{column}={value}": part for column, values in comparison.by.items() for value, part in values.items()}
    compared = {"": comparison, **parts}.items()
    return as_csv(HEADER, ([name, part, *cells] for part, one in compared for name, *cells in _lines(one)))


def _lines(comparison: Comparison) -> Iterator[list[str]]:
    for name, row in comparison.differences.items():
        for of_class, keys in {"": row["metrics"], **row["per_class"]}.items():
            for key, entry in keys.items():
                numbers = [entry[part] for part in ("b", "a", "difference", "low", "high", "p", "p_holm")]
                cells = ["" if number is None else f"{number:.6g}" for number in numbers]
                yield [name, of_class, key, comparison.reference, *cells]


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
