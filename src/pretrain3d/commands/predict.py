"""`predict`: one checkpoint and NIfTI files in, boxes in the files' own voxels and in mm out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pretrain3d.config import REQUIRED, UserError, read_options

USAGE = """\
pretrain3d predict CHECKPOINT IMAGE_OR_FOLDER out=FOLDER [min_score=0.05]

Finds objects in NIfTI files (.nii, .nii.gz; a folder is searched with its subfolders) with a detector that `fit`
trained. The checkpoint holds all that is needed: classes, spacing, normalisation, tiles.

  out=FOLDER             predictions.json (a score file, with millimetres beside the voxels) and predictions.csv
  min_score=0.05         boxes below it are left out

A file that cannot be read is named, the others go on; the exit status is then 1."""


def run(paths: list[str], options: dict[str, object]) -> int:
    """Predicts files; returns the exit status."""
    if len(paths) != 2:
        raise UserError(f"predict takes a checkpoint and an image or folder, got {len(paths)} paths")
    given = read_options(options, {"out": REQUIRED, "min_score": 0.05})
    checkpoint, images = Path(paths[0]), Path(paths[1])
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint}: no such checkpoint; a run has checkpoints/last.ckpt and checkpoints/best.ckpt")
    if not images.exists():
        raise UserError(f"{images}: no such file or folder")
    return predict(checkpoint, images, Path(str(given["out"])), given["min_score"])


def predict(checkpoint: Path, images: Path, out: Path, min_score: float) -> int:
    """Writes the boxes of one image or of all images of a folder."""
    import sys

    import torch
    from tqdm import tqdm

    from pretrain3d.data.readers.images import Images
    from pretrain3d.modules.checkpoint import load_module
    from pretrain3d.reporting.formats import Found, write_boxes_csv, write_boxes_json

    module: Any = load_module(checkpoint, "detection", "cuda" if torch.cuda.is_available() else "cpu")
    reader = Images(images if images.is_dir() else images.parent)
    cases = [case for case in reader.cases() if images.is_dir() or case.files[0].name == images.name]
    if not cases:
        raise UserError(f"{images} is not a NIfTI file (.nii or .nii.gz)")
    found: dict[str, Found] = {}
    failed: list[str] = []
    for case in tqdm(cases, desc="predict", unit="case"):
        try:
            found[case.id] = predict_file(module, case.files[0], min_score)
        except UserError as error:
            failed.append(str(error))
    out.mkdir(parents=True, exist_ok=True)
    write_boxes_json(out / "predictions.json", module.classes, found)
    write_boxes_csv(out / "predictions.csv", module.classes, found)
    boxes = sum(len(each.scores) for each in found.values())
    print(f"{out}: {boxes} boxes in {len(found)} of {len(cases)} images")
    for problem in failed:
        print(f"not predicted: {problem}", file=sys.stderr)
    return 1 if failed else 0


def predict_file(module: Any, path: Path, min_score: float) -> Any:
    """The boxes of one NIfTI file, prepared as the detector's training cases were.

    Raises:
        UserError: the file is unreadable or does not fit the detector; names it.
    """
    import torch

    from pretrain3d.data.normalise import normalisation_of
    from pretrain3d.data.prepare import image_histograms, prepare_volume
    from pretrain3d.data.readers import nifti
    from pretrain3d.data.readers.contract import RawVolume
    from pretrain3d.reporting.formats import Found

    about = module.note["preprocessing"]
    image, affine = nifti.read_image(path)
    cached = prepare_volume(RawVolume(image[None], affine), path, about["modality"], tuple(about["spacing_mm"]))
    body = image_histograms(cached.image, {"body": cached.body}, about["modality"])["body"]
    normalisation = normalisation_of(about["intensity"], len(about["modality"]))(body)
    pad = normalisation(torch.tensor(normalisation.pad_value).view(-1, 1, 1, 1)).flatten().tolist()
    mixed = "bf16" in str(module.note["precision"])
    with torch.autocast(module.device.type, dtype=torch.bfloat16) if mixed else nullcontext():
        boxes = module.predict_image(normalisation(torch.from_numpy(cached.image)).to(module.device), tuple(pad))
    boxes = boxes[boxes.scores >= min_score].cpu()
    return Found(cached.frame, boxes.boxes.numpy(), boxes.scores.numpy(), boxes.labels.numpy())
