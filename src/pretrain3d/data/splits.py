"""Which cases are for training, validation and test."""

from __future__ import annotations

import hashlib

from pretrain3d.config import UserError
from pretrain3d.data.store import Store

SPLITS = ("train", "val", "test", "pretrain")


def fold_cases(store: Store, fold: int, num_folds: int = 5, seed: int = 0) -> dict[str, list[str]]:
    """The case ids of every split for one fold.

    A "val" split in the raw data is used as it is and every fold is the same. Otherwise the training cases are dealt
    to ``num_folds`` by patient: groups in the order of a hash of (seed, group), each to the fold with the fewest cases
    so far. The order of files or cases does not matter.

    Raises:
        UserError: ``fold`` is out of range, or there are fewer patients than folds.
    """
    if num_folds < 2 or not 0 <= fold < num_folds:
        raise UserError(f"fold must be 0..{num_folds - 1} and num_folds at least 2, got fold={fold} of {num_folds}")
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for case_id in sorted(store.cases):
        splits[store.cases[case_id].split].append(case_id)
    if splits["val"] or not splits["train"]:
        return splits
    groups: dict[str, list[str]] = {}
    for case_id in splits["train"]:
        groups.setdefault(store.cases[case_id].group, []).append(case_id)
    if len(groups) < num_folds:
        raise UserError(f"{store.path}: {len(groups)} training patients cannot fill {num_folds} folds; use fewer folds")
    folds: list[list[str]] = [[] for _ in range(num_folds)]
    for group in sorted(groups, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest()):
        min(folds, key=len).extend(groups[group])
    splits["val"] = sorted(folds[fold])
    splits["train"] = sorted(case_id for index, ids in enumerate(folds) if index != fold for case_id in ids)
    return splits
