"""`pretrain3d score`: the boxes of any detector against the true ones. Needs NumPy only, so it answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain3d.config import REQUIRED, UserError, read_options
from pretrain3d.evaluation.protocol import summarise
from pretrain3d.evaluation.scorefile import read_pair

USAGE = """
pretrain3d score predictions=FILE targets=FILE [out=FILE] [samples=1000]

  predictions=FILE   {"classes": [names], "cases": {id: {"boxes": [[x1,y1,z1,x2,y2,z2], ...], "scores": [...],
                     "labels": [...]}}}; half-open voxels, labels count from 0, every case listed
  targets=FILE       the same without scores; "annotated": [labels] in a case says which classes were annotated
                     there (default all): false positives of the others are not counted
  out=FILE           writes mAP, AP@0.10 ... AP@0.90, FROC@0.10, FROC@0.50, per_class, and their intervals as JSON
  samples=1000       bootstrap samples of the 95 % intervals over cases; 0 for none
"""
COLUMNS = ("mAP", "AP@0.10", "AP@0.50", "FROC@0.10", "FROC@0.50")


def run(paths: list[str], options: dict[str, object]) -> int:
    """Prints the table and writes `out`."""
    from pretrain3d.evaluation.matching import match
    from pretrain3d.evaluation.statistics import bootstrap
    from pretrain3d.reporting.results import write_json

    settings = read_options(options, {"predictions": REQUIRED, "targets": REQUIRED, "out": "", "samples": 1000})
    if paths:
        raise UserError(f"score takes no path without a key: {paths[0]}; write predictions={paths[0]}")
    if settings["samples"] < 0:
        raise UserError(f"samples={settings['samples']}: it must be 0 or more")
    classes, predictions, targets = read_pair(settings["predictions"], settings["targets"])
    matches = match(predictions, targets, classes)
    intervals = bootstrap(matches, samples=settings["samples"])
    if settings["out"]:
        summary = summarise(matches)
        content = {key: value for key, value in summary.items() if key not in ("curves", "cases")}
        write_json(Path(settings["out"]), content | {"intervals": _bounds(intervals), "num_cases": len(targets)})
    print(_table(intervals, {name: int(m.objects.sum()) for name, m in zip(classes, matches.per_class, strict=True)}))
    print(f"{len(targets)} cases" + (", 95 % intervals over cases" if settings["samples"] else ""))
    return 0


def _bounds(intervals: dict[str, Any]) -> dict[str, Any]:
    """{key: [low, high] or null, "per_class": {class: the same}}."""

    def bounds(row: dict[str, dict[str, float | None]]) -> dict[str, Any]:
        return {key: None if v["low"] is None else [v["low"], v["high"]] for key, v in row.items()}

    return bounds(intervals["metrics"]) | {
        "per_class": {name: bounds(row) for name, row in intervals["per_class"].items()}
    }


def _table(intervals: dict[str, Any], objects: dict[str, int]) -> str:
    """Overall and per class, aligned."""
    rows = [["", "objects", *COLUMNS], ["all", str(sum(objects.values())), *_cells(intervals["metrics"])]]
    rows += [[name, str(objects[name]), *_cells(row)] for name, row in intervals["per_class"].items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cells(row: dict[str, dict[str, float | None]]) -> list[str]:
    cells = []
    for key in COLUMNS:
        value, low, high = row[key]["value"], row[key]["low"], row[key]["high"]
        text = "-" if value is None else f"{value:.3f}"
        cells.append(text if low is None else f"{text} [{low:.3f}, {high:.3f}]")
    return cells
