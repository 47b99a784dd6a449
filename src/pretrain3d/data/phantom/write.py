"""Writes the embedded data set as NIfTI files in the nnDetection raw layout."""

from __future__ import annotations

import gzip
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from pretrain3d.config import UserError
from pretrain3d.data.phantom.anatomy import ORGANS
from pretrain3d.data.phantom.case import SPLITS, PhantomCase, make_case
from pretrain3d.data.phantom.lesions import CLASSES
from pretrain3d.files import replacing

VERSION = 2  # of what is drawn: goes up whenever the same seed gives another volume
RECIPE = "phantom.json"
FOLDERS = {"train": "Tr", "test": "Ts", "unlabelled": "Un"}
Job = tuple[Path, str, int, int]  # folder, split, index and seed of a case


@dataclass
class Summary:
    """What `generate` did.

    Attributes:
        written: files written now; 0 when everything was there.
        reused: files that were there before.
        cases: number of cases per split.
        objects: per labelled split, the number of objects of each class.
    """

    written: int
    reused: int
    cases: dict[str, int]
    objects: dict[str, dict[str, int]] = field(default_factory=dict)


def generate(
    folder: Path,
    num_train: int = 60,
    num_test: int = 24,
    num_unlabelled: int = 40,
    seed: int = 0,
    workers: int = 2,
    progress: bool = True,
) -> Summary:
    """Writes the data set, or what is missing of it.

    Makes `imagesTr/<case>_0000.nii.gz`, `labelsTr/<case>.nii.gz` (ids 1..N), `labelsTr/<case>.json` (class of each
    id), `organsTr/<case>.nii.gz`, the same with `Ts` for the test cases, `imagesUn/` for the unlabelled, `dataset.json`
    (also names the organs) and `phantom.json` (the parameters). Files appear whole or not at all.

    Args:
        folder: new, empty, or of an earlier call with the same parameters.
        num_train: labelled cases to train with.
        num_test: labelled cases of other bodies and noise.
        num_unlabelled: cases without labels, drawn like the training cases.
        seed: of everything.
        workers: processes.
        progress: shows a bar.

    Raises:
        UserError: the folder holds something else, or a number makes no sense.
    """
    folder = Path(folder)
    counts = dict(zip(SPLITS, (num_train, num_test, num_unlabelled), strict=True))
    for name, value, least in [*((k, v, 0) for k, v in counts.items()), ("seed", seed, 0), ("workers", workers, 1)]:
        if value < least:
            raise UserError(f"{name}={value}: must be at least {least}")
    _claim(folder, {"version": VERSION, **counts, "seed": seed})
    for split, count in counts.items():
        if count:
            for kind in _kinds(split):
                (folder / f"{kind}{FOLDERS[split]}").mkdir(exist_ok=True)
    jobs: list[Job] = [(folder, split, index, seed) for split, count in counts.items() for index in range(count)]
    written = 0
    todo = [job for job in jobs if any(not path.exists() for path in case_files(*job[:3]).values())]
    bar = tqdm(total=len(todo), desc="phantom", unit="case", disable=not (progress and todo))
    with bar:
        for files in _run(todo, workers):
            written += files
            bar.update()
    written += _write_missing(folder / "dataset.json", lambda: _as_json(_dataset()))
    total = sum(len(case_files(*job[:3])) for job in jobs) + 1
    objects = {split: _count_objects(folder, split, counts[split]) for split in ("train", "test")}
    return Summary(written, total - written, counts, objects)


def case_id(split: str, index: int) -> str:
    """The name of a case, such as `train_007`."""
    return f"{split}_{index:03d}"


def case_files(folder: Path, split: str, index: int) -> dict[str, Path]:
    """The files of a case by kind: "images", and for labelled splits "labels", "organs" and "json"."""
    name = case_id(split, index)
    files = {
        kind: folder / f"{kind}{FOLDERS[split]}" / f"{name}{'_0000' if kind == 'images' else ''}.nii.gz"
        for kind in _kinds(split)
    }
    if "labels" in files:
        files["json"] = folder / f"labels{FOLDERS[split]}" / f"{name}.json"
    return files


def _kinds(split: str) -> tuple[str, ...]:
    return ("images",) if split == "unlabelled" else ("images", "labels", "organs")


def _claim(folder: Path, recipe: dict[str, int]) -> None:
    """Makes the folder ours: writes the parameters, or checks that they are the ones already there."""
    path = folder / RECIPE
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not a recipe of phantoms ({error}); delete the folder to start afresh") from error
        other = [f"{key}={found.get(key)}, not {value}" for key, value in recipe.items() if found.get(key) != value]
        if other:
            raise UserError(
                f"{folder} holds a phantom data set with {'; '.join(other)}: choose another folder or delete it"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not a phantom data set (no {RECIPE}): choose a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write_missing(path, lambda: _as_json(recipe))


def _run(jobs: list[Job], workers: int) -> Iterator[int]:
    if workers == 1 or len(jobs) < 2:
        yield from map(_write_case, jobs)
        return
    # spawned, not forked: the parent may hold threads of torch
    with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_write_case, jobs)


def _write_case(job: Job) -> int:
    """Writes the missing files of one case; the number of files written."""
    folder, split, index, seed = job
    case = make_case(seed, index, split)
    contents: dict[str, Callable[[], bytes]] = {
        "images": lambda: _as_nifti(case.image, case),
        "labels": lambda: _as_nifti(case.instances, case),
        "organs": lambda: _as_nifti(case.organs, case),
        "json": lambda: _as_json({"instances": {str(key): label for key, label in case.labels.items()}}),
    }
    return sum(_write_missing(path, contents[kind]) for kind, path in case_files(folder, split, index).items())


def _write_missing(path: Path, content: Callable[[], bytes]) -> int:
    """Writes a file whole or not at all, unless it is there: the number of files written."""
    if path.exists():
        return 0
    with replacing(path) as temporary:
        temporary.write_bytes(content())
    return 1


def _as_nifti(volume: np.ndarray, case: PhantomCase) -> bytes:
    image = nib.Nifti1Image(volume, case.affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=3, mtime=0)  # no time inside: the same seed, the same file


def _as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _dataset() -> dict[str, Any]:
    return {
        "task": "Task900_Phantom",
        "name": "phantom",
        "dim": 3,
        "target_class": None,
        "test_labels": True,
        "labels": {str(index): name for index, name in enumerate(CLASSES)},
        "modalities": {"0": "CT"},
        "organs": {str(value): name for value, name in enumerate(ORGANS, start=1)},
        "licence": "CC0-1.0",
    }


def _count_objects(folder: Path, split: str, count: int) -> dict[str, int]:
    totals = dict.fromkeys(CLASSES, 0)
    for index in range(count):
        instances = json.loads(case_files(folder, split, index)["json"].read_text())["instances"]
        for label in instances.values():
            totals[CLASSES[label]] += 1
    return totals
