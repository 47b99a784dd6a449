"""`table`: the results of runs side by side, on the terminal, as Markdown and as an HTML report."""

from __future__ import annotations

from pretrain3d.options import output_file, read_options

USAGE = """\
pretrain3d table RUN ... [out=FILE] [report=FILE] [title=TEXT] [pictures=true]

Prints mAP, AP@0.10, AP@0.50 and FROC@0.10 with 95 % intervals over patients, and AP@0.10 per class; of pretraining by
reconstruction, its error on held-out patches; of supervised pretraining, Dice; and what training cost: time, samples
and TFLOP, peak GPU memory and model-FLOP utilisation. Runs that differ by seed or fold only become one row. The folds
of a cross-validation, each tested on its own cases (`test split=val`), are pooled: their boxes are scored as those of
one run on all cases, scores as they are, as nnDetection does. Seeds, and folds tested on the same cases, become mean
and standard deviation. A seed that lacks folds is of other cases, and a row of its own.

  RUN              a run folder after `test`, or a result.json; of a pretraining run without a result, its folder
  out=FILE.md      the tables as Markdown
  report=FILE.html one self-contained HTML page: tables, curves, FROC, slices with boxes, reconstructions
  title=TEXT       title of the report
  pictures=false   leaves out everything that shows an image, for data whose pictures must not be passed on"""

DEFAULTS = {"out": "", "report": "", "title": "Results", "pictures": True}
ENDINGS = {"out": (".md",), "report": (".html", ".htm")}


def run(paths: list[str], options: dict[str, object]) -> int:
    """Tabulates runs; returns the exit status."""
    given = read_options(options, DEFAULTS)
    for key, endings in ENDINGS.items():
        if given[key]:
            output_file(key, given[key], endings)
    from pretrain3d.files import write_text
    from pretrain3d.reporting.reported import read_runs

    reported = read_runs(paths)
    tables = reported.tables()
    print("\n\n".join(table.as_text() for table in tables))
    if given["out"]:
        write_text(given["out"], "\n".join(table.as_markdown() for table in tables))
        print(f"\n{given['out']}")
    if given["report"]:
        from pretrain3d.reporting.report import write_report

        write_report(given["report"], reported, title=given["title"], pictures=given["pictures"])
        print(given["report"])
    return 0
