"""`sweep`: chooses how boxes are merged and where scores are cut, on validation cases; kept with the weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pretrain3d.commands.tested import hash_of, held_out
from pretrain3d.commands.trained import load_run
from pretrain3d.config import UserError
from pretrain3d.files import check_writable
from pretrain3d.options import read_options
from pretrain3d.reporting.run_folder import RunFolder

USAGE = """\
pretrain3d sweep RUN ... [checkpoint=last] [metric=mAP] [false_positives=1] [tile_batch=N]

Predicts the validation cases once, tries out how the boxes of tiles and mirrored views are merged (IoU thresholds,
clustering or NMS, least score, least size), and puts the best setting into the checkpoint, where `test` and `predict`
find it. Also stored: the operating point, the score from which on a validation case has so many false positives. The
cases that `test` reports take no part. Several runs (the folds of one configuration, with one module.merging) are swept
together and get the same setting, with which `predict` takes them as an ensemble; clustering or NMS is then left as
configured: NMS keeps the best score of all, so that with every network more false positives pass the threshold.

  checkpoint=last|best   which weights of the runs
  metric=mAP             what is maximised: mAP, AP@0.10, FROC@0.10, ...
  false_positives=K      per case, of the operating point (predict threshold=operating)
  tile_batch=N           tiles predicted at once; fewer take less memory; default: as configured

Every trial is written to <run>/sweep.json."""


def run(paths: list[str], options: dict[str, object]) -> int:
    """Sweeps runs; returns the exit status."""
    defaults = {"checkpoint": "last", "metric": "mAP", "false_positives": 1.0, "tile_batch": None}
    given = read_options(options, defaults)
    if not paths:
        raise UserError("sweep takes at least one run folder; see `pretrain3d sweep --help`")
    folders = [RunFolder(Path(path)) for path in paths]
    for index, folder in enumerate(folders):
        if folder.path.resolve() in [other.path.resolve() for other in folders[:index]]:
            raise UserError(f"{paths[index]} is given twice")
    if not given["false_positives"] > 0:
        raise UserError(f"false_positives={given['false_positives']}: expected a number above 0")
    sweep_runs(folders, **given)
    return 0


def sweep_runs(
    folders: list[RunFolder], checkpoint: str, metric: str, false_positives: float, tile_batch: int | None
) -> None:
    """Sweeps the pooled validation cases of runs; skips what their checkpoints hold already.

    Raises:
        UserError: the runs have different classes or settings to start from, or there is no object to find.
    """
    from pretrain3d.detection.sweep import SweepCase, check_metric, sweep
    from pretrain3d.modules.checkpoint import store_inference
    from pretrain3d.reporting.results import write_json

    check_metric(metric)
    runs = [load_run(folder, checkpoint, tile_batch=tile_batch) for folder in folders]
    classes, start = runs[0][0].classes, runs[0][0].unswept
    for folder, (module, _) in zip(folders, runs, strict=True):
        if module.classes != classes:
            raise UserError(f"{folder.path} finds {module.classes}, {folders[0].path} {classes}: sweep them apart")
        if module.unswept != start:
            differing = [key for key, value in start.to_dict().items() if module.unswept.to_dict()[key] != value]
            raise UserError(
                f"{folder.path} is configured with another module.merging than {folders[0].path} "
                f"({', '.join(differing)}): sweep them apart"
            )
    hashes = {
        str(folder.path): hash_of(data.store, data.val_ids) for folder, (_, data) in zip(folders, runs, strict=True)
    }
    asked = {"metric": metric, "false_positives": false_positives, "runs": sorted(hashes), "cases": hashes}
    if all((module.note.get("inference") or {}).get("asked") == asked for module, _ in runs):
        print(f"{folders[0].path}: the {checkpoint} checkpoint was swept like this already, nothing to do")
        return
    for folder in folders:
        check_writable(folder.path)
        check_writable(folder.checkpoint(checkpoint).parent)
    cases: dict[str, SweepCase] = {}
    for index, (module, datamodule) in enumerate(runs):  # a case may be validated by several runs, which differ in seed
        cases |= {f"{index}:{case_id}": case for case_id, case in _predicted(module, datamodule).items()}
    fixed = ("method",) if len(runs) > 1 else ()  # each case is seen by one network here, by all in an ensemble
    found = sweep(cases, classes, metric, false_positives, start, fixed)
    inference = {
        **found.to_dict(),
        "cases": sorted({key.partition(":")[2] for key in cases}),
        "asked": asked,
    }
    for folder in folders:
        store_inference(folder.checkpoint(checkpoint), inference)
        write_json(folder.path / "sweep.json", {**inference, "checkpoint": checkpoint, "trials": found.trials})
    best, operating = found.merging.to_dict(), found.operating
    print(f"{len(found.trials)} settings on {len(cases)} validation cases: {metric} {found.value_before:.4f} -> "
          f"{found.value:.4f} with " + ", ".join(f"{key} {value}" for key, value in best.items()))  # fmt: skip
    print(f"from score {operating['threshold']:.3f} on: {operating['measured']:.2f} false positives per case, "
          f"sensitivity {operating['sensitivity']:.3f}")  # fmt: skip
    if not operating["sensitivity"]:
        print(f"warning: no object is found there with {false_positives:g} false positives per case: a greater "
              "false_positives= allows more; threshold=operating would find nothing", file=sys.stderr)  # fmt: skip
    print(f"kept in the {checkpoint} checkpoint of {', '.join(str(folder.path) for folder in folders)}")


def _predicted(module: Any, datamodule: Any) -> dict[str, Any]:
    """What a run finds in its validation cases, not merged, and what there is to find."""
    from tqdm import tqdm

    from pretrain3d.detection.sweep import SweepCase

    cases = {}
    for case_id in tqdm(held_out({"val": datamodule.val_ids}, "val"), desc="sweep", unit="case"):
        _, case, views = module.predict_case(datamodule, case_id)
        target = {"boxes": case.boxes, "labels": case.labels, "annotated": case.annotated}
        cases[case_id] = SweepCase(views, target)
    return cases
