"""Numbers by the column of a case table: the same as those of the chosen cases alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_matching import random_cases

from pretrain3d.config import UserError
from pretrain3d.evaluation.matching import match
from pretrain3d.evaluation.protocol import evaluate
from pretrain3d.evaluation.strata import by_stratum, chosen_values, read_values, strata_of

CASES = [f"case{index}" for index in range(9)]


def table(folder: Path, header: str, rows: list[str]) -> Path:
    path = folder / "cases.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_every_value_is_an_evaluation_of_its_cases(tmp_path: Path) -> None:
    predictions, targets = random_cases(0, cases=9, boxes=25, objects=5, classes=2)
    path = table(tmp_path, "scanner,case", [f"{'AB'[i % 2]},{case}" for i, case in enumerate(CASES)] + ["C,other"])
    strata = strata_of(read_values(path, "scanner", CASES))
    assert strata == {"A": CASES[::2], "B": CASES[1::2]}
    result = by_stratum(match(predictions, targets, ["a", "b"]), strata, samples=30)
    for name, part in strata.items():
        expected = evaluate({i: predictions[i] for i in part}, {i: targets[i] for i in part}, ["a", "b"])
        assert result[name]["num_cases"] == len(part)
        for key, entry in result[name]["metrics"].items():
            assert entry["value"] == (None if expected[key] is None else pytest.approx(expected[key], abs=1e-12)), key
        assert result[name]["per_class"]["b"]["mAP"]["value"] == pytest.approx(expected["per_class"]["b"]["mAP"])
        assert result[name]["metrics"]["mAP"]["low"] <= result[name]["metrics"]["mAP"]["high"]


def test_of_cases_keeps_everything_about_them() -> None:
    predictions, targets = random_cases(1, cases=9, boxes=25, objects=5, classes=2)
    part = match(predictions, targets, ["a", "b"]).of_cases({"case7", "case2"})
    alone = match({i: predictions[i] for i in part.case_ids}, {i: targets[i] for i in part.case_ids}, ["a", "b"])
    assert part.case_ids == ["case2", "case7"]
    for mine, its in zip(part.per_class, alone.per_class, strict=True):
        for name in ("case", "scores", "hits", "objects", "annotated", "source", "found"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(its, name))


def test_numbers_are_in_order_and_many_of_them_in_thirds(tmp_path: Path) -> None:
    few = table(tmp_path, "case,slices", [f"{case},{[10, 9, 100][i % 3]}" for i, case in enumerate(CASES)])
    assert list(strata_of(read_values(few, "slices", CASES))) == ["9", "10", "100"]
    many = table(tmp_path, "id,spacing", [f"{case},{0.5 + i / 4}" for i, case in enumerate(CASES)])
    assert strata_of(read_values(many, "spacing", CASES)) == {
        "0.5..1": CASES[:3], "1.25..1.75": CASES[3:6], "2..2.5": CASES[6:]
    }  # fmt: skip
    blank = table(tmp_path, "case,site", [f"{case},{'' if i else 'north'}" for i, case in enumerate(CASES)])
    assert strata_of(read_values(blank, "site", CASES)) == {"(blank)": CASES[1:], "north": CASES[:1]}


def test_what_the_options_choose(tmp_path: Path) -> None:
    targets = {case: {"spacing_mm": np.array([0.7, 0.8, size])} for case, size in zip("cab", (5, 0.6, 5), strict=True)}
    assert chosen_values("", "", targets) == strata_of({}) == {}
    assert strata_of(chosen_values("", "spacing", targets)) == {"0.8": ["a"], "5": ["b", "c"]}  # the longest side
    path = table(tmp_path, "case,spacing", ["a,1", "b,1", "c,2"])
    assert chosen_values(str(path), "spacing", targets) == {"a": "1", "b": "1", "c": "2"}  # a table comes first
    for given, said in [
        (("", "site"), "by=site needs cases=TABLE as well (only by=spacing is known without a table)"),
        ((str(path), ""), f"cases={path} needs by=COLUMN as well"),
        (("nowhere.csv", "site"), "nowhere.csv: cannot be read: No such file"),
    ]:
        with pytest.raises(UserError) as caught:
            chosen_values(*given, targets)
        assert said in str(caught.value)
    with pytest.raises(UserError, match="case 'd' has no spacing_mm in the targets"):
        chosen_values("", "spacing", {**targets, "d": {}})


def test_a_value_of_one_patient_has_no_interval(tmp_path: Path) -> None:
    predictions, targets = random_cases(0, cases=9, boxes=25, objects=5, classes=2)
    strata = {"one": ["case1", "case2"], "more": ["case3", "case4", "case5"]}
    groups = {case: "p" if case in strata["one"] else case for case in targets}
    result = by_stratum(match(predictions, targets, ["a", "b"]), strata, samples=20, groups=groups)
    one, more = (result[name]["metrics"]["mAP"] for name in strata)
    assert one["value"] is not None and one["low"] is None and more["low"] < more["high"]


def test_a_column_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 columns are named 'site'"):
        read_values(table(tmp_path, "case,site,site", ["a,1,2"]), "site", ["a"])


@pytest.mark.parametrize(
    ("rows", "column", "said"),
    [
        (["a,1"], "site", "no row of case 'b'; its column 'case' holds 'a'"),
        ([], "site", "no row of case 'a' and 1 more cases; its column 'case' is empty"),
        (["a,1", "b,2", "a,3"], "site", "line 4: case 'a' was in line 2 already"),
        (["a,1", "b,2"], "sites", "no column 'sites', did you mean 'site'?"),
        (["a,1", "b"], "site", "line 3: 1 cells, but the header names 2"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, rows: list[str], column: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_values(table(tmp_path, "case,site", rows), column, ["a", "b"])
    assert said in str(caught.value) and "cases.csv" in str(caught.value)
