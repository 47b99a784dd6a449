"""The held-out cases of a store as `test` predicts and scores them, and the files that it writes of them."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.files import check_writable

Prediction = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes (N, 6) in cached voxels, scores (N,), labels (N,)


def held_out(cases: dict[str, list[str]], split: str) -> list[str]:
    """The case ids of a split.

    Raises:
        UserError: the split is not ``test`` or ``val``, or holds no case.
    """
    if split not in ("test", "val"):
        raise UserError(f"split={split}: it is test or val")
    if not cases[split]:
        raise UserError(f"the store holds no {split} case for this fold")
    return cases[split]


def check_annotated(data: Any, case_ids: list[str], split: str) -> None:
    """Says that there is nothing to score before hours of prediction do, as where a challenge keeps its test labels.

    Raises:
        UserError: no class was annotated in any of the cases.
    """
    if not any(data.cases[case_id].annotated for case_id in case_ids):
        other = "; split=val scores those of the validation fold" if split == "test" else ""
        raise UserError(f"{data.path}: no class was annotated in its {len(case_ids)} {split} cases, nothing can be "
                        f"scored{other}")  # fmt: skip


def truth_of(data: Any, case_ids: list[str]) -> dict[str, dict[str, Any]]:
    """What there is to find in cases of a store, in the voxels of their input files, as a score file says it."""
    return {
        case.id: {
            "boxes": case.frame.to_original(case.boxes), "labels": case.labels, "annotated": list(case.annotated),
            "volumes_mm3": case.volumes_mm3, "spacing_mm": np.linalg.norm(case.frame.affine[:3, :3], axis=0),
            "group": case.group,
        }
        for case in (data.cases[case_id] for case_id in case_ids)
    }  # fmt: skip


def hash_of(data: Any, case_ids: list[str]) -> str:
    """A short hash of what is to be found in cases of a store: it changes with an annotation, a class or the cases."""
    records = [data.cases[case_id].to_dict() for case_id in sorted(case_ids)]
    keys = ("id", "group", "shape", "frame", "boxes", "labels", "volumes_mm3", "annotated")
    known = [data.classes, [[record[key] for key in keys] for record in records]]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def is_to_be_tested(folder: Path, asked: dict[str, Any], what: str, files: Iterable[str] = ()) -> bool:
    """Whether the folder lacks the result of exactly ``asked``, or one of the ``files`` that it was made from.

    Prints a line if it has all, as ``what`` was tested, or if it has the result of another split, checkpoint or
    baseline, which is replaced.

    Raises:
        OSError: no file can be written there.
    """
    from pretrain3d.reporting.results import is_current, read_result

    path = folder / "result.json"
    if all((folder / name).is_file() for name in files) and is_current(path, asked):
        print(f"{path} is of {what} already, nothing to predict")
        return False
    check_writable(folder)
    if path.is_file():
        old = read_result(path).get("asked") or {}
        keys = [key for key in ("baseline", "checkpoint", "split") if key in old]
        if any(old[key] != asked.get(key) for key in keys):
            was = ", ".join(f"{key}={old[key]}" for key in keys)
            print(f"{path} of {was} is replaced", file=sys.stderr)
    return True


def score_cases(
    folder: Path,
    name: str,
    data: Any,
    case_ids: list[str],
    predict: Callable[[str], Prediction],
    about: dict[str, Any],
    samples: int,
    threshold: float | None = None,
) -> None:
    """Predicts and scores cases in the voxels of their input files; writes score files and result.json.

    With the ``threshold`` of an operating point the result also says what boxes from this score on find.
    """
    from tqdm import tqdm

    from pretrain3d.detection.sweep import measure_at
    from pretrain3d.evaluation.matching import match
    from pretrain3d.evaluation.scorefile import groups_of, write
    from pretrain3d.evaluation.sizes import by_size
    from pretrain3d.evaluation.statistics import evaluate_with_intervals
    from pretrain3d.reporting.results import write_result

    start = time.perf_counter()
    found: dict[str, Any] = {}
    for case_id in tqdm(case_ids, desc=f"test {name}", unit="case"):
        case = data.cases[case_id]
        boxes, scores, labels = predict(case_id)
        found[case_id] = {"boxes": case.frame.to_original(boxes), "scores": scores, "labels": labels}
    truth = truth_of(data, case_ids)
    seconds = time.perf_counter() - start
    (folder / "result.json").unlink(missing_ok=True)  # no result may ever stand beside the boxes of another one
    write(folder / "predictions.json", data.classes, found)
    write(folder / "targets.json", data.classes, truth)
    matches, groups = match(found, truth, data.classes), groups_of(truth)
    scored = evaluate_with_intervals(matches, samples=samples, groups=groups)
    sizes = by_size(matches, found, truth, samples=samples, groups=groups)
    operating = None if threshold is None else measure_at(threshold, matches)
    write_result(
        folder,
        run=name,
        operating=operating,
        by_size=sizes,
        **scored,
        **about,
        data={"hash": data.data_hash, "name": data.name, "licence": data.licence, "cases": len(case_ids)},
        test_seconds=seconds,
    )
    shown = ("mAP", "AP@0.10", "AP@0.50", "FROC@0.10")
    print(f"{name}: " + ", ".join(f"{key} {_text(scored['metrics'][key]['value'])}" for key in shown))
    if operating is not None:
        print(f"at score {threshold:.3f}: sensitivity {_text(operating['sensitivity'])}, "
              f"{operating['false_positives_per_case']:.2f} false positives per case")  # fmt: skip
    print(f"{folder / 'result.json'} ({len(case_ids)} cases, {seconds:.0f} s)")


def write_strata(folder: Path, column: str, values: dict[str, str], samples: int) -> None:
    """Adds what the tested folder's score files say of the cases of each value to its `result.json`, and prints it."""
    if not values:
        return
    from pretrain3d.commands.score import strata_table
    from pretrain3d.evaluation.matching import match
    from pretrain3d.evaluation.scorefile import groups_of, read_pair
    from pretrain3d.evaluation.strata import by_stratum, strata_of
    from pretrain3d.reporting.results import read_result, write_json

    classes, found, truth = read_pair(folder / "predictions.json", folder / "targets.json")
    parts = by_stratum(match(found, truth, classes), strata_of(values), samples=samples, groups=groups_of(truth))
    result = read_result(folder)
    added = {"by": parts, "columns": values}
    more = {key: {**result.get(key, {}), column: value} for key, value in added.items()}
    write_json(folder / "result.json", {**result, **more})
    print(strata_table(column, parts))


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
