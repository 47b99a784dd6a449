"""`test`: predicts the held-out cases of a run, or of a baseline without learning, and writes the result."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.files import check_writable
from pretrain3d.options import REQUIRED, read_options
from pretrain3d.registry import build
from pretrain3d.reporting.run_folder import RunFolder

USAGE = """\
pretrain3d test RUN [checkpoint=last] [split=test] [samples=1000] [pictures=4] [by=COLUMN cases=TABLE] [tile_batch=N]
pretrain3d test RUN [checkpoint=last] [split=test] [samples=1000] [patches=4]     of a pretraining by reconstruction
pretrain3d test baseline=mean_box|threshold store=STORE out=FOLDER [fold=0 num_folds=5]
                [split=test] [samples=1000] [by=COLUMN cases=TABLE]

Predicts whole volumes and scores them in the voxels of the input files: predictions.json, targets.json (score files)
and result.json with 95 % bootstrap intervals over patients, overall, per class and in thirds of the objects by volume.
Boxes are merged as `sweep` chose on the validation cases, if it did. A run that logged to W&B gets its result there.
Of a pretraining by reconstruction: the error on fixed patches of held-out cases, beside that of the mean predictor and,
where blocks are hidden, of tri-linear in-painting.

  checkpoint=last|best   which weights of the run
  split=test|val         held-out cases, or the validation fold
  samples=N              bootstrap samples, 0 for no intervals
  pictures=N             cases drawn into pictures/, 0 for none
  tile_batch=N           tiles predicted at once; fewer take less memory and give the same boxes; default: as configured
  patches=N              of each case, for reconstruction
  by=COLUMN              the same numbers for the cases of each value of a column (numbers of many values: in thirds) of
  cases=TABLE            a CSV or TSV file with a column `case` (or the case ids in its first column);
                         by=spacing needs no table: the longest side of an input voxel. A run that was tested already
                         is not predicted again, and keeps what other columns gave
  baseline=...           a method without a network: the mean box of each class, placed relative to the volume, or
                         an intensity threshold with connected components; both are fitted to the training fold"""

Prediction = tuple[np.ndarray, np.ndarray, np.ndarray]  # boxes (N, 6) in cached voxels, scores (N,), labels (N,)


def run(paths: list[str], options: dict[str, object]) -> int:
    """Tests a run folder or a baseline; returns the exit status."""
    if len(paths) == 1:
        folder = RunFolder(Path(paths[0]))
        if said := folder.unfinished():
            print(said, file=sys.stderr)
        if (folder.config().get("module") or {}).get("name") == "reconstruction":
            from pretrain3d.commands import reconstruction

            return reconstruction.run(folder, options)
        defaults = {"checkpoint": "last", "split": "test", "samples": 1000, "pictures": 4, "by": "", "cases": "",
                    "tile_batch": None}  # fmt: skip
        test_run(folder, **_checked(read_options(options, defaults)))
        return 0
    if paths:
        raise UserError(f"test takes one run folder, got {len(paths)}: {' '.join(paths)}")
    if "baseline" not in options:
        raise UserError("test takes a run folder, or baseline=mean_box|threshold; see `pretrain3d test --help`")
    from pretrain3d.commands import baseline

    defaults = {"baseline": REQUIRED, "store": REQUIRED, "out": REQUIRED, "fold": 0, "num_folds": 5, "split": "test",
                "samples": 1000, "by": "", "cases": ""}  # fmt: skip
    baseline.test(**_checked(read_options(options, defaults)))
    return 0


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The options, if the numbers among them can be."""
    for key in ("samples", "pictures"):
        if given.get(key, 0) < 0:
            raise UserError(f"{key}={given[key]}: it must be 0 or more")
    return given


def held_out(cases: dict[str, list[str]], split: str) -> list[str]:
    """The case ids of a split.

    Raises:
        UserError: the split is not ``test`` or ``val``, or holds no case.
    """
    if split not in ("test", "val"):
        raise UserError(f"split={split}: it is test or val")
    if not cases[split]:
        raise UserError(f"the store holds no {split} case")
    return cases[split]


def load_run(folder: RunFolder, checkpoint: str, tile_batch: int | None) -> tuple[Any, Any]:
    """The trained detector of a run, and the data that it was trained and validated on.

    Args:
        folder, checkpoint: which weights.
        tile_batch: tiles predicted at once; None: as configured.

    Raises:
        UserError: no run, no such checkpoint, or its store is gone or has changed.
    """
    if tile_batch is not None and (type(tile_batch) is not int or tile_batch < 1):
        raise UserError(f"tile_batch={tile_batch}: expected a whole number from 1 on")
    weights = folder.checkpoint(checkpoint)

    import torch

    from pretrain3d.modules.checkpoint import load_module

    module: Any = load_module(weights, "detection", "cuda" if torch.cuda.is_available() else "cpu")
    module.tile_batch = tile_batch or module.tile_batch
    return module, data_of(folder, module.note)


def data_of(folder: RunFolder, note: dict[str, Any]) -> Any:
    """The data of a run as it was trained on them, whatever the plan of its store says by now.

    Raises:
        UserError: a store is gone, or its cases, classes or spacing have changed.
    """
    from pretrain3d.commands.assemble import about_sets
    from pretrain3d.commands.settings import DATA

    settings, known = folder.config(), note["preprocessing"]
    data = {**settings["data"], "batch_size": note["batch"]["batch_size"], "patch_size": known["patch_size"]}
    if isinstance(data["store"], str):
        data["intensity"] = known["intensity"]
    datamodule: Any = build(DATA, {"name": "data", **data}, "data", seed=settings["seed"])
    store = datamodule.store
    now = {"sets": about_sets({**settings, "data": data}, datamodule), "classes": list(store.classes)}
    folder.check_same(note, {**now, "mirror_classes": dict(store.mirror_classes)})
    return datamodule


def unswept(module: Any, case_ids: list[str]) -> dict[str, Any] | None:
    """What `sweep` chose for the module; None, and the module as configured, where it chose on these cases."""
    chosen: dict[str, Any] | None = module.note.get("inference")
    if chosen is None or not set(case_ids) & set(chosen["cases"]):
        return chosen
    module.merging = module.unswept
    print("the merge settings of this checkpoint were chosen on these cases: those of its config are used instead")
    return None


def test_run(
    folder: RunFolder,
    checkpoint: str,
    split: str,
    samples: int,
    pictures: int,
    by: str,
    cases: str,
    tile_batch: int | None,
) -> None:
    """Predicts with the run's weights; skips what `result.json` already holds for the same weights and options."""
    module, datamodule = load_run(folder, checkpoint, tile_batch)

    from pretrain3d.backbones.transfer import fingerprint
    from pretrain3d.data.leakage import find, warning
    from pretrain3d.evaluation.strata import chosen_strata
    from pretrain3d.reporting.figures import save_case_picture
    from pretrain3d.reporting.results import is_current

    settings = folder.config()
    case_ids = held_out({"test": datamodule.test_ids, "val": datamodule.val_ids}, split)
    strata = chosen_strata(cases, by, truth_of(datamodule.store, case_ids))
    chosen = unswept(module, case_ids)
    threshold = chosen["operating"]["threshold"] if chosen else None
    step = module.note["source"]["step"]
    asked = {"checkpoint": checkpoint, "split": split, "samples": samples, "step": step,
             "fingerprint": fingerprint(module.state_dict()), "merging": module.merging.to_dict(),
             "threshold": threshold, "cases": hash_of(datamodule.store, case_ids)}  # fmt: skip
    if is_current(folder.path / "result.json", asked):
        print(f"{folder.path / 'result.json'} is of these weights already, nothing to predict")
        write_strata(folder.path, by, strata, samples)
        return

    check_writable(folder.path)
    say_what_is_replaced(folder.path, asked)

    def predict(case_id: str) -> Prediction:
        image, case = datamodule.volume(case_id)
        try:
            found = module.predict_image(image, datamodule.pad_value(case_id))
        except UserError as error:
            raise UserError(f"case {case_id}: {error}") from error
        boxes, scores, labels = (value.cpu().numpy() for value in (found.boxes, found.scores, found.labels))
        if case_ids.index(case_id) < pictures:
            path = folder.path / "pictures" / f"test_{case_id}.npz"
            save_case_picture(path, image[0].numpy(), case.boxes, case.labels, boxes, labels, scores, module.classes,
                              spacing_mm=case.frame.spacing_mm)  # fmt: skip
        return boxes, scores, labels

    leakage = find(module.note.get("pretrained_on"), [(datamodule.store, split, case_ids)])
    if leakage:
        print(warning(leakage, module.note["transfer"]["path"]), file=sys.stderr)
    trained = [row for row in module.note.get("leakage") or [] if row["split"] == "train"]
    about = {"asked": asked, "leakage": leakage + trained, **about_run(folder, settings, module)}
    score_cases(folder.path, settings["name"], datamodule.store, case_ids, predict, about, samples, threshold)
    write_strata(folder.path, by, strata, samples)
    log_to_wandb(folder, settings)


def say_what_is_replaced(folder: Path, asked: dict[str, Any]) -> None:
    """Prints a line if the folder holds the result of another split, checkpoint or baseline."""
    from pretrain3d.reporting.results import read_result

    if not (folder / "result.json").is_file():
        return
    old = read_result(folder).get("asked") or {}
    keys = [key for key in ("baseline", "checkpoint", "split") if key in old]
    if any(old[key] != asked.get(key) for key in keys):
        was = ", ".join(f"{key}={old[key]}" for key in keys)
        print(f"{folder / 'result.json'} of {was} is replaced", file=sys.stderr)


def about_run(folder: RunFolder, settings: dict[str, Any], module: Any) -> dict[str, Any]:
    """``config, seed, cost, backbone`` of the result of a trained run; see `reporting.results.write_result`."""
    from pretrain3d.backbones.transfer import fingerprint
    from pretrain3d.reporting.cost import cost_of

    step, transfer = module.note["source"]["step"], module.note.get("transfer")
    batch = math.prod(module.note["batch"].values()) * module.note["processes"]
    return {
        "config": settings,
        "seed": settings["seed"],
        "cost": {**cost_of(folder), "steps": step, "samples": step * batch},
        "backbone": {
            "name": settings["backbone"]["name"],
            "fingerprint": fingerprint(module.best_networks()[0].state_dict()),
            "init": transfer["source"]["method"] if transfer else "scratch",
            "transfer": transfer,
        },
    }


def log_to_wandb(folder: RunFolder, settings: dict[str, Any]) -> None:
    """Adds the result to the W&B run that training left in the folder; nothing where it left none."""
    node = (settings.get("logger") or {}).get("wandb")
    if node is None or not (folder.path / "wandb" / "run-id.txt").is_file():
        return
    from pretrain3d.reporting.results import read_result
    from pretrain3d.reporting.wandb_logger import log_result

    log_result(node, folder.path, settings, read_result(folder.path))


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
    write(folder / "predictions.json", data.classes, found)
    write(folder / "targets.json", data.classes, truth)
    groups = groups_of(truth)
    scored = evaluate_with_intervals(found, truth, data.classes, samples=samples, groups=groups)
    sizes = by_size(match(found, truth, data.classes), found, truth, samples=samples, groups=groups)
    operating = None if threshold is None else measure_at(threshold, found, truth, data.classes)
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


def write_strata(folder: Path, column: str, strata: dict[str, list[str]], samples: int) -> None:
    """Adds what the tested folder's score files say of each stratum to its `result.json`, and prints it."""
    if not strata:
        return
    from pretrain3d.commands.score import strata_table
    from pretrain3d.evaluation.matching import match
    from pretrain3d.evaluation.scorefile import groups_of, read_pair
    from pretrain3d.evaluation.strata import by_stratum
    from pretrain3d.reporting.results import read_result, write_json

    classes, found, truth = read_pair(folder / "predictions.json", folder / "targets.json")
    parts = by_stratum(match(found, truth, classes), strata, samples=samples, groups=groups_of(truth))
    result = read_result(folder)
    write_json(folder / "result.json", {**result, "by": {**result.get("by", {}), column: parts}})
    print(strata_table(column, parts))


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
