"""`table`: the results of runs side by side, on the terminal, as Markdown and as an HTML report."""

from __future__ import annotations

from pretrain3d.config import UserError
from pretrain3d.options import output_file, read_options

USAGE = """\
pretrain3d table RUN ... [out=FILE] [report=FILE] [title=TEXT] [pictures=true]

Prints mAP, AP@0.10, AP@0.50 and FROC@0.10 with 95 % intervals over cases, and AP@0.10 per class; of pretraining by
reconstruction, its error on held-out patches. Runs that differ by their seed only become one row, mean and standard
deviation over seeds.

  RUN              a run folder after `test`, or a result.json; a pretraining run without a result appears in the
                   report only
  out=FILE         the tables as Markdown
  report=FILE      one self-contained HTML page: tables, curves, FROC, slices with boxes, reconstructions
  title=TEXT       title of the report
  pictures=false   leaves out everything that shows an image, for data whose pictures must not be passed on"""

DEFAULTS = {"out": "", "report": "", "title": "Results", "pictures": True}


def run(paths: list[str], options: dict[str, object]) -> int:
    """Tabulates runs; returns the exit status."""
    given = read_options(options, DEFAULTS)
    for key in ("out", "report"):
        if given[key]:
            output_file(key, given[key])
    from pretrain3d.files import write_text
    from pretrain3d.reporting.report import is_pretraining
    from pretrain3d.reporting.tables import make_tables, read_results

    tested = [path for path in paths if not is_pretraining(path)]
    pretraining = [path for path in paths if path not in tested]
    if pretraining and not given["report"]:
        raise UserError(
            f"{pretraining[0]} is a pretraining run without a result, which has no row in a table; add report=FILE, or "
            "call `pretrain3d test` first if it was pretrained by reconstruction"
        )
    tables = make_tables(read_results(tested))
    print("\n\n".join(table.as_text() for table in tables))
    if given["out"]:
        write_text(given["out"], "\n".join(table.as_markdown() for table in tables))
        print(f"\n{given['out']}")
    if given["report"]:
        from pretrain3d.reporting.report import write_report

        write_report(given["report"], paths, title=given["title"], pictures=given["pictures"])
        print(given["report"])
    return 0
