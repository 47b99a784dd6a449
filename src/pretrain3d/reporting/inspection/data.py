"""Raw data, stores and their plans, in lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain3d.config import UserError, by_text, read_yaml
from pretrain3d.data.readers import READERS
from pretrain3d.data.splits import SPLITS, fold_cases
from pretrain3d.data.store import Store
from pretrain3d.registry import resolve
from pretrain3d.reporting.inspection.lines import Rows, aligned, flat


def raw_lines(path: Path) -> list[str]:
    """A folder of raw data, by the first reader that knows it."""
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
        rows: Rows = [
            ("cases", _counted(cases)),
            *[("note", line) for line in reader.remarks()],
            ("classes", ", ".join(reader.classes) or "none"),
            ("mirrored", _mirrored(reader.mirror_classes)),
            ("channels", ", ".join(reader.modality) or "not said by the files; give modality= to prepare"),
            ("organ map", ", ".join(reader.semantic_classes)),
            ("licence", reader.licence or "unknown"),
        ]
        return aligned(f"{path}: raw data of {reader.name}, reader={name}", rows)
    raise UserError(f"{path} is neither a store, a run nor raw data that a reader knows ({'; '.join(reasons)})")


def store_lines(path: Path) -> list[str]:
    """A store, with its plan."""
    store = Store(path)
    cases = list(store.cases.values())
    shapes = np.percentile([case.shape for case in cases], [50, 0, 100], axis=0)
    median, least, most = map(by_text, shapes)
    rows: Rows = [
        ("cases", _counted(cases)),
        ("channels", ", ".join(store.modality)),
        ("spacing", f"{by_text(store.spacing_mm)} mm"),
        ("shape", f"median {median}, {least} to {most}"),
        *[(f"class {index}", _class(store, index)) for index in range(len(store.classes))],
        ("empty", f"{sum(not len(case.boxes) for case in cases if case.annotated)} annotated cases without an object"),
        ("specks", f"{specks} too small to be objects" if (specks := sum(case.specks for case in cases)) else ""),
        ("mirrored", _mirrored(store.mirror_classes)),
        ("organ map", ", ".join(store.semantic_classes)),
        *_folds(store),
        ("licence", store.licence or "unknown"),
        ("data hash", store.data_hash),
    ]
    if (path / "plan.yaml").is_file():
        rows += flat(store.plan, "plan.")
    return aligned(f"{path}: store of the data set {store.name}", rows)


def _class(store: Store, index: int) -> str:
    sizes = [case.boxes[case.labels == index] for case in store.cases.values()]
    found = sum(len(boxes) > 0 for boxes in sizes)
    boxes = np.concatenate(sizes)
    if not len(boxes):
        return f"{store.classes[index]}, no object"
    edges = (boxes[:, 3:] - boxes[:, :3]) * np.asarray(store.spacing_mm)
    low, median, high = np.percentile(np.cbrt(edges.prod(axis=1)), [0, 50, 100])
    size = f"edge {low:.0f} to {high:.0f} mm, median {median:.0f}"
    return f"{store.classes[index]}, {len(boxes)} objects in {found} cases, {size}"


def _folds(store: Store) -> Rows:
    try:
        split = fold_cases(store, 0)
    except UserError:  # fewer patients than folds
        return [("folds", "too few patients for 5")]
    name = f"fold 0 of {len(store.folds)} (given)" if store.folds else "fold 0"
    return [(name, ", ".join(f"{len(ids)} {name}" for name, ids in split.items()))]


def plan_lines(path: Path) -> list[str]:
    """The plan of a store."""
    return aligned(f"{path}: plan of a store", list(flat(read_yaml(path))))


def _counted(cases: Sequence[Any]) -> str:
    splits = Counter(case.split for case in cases)
    counts = ", ".join(f"{splits[name]} {name}" for name in SPLITS if splits[name])
    return f"{len(cases)} ({counts}), {len({case.group for case in cases})} patients"


def _mirrored(classes: Mapping[str, str]) -> str:
    return ", ".join(f"{a} <-> {b}" for a, b in classes.items() if a < b)
