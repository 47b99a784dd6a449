from types import SimpleNamespace

import pytest

from pretrain3d.config import UserError
from pretrain3d.data.splits import fold_cases


def store_of(cases: list[tuple[str, str, str]]) -> SimpleNamespace:
    """Cases as (id, split, group)."""
    records = {name: SimpleNamespace(id=name, split=split, group=group) for name, split, group in cases}
    return SimpleNamespace(path="stores/x", cases=records)


CASES = [(f"c{i:02d}", "train", f"patient{i // 2}") for i in range(26)]
OTHERS = [("t0", "test", "t0"), ("u0", "pretrain", "u0"), ("u1", "pretrain", "u1")]


def test_folds_partition_the_training_cases_and_keep_patients_together():
    store = store_of(CASES + OTHERS)
    seen: list[str] = []
    for fold in range(5):
        splits = fold_cases(store, fold)
        assert splits["test"] == ["t0"] and splits["pretrain"] == ["u0", "u1"]
        assert sorted(splits["train"] + splits["val"]) == [name for name, _, _ in CASES]
        patients = {key: {store.cases[name].group for name in splits[key]} for key in ("train", "val")}
        assert not patients["train"] & patients["val"]
        assert 4 <= len(splits["val"]) <= 6
        seen += splits["val"]
    assert sorted(seen) == [name for name, _, _ in CASES]


def test_the_order_of_listing_does_not_matter_and_the_seed_does():
    first = fold_cases(store_of(CASES), 1)
    assert fold_cases(store_of(CASES[::-1]), 1) == first
    assert fold_cases(store_of(CASES), 1, seed=1) != first


def test_folds_never_change():
    """Results of one version are compared with those of the next: the same cases, the same folds."""
    assert fold_cases(store_of(CASES), 0)["val"] == ["c02", "c03", "c16", "c17", "c20", "c21"]


def test_a_raw_validation_split_is_used_as_it_is():
    store = store_of([*CASES, ("v1", "val", "v1"), ("v0", "val", "v0")])
    for fold in (0, 3):
        splits = fold_cases(store, fold)
        assert splits["val"] == ["v0", "v1"] and len(splits["train"]) == 26


def test_a_store_without_training_cases_has_no_folds_to_make():
    assert fold_cases(store_of(OTHERS), 0) == {"train": [], "val": [], "test": ["t0"], "pretrain": ["u0", "u1"]}


@pytest.mark.parametrize("arguments", [{"fold": 5}, {"fold": -1}, {"fold": 0, "num_folds": 1}])
def test_a_fold_out_of_range_is_refused(arguments):
    with pytest.raises(UserError, match="fold must be"):
        fold_cases(store_of(CASES), **arguments)


def test_more_folds_than_patients_are_refused():
    with pytest.raises(UserError, match="2 training patients cannot fill 5 folds"):
        fold_cases(store_of(CASES[:4]), 0)
