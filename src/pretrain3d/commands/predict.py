"""`predict`: checkpoints and image files in, boxes in the files' own voxels and in mm out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain3d.config import UserError
from pretrain3d.files import check_writable
from pretrain3d.options import REQUIRED, output_folder, read_options
from pretrain3d.registry import check_name, resolve

USAGE = """\
pretrain3d predict CHECKPOINT_OR_RUN ... IMAGE_OR_FOLDER out=FOLDER [threshold=0.05] [format=json,csv] [precision=...]

Finds objects in NIfTI, MetaImage and NRRD files and in DICOM series (.nii.gz, .nii; with SimpleITK .mhd, .mha, .nrrd,
.nhdr, and a folder of DICOM slices) with a detector that `fit` trained. A folder is searched with its subfolders. A
checkpoint holds all that is needed: classes, spacing, normalisation, tiles. Of a run folder the last checkpoint is
taken. Several checkpoints (the folds of one configuration) are an ensemble: all their boxes are merged once. The
channels of a case are <case>_0000.nii.gz, <case>_0001.nii.gz, ..., or one file <case>.nii.gz of shape (X, Y, Z, C).

  out=FOLDER             where the files go
  threshold=0.05         boxes of a lower score are left out; threshold=operating takes what `sweep` found
  format=json,csv        any of these:
                           json         predictions.json, a score file with millimetres beside the voxels
                           csv          predictions.csv, voxels and millimetres
                           luna16       luna16.csv, a submission to LUNA16; a series is named as its file
                           coco         coco.json
                           nndetection  nndetection/<case>_boxes.npz
                           nifti        nifti/<case>.nii.gz, the boxes as a mask
                           slicer       slicer/<case>.mrk.json, ROIs for 3D Slicer
                           png          png/<case>.png, slices through the best boxes
  precision=32|bf16|fp16 arithmetic of the network; default: as in training, 32 on a CPU without it
  mirror_axes=[0,1,2]    mirrored views that are predicted too; default: as configured
  tile_batch=4           tiles predicted at once, which bounds the memory; default: as configured

A file that cannot be read is named, the others go on; the exit status is then 1. What is odd about an image, as
`prepare` says it, is a warning."""

DEFAULTS: dict[str, Any] = {
    "out": REQUIRED, "threshold": "0.05", "format": "json,csv", "precision": "", "mirror_axes": None,
    "tile_batch": None,
}  # fmt: skip


def run(paths: list[str], options: dict[str, object]) -> int:
    """Predicts files; returns the exit status."""
    if len(paths) < 2:
        raise UserError(f"predict takes checkpoints and then an image or folder, got {' '.join(paths) or 'no path'}")
    given = read_options(options, DEFAULTS)
    images = Path(paths[-1])
    if not images.exists():
        raise UserError(f"{images}: no such file or folder")
    formats, out = _formats(str(given.pop("format"))), output_folder("out", str(given.pop("out")))
    given["threshold"] = _threshold(str(given["threshold"]))
    return predict(paths[:-1], images, out, formats, **given)


def predict(
    checkpoints: list[str],
    images: Path,
    out: Path,
    formats: list[str],
    threshold: float | str,
    precision: str,
    mirror_axes: Any,
    tile_batch: int | None,
) -> int:
    """Writes the boxes of one image or of all images of a folder."""
    from tqdm import tqdm

    from pretrain3d.api import Detector
    from pretrain3d.data.oddity import by_oddity
    from pretrain3d.reporting.formats import FILES, TABLES
    from pretrain3d.reporting.formats.found import Found

    detector = Detector(*checkpoints, precision=precision or None, mirror_axes=mirror_axes, tile_batch=tile_batch)
    least = detector.operating_threshold if isinstance(threshold, str) else threshold
    if "luna16" in formats and len(detector.classes) != 1:
        raise UserError(f"format=luna16 is for one class, this detector has {', '.join(detector.classes)}")
    cases = image_files(images, len(detector.modality), out)
    if "nifti" in formats and _masks(out) in {file.resolve().parent for files in cases.values() for file in files}:
        raise UserError(f"format=nifti writes into {out / 'nifti'}, where images lie that it reads; name another out=")
    series = series_of(cases) if "luna16" in formats else {}
    check_writable(out)
    found: dict[str, Found] = {}
    failed: list[str] = []
    odd: dict[str, Sequence[str]] = {}
    for case, files in tqdm(cases.items(), desc="predict", unit="case"):
        try:
            one = detector.predict(files, threshold=threshold, keep_image="png" in formats)
        except UserError as error:
            failed.append(str(error))
            continue
        except MemoryError as error:  # of a volume, before the network sees it
            failed.append(f"{files[0]}: out of memory ({error})")
            continue
        for name in FILES:
            if name in formats:
                resolve(FILES, name, "format")(out, case, detector.classes, one)
        found[case] = dataclasses.replace(one, image=None)
        odd[str(files[0])] = one.odd
    for name in TABLES:
        if name in formats and found:
            named = {series[case]: one for case, one in found.items()} if name == "luna16" else found
            resolve(TABLES, name, "format")(out, detector.classes, named)
    boxes = sum(len(one) for one in found.values())
    print(f"{out}: {boxes} boxes from score {least:g} on in {len(found)} of {len(cases)} images")
    for line in by_oddity(odd):
        print(f"warning: {line}", file=sys.stderr)
    for problem in failed:
        print(f"not predicted: {problem}", file=sys.stderr)
    return 1 if failed else 0


def image_files(images: Path, channels: int, out: Path) -> dict[str, list[Path]]:
    """The images of each case, one per channel or one of all, by case id: its path in the folder with ``-`` for ``/``.

    A name that ends in ``_0000`` is the first channel of the case before it, as in nnDetection and nnU-Net; a file
    without such a number, or whose case has no ``_0000``, holds all channels. The masks that an earlier call wrote into
    ``out`` are no images, unless ``images`` names them.

    Raises:
        UserError: no image file, a file of labels, a channel is missing or too many, or two cases of one name.
    """
    from pretrain3d.data.readers import volumes
    from pretrain3d.data.readers.images import check_no_labels

    folder = images if images.is_dir() else images.parent
    files = volumes.files_in(images, "**/*") if images.is_dir() else [images]
    masks, named = _masks(out), images.resolve()
    if masks not in (named, *named.parents):
        files = [path for path in files if masks not in path.resolve().parents]
    if not files or (images.is_file() and not images.name.endswith(volumes.SUFFIXES)):
        raise UserError(f"{images} is not an image file ({volumes.ENDINGS}), nor a folder with any")
    check_no_labels(folder, files)
    numbers: dict[tuple[Path, str], set[str]] = {}  # of the channels there are, by folder and case
    for path in files:
        name, _, number = volumes.stem(path).rpartition("_")
        if len(number) == 4 and number.isdigit():
            numbers.setdefault((path.parent, name), set()).add(number)
    cases: dict[str, list[Path]] = {}
    for path in files:
        stem = volumes.stem(path)
        before, _, number = stem.rpartition("_")
        if channels > 1 and number != "0000" and {number, "0000"} <= numbers.get((path.parent, before), set()):
            continue  # another channel, taken with its first one
        suffix = path.name.removeprefix(stem)
        name = stem.removesuffix("_0000")
        case = "-".join((*path.relative_to(folder).parts[:-1], name))
        there = sorted(numbers[path.parent, name]) if stem != name else []
        if len(there) > channels:
            raise UserError(
                f"{path}: case {case!r} has {len(there)} channels, _{there[0]} to _{there[-1]}; the detector takes "
                f"{channels}. Give it only these, and cases of one channel names that do not end in such a number"
            )
        if case in cases:
            raise UserError(f"{path}: case {case!r} occurs twice, also as {cases[case][0]}")
        others = range(1, channels) if stem != name else ()
        cases[case] = [path, *(path.with_name(f"{name}_{index:04d}{suffix}") for index in others)]
        for file in cases[case]:
            if not file.exists():
                raise UserError(f"{file}: no such file, a channel of {path}")
    return cases


def _masks(out: Path) -> Path:
    """Where ``format=nifti`` writes, the only format whose files could be taken for images."""
    return (out / "nifti").resolve()


def series_of(cases: dict[str, list[Path]]) -> dict[str, str]:
    """The series of each case as LUNA16 calls it: the image's own name, whichever folder (``subset0``) it lies in.

    Raises:
        UserError: two files of one name.
    """
    from pretrain3d.data.readers import volumes

    series = {case: volumes.stem(files[0]).removesuffix("_0000") for case, files in cases.items()}
    owners: dict[str, str] = {}
    for case, name in series.items():
        if owners.setdefault(name, case) != case:
            first = cases[owners[name]][0]
            raise UserError(f"format=luna16: {first} and {cases[case][0]} would both be the series {name}")
    return series


def _formats(text: str) -> list[str]:
    from pretrain3d.reporting.formats import FILES, TABLES

    names = [name.strip() for name in text.split(",")]
    for name in names:
        check_name({**TABLES, **FILES}, name, "format")
    return names


def _threshold(text: str) -> float | str:
    if text == "operating":
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"threshold={text}: expected a score from 0 to 1, or operating")
    return value
