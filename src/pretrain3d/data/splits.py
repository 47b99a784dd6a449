"""Which cases are for training, validation and test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain3d.config import UserError
from pretrain3d.data.readers.contract import RawCase
from pretrain3d.data.store import Store

SPLITS = ("train", "val", "test", "pretrain")
FOLDS_FILE = "splits_final.json"  # nnU-Net's name and form
# of each fold {"train": case ids, "val": case ids}, and "test" where a data set's own folds take turns in testing
Folds = list[dict[str, list[str]]]


def fold_cases(store: Store, fold: int, num_folds: int = 5, seed: int = 0) -> dict[str, list[str]]:
    """The case ids of every split for one fold.

    A "val" split in the raw data is used as it is and every fold is the same. A splits file of the raw data
    (`read_folds`) or the data set itself (`Reader.folds`) says all folds. Otherwise the training cases are dealt to
    ``num_folds`` by patient: groups in the order of a hash of (seed, group), each to the fold with the fewest cases so
    far. The order of files or cases does not matter.

    Raises:
        UserError: ``fold`` is out of range, there are fewer patients than folds, or cases of a fold are missing.
    """
    if store.folds:
        return _given_fold(store, fold)
    if num_folds < 2 or not 0 <= fold < num_folds:
        raise UserError(f"fold must be 0..{num_folds - 1} and num_folds at least 2, got fold={fold} of {num_folds}")
    splits = _raw_splits(store)
    if splits["val"] or not splits["train"]:
        return splits
    groups: dict[str, list[str]] = {}
    for case_id in splits["train"]:
        groups.setdefault(store.cases[case_id].group, []).append(case_id)
    if len(groups) < num_folds:
        hint = f"num_folds={len(groups)} at most (data.num_folds of fit)" if len(groups) > 1 else "it takes two"
        raise UserError(f"{store.path}: {len(groups)} training patients cannot fill {num_folds} folds; {hint}")
    folds: list[list[str]] = [[] for _ in range(num_folds)]
    for group in sorted(groups, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest()):
        min(folds, key=len).extend(groups[group])
    splits["val"] = sorted(folds[fold])
    splits["train"] = sorted(case_id for index, ids in enumerate(folds) if index != fold for case_id in ids)
    return splits


def fold_or_all(store: Store, fold: int, num_folds: int = 5) -> dict[str, list[str]]:
    """`fold_cases`; where there are fewer patients than folds, all training cases train and none validates.

    For what needs training cases, but no validation on them: statistics, and pretraining on unlabelled cases.
    """
    splits = _raw_splits(store)
    patients = {store.cases[case_id].group for case_id in splits["train"]}
    too_few = 0 < len(patients) < num_folds and 0 <= fold < num_folds and not splits["val"] and not store.folds
    return splits if too_few else fold_cases(store, fold, num_folds)


def _raw_splits(store: Store) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for case_id in sorted(store.cases):
        splits[store.cases[case_id].split].append(case_id)
    return splits


def _given_fold(store: Store, fold: int) -> dict[str, list[str]]:
    if not 0 <= fold < len(store.folds):
        raise UserError(f"fold must be 0..{len(store.folds) - 1}, the folds of {store.path}, got fold={fold}")
    parts = {
        part: sorted(case_id for case_id in case_ids if case_id in store.cases)
        for part, case_ids in store.folds[fold].items()
    }
    for part in ("train", "val"):
        if not parts[part]:
            raise UserError(f"{store.path}: none of the {part} cases of fold {fold} could be prepared")
    return {**_raw_splits(store), **parts}


def read_folds(path: Path, cases: Iterable[RawCase]) -> tuple[Folds, list[str]]:
    """The folds of a splits file, ``[{"train": [case, ...], "val": [case, ...]}, ...]``, as nnU-Net writes it.

    Args:
        path: the file.
        cases: of the raw data.

    Returns:
        the folds, and what is to be said of them: training cases that a fold leaves out, patients on both sides of it.

    Raises:
        UserError: the file cannot be read or has another form, a fold names no training case, a case twice or one that
            is none of the training cases, or the data have a validation split of their own.
    """
    try:
        folds = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    known = {case.id: case for case in cases}
    if own := [case.id for case in known.values() if case.split == "val"]:
        raise UserError(f"{path}: the data have a validation split of their own, {own[0]!r} is in it; keep one of both")
    if not isinstance(folds, list) or not folds:
        raise UserError(f'{path}: expected a list of folds {{"train": [...], "val": [...]}}, got {str(folds)[:40]!r}')
    said = []
    for number, fold in enumerate(folds):
        said += _check_fold(f"{path}: fold {number}", fold, known)
    return [{part: fold[part] for part in ("train", "val")} for fold in folds], said


def _check_fold(place: str, fold: Any, known: dict[str, RawCase]) -> list[str]:
    """Raises UserError where a fold cannot be; returns what is to be said of it."""
    parts: list[Any] = [fold.get("train"), fold.get("val")] if isinstance(fold, dict) else [None]
    for part in parts:
        if not isinstance(part, list) or not part or not all(isinstance(case_id, str) for case_id in part):
            raise UserError(f"{place}: expected case ids under train and under val, got {str(fold)[:40]!r}")
    train, val = parts
    seen: set[str] = set()
    for case_id in [*train, *val]:
        if case_id not in known:
            raise UserError(f"{place}: there is no case {case_id!r}")
        if known[case_id].split != "train":
            raise UserError(f"{place}: {case_id!r} is a {known[case_id].split} case, expected training cases")
        if case_id in seen:
            raise UserError(f"{place}: case {case_id!r} is named twice")
        seen.add(case_id)
    said = []
    if left := sorted(case.id for case in known.values() if case.split == "train" and case.id not in seen):
        said.append(f"{place} leaves out {len(left)} training cases, the first {left[0]!r}")
    if shared := sorted({known[i].group for i in train} & {known[i].group for i in val}):
        said.append(f"{place} trains and validates on {len(shared)} of the patients, the first {shared[0]!r}")
    return said
