"""`prepare`: a folder of raw cases becomes a training store."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from pretrain3d.config import UserError, by_text
from pretrain3d.options import REQUIRED, read_options
from pretrain3d.registry import check_promises, resolve

USAGE = """\
pretrain3d prepare RAW_FOLDER out=STORE reader=NAME [spacing_mm=null patch_size=null workers=2]

Reads every case of RAW_FOLDER, turns it to RAS axes, crops it to the body, resamples it and writes it to STORE with its
boxes and statistics; then plans patch, batch, levels and anchors in STORE/plan.yaml, for the small default backbone
and the memory here: `pretrain3d plan` does that again for others. Intensities stay as they are.
A repeated call does only what is missing or has changed, so an interrupted one is continued. A case that cannot be
read is named with its reason, the rest goes on, nothing is planned, and the exit status is 1. An image is taken and
named in a warning where it looks like a segmentation or like a CT without its rescale intercept, and where sform and
qform of its header differ (the sform counts). Where spacing_mm was changed in plan.yaml, the cases are prepared and
all that counts in voxels is planned again.
RAW_FOLDER/splits_final.json, if it is there, says the folds as in nnU-Net: [{"train": [cases], "val": [cases]}, ...],
else a data set with official folds has these (luna16), else `fit` deals the training cases to data.num_folds folds by
patient. Images are NIfTI, or MetaImage (.mhd, .mha) and NRRD (.nrrd, .nhdr) with SimpleITK: pip install
'pretrain3d[itk]'. reader=images also takes DICOM: a folder with the slices of one series is an image.

  out=STORE            folder of the store, new or of an earlier call
  reader=NAME          format of RAW_FOLDER: nndetection, nnunet (and the Decathlon's; "objects" in dataset.json names
                       the labels or regions to detect, a file may hold all channels), openkbp, ribfrac, luna16 or
                       images
  spacing_mm=null      voxel size: one number or [x,y,z]; null: the plan's, for a new store the median of the cases
                       (of few thick slices: their 10th percentile)
  patch_size=null      largest patch to plan, a number or [x,y,z] in multiples of 16; null: 128, more beside an axis
                       of which the cases have less
  modality=null        CT, MR, ... (a list for several channels), where the files do not say (reader=images)
  workers=2            processes
  replan=false         true computes spacing and plan again, over an existing plan.yaml

  pretrain3d prepare data/phantom out=stores/phantom reader=nndetection
  pretrain3d prepare scans out=stores/scans reader=images modality=CT spacing_mm=1.5"""

DEFAULTS: dict[str, Any] = {
    "out": REQUIRED,
    "reader": REQUIRED,
    "spacing_mm": None,
    "patch_size": None,
    "modality": None,
    "workers": 2,
    "replan": False,
}
MAX_NAMED = 3
THIN = 0.99  # voxels; one of the input file may be a little less after rounding


def run(paths: list[str], options: dict[str, object]) -> int:
    """Prepares a folder; returns the exit status: 1 when a case failed."""
    if len(paths) != 1:
        raise UserError(f"prepare takes one folder of raw data, got {len(paths)}: {' '.join(paths) or 'none'}")
    given = read_options(options, DEFAULTS)
    if given["workers"] < 1:
        raise UserError(f"workers={given['workers']}: must be at least 1")
    spacing = _three(given["spacing_mm"], "spacing_mm", float)
    patch = _three(given["patch_size"], "patch_size", int)
    raw, out = Path(paths[0]), Path(str(given["out"]))
    if not raw.is_dir():
        raise UserError(f"{raw}: no such folder")

    from pretrain3d.data.readers import READERS
    from pretrain3d.data.readers.contract import Reader

    reader = resolve(READERS, str(given["reader"]), "reader")(raw)
    check_promises(reader, Reader, "reader")
    reader.modality = _modality(given["modality"], reader.modality)
    if hidden := sorted(raw.rglob("._*")):
        print(f"{len(hidden)} files ._* are left-overs of macOS and not read, the first {hidden[0]}")
    return _prepare(reader, raw, out, spacing, patch, given["workers"], given["replan"])


def _prepare(
    reader: Any,
    raw: Path,
    out: Path,
    spacing: tuple[float, ...] | None,
    patch: tuple[int, ...] | None,
    workers: int,
    replan: bool,
) -> int:
    from pretrain3d.data.prepare import prepare
    from pretrain3d.data.splits import FOLDS_FILE
    from pretrain3d.data.store import Store
    from pretrain3d.planning.plan import make_plan, patch_budget, plan_again, read_plan, write_plan

    patch_budget(patch)  # a mistake is told before the work, not after it
    path = out / "plan.yaml"
    old = read_plan(path) if path.is_file() and not replan else None
    if old is not None:
        plan_spacing = tuple(float(v) for v in old["spacing_mm"])
        if spacing not in (None, plan_spacing):
            raise UserError(f"{path} says spacing_mm={list(plan_spacing)}, not {list(spacing or ())}; edit it or give "
                            "replan=true")  # fmt: skip
        if patch is not None:
            raise UserError(f"{path} exists and holds the patch size; edit it there or give replan=true")
        spacing = plan_spacing
    folds = raw / FOLDS_FILE
    summary = prepare(
        reader, out, spacing, workers, keep_spacing=not replan, folds_file=folds if folds.is_file() else None
    )
    _report(out, summary)
    if summary.failed:
        if old is None:  # a plan for part of the cases would stay when the others are there
            path.unlink(missing_ok=True)
            print(f"{path}: not planned, as cases failed; repair or remove them and run this again, or plan for those "
                  f"that are there: pretrain3d plan {out}", file=sys.stderr)  # fmt: skip
        return 1
    if old is None:
        store = Store(out)
        write_plan(path, make_plan(store, patch), store)
        print(f"{path}: planned, patch {by_text(store.plan['patch_size'])}; edit it as you like")
    elif (before := old.get("planned_for", {}).get("spacing_mm")) not in (None, list(summary.spacing_mm)):
        store = Store(out)
        write_plan(path, plan_again(store, old), store)
        print(f"{path}: planned again for voxels of {by_text(summary.spacing_mm)} mm, was {by_text(before)} mm; patch "
              f"{by_text(store.plan['patch_size'])}")  # fmt: skip
    return 0


def _report(out: Path, summary: Any) -> None:
    from pretrain3d.data.identity import same_content
    from pretrain3d.data.store import Store

    for line in summary.said:
        print(f"warning: {line}", file=sys.stderr)
    if not summary.indexed:
        print(f"{out}: complete, all {len(summary.reused)} cases are up to date, nothing to do")
        return
    store = Store(out)
    cases = store.cases.values()
    counts = [
        f"{len(summary.done)} cases prepared",
        f"{len(summary.reused)} were up to date" if summary.reused else "",
        f"{len(summary.removed)} removed that are not in the raw data any more" if summary.removed else "",
        f"{len(summary.failed)} failed" if summary.failed else "",
    ]
    print(f"{out}: {', '.join(filter(None, counts))}")
    if pairs := same_content(cases):
        named = [f"{a.id} ({a.split}) = {b.id} ({b.split})" for a, b in pairs[:MAX_NAMED]]
        more = f" and {len(pairs) - MAX_NAMED} more" if len(pairs) > MAX_NAMED else ""
        print(f"  warning: the same image twice: {', '.join(named)}{more}", file=sys.stderr)
    trained, tested = ({c.group for c in cases if c.split in splits} for splits in (("train", "val"), ("test",)))
    if shared := trained & tested:
        named = [f"{case.id} ({case.split})" for case in cases if case.group == min(shared)]
        print(f"  warning: {len(shared)} patients have training and test cases, the first {min(shared)!r}: "
              f"{', '.join(named)}", file=sys.stderr)  # fmt: skip
    thinnest = [float((box[3:] - box[:3]).min()) for case in cases for box in case.boxes]
    print(f"  {len(cases)} cases, {len(thinnest)} objects, voxels of {by_text(summary.spacing_mm)} mm"
          + (f", {summary.folds} given folds" if summary.folds else ""))  # fmt: skip
    if thin := [size for size in thinnest if size < THIN]:
        print(f"  note: {len(thin)} of {len(thinnest)} objects are thinner than a voxel along an axis, at worst "
              f"{min(thin):.2g} of one; a smaller spacing_mm shows more of them")  # fmt: skip
    if specks := [case.specks for case in cases if case.specks]:
        print(f"  note: {sum(specks)} specks in {len(specks)} cases are no objects, as they have fewer voxels than the "
              "raw data ask of one")  # fmt: skip
    for kind, splits in (("training", ("train", "val")), ("test", ("test",))) if store.classes else ():
        known = [case for case in cases if case.split in splits]
        if blank := [case.id for case in known if not case.annotated]:
            print(f"  note: in {len(blank)} of {len(known)} {kind} cases no class was annotated, the first {blank[0]}")
    for case_id, problem in sorted(summary.failed.items()):
        print(f"  failed: {case_id}: {' '.join(problem.split())}", file=sys.stderr)


def _three(value: Any, key: str, kind: type) -> tuple[Any, ...] | None:
    """A number or three of them."""
    if value is None:
        return None
    values = value if isinstance(value, list) else [value] * 3
    fine = (int, float) if kind is float else (int,)
    if len(values) != 3 or not all(type(v) in fine and v > 0 for v in values):
        what = "sizes in mm" if kind is float else "whole numbers of voxels"
        raise UserError(f"{key}={value}: expected one or three {what}, such as {key}={'1.5' if kind is float else 96}")
    return tuple(kind(v) for v in values)


def _modality(given: Any, of_reader: list[str]) -> list[str]:
    if given is None:
        if not of_reader:
            raise UserError("the files do not say what they show; give modality=CT or modality=MR")
        return ["CT" if name.strip().upper() == "CT" else name for name in of_reader]  # it decides about HU
    names = given if isinstance(given, list) else [given]
    if not names or not all(isinstance(name, str) and re.fullmatch(r"[A-Z][A-Z0-9]*", name) for name in names):
        raise UserError(f"modality={given}: expected a name such as CT or MR, or a list with one for each channel")
    if of_reader and len(names) != len(of_reader):
        raise UserError(f"modality={given}: the data set has {len(of_reader)} channels: {of_reader}")
    return names
