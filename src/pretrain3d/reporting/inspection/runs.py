"""Configurations, runs, results and score files, in lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain3d.config import SECTIONS, UserError, load, read_yaml, to_yaml
from pretrain3d.evaluation.scorefile import read
from pretrain3d.registry import check_names
from pretrain3d.reporting.cost import in_words
from pretrain3d.reporting.inspection.lines import Rows, aligned, components
from pretrain3d.reporting.results import read_result, read_rows
from pretrain3d.reporting.run_folder import RunFolder
from pretrain3d.reporting.tables import shown

HEADLINE = (
    "mAP", "AP@0.10", "AP@0.50", "FROC@0.10", "FROC@0.50", "network", "mean_predictor", "inpainting_linear", "copy",
    "dice", "volume_error", "trivial_dice",
)  # fmt: skip


def configuration_lines(path: Path, overrides: list[str]) -> list[str]:
    """A configuration, resolved, as YAML."""
    if path.exists():
        content = read_yaml(path)
        if not isinstance(content, dict) or not {"base", *SECTIONS} & content.keys():
            raise UserError(f"{path} is no configuration: it has none of the sections {', '.join(SECTIONS)}")
    config = load(path, overrides)
    if "module" in config:  # a base need not name everything
        check_names(config)
    applied = f" with {' '.join(overrides)}" if overrides else ""
    return [f"# {path}: configuration{applied}, resolved", *to_yaml(config).splitlines()]


def run_lines(path: Path) -> list[str]:
    """The folder of a run, with its result."""
    folder = RunFolder(path)
    config, state = folder.config(), folder.state()
    steps = (config.get("trainer") or {}).get("max_steps")
    status = "unfinished" if state["status"] == "running" else state["status"]  # one that was killed says running
    checkpoints = sorted((path / "checkpoints").glob("*.ckpt"))
    rows: Rows = [
        ("name", config.get("name", path.name)),
        ("state", f"{status} at step {state['step']}" + (f" of {steps}" if steps and steps > 0 else "")),
        ("store", (config.get("data") or {}).get("store", "")),
        ("backbone", (config.get("backbone") or {}).get("name", "")),
        ("transfer", _transfer(config.get("transfer"))),
        ("module", components(config.get("module") or {})),
        *_last_metrics(path / "metrics.csv"),
        ("checkpoints", ", ".join(f"{file.name} ({file.stat().st_size / 1e6:.1f} MB)" for file in checkpoints)),
        ("pictures", len(list((path / "pictures").glob("*"))) or ""),
    ]
    about_result = _result(path / "result.json") if (path / "result.json").is_file() else []
    return aligned(f"{path}: run", rows) + about_result


def _transfer(node: Mapping[str, Any] | None) -> str:
    return (node or {}).get("path") or "none, from scratch"


def _last_metrics(path: Path) -> Rows:
    """The newest value of every logged key, and the best one of what is validated."""
    if not path.is_file():
        return []
    latest: dict[str, tuple[str, float]] = {}
    best: dict[str, tuple[str, float]] = {}
    for row in read_rows(path):
        for key, text in row.items():
            if key != "step":
                latest[key] = (row["step"], float(text))
                if key == "val/mAP" and not float(text) <= best.get(key, ("", float("-inf")))[1]:
                    best[key] = latest[key]
    rows: Rows = [(key, f"{value:.4g} at step {step}") for key, (step, value) in sorted(latest.items())]
    return rows + [(f"best {key}", f"{value:.4g} at step {step}") for key, (step, value) in best.items()]


def json_lines(path: Path) -> list[str]:
    """A result or a score file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what is no UTF-8
        raise UserError(f"{path} is not JSON: {error}") from error
    if isinstance(content, dict) and "metrics" in content:
        return _result(path)
    if isinstance(content, dict) and {"classes", "cases"} <= content.keys():
        return _boxes(path, content)
    keys = ", ".join(list(content)[:8]) if isinstance(content, dict) else f"a {type(content).__name__}"
    raise UserError(f"{path} is neither a result nor a score file; it holds {keys}")


def _result(path: Path) -> list[str]:
    result = read_result(path)
    data, backbone, cost, commit = (result.get(key) or {} for key in ("data", "backbone", "cost", "commit"))
    split = (result.get("asked") or {}).get("split")
    number = f"{len(result['cases'])} {split}" if split else f"{len(result['cases'])}"
    rows: Rows = [
        *[(key, _interval(entry)) for key, entry in result["metrics"].items() if key in HEADLINE],
        *[
            (f"{key} of {name}", _interval(keys[key]))
            for name, keys in result["per_class"].items()
            for key in ("mAP", "dice")
            if key in (keys or {})
        ],
        ("cases", f"{number}, of {data.get('name', 'unknown data')}, hash {data.get('hash', 'unknown')}"),
        ("backbone", " ".join(f"{key} {backbone[key]}" for key in ("name", "fingerprint") if key in backbone)),
        ("transfer", _transfer(backbone["transfer"]) if "transfer" in backbone else ""),
        ("seed", result["seed"]),
        *in_words(cost).items(),
        ("commit", f"{commit.get('hash', 'unknown')}{' with changes' if commit.get('dirty') else ''}"),
    ]
    return aligned(f"{path}: result of {result['run']}", rows)


def _interval(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None:
        return "null (no object of this class)"
    return shown([entry])


def _boxes(path: Path, content: Mapping[str, Any]) -> list[str]:
    scored = any(isinstance(case, dict) and "scores" in case for case in content["cases"].values())
    file = read(path, "predictions" if scored else "targets")
    boxes = Counter(int(label) for case in file.cases.values() for label in case["labels"])
    rows: Rows = [
        ("cases", f"{len(file.cases)}, {sum(not len(case['labels']) for case in file.cases.values())} without a box"),
        *[(name, f"{boxes[index]} boxes") for index, name in enumerate(file.classes)],
    ]
    if scored and boxes:
        scores = [float(score) for case in file.cases.values() for score in case["scores"]]
        rows.append(("scores", f"{min(scores):.3g} to {max(scores):.3g}"))
    return aligned(f"{path}: score file of {'predictions' if scored else 'targets'}", rows)
