"""`pretrain3d score`: the boxes of any detector against the true ones. Needs NumPy only, so it answers at once."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from pretrain3d.config import UserError, suggestion
from pretrain3d.options import REQUIRED, at_least, output_file, read_options

USAGE = """
pretrain3d score predictions=FILE targets=FILE [out=FILE] [samples=1000] [sizes=[500,5000]] [by=COLUMN cases=TABLE]
pretrain3d score protocol=luna16 predictions=SUBMISSION.csv targets=annotations.csv cases=seriesuids.csv
                 [excluded=annotations_excluded.csv] [out=FILE] [samples=1000]

  predictions=FILE   {"classes": [names], "cases": {id: {"boxes": [[x1,y1,z1,x2,y2,z2], ...], "scores": [...],
                     "labels": [...]}}}; half-open voxels, labels count from 0, every case listed
  targets=FILE       the same without scores; "annotated": [labels] in a case says which classes were annotated
                     there (default all): false positives of the others are not counted. Optional in a case:
                     "spacing_mm": [x,y,z] and "volumes_mm3": [of each object] for sizes, "group": patient
  out=FILE           writes mAP, AP@0.10 ... AP@0.90, FROC@0.10, FROC@0.50, case_AUROC, case_AP, per_class, by_size,
                     their intervals and the curves as JSON
  samples=1000       bootstrap samples of the 95 % intervals over patients; 0 for none
  sizes=[...]        bounds in mm3 between the bins of by_size; default thirds of the objects, where sizes are known
  by=COLUMN          the same numbers for the cases of each value of a column (numbers of many values: in thirds) of
  cases=TABLE        a CSV or TSV file with a column `case` (or the case ids in its first column);
                     by=spacing needs no table where the targets say spacing_mm: the longest side of a voxel

protocol=luna16: CPM by the challenge's rules from its own files, comma- or tab-separated, also gzipped. A mark hits
within a nodule's radius; a nodule counts once; marks on excluded findings are ignored; at most 100 marks per scan.
  predictions=FILE   seriesuid, coordX, coordY, coordZ, probability
  targets=, excluded=FILE   seriesuid, coordX, coordY, coordZ, diameter_mm (-1 unknown: 10 mm)
  cases=FILE         the scans that count, one series id per line, with or without header
  out=FILE           writes CPM, sensitivity at 1/8 ... 8 false positives per scan, intervals, the FROC curve with its
                     95 % band over scans, and counts as JSON
"""
COLUMNS = ("mAP", "AP@0.10", "AP@0.50", "FROC@0.10", "FROC@0.50")
PROTOCOLS = ("boxes", "luna16")
Entry = Mapping[str, float | None]


def run(paths: list[str], options: dict[str, object]) -> int:
    """Prints the table and writes `out`."""
    if paths:
        raise UserError(f"score takes no path without a key: {paths[0]}; write predictions={paths[0]}")
    options = dict(options)
    protocol = str(options.pop("protocol", "boxes"))
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol={protocol}{suggestion(protocol, PROTOCOLS) or ';'} it is {' or '.join(PROTOCOLS)}")
    common = {"predictions": REQUIRED, "targets": REQUIRED, "out": "", "samples": 1000}
    if protocol == "luna16":
        settings = read_options(options, {**common, "cases": REQUIRED, "excluded": ""})
    else:
        settings = read_options(options, {**common, "sizes": None, "cases": "", "by": ""})
    at_least(settings, samples=0)
    if settings["out"]:
        output_file("out", settings["out"])
    (score_luna16 if protocol == "luna16" else score_boxes)(settings)
    return 0


def score_boxes(settings: dict[str, Any]) -> None:
    """Boxes against boxes, by IoU."""
    from pretrain3d.evaluation.matching import match
    from pretrain3d.evaluation.protocol import summarise
    from pretrain3d.evaluation.scorefile import groups_of, read_pair
    from pretrain3d.evaluation.sizes import by_size, have_sizes
    from pretrain3d.evaluation.statistics import bootstrap
    from pretrain3d.evaluation.strata import by_stratum, chosen_values, strata_of
    from pretrain3d.reporting.results import write_json

    edges, samples = _edges(settings["sizes"]), settings["samples"]
    classes, predictions, targets = read_pair(settings["predictions"], settings["targets"])
    strata = strata_of(chosen_values(settings["cases"], settings["by"], targets))
    matches, groups = match(predictions, targets, classes), groups_of(targets)
    intervals = bootstrap(matches, samples=samples, groups=groups)
    content: dict[str, Any] = flat(intervals)
    if edges or have_sizes(targets):
        bins = by_size(matches, predictions, targets, edges, samples=samples, groups=groups)
        content["by_size"] = {name: flat(row) for name, row in bins.items()}
    else:
        bins = {}
    parts = by_stratum(matches, strata, samples=samples, groups=groups)
    if parts:
        content["by"] = {settings["by"]: {name: flat(row) for name, row in parts.items()}}
    if settings["out"]:
        write_json(settings["out"], content | {"num_cases": len(targets), "curves": summarise(matches)["curves"]})

    objects = {name: int(m.objects.sum()) for name, m in zip(classes, matches.per_class, strict=True)}
    rows = {"all": intervals["metrics"], **intervals["per_class"]}
    print(interval_table(rows, {"all": sum(objects.values()), **objects}, "objects"))
    if intervals["metrics"]["case_AUROC"]["value"] is not None:
        auroc, precision = (_cell(**intervals["metrics"][key]) for key in ("case_AUROC", "case_AP"))
        print(f"cases with an object against cases without: AUROC {auroc}, AP {precision}")
    if parts:
        print("\n" + strata_table(settings["by"], parts))
    if bins:
        counts = {name: row["objects"] for name, row in bins.items()}
        print("\nby size in mm3\n" + interval_table({n: r["metrics"] for n, r in bins.items()}, counts, "objects"))
    over = "cases" if groups is None else "patients"
    print(f"{len(targets)} cases" + (f", 95 % intervals over {over}" if samples else ""))


def score_luna16(settings: dict[str, Any]) -> None:
    """Marks against nodules, by the distance of their centres."""
    from pretrain3d.evaluation.luna16 import score_files
    from pretrain3d.reporting.results import write_json

    files = {key: settings[key] for key in ("predictions", "targets", "cases", "excluded", "samples")}
    result = score_files(**files)
    if settings["out"]:
        write_json(settings["out"], result)
    rows = [("CPM", result["CPM"], result["intervals"]["CPM"])]
    rows += [(rate, value, result["intervals"]["sensitivity"][rate]) for rate, value in result["sensitivity"].items()]
    for name, value, bounds in rows:
        label = name if name == "CPM" else f"sensitivity at {name} false positives per scan"
        print(f"{label:<47}{_cell(value, *(bounds or (None, None)))}")
    counts = result["counts"]
    print(
        f"{counts['scans']} scans, {counts['nodules']} nodules ({counts['FN']} missed), {counts['marks']} marks: "
        f"{counts['FP']} false positives, {counts['ignored_on_excluded']} on excluded findings, "
        f"{counts['double_detections_ignored']} second hits"
    )
    if counts["nodules_of_other_scans"]:
        print(f"{counts['nodules_of_other_scans']} nodules of scans that {files['cases']} does not list were left out")
    if settings["samples"]:
        print("95 % intervals over scans")


def flat(intervals: Mapping[str, Any]) -> dict[str, Any]:
    """{key: value, "per_class": {class: {key: value}}, "intervals": {key: [low, high] or null, "per_class": ...}}.

    Whatever else an entry holds (counts, bounds of a bin) stays as it is.
    """

    def bounds(row: Mapping[str, Entry]) -> dict[str, Any]:
        return {key: None if v["low"] is None else [v["low"], v["high"]] for key, v in row.items()}

    def plain(row: Mapping[str, Entry]) -> dict[str, Any]:
        return {key: v["value"] for key, v in row.items()}

    per_class = intervals["per_class"]
    return {
        **{key: value for key, value in intervals.items() if key not in ("metrics", "per_class")},
        **plain(intervals["metrics"]),
        "per_class": {name: plain(row) for name, row in per_class.items()},
        "intervals": bounds(intervals["metrics"]) | {"per_class": {n: bounds(row) for n, row in per_class.items()}},
    }


def _edges(value: Any) -> list[float]:
    """The bounds between bins; empty for the default."""
    if value is None:
        return []
    listed = value if isinstance(value, list) else [value]
    numbers = all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in listed)
    if not listed or not numbers or not all(0 < edge <= sys.float_info.max for edge in listed):
        raise UserError(f"sizes={value}: expected ascending volumes in mm3, such as [500, 5000]")
    return [float(edge) for edge in listed]


def strata_table(column: str, strata: Mapping[str, Mapping[str, Any]]) -> str:
    """A titled table of what `strata.by_stratum` gives."""
    counts = {name: row["num_cases"] for name, row in strata.items()}
    return f"by {column}\n" + interval_table({name: row["metrics"] for name, row in strata.items()}, counts, "cases")


def interval_table(rows: Mapping[str, Mapping[str, Entry]], counts: Mapping[str, int], counted: str) -> str:
    """One row per class, value or bin, aligned; the columns that the rows have."""
    columns = [key for key in COLUMNS if all(key in row for row in rows.values())]
    cells = [["", counted, *columns]]
    for name, row in rows.items():
        values = [_cell(row[key]["value"], row[key]["low"], row[key]["high"]) for key in columns]
        cells.append([name, str(counts[name]), *values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _cell(value: float | None, low: float | None, high: float | None) -> str:
    text = "-" if value is None else f"{value:.3f}"
    return text if low is None or high is None else f"{text} [{low:.3f}, {high:.3f}]"
