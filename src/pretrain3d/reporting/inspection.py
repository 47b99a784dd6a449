"""What a file or folder is, in plain lines: data, store, plan, configuration, run, checkpoint, result, boxes."""

from __future__ import annotations

import csv
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pretrain3d.config import SECTIONS, UserError, load, read_yaml, to_yaml
from pretrain3d.registry import check_names, resolve

Rows = list[tuple[str, object]]  # what is said of a thing, line by line


def describe(path: Path, overrides: list[str]) -> list[str]:
    """The lines about one path, the first one saying what it is.

    Args:
        path: file or folder.
        overrides: ``key=value`` for a configuration.

    Raises:
        UserError: no such path, nothing that pretrain3d knows, damaged, or overrides for something else.
    """
    say = _recognised(path)
    if say is _configuration:
        return _configuration(path, overrides)
    if overrides:
        raise UserError(f"{overrides[0]} overrides a configuration, and {path} is none")
    return say(path)


def _recognised(path: Path) -> Callable[..., list[str]]:
    if not path.exists() and path.parts[:1] != ("configs",):
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        return _store if (path / "index.json").is_file() else _run if (path / "config.yaml").is_file() else _raw
    if path.suffix in (".yaml", ".yml"):
        return _plan if path.name == "plan.yaml" else _configuration
    if path.suffix == ".json":
        return _json
    if zipfile.is_zipfile(path):  # the container of torch.save
        return _weights
    raise UserError(
        f"{path} is nothing that show knows: raw data, a store, a plan, a configuration, a run, a checkpoint, "
        "an exported backbone, a result or a score file"
    )


def _raw(path: Path) -> list[str]:
    from pretrain3d.data.readers import READERS

    reasons = []
    for name in READERS:
        if name == "images" and (path / "dataset.json").is_file():
            continue  # any folder of images would do for it, and a data set with a mistake is none
        try:
            reader = resolve(READERS, name, "reader")(path)
            cases = reader.cases()
        except UserError as error:
            reasons.append(f"{name}: {error}")
            continue
        splits = Counter(case.split for case in cases)
        rows: Rows = [
            ("cases", f"{len(cases)} ({_counts(splits)}), {len({case.group for case in cases})} patients"),
            *[("note", line) for line in reader.remarks()],
            ("classes", ", ".join(reader.classes) or "none"),
            ("mirrored", ", ".join(f"{a} <-> {b}" for a, b in reader.mirror_classes.items() if a < b)),
            ("channels", ", ".join(reader.modality) or "not said by the files; give modality= to prepare"),
            ("organ map", ", ".join(reader.semantic_classes)),
            ("licence", reader.licence or "unknown"),
        ]
        return _lines(f"{path}: raw data of {reader.name}, reader={name}", rows)
    raise UserError(f"{path} is neither a store, a run nor raw data that a reader knows ({'; '.join(reasons)})")


def _store(path: Path) -> list[str]:
    import numpy as np

    from pretrain3d.data.store import Store

    store = Store(path)
    cases = list(store.cases.values())
    shapes = np.array([case.shape for case in cases])
    splits = Counter(case.split for case in cases)
    rows: Rows = [
        ("cases", f"{len(cases)} ({_counts(splits)}), {len({case.group for case in cases})} patients"),
        ("channels", ", ".join(store.modality)),
        ("spacing", f"{_by(store.spacing_mm)} mm"),
        ("shape", f"median {_by(np.median(shapes, axis=0))}, {_by(shapes.min(axis=0))} to {_by(shapes.max(axis=0))}"),
        *[(f"class {index}", _class(store, index)) for index in range(len(store.classes))],
        ("empty", f"{sum(not len(case.boxes) for case in cases if case.annotated)} annotated cases without an object"),
        ("specks", f"{specks} too small to be objects" if (specks := sum(case.specks for case in cases)) else ""),
        ("mirrored", ", ".join(f"{a} <-> {b}" for a, b in store.mirror_classes.items() if a < b)),
        ("organ map", ", ".join(store.semantic_classes)),
        *_folds(store),
        ("licence", store.licence or "unknown"),
        ("data hash", store.data_hash),
    ]
    if (path / "plan.yaml").is_file():
        rows += _flat(store.plan, "plan.")
    return _lines(f"{path}: store of the data set {store.name}", rows)


def _class(store: Any, index: int) -> str:
    import numpy as np

    sizes = [case.boxes[case.labels == index] for case in store.cases.values()]
    found = sum(len(boxes) > 0 for boxes in sizes)
    boxes = np.concatenate(sizes)
    if not len(boxes):
        return f"{store.classes[index]}, no object"
    edges = (boxes[:, 3:] - boxes[:, :3]) * np.asarray(store.spacing_mm)
    low, median, high = np.percentile(np.cbrt(edges.prod(axis=1)), [0, 50, 100])
    size = f"edge {low:.0f} to {high:.0f} mm, median {median:.0f}"
    return f"{store.classes[index]}, {len(boxes)} objects in {found} cases, {size}"


def _folds(store: Any) -> Rows:
    from pretrain3d.data.splits import fold_cases

    try:
        split = fold_cases(store, 0)
    except UserError:  # fewer patients than folds
        return [("folds", "too few patients for 5")]
    name = f"fold 0 of {len(store.folds)} (given)" if store.folds else "fold 0"
    return [(name, ", ".join(f"{len(ids)} {name}" for name, ids in split.items()))]


def _plan(path: Path) -> list[str]:
    return _lines(f"{path}: plan of a store", list(_flat(read_yaml(path))))


def _configuration(path: Path, overrides: list[str]) -> list[str]:
    if path.exists():
        content = read_yaml(path)
        if not isinstance(content, dict) or not {"base", *SECTIONS} & content.keys():
            raise UserError(f"{path} is no configuration: it has none of the sections {', '.join(SECTIONS)}")
    config = load(path, overrides)
    if "module" in config:  # a base need not name everything
        check_names(config)
    applied = f" with {' '.join(overrides)}" if overrides else ""
    return [f"# {path}: configuration{applied}, resolved", *to_yaml(config).splitlines()]


def _run(path: Path) -> list[str]:
    from pretrain3d.reporting.run_folder import RunFolder

    folder = RunFolder(path)
    config, state = folder.config(), folder.state()
    steps = (config.get("trainer") or {}).get("max_steps")
    checkpoints = sorted((path / "checkpoints").glob("*.ckpt"))
    rows: Rows = [
        ("name", config.get("name", path.name)),
        ("state", f"{state['status']} at step {state['step']}" + (f" of {steps}" if steps and steps > 0 else "")),
        ("store", (config.get("data") or {}).get("store", "")),
        ("backbone", (config.get("backbone") or {}).get("name", "")),
        ("transfer", (config.get("transfer") or {}).get("path") or "none, from scratch"),
        ("module", " ".join(_names(config.get("module") or {}))),
        *_last_metrics(path / "metrics.csv"),
        ("checkpoints", ", ".join(f"{file.name} ({file.stat().st_size / 1e6:.1f} MB)" for file in checkpoints)),
        ("pictures", len(list((path / "pictures").glob("*"))) or ""),
    ]
    lines = _lines(f"{path}: run", rows)
    return lines + (_result(path / "result.json") if (path / "result.json").is_file() else [])


def _names(module: Mapping[str, Any]) -> list[str]:
    nodes = [module, module.get("method") or {}, module.get("detector") or {}]
    return [node["name"] for node in nodes if "name" in node]


def _last_metrics(path: Path) -> Rows:
    """The newest value of every logged key, and the best one of what is validated."""
    if not path.is_file():
        return []
    latest: dict[str, tuple[str, float]] = {}
    best: dict[str, tuple[str, float]] = {}
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):  # the logger's reader imports lightning
        for key, text in row.items():
            if key != "step" and text:
                latest[key] = (row["step"], float(text))
                if key == "val/mAP" and not float(text) <= best.get(key, ("", float("-inf")))[1]:
                    best[key] = latest[key]
    rows: Rows = [(key, f"{value:.4g} at step {step}") for key, (step, value) in sorted(latest.items())]
    return rows + [(f"best {key}", f"{value:.4g} at step {step}") for key, (step, value) in best.items()]


def _weights(path: Path) -> list[str]:
    from pretrain3d.backbones.checkpoints.importing import form_of
    from pretrain3d.backbones.torchfile import read_torch

    content = read_torch(path, mmap=True)
    if isinstance(content, dict) and "weights" in content and "backbone" in content:
        return _export(path)
    ours = not isinstance(content, dict) or {"pretrain3d", "state_dict"} <= set(content)
    if not ours and (form := form_of(content)):
        plan = content.get("nnssl_adaptation_plan")
        about = plan.get("architecture_plans") if isinstance(plan, dict) else None
        weights = content.get("network_weights")
        return _lines(
            f"{path}: weights in the form {form}; `pretrain3d import {path} out=FILE` reads them",
            [
                ("architecture", about.get("arch_class_name") if isinstance(about, dict) else ""),
                ("tensors", len(weights) if isinstance(weights, dict) else ""),
            ],
        )
    return _checkpoint(path)


def _export(path: Path) -> list[str]:
    from pretrain3d.backbones.transfer import load_export

    content = load_export(path)
    return _lines(f"{path}: exported backbone, version {content['version']}", _travelling(content, content["weights"]))


def _checkpoint(path: Path) -> list[str]:
    from pretrain3d.modules.base import NOTE
    from pretrain3d.modules.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(path)
    note, state = checkpoint[NOTE], checkpoint["state_dict"]
    prefix = "backbone." if note["weights"] == "online" else "averaged.backbone."
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    swept = note.get("inference") or {}
    rows: Rows = [
        ("module", " ".join(_names(note["module"]))),
        ("classes", ", ".join(note["classes"]) if note["kind"] == "detection" else ""),
        ("step", checkpoint.get("global_step", "unknown")),
        ("weights", f"{note['weights']} are used"),
        *_travelling(note, weights),
        *_flat({key: swept[key] for key in ("metric", "value", "merging", "operating") if key in swept}, "sweep."),
    ]
    return _lines(f"{path}: checkpoint of a {note['kind']} module", rows)


def _travelling(content: Mapping[str, Any], weights: Mapping[str, Any]) -> Rows:
    """Backbone, preprocessing and source: what a checkpoint and an export have in common."""
    from pretrain3d.backbones.transfer import fingerprint

    arguments = {key: value for key, value in content["backbone"].items() if key != "name"}
    return [
        ("backbone", f"{content['backbone']['name']} ({', '.join(f'{k}={v}' for k, v in arguments.items())})"),
        ("parameters", f"{sum(tensor.numel() for tensor in weights.values()):,} in the backbone"),
        ("fingerprint", fingerprint(weights)),
        *_flat(content["preprocessing"], "preprocessing."),
        *_flat(content["source"], "source."),
    ]


def _json(path: Path) -> list[str]:
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
    from pretrain3d.reporting.cost import in_words
    from pretrain3d.reporting.results import read_result

    result = read_result(path)
    data, backbone, cost = (result.get(key) or {} for key in ("data", "backbone", "cost"))
    commit = result.get("commit") or {}
    rows: Rows = [
        *[(key, _interval(entry)) for key, entry in result["metrics"].items() if key in _HEADLINE],
        *[
            (f"{key} of {name}", _interval(keys[key]))
            for name, keys in result["per_class"].items()
            for key in ("mAP", "dice")
            if key in (keys or {})
        ],
        ("cases", f"{len(result['cases'])}, of {data.get('name', 'unknown data')}, hash {data.get('hash', 'unknown')}"),
        ("backbone", " ".join(f"{key} {value}" for key, value in backbone.items())),
        ("seed", result["seed"]),
        *in_words(cost).items(),
        ("commit", f"{commit.get('hash', 'unknown')}{' with changes' if commit.get('dirty') else ''}"),
    ]
    return _lines(f"{path}: result of {result['run']}", rows)


_HEADLINE = (
    "mAP", "AP@0.10", "AP@0.50", "FROC@0.10", "FROC@0.50", "network", "mean_predictor", "inpainting_linear", "dice",
    "volume_error", "trivial_dice",
)  # fmt: skip


def _interval(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None:
        return "null (no object of this class)"
    known = entry.get("low") is not None and entry.get("high") is not None
    return f"{entry['value']:.3f}" + (f" [{entry['low']:.3f}, {entry['high']:.3f}]" if known else "")


def _boxes(path: Path, content: Mapping[str, Any]) -> list[str]:
    from pretrain3d.evaluation.scorefile import read

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
    return _lines(f"{path}: score file of {'predictions' if scored else 'targets'}", rows)


def _lines(title: str, rows: Rows) -> list[str]:
    """Aligned lines; what has nothing to say is left out."""
    shown = [(key, value) for key, value in rows if str(value)]
    width = max((len(key) for key, _ in shown), default=0)
    return [title, *(f"  {key:<{width}}  {value}" for key, value in shown)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "none" if value in (None, "", [], {}) else value


def _by(values: Iterable[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in ("train", "val", "test", "pretrain") if counts.get(name))
