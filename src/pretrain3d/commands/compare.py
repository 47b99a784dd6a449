"""`compare`: how sure the differences between tested runs are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain3d.config import UserError
from pretrain3d.options import at_least, output_file, read_options

USAGE = """\
pretrain3d compare RUN RUN ... [out=FILE] [figure=FILE] [samples=1000] [seed=0] [by=COLUMN cases=TABLE]

mAP, AP@0.10, AP@0.50 and FROC@0.10 of every run and its difference from the first one, with 95 % intervals and a
p value from a bootstrap that draws the same patients for both; AP@0.10 per class. With several runs p values are
corrected by Holm's method over the runs (not over metrics, classes and parts of the cases). Runs that differ by seed
or fold only, and were tested alike, are one row: folds tested on cases of their own are pooled as in `table`, and of
seeds (or folds on the same cases) it is the mean, for which they are drawn too. A row of one seed knows nothing of
what another one changes, one of two, three or four too little: where seeds alone made the difference, equal methods
would have p < 0.05 in 33, 13 and 10 of 100 comparisons.

  RUN            a folder after `test`; every row must have been tested on the same cases
  out=FILE       the tables: .md, .csv (every metric and class, one per line) or .json (everything)
  figure=FILE    differences with intervals on all cases: .svg, .png or .pdf; default beside out, as .svg
  by=COLUMN      the same differences for the cases of each value of a column (numbers of many values: in thirds) of
  cases=TABLE    a CSV or TSV file with a column `case` (or the case ids in its first column);
                 by=spacing needs no table: the longest side of an input voxel
  samples=1000   bootstrap samples
  seed=0         of the bootstrap"""

DEFAULTS = {"out": "", "figure": "", "samples": 1000, "seed": 0, "by": "", "cases": ""}
TABLES, FIGURES = (".md", ".csv", ".json"), (".svg", ".png", ".pdf")


def run(paths: list[str], options: dict[str, object]) -> int:
    """Compares runs; returns the exit status."""
    given = read_options(options, DEFAULTS)
    if len(paths) < 2:
        raise UserError(f"compare takes at least two run folders, got {len(paths)}")
    at_least(given, samples=1, seed=0)
    table = output_file("out", given["out"], TABLES) if given["out"] else None
    figure = output_file("figure", given["figure"], FIGURES) if given["figure"] else None
    if table is not None and figure is None:
        figure = table.with_suffix(".svg")
    from pretrain3d.reporting.compare import compare
    from pretrain3d.reporting.differences import comparison_tables

    comparison = compare(paths, given["samples"], given["seed"], given["by"], given["cases"])
    print("\n\n".join(each.as_text() for each in comparison_tables(comparison)))
    if table is not None:
        _write_table(table, comparison)
    if figure is not None:
        _write_figure(figure, comparison)
    written = [str(file) for file in (table, figure) if file is not None]
    if written:
        print("\n" + "\n".join(written))
    return 0


def _write_table(path: Path, comparison: Any) -> None:
    from pretrain3d.files import write_text
    from pretrain3d.reporting.differences import comparison_csv, comparison_tables
    from pretrain3d.reporting.results import write_json

    if path.suffix == ".json":
        write_json(path, asdict(comparison))
    elif path.suffix == ".csv":
        write_text(path, comparison_csv(comparison))
    else:
        write_text(path, "\n".join(each.as_markdown() for each in comparison_tables(comparison)))


def _write_figure(path: Path, comparison: Any) -> None:
    from matplotlib import rc_context

    from pretrain3d.files import replacing
    from pretrain3d.reporting.differences import comparison_figure
    from pretrain3d.reporting.figures import STYLE

    with replacing(path) as temporary, rc_context(STYLE):
        comparison_figure(comparison).savefig(temporary, format=path.suffix[1:], dpi=150, bbox_inches="tight")
