"""`show`: says what a file or folder is."""

from __future__ import annotations

from pathlib import Path

from pretrain3d.config import UserError

USAGE = """\
pretrain3d show PATH ... [key=value ...]

Says in plain lines what each path is:
  a folder of raw data    the reader that knows it, cases, classes, licence
  a store, its plan.yaml  cases, classes, sizes of the objects, spacing, folds, plan
  a configuration         resolved, as YAML; key=value overrides as in `fit`
  a run folder            its state, the last metrics, its checkpoints, its result
  a checkpoint, an export backbone, preprocessing, where it comes from, parameters, fingerprint
  a result.json           metrics with intervals, data, cost
  a score file            cases, boxes per class; so of a folder of `predict`, or its masks of boxes

  pretrain3d show data/phantom
  pretrain3d show configs/detect/phantom.yaml backbone=resenc_s
  pretrain3d show runs/phantom/mae-scratch-resenc_xs-f0-s0/checkpoints/last.ckpt
"""


def run(paths: list[str], options: dict[str, object]) -> int:
    """Prints the lines of every path; returns the exit status."""
    from pretrain3d.reporting.inspection.describe import describe

    if not paths:
        raise UserError("show takes at least one path; see pretrain3d show --help")
    overrides = [f"{key}={value}" for key, value in options.items()]
    for index, path in enumerate(paths):
        print("\n" * bool(index) + "\n".join(describe(Path(path), overrides)), flush=True)
    return 0
