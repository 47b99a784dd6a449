"""One self-contained HTML page about a few runs: tables, curves, cases, reconstructions, and how to do it again."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain3d.config import to_yaml
from pretrain3d.files import write_text
from pretrain3d.reporting import figures
from pretrain3d.reporting.case_pictures import case_figure
from pretrain3d.reporting.cost import duration, in_words
from pretrain3d.reporting.reported import Reported, Run, results_of
from pretrain3d.reporting.tables import CLASS_KEY, Table, by_cases, describe_cases, part_tables

CASES = 4  # with pictures
VALIDATED = {  # title of a panel -> logged key
    "validation mAP": "val/mAP", "validation AP@0.10": "val/AP@0.10", "validation Dice": "val/dice",
    "AUROC of the probe of frozen features": "val/probe_auroc",
}  # fmt: skip
ORDER = ("original", "masked", "reconstructed")
STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1c1c1e; background: #f5f5f4;
  margin: 0 }
main { max-width: 1120px; margin: 0 auto; padding: 24px }
section { background: #fff; border: 1px solid #e4e4e2; border-radius: 10px; padding: 4px 24px 20px; margin: 20px 0 }
h1 { font-size: 28px; margin: 12px 0 0 } h2 { font-size: 19px } h3 { font-size: 15px; margin: 18px 0 6px }
p.about, figcaption { color: #6b6b70; margin: 4px 0 }
figcaption { font-size: 13px }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px; margin: 14px 0; font-variant-numeric: tabular-nums }
caption { text-align: left; color: #6b6b70; padding-bottom: 6px }
th, td { padding: 5px 14px 5px 0; text-align: right; border-bottom: 1px solid #ececea; white-space: nowrap }
th { font-weight: 600; border-bottom: 2px solid #c9c9c6 }
th:first-child, td:first-child, table.facts td { text-align: left }
table.facts td:not(:first-child) { white-space: normal; max-width: 420px }
figure { margin: 10px 0 }
svg { max-width: 100%; height: auto; font-family: inherit }
img.case { width: 100%; border-radius: 6px; display: block }
.strip { display: flex; gap: 10px; flex-wrap: wrap }
.strip img { width: 240px; image-rendering: pixelated; background: #111; border-radius: 4px; display: block }
pre { background: #f5f5f4; padding: 12px; border-radius: 6px; overflow-x: auto; font-size: 12.5px }
details { margin: 8px 0 } summary { cursor: pointer }
.true { color: #1c9a3c } .predicted { color: #d9780a }
"""


def write_report(path: str | Path, reported: Reported, title: str = "Results", pictures: bool = True) -> None:
    """Writes the page.

    Args:
        path: the HTML file.
        reported: tested detectors, baselines and pretraining runs.
        title: of the page.
        pictures: False leaves out every image of the data: cases and reconstructions.
    """
    runs = reported.runs
    rows = {name: row for name, row in reported.rows.items() if row[0].is_detection}
    tested = [run for row in rows.values() for run in row]
    colours = figures.palette(list(dict.fromkeys(run.label for run in [*tested, *runs])))
    sections = [
        ("Results", _tables(reported.tables()) + _per_class(rows, colours)),
        ("Results in parts", _tables(part_tables(results_of(rows)))),
        ("Training", _training(runs, colours)),
        ("Detection curves", _curves(rows, colours)),
        ("Cases", _cases(rows) if pictures else ""),
        ("Reconstruction", "".join(_reconstructions(run) for run in runs) if pictures else ""),
        ("Cases in numbers", "".join(_case_rows(run) for run in tested)),
        ("What was run", _facts(runs)),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections if content)
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    about = ", ".join(dict.fromkeys(about for about, _ in _same_cases(rows)))
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body><main>'
        f'<h1>{html.escape(title)}</h1><p class="about">{html.escape(about)}</p>{body}</main></body></html>\n',
    )


def _same_cases(rows: Mapping[str, Sequence[Run]]) -> list[tuple[str, list[Run]]]:
    """What each set of cases is, and the runs that were tested on it."""
    return [(describe_cases(same), [run for name in same for run in rows[name]]) for same in by_cases(results_of(rows))]


def _tables(tables: Sequence[Table]) -> str:
    return "".join(f'<div class="wide">{table.as_html()}</div>' for table in tables)


def _per_class(rows: Mapping[str, Sequence[Run]], colours: dict[str, str]) -> str:
    parts = []
    for about, of_cases in _same_cases(rows):
        values = {}
        for run in of_cases:
            entries = {name: (keys or {}).get(CLASS_KEY) for name, keys in (run.result or {})["per_class"].items()}
            found = {n: (e["value"], e.get("low"), e.get("high")) for n, e in entries.items()
                     if e is not None and e["value"] is not None}  # fmt: skip
            if found:
                values[run.label] = found
        if values:
            parts.append(_svg(figures.values_per_class(values, CLASS_KEY, colours), about))
    return "".join(parts)


def _training(runs: Sequence[Run], colours: dict[str, str]) -> str:
    panels: dict[str, dict[str, dict[str, figures.Curve]]] = {}
    for run in runs:
        loss = f"{'detection' if run.is_detection else 'pretraining'} loss"
        drawn = {loss: {"train": "train/loss", "val": "val/loss"}}
        for panel, keys in (drawn | {panel: {"val": key} for panel, key in VALIDATED.items()}).items():
            curves = {kind: run.curve(key) for kind, key in keys.items()}
            if curves := {kind: curve for kind, curve in curves.items() if curve[0]}:
                panels.setdefault(panel, {})[run.label] = curves
    order = sorted(panels, key=["pretraining loss", "detection loss", *VALIDATED].index)
    pairs = [order[i : i + 2] for i in range(0, len(order), 2)]
    drawings = [figures.training_curves({name: panels[name] for name in pair}, colours) for pair in pairs]
    caption = "Losses: solid is training (running median), dots are validation."
    return "".join(_svg(figure, caption if index == 0 else "") for index, figure in enumerate(drawings))


def _curves(rows: Mapping[str, Sequence[Run]], colours: dict[str, str]) -> str:
    parts = []
    for about, of_cases in _same_cases(rows):
        froc: dict[str, dict[str, Any]] = {}
        for suffix, threshold in (("", "0.10"), ("@0.50", "0.50")):
            for run in of_cases:
                if (curve := _curve_set(run, f"froc{suffix}")).get("sensitivity"):
                    froc.setdefault(f"FROC at IoU {threshold}, all classes", {})[run.label] = curve
        if froc:
            parts.append(_svg(figures.froc_curves(froc, colours), about))
        panels: dict[str, dict[str, Any]] = {}
        for run in of_cases:
            for name, curve in _curve_set(run, "pr").items():
                if curve and curve.get("recall"):
                    panels.setdefault(name, {})[run.label] = curve
        if panels:
            parts.append(_svg(figures.precision_recall_curves(panels, colours), about))
    return "".join(parts)


def _curve_set(run: Run, key: str) -> dict[str, Any]:
    assert run.result is not None
    return (run.result.get("curves") or {}).get(key) or {}


def _cases(rows: Mapping[str, Sequence[Run]]) -> str:
    """The kept pictures of each data set, case by case, the runs under each other."""
    shown: list[tuple[str, list[tuple[Run, Path]]]] = []
    for _, of_cases in _same_cases(rows):
        files: dict[str, list[tuple[Run, Path]]] = {}
        for run in of_cases:
            for path in sorted((run.folder / "pictures").glob("test_*.npz")):
                files.setdefault(path.stem.removeprefix("test_"), []).append((run, path))
        shown += list(files.items())[:CASES]
    parts = []
    for case, of_case in shown:
        parts.append(f"<h3>{html.escape(case)}</h3>")
        for run, path in of_case:
            source = figures.to_png(case_figure(path))
            label = html.escape(run.label)
            parts.append(
                f'<figure><img class="case" src="{source}" alt="{label}"><figcaption>{label}</figcaption></figure>'
            )
    legend = (
        '<p class="about">Planes through up to three objects of a case; <b class="true">true boxes</b>, '
        '<b class="predicted">predicted boxes with their score</b>: the best of the case, three more than it has '
        "objects, where the plane cuts them. Right of the patient on the left.</p>"
    )
    return legend + "".join(parts) if parts else ""


def _reconstructions(run: Run) -> str:
    """The strips that a pretraining run drew at its first and last validation."""
    steps: dict[int, dict[str, Path]] = {}
    for path in sorted((run.folder / "pictures").glob("step*_*.png")):
        if match := re.fullmatch(r"step(\d+)_(.+)", path.stem):
            steps.setdefault(int(match[1]), {})[match[2]] = path
    parts = []
    for step, names in sorted(steps.items()):
        order = sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
        images = "".join(
            f'<figure><img src="{figures.png_address(names[name].read_bytes())}" alt="{html.escape(name)}">'
            f"<figcaption>{html.escape(name)}</figcaption></figure>"
            for name in order
        )
        parts.append(f'<h3>{html.escape(run.label)}, step {step}</h3><div class="strip">{images}</div>')
    return "".join(parts)


def _case_rows(run: Run) -> str:
    assert run.result is not None
    rows = run.result["cases"]
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in columns)
    body = "".join("<tr>" + "".join(f"<td>{_text(row.get(key))}</td>" for key in columns) + "</tr>" for row in rows)
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<details><summary>{html.escape(run.label)}: {len(rows)} cases</summary>{table}</details>"


def _facts(runs: Sequence[Run]) -> str:
    """One column of facts per run, and the resolved configurations."""
    facts = [_facts_of(run) for run in runs]
    keys = list(dict.fromkeys(key for fact in facts for key in fact))
    head = "".join(f"<th>{html.escape(run.label)}</th>" for run in runs)
    rows = "".join(
        f"<tr><td>{key}</td>" + "".join(f"<td>{html.escape(fact.get(key) or '–')}</td>" for fact in facts) + "</tr>"
        for key in keys
    )
    configs = "".join(
        f"<details><summary>Configuration of {html.escape(run.label)}</summary>"
        f"<pre>{html.escape(to_yaml(run.config))}</pre></details>"
        for run in runs
    )
    table = f'<table class="facts"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="wide">{table}</div>{configs}'


def _facts_of(run: Run) -> dict[str, str | None]:
    config, result = run.config, run.result or {}
    module = config.get("module") or {}
    what = (module.get("detector") or module.get("method") or {}).get("name") or config.get("baseline")
    backbone = (result.get("backbone") or {}) or {"name": (config.get("backbone") or {}).get("name")}
    data, machine = (result.get(key) or {} for key in ("data", "environment"))
    commit, seconds = result.get("commit"), result.get("test_seconds")
    versions = [f"{name} {machine[name]}" for name in ("python", "torch", "lightning", "monai") if machine.get(name)]
    return {
        "method": what,
        "backbone": backbone.get("name"),
        "starts from": backbone.get("init"),
        **in_words(run.cost),
        "prediction time": None if seconds is None else duration(seconds),
        "seed": _text(result.get("seed", config.get("seed"))),
        "data": f"{data.get('name')} ({data.get('hash')})" if data else (config.get("data") or {}).get("store"),
        "licence of the data": data.get("licence"),
        "tested on": machine.get("gpu") or (f"{machine['cpu']}, {machine.get('cores')} cores" if machine else None),
        "software": ", ".join(versions) or None,
        "commit": f"{commit['hash'][:12]}{', with changes' if commit['dirty'] else ''}" if commit else None,
    }


def _svg(figure: Any, caption: str) -> str:
    return f"<figure>{figures.to_svg(figure)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))
