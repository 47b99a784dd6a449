"""Raw cases -> store: reoriented to RAS, cropped to the body, resampled; in parallel, and continued after a kill.

Intensities stay as they are. What the note of a case covers (`data.prepared`) is not done again. The index is taken
away while there is work to do, so that a store that is half of one kind and half of another is never read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pretrain3d.config import UserError
from pretrain3d.data.cached import image_histograms, prepare_volume
from pretrain3d.data.case import Case, write_json
from pretrain3d.data.fingerprint import target_spacing
from pretrain3d.data.identity import content_hash
from pretrain3d.data.oddity import by_oddity, oddities
from pretrain3d.data.prepared import claim, forget, is_done, is_indexed, new_note, note_path
from pretrain3d.data.readers.contract import RawCase, RawVolume, Reader
from pretrain3d.data.splits import SPLITS, read_folds
from pretrain3d.data.store import StoreWriter
from pretrain3d.geometry import Frame, boxes_of_instances
from pretrain3d.registry import CONTRACTS

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
VERSION = 6  # of what is done to a case: goes up whenever the same input gives other arrays or records


@dataclass
class Summary:
    """What `prepare` did.

    Attributes:
        spacing_mm: of the cached voxels.
        done: cases prepared now.
        reused: cases that were there before and are up to date.
        failed: case id -> why it could not be prepared; these are not in the store.
        removed: cases of an earlier call that are not in the raw data any more.
        indexed: the index was written, as it was missing or damaged, or something else was done.
        folds: number of folds that the data's own splits file or the reader says; 0 without.
        said: of the data, where parts are missing or images are odd, and of these folds, where they leave cases out or
            share patients.
    """

    spacing_mm: tuple[float, ...]
    done: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    indexed: bool = False
    folds: int = 0
    said: list[str] = field(default_factory=list)


def prepare(
    reader: Reader,
    out: Path,
    spacing_mm: tuple[float, ...] | None = None,
    workers: int = 2,
    progress: bool = True,
    keep_spacing: bool = True,
    folds_file: Path | None = None,
) -> Summary:
    """Makes or completes the store ``out``. A bad case is noted and the rest goes on.

    Args:
        reader: of the raw data.
        out: folder of the store.
        spacing_mm: of the cached voxels (R, A, S). None: that of an earlier call, else `target_spacing` of the cases.
        workers: processes; 1 works in this one.
        progress: shows a bar.
        keep_spacing: False computes the spacing again where ``spacing_mm`` is None.
        folds_file: says which training cases each fold validates on, see `data.splits.read_folds`; None: the reader.

    Raises:
        UserError: no case could be prepared, the folds make no sense, or ``out`` is something else.
        OSError: of a file of ``out``, whose disk is full or read-only; the same call continues.
    """
    cases = _checked_cases(reader)
    folds, said = (reader.folds(), []) if folds_file is None else read_folds(folds_file, cases)
    old = claim(out, reader)
    if spacing_mm is None:
        spacing_mm = old["spacing_mm"] if keep_spacing and old.get("spacing_mm") else _computed_spacing(reader, cases)
    spacing_mm = tuple(float(value) for value in spacing_mm)
    note = {"name": reader.name, "spacing_mm": list(spacing_mm)}
    if note != old:
        write_json(out / "prepare.json", note)
    writer = StoreWriter(
        out, reader.name, reader.classes, spacing_mm, reader.modality, reader.mirror_classes, reader.semantic_classes,
        reader.licence, folds,
    )  # fmt: skip
    job = _Job(reader, writer, spacing_mm)
    summary = Summary(spacing_mm, folds=len(folds), said=[*reader.remarks(), *said])
    todo = []
    for case in tqdm(cases, desc="check", unit="case", disable=not progress, leave=False, delay=1):
        if is_done(out, case, job.settings(case)):
            summary.reused.append(case.id)
        else:
            todo.append(case)
    known = {case.id for case in cases}
    summary.removed = sorted(p.stem for p in (out / "prepared").glob("*.json") if p.stem not in known)
    if not todo and not summary.removed and is_indexed(job.writer, known):
        return summary
    summary.indexed = True
    (out / "index.json").unlink(missing_ok=True)
    for case_id in [*summary.removed, *(case.id for case in todo)]:
        forget(out, case_id)
    odd = {}
    for case, outcome in tqdm(
        _run(job, todo, workers), total=len(todo), desc="prepare", unit="case", disable=not (progress and todo)
    ):
        if isinstance(outcome, str):
            summary.failed[case.id] = outcome
            continue
        summary.done.append(case.id)
        odd[str(case.files[0])] = outcome
    summary.said += by_oddity(odd)
    good = [*summary.done, *summary.reused]
    if not good:
        case_id, problem = min(summary.failed.items())
        raise UserError(f"none of {len(cases)} cases could be prepared; the first, {case_id}: {problem}")
    job.writer.finish(good)
    return summary


def prepare_case(reader: Reader, case: RawCase, spacing_mm: tuple[float, ...], writer: StoreWriter) -> list[str]:
    """Reads one case, brings it into the store's form and writes it.

    Returns:
        what is odd about its image, see `oddity.oddities`.

    Raises:
        UserError: a file is missing, unreadable or inconsistent, or the image or an object is not usable.
    """
    volume = reader.read(case)
    if problem := _problem(volume):
        raise UserError(f"{case.files[0]}: {problem} ({CONTRACTS})")
    cached = prepare_volume(volume, case.files[0], reader.modality, spacing_mm)
    shape = cached.frame.cached_shape
    foreground = {"body": cached.body, "objects": cached.maps.get("instances", np.zeros(shape, dtype=np.uint8)) > 0}
    record = Case(
        id=case.id, split=case.split, group=case.group, shape=shape, channels=len(cached.image), frame=cached.frame,
        **_objects(volume, cached.frame), annotated=tuple(volume.annotated), content_hash=content_hash(volume.image),
        histograms=image_histograms(cached.image, foreground, reader.modality),
        has_instances="instances" in cached.maps, has_semantic="semantic" in cached.maps,
        semantic_annotated=None if volume.semantic_annotated is None else tuple(volume.semantic_annotated),
        signature=cached.signature, moments=cached.moments, specks=volume.specks,
    )  # fmt: skip
    if problem := record.problem(len(reader.classes)):
        raise UserError(f"{case.files[0]}: case {case.id}: {problem}")
    writer.add(record, cached.image, cached.maps.get("instances"), cached.maps.get("semantic"))
    return oddities(case.files[0], volume.image, reader.modality)


def _problem(volume: RawVolume) -> str:
    """What no reader may give: maps that do not lie on the image, or classes that nobody drew; "" when all is well."""
    for name, labels in (("instances", volume.instances), ("semantic", volume.semantic)):
        if labels is not None and labels.shape != volume.image.shape[1:]:
            return f"{name} has the shape {labels.shape}, the image {volume.image.shape}"
    if volume.instances is None and volume.annotated:
        return f"annotated names the classes {volume.annotated}, but instances is None"
    return ""


def _objects(volume: RawVolume, frame: Frame) -> dict[str, np.ndarray]:
    """Boxes, labels, ids and volumes, all from the input file's mask."""
    mask = np.zeros((1, 1, 1), dtype=np.uint8) if volume.instances is None else volume.instances
    instances, boxes = boxes_of_instances(mask)
    if set(instances.tolist()) != volume.labels.keys():
        ids, named = instances.tolist(), sorted(volume.labels)
        raise UserError(f"the ids in instances are {ids}, those that labels names {named} ({CONTRACTS})")
    mapped = frame.from_original(boxes)
    shape = np.asarray(frame.cached_shape)
    assert (mapped[:, :3] > -1e-6).all() and (mapped[:, 3:] < shape + 1e-6).all(), "the crop cuts an object"
    counts = [
        np.count_nonzero(mask[tuple(slice(int(a), int(b)) for a, b in zip(box[:3], box[3:], strict=True))] == instance)
        for instance, box in zip(instances, boxes, strict=True)
    ]
    return {
        "boxes": mapped.astype(np.float32),
        "labels": np.array([volume.labels[int(i)] for i in instances], dtype=np.int64),
        "instances": instances,
        "volumes_mm3": np.array(counts, dtype=np.float64) * abs(np.linalg.det(volume.affine[:3, :3])),
    }


@dataclass
class _Job:
    """What a worker needs for any case."""

    reader: Reader
    writer: StoreWriter
    spacing_mm: tuple[float, ...]

    def settings(self, case: RawCase) -> str:
        """A hash of all that decides the result besides the files' contents."""
        reader = self.reader
        parts = [VERSION, type(reader).__name__, self.spacing_mm, reader.modality, reader.classes,
                 reader.semantic_classes, case.split, case.group, *reader.settings(case)]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _run(job: _Job, cases: list[RawCase], workers: int) -> Iterator[tuple[RawCase, str | list[str]]]:
    """Yields each case with its problem, or what is odd about it when it went well, in the order of completion."""
    if workers == 1 or len(cases) < 2:
        for case in cases:
            yield case, _work(job, case)
        return
    # spawned, not forked: the parent may hold threads of torch
    with ProcessPoolExecutor(min(workers, len(cases)), multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_work, job, case): case for case in cases}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed, most likely for want of memory; the same call with workers=1 continues"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _work(job: _Job, case: RawCase) -> str | list[str]:
    """Prepares a case and notes it.

    Returns:
        what is odd about it; the problem if it cannot be prepared.

    Raises:
        OSError: the store takes no more.
    """
    try:
        note = new_note(case, job.settings(case))
        odd = prepare_case(job.reader, case, job.spacing_mm, job.writer)
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever a strange file does to a library, the other cases go on
        if isinstance(error, OSError) and error.errno in FULL and job.writer.path in Path(error.filename or "").parents:
            raise  # no fault of this case, and no other one could be written
        if isinstance(error, FileNotFoundError):
            return f"{error.filename}: no such file"
        return f"{case.files[0]}: {type(error).__name__}: {' '.join(str(error).split())}"
    write_json(note_path(job.writer.path, case.id), note)
    return odd


def _checked_cases(reader: Reader) -> list[RawCase]:
    cases = reader.cases()
    seen: set[str] = set()
    for case in cases:
        if case.split not in SPLITS:
            raise UserError(f"{case.files[0]}: case {case.id}: split is {case.split!r}; one of {', '.join(SPLITS)}")
        if case.id in seen:
            raise UserError(f"{case.files[0]}: case id {case.id!r} occurs twice; rename one of its files")
        seen.add(case.id)
    return sorted(cases, key=lambda case: case.id)


def _computed_spacing(reader: Reader, cases: list[RawCase]) -> tuple[float, ...]:
    """From the headers of the annotated cases that are not for testing, else of those for pretraining."""
    pool = [case for case in cases if case.split in ("train", "val")] or [c for c in cases if c.split == "pretrain"]
    spacings, shapes = [], []
    problem = ""
    for case in pool or cases:
        try:
            frame = Frame.of_file(*reader.geometry(case))
        except (UserError, OSError) as error:
            problem = problem or str(error)
            continue  # reported with its reason when its turn comes
        spacings.append(frame.input_spacing_mm)
        shapes.append(frame.cached_shape)
    if not spacings:
        raise UserError(f"no readable image among {len(pool or cases)} cases; of the first: {problem}")
    return target_spacing(np.asarray(spacings), np.asarray(shapes))
