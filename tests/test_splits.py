import json
from types import SimpleNamespace

import pytest

from pretrain3d.config import UserError
from pretrain3d.data.readers.contract import RawCase
from pretrain3d.data.splits import fold_cases, fold_or_all, read_folds


def store_of(cases: list[tuple[str, str, str]], folds=()) -> SimpleNamespace:
    """Cases as (id, split, group)."""
    records = {name: SimpleNamespace(id=name, split=split, group=group) for name, split, group in cases}
    return SimpleNamespace(path="stores/x", cases=records, folds=list(folds))


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
    with pytest.raises(UserError, match=r"2 training patients cannot fill 5 folds; num_folds=2 at most"):
        fold_cases(store_of(CASES[:4]), 0)


def test_what_needs_no_validation_takes_fewer_patients_than_folds():
    assert fold_or_all(store_of(CASES), 1) == fold_cases(store_of(CASES), 1)
    few = fold_or_all(store_of(CASES[:4]), 0)
    assert few["train"] == sorted(case[0] for case in CASES[:4]) and few["val"] == []
    with pytest.raises(UserError, match="fold must be"):
        fold_or_all(store_of(CASES[:4]), 5)


GIVEN = [{"train": ["c00", "c01", "c04"], "val": ["c02"]}, {"train": ["c02", "c03"], "val": ["c01", "c00"]}]


def read(tmp_path, content, cases=(*CASES[:5], *OTHERS)):
    path = tmp_path / "splits_final.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_folds(path, [RawCase(name, split, group, ()) for name, split, group in cases])


def test_folds_of_a_splits_file_are_taken_as_they_are(tmp_path):
    folds, said = read(tmp_path, GIVEN)
    assert folds == GIVEN
    assert [line.split(": ", 1)[1] for line in said] == [
        "fold 0 leaves out 1 training cases, the first 'c03'",
        "fold 1 leaves out 1 training cases, the first 'c04'",
    ]
    store = store_of(CASES[:5] + OTHERS, folds)
    assert fold_cases(store, 1, num_folds=7) == {
        "train": ["c02", "c03"], "val": ["c00", "c01"], "test": ["t0"], "pretrain": ["u0", "u1"],
    }  # fmt: skip
    with pytest.raises(UserError, match=r"fold must be 0\.\.1, the folds of stores/x, got fold=2"):
        fold_cases(store, 2)
    del store.cases["c02"]  # could not be prepared, and `prepare` said so
    assert fold_cases(store, 1)["train"] == ["c03"]
    with pytest.raises(UserError, match="none of the val cases of fold 0 could be prepared"):
        fold_cases(store, 0)


def test_patients_on_both_sides_of_a_fold_are_said(tmp_path):
    said = read(tmp_path, [{"train": ["c00", "c02", "c04"], "val": ["c01", "c03"]}])[1]
    assert len(said) == 1 and "fold 0 trains and validates on 2 of the patients, the first 'patient0'" in said[0]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[", "cannot read .*splits_final.json: Expecting value"),
        ({"train": ["c00"], "val": ["c01"]}, "expected a list of folds"),
        ([], "expected a list of folds"),
        ([["c00"]], "fold 0: expected case ids under train and under val"),
        ([{"train": ["c00"]}], "fold 0: expected case ids under train and under val"),
        ([{"train": ["c00"], "val": []}], "fold 0: expected case ids under train and under val"),
        ([{"train": [0], "val": ["c01"]}], "fold 0: expected case ids under train and under val"),
        ([GIVEN[0], {"train": ["c00"], "val": ["c99"]}], "fold 1: there is no case 'c99'"),
        ([{"train": ["c00", "t0"], "val": ["c01"]}], "fold 0: 't0' is a test case, expected training cases"),
        ([{"train": ["c00", "c01"], "val": ["c01"]}], "fold 0: case 'c01' is named twice"),
    ],
)
def test_a_splits_file_that_cannot_be_is_refused(tmp_path, content, text):
    with pytest.raises(UserError, match=text):
        read(tmp_path, content)


def test_two_validation_splits_are_refused(tmp_path):
    with pytest.raises(UserError, match="a validation split of their own, 'v0' is in it"):
        read(tmp_path, GIVEN, (*CASES[:5], ("v0", "val", "v0")))
