"""`test`: predicts the held-out cases of a run, or of a baseline without learning, and writes the result."""

from __future__ import annotations

import sys
from pathlib import Path

from pretrain3d.commands import baseline, reconstruction, segmentation, tested
from pretrain3d.commands.trained import about_run, load_run, log_to_wandb, unswept
from pretrain3d.config import UserError
from pretrain3d.options import REQUIRED, at_least, read_options
from pretrain3d.reporting.run_folder import RunFolder

USAGE = """\
pretrain3d test RUN [checkpoint=last] [split=test] [samples=1000] [pictures=4] [by=COLUMN cases=TABLE] [tile_batch=N]
pretrain3d test RUN [checkpoint=last] [split=test] [samples=1000] [patches=4]     of a pretraining by reconstruction
pretrain3d test RUN [checkpoint=last] [split=test] [samples=1000] [tile_batch=N]  of supervised pretraining
pretrain3d test baseline=mean_box|threshold store=STORE out=FOLDER [fold=0 num_folds=5]
                [split=test] [samples=1000] [by=COLUMN cases=TABLE]

Predicts whole volumes and scores them in the voxels of the input files: predictions.json, targets.json (score files)
and result.json with 95 % bootstrap intervals over patients, overall, per class and in thirds of the objects by volume.
Boxes are merged as `sweep` chose on the validation cases, if it did. A run that logged to W&B gets its result there.
Of a pretraining by reconstruction: the error on fixed patches of held-out cases, beside that of the mean predictor and,
where blocks are hidden, of tri-linear in-painting. Of supervised pretraining: Dice and error of the volume of whole
cases, per class and their mean.

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

PRETRAINED = {"reconstruction": reconstruction.run, "segmentation": segmentation.run}


def run(paths: list[str], options: dict[str, object]) -> int:
    """Tests a run folder or a baseline; returns the exit status."""
    if len(paths) == 1:
        folder = RunFolder(Path(paths[0]))
        if said := folder.unfinished():
            print(said, file=sys.stderr)
        kind = (folder.config().get("module") or {}).get("name")
        if kind in PRETRAINED:
            return PRETRAINED[kind](folder, options)
        if kind == "contrastive":
            raise UserError(f"{folder.path} was pretrained by contrast, which has nothing to test on held-out cases; "
                            "test a detector that starts from it")  # fmt: skip
        defaults = {"checkpoint": "last", "split": "test", "samples": 1000, "pictures": 4, "by": "", "cases": "",
                    "tile_batch": None}  # fmt: skip
        given = at_least(read_options(options, defaults), samples=0, pictures=0)
        test_run(folder, **given, drawn="pictures" in options)
        return 0
    if paths:
        raise UserError(f"test takes one run folder, got {len(paths)}: {' '.join(paths)}")
    if "baseline" not in options:
        raise UserError("test takes a run folder, or baseline=mean_box|threshold; see `pretrain3d test --help`")
    defaults = {"baseline": REQUIRED, "store": REQUIRED, "out": REQUIRED, "fold": 0, "num_folds": 5, "split": "test",
                "samples": 1000, "by": "", "cases": ""}  # fmt: skip
    baseline.test(**at_least(read_options(options, defaults), samples=0))
    return 0


def test_run(
    folder: RunFolder,
    checkpoint: str,
    split: str,
    samples: int,
    pictures: int,
    by: str,
    cases: str,
    tile_batch: int | None,
    drawn: bool,
) -> None:
    """Predicts with the run's weights; skips what `result.json` already holds for the same weights and options.

    Args: see `USAGE`; ``drawn``: not skipped where one of the pictures is missing.
    """
    module, datamodule = load_run(folder, checkpoint, tile_batch=tile_batch)

    from pretrain3d.backbones.transfer import fingerprint
    from pretrain3d.data.leakage import find, warning
    from pretrain3d.detection.merge import merge
    from pretrain3d.evaluation.strata import chosen_values
    from pretrain3d.reporting.case_pictures import save_case_picture
    from pretrain3d.reporting.results import SCORE_FILES

    settings = folder.config()
    case_ids = tested.held_out({"test": datamodule.test_ids, "val": datamodule.val_ids}, split)
    tested.check_annotated(datamodule.store, case_ids, split)
    values = chosen_values(cases, by, tested.truth_of(datamodule.store, case_ids))
    chosen = unswept(module, case_ids)
    threshold = chosen["operating"]["threshold"] if chosen else None
    step = module.note["source"]["step"]
    asked = {"checkpoint": checkpoint, "split": split, "samples": samples, "step": step,
             "fingerprint": fingerprint(module.state_dict()), "merging": module.merging.to_dict(),
             "threshold": threshold, "cases": tested.hash_of(datamodule.store, case_ids)}  # fmt: skip
    drawings = {case_id: folder.path / "pictures" / f"test_{case_id}.npz" for case_id in case_ids[:pictures]}
    needed = [*SCORE_FILES, *(f"pictures/{path.name}" for path in drawings.values() if drawn)]
    if not tested.is_to_be_tested(folder.path, asked, "these weights", needed):
        tested.write_strata(folder.path, by, values, samples)
        return
    for old in (folder.path / "pictures").glob("test_*.npz"):  # of other boxes than those that are reported
        old.unlink()

    def predict(case_id: str) -> tested.Prediction:
        image, case, views = module.predict_case(datamodule, case_id)
        found = merge(views, module.merging)
        boxes, scores, labels = (value.cpu().numpy() for value in (found.boxes, found.scores, found.labels))
        if case_id in drawings:
            save_case_picture(drawings[case_id], image[0].numpy(), case.boxes, case.labels, boxes, labels, scores,
                              module.classes, spacing_mm=case.frame.spacing_mm)  # fmt: skip
        return boxes, scores, labels

    leakage = find(module.note.get("pretrained_on"), [(datamodule.store, split, case_ids)])
    if leakage:
        print(warning(leakage, module.note["transfer"]["path"]), file=sys.stderr)
    others = [row for row in module.note.get("leakage") or [] if row["split"] != split]  # trained on, chosen by
    about = {"asked": asked, "leakage": leakage + others, **about_run(folder, settings, module)}
    tested.score_cases(folder.path, settings["name"], datamodule.store, case_ids, predict, about, samples, threshold)
    tested.write_strata(folder.path, by, values, samples)
    log_to_wandb(folder, settings)
