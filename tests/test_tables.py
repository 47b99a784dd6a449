"""Tables: values with intervals, seeds as one row, and never two sets of cases in one table."""

import statistics

import pytest

from pretrain3d.__main__ import main
from pretrain3d.config import UserError
from pretrain3d.reporting.results import write_result
from pretrain3d.reporting.rows import rows_of
from pretrain3d.reporting.tables import KEYS, Table, leakage_table, make_tables, part_tables, read_results


def result(name="a", value=0.5, seed=0, data="h", cases=("c0", "c1"), interval=True, **config):
    entry = {"value": value, "low": None, "high": None}
    if interval and value is not None:
        entry |= {"low": value - 0.1, "high": value + 0.1}
    return {
        "run": name, "metrics": dict.fromkeys(KEYS, entry), "per_class": {"nodule": {"AP@0.10": entry}, "other": None},
        "cases": [{"case": case} for case in cases], "config": {"name": name, "out": "runs", "seed": seed, **config},
        "seed": seed, "data": {"hash": data, "name": f"set {data}"}, "asked": {"split": "test"},
    }  # fmt: skip


def rows(*results):
    """Rows of results that need no pooling."""
    return {name: [results[index] for (index,) in row] for name, row in rows_of(results).items()}


def test_a_row_holds_values_and_intervals():
    table, classes = make_tables(rows(result("a", 0.5), result("b|c", 0.25, interval=False), result("none", None)))
    assert table.header == ["run", *KEYS] and classes.header == ["run", "nodule", "other"]
    assert table.rows[0] == ["a", *["0.500 [0.400, 0.600]"] * 4]
    assert table.rows[1] == ["b|c", *["0.250"] * 4]
    assert table.rows[2] == ["none", *["–"] * 4]
    assert classes.rows[0] == ["a", "0.500 [0.400, 0.600]", "–"]
    assert table.title == "set h, 2 test cases, 95 % intervals over patients"


def test_tested_cases_that_the_pretraining_has_seen_stand_beside_the_results():
    rows = [{"case": "c0", "split": "test", "how": "copy", "similarity": 0.95},
            {"case": "c1", "split": "test", "how": "same voxels", "similarity": 1.0},
            {"case": "c7", "split": "train", "how": "same voxels", "similarity": 1.0}]  # fmt: skip
    leaky, clean = result("a") | {"leakage": rows}, result("b") | {"leakage": rows[2:]}
    table = leakage_table({"a": leaky, "b": clean, "old": result("old"), "baseline": result("c") | {"leakage": None}})
    assert table.header == ["run", "tested cases", "copy", "same voxels"]
    assert table.rows == [["a", "2 of 2", "1", "1"]]
    assert leakage_table({"b": clean}) is None


def test_seeds_become_mean_and_deviation():
    values = [0.4, 0.5, 0.75]
    runs = [result(f"x-s{s}", v, s, transfer={"path": f"runs/mae-s{s}/backbone.pt"}) for s, v in enumerate(values)]
    table = make_tables(rows(*runs, result("y-s0", 0.1)))[0]
    expected = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    assert table.rows[0] == ["x-s* (3 seeds)", *[expected] * 4]
    assert table.rows[1][0] == "y-s0"
    assert table.title.endswith("over patients; mean ± standard deviation over seeds or runs")


@pytest.mark.parametrize(
    "second",
    [
        result("x-s1", seed=1, backbone={"name": "other"}),  # another setting
        result("z-s1", seed=1),  # another name
        result("x-s11", seed=1),  # 11 is not the seed
        result("x-s0", seed=0),  # the same seed again
    ],
)
def test_runs_that_differ_otherwise_keep_their_rows(second):
    assert [*rows_of([result("x-s0"), second]).values()] == [[[0]], [[1]]]


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ({"checkpoint": "last", "step": 9}, {"checkpoint": "best", "step": 9}, False),
        ({"checkpoint": "last", "step": 9}, {"checkpoint": "last", "step": 4}, False),  # not trained to its end
        ({"checkpoint": "best", "step": 9}, {"checkpoint": "best", "step": 4}, True),
        ({"threshold": 0.25}, {"threshold": None}, False),  # swept or not
        ({"threshold": 0.25}, {"threshold": 0.5}, True),
        ({"patches": 4}, {"patches": 8}, False),
    ],
)
def test_runs_that_were_tested_otherwise_keep_their_rows(first, second, together):
    runs = [result(f"x-s{seed}", seed=seed) | {"asked": asked} for seed, asked in enumerate((first, second))]
    assert list(rows_of(runs)) == (["x-s* (2 seeds)"] if together else ["x-s0", "x-s1"])


def test_seeds_that_were_read_or_logged_otherwise_share_a_row():
    first = result("x-s0", logger={"wandb": None}, trainer={"max_steps": 9, "log_every_n_steps": 1})
    second = result("x-s1", seed=1, logger={"wandb": {"tags": ["s1"]}}, trainer={"max_steps": 9})
    assert list(rows_of([first, second])) == ["x-s* (2 seeds)"]
    second["config"]["trainer"]["max_steps"] = 10
    assert list(rows_of([first, second])) == ["x-s0", "x-s1"]


def test_trainings_that_end_by_their_time_share_a_row():
    asked = [{"checkpoint": "last", "step": step} for step in (9, 4)]
    runs = [result(f"x-s{s}", seed=s, trainer={"max_time": "00:01:00:00"}) | {"asked": asked[s]} for s in (0, 1)]
    assert list(rows_of(runs)) == ["x-s* (2 seeds)"]


def test_different_cases_never_share_a_table():
    tables = make_tables(rows(result("a"), result("b", data="other"), result("c", cases=("c0",)), result("d")))
    assert [[row[0] for row in table.rows] for table in tables[::2]] == [["a", "d"], ["b"], ["c"]]
    other_task = result("e") | {"per_class": {"organ": None}}
    annotated_anew = result("f") | {"cases": [{"case": "c0", "objects": 3}, {"case": "c1", "objects": 1}]}
    tables = make_tables(rows(result("a"), other_task, annotated_anew, result("d")))
    assert [[row[0] for row in table.rows] for table in tables[::2]] == [["a", "d"], ["e"], ["f"]]


def fold(number, value, seed=0, **result_of):
    cases = (f"c{2 * number}", f"c{2 * number + 1}")
    tested = result(f"x-f{number}-s{seed}", value, seed, **{"cases": cases, **result_of})
    tested["config"]["data"] = {"fold": number, "store": "s"}
    return tested


def test_folds_that_share_cases_are_averaged():
    """Of a repeated random split: all cases count, and the parts of each run stay apart."""
    folds = [fold(number, value, cases=("c0", f"c{number + 1}")) for number, value in enumerate((0.4, 0.5, 0.75))]
    table, classes = make_tables(rows(*folds, result("other", cases=("c0", "c1"))))[:2]
    expected = f"{statistics.mean((0.4, 0.5, 0.75)):.3f} ± {statistics.stdev((0.4, 0.5, 0.75)):.3f}"
    assert table.rows == [["x-f*-s0 (3 runs)", *[expected] * 4]]
    assert table.title.startswith("set h, 4 test cases, ") and classes.rows[0][1] == expected
    parts = [{"metrics": {"AP@0.10": {"value": 0.5, "low": None, "high": None}}, "objects": 3}]
    measured = [run | {"by_size": {f"0-{number}": parts[0]}} for number, run in enumerate(folds)]
    assert [table.rows for table in part_tables(rows(*measured))] == [
        [[f"x-f*-s0 (3 runs): x-f{number}-s0", "0.500"]] for number in range(3)
    ]
    same = [fold(number, 0.5, seed, cases=("c0", "c1")) for number in (0, 1) for seed in (0, 1)]
    assert [table.rows[0][:2] for table in make_tables(rows(*same))] == [["x-f*-s* (4 runs)", "0.500 ± 0.000"]] * 2


@pytest.mark.parametrize("second", [fold(0, 0.5, 1, cases=("c0", "c9")), fold(1, 0.5, 1, data="anew"), fold(0, 0.5, 0)])
def test_a_fold_with_other_cases_or_data_or_again_is_a_row_of_its_own(second):
    assert [*rows_of([fold(0, 0.5), second]).values()] == [[[0]], [[1]]]


def test_a_value_that_some_runs_lack_says_how_many_have_it():
    table = make_tables(rows(result("x-s0", 0.5), result("x-s1", None, 1), result("x-s2", 0.7, 2)))[0]
    assert table.rows == [["x-s* (3 seeds)", *["0.600 ± 0.141 (2 of 3)"] * 4]]
    table = make_tables(rows(result("x-s0", 0.5, 0), result("x-s1", None, 1)))[0]
    assert table.rows == [["x-s* (2 seeds)", *["0.500 (1 of 2)"] * 4]]


def test_parts_have_tables_of_their_own():
    def part(value, **counted):
        return {"metrics": {"AP@0.10": {"value": value, "low": None, "high": None}}, **counted}

    sizes = {"0-500": part(0.2, objects=1), "500-": part(None, objects=7)}
    runs = [
        result("x-s0", seed=0) | {"by_size": sizes, "by": {"scanner": {"A": part(0.4, num_cases=2)}}},
        result("x-s1", seed=1) | {"by_size": sizes, "by": {"scanner": {"A": part(0.6, num_cases=2)}}},
        result("old"),
    ]
    by_size, by_scanner = part_tables(rows(*runs))
    assert by_size.title == "AP@0.10 by object size in mm3, set h, 2 test cases"
    assert by_size.header == ["run", "0-500 (1 object)", "500- (7 objects)"]
    assert by_size.rows == [["x-s* (2 seeds)", "0.200 ± 0.000", "–"], ["old", "–", "–"]]
    assert by_scanner.title == "AP@0.10 by scanner, set h, 2 test cases"
    assert by_scanner.header == ["run", "A (2 cases)"] and by_scanner.rows[0][1] == "0.500 ± 0.141"
    assert part_tables(rows(result("old"))) == []


def test_formats_of_a_table():
    table = Table("A & B", ["run", "mAP"], [["x|y", "0.5"], ["longer", "–"]])
    assert table.as_markdown() == "### A & B\n\n| run | mAP |\n| --- | ---: |\n| x\\|y | 0.5 |\n| longer | – |\n"
    assert table.as_text().splitlines() == ["A & B", "run     mAP", "-----------", "x|y     0.5", "longer    –"]
    assert "<caption>A &amp; B</caption>" in table.as_html() and "<td>x|y</td><td>0.5</td>" in table.as_html()


def test_reading_takes_folders_and_files_once_each(tmp_path):
    for name in ("a", "b"):
        values = result(name)
        write_result(tmp_path / name, curves={}, **{k: values[k] for k in values})
    read = read_results([tmp_path / "a", tmp_path / "b" / "result.json"])
    assert [entry["run"] for entry in read] == ["a", "b"]
    with pytest.raises(UserError, match="given twice"):
        read_results([tmp_path / "a", tmp_path / "a" / "result.json"])
    with pytest.raises(UserError, match="no run is given"):
        read_results([])


@pytest.mark.parametrize(
    ("option", "endings"), [("out=table.html", ".md"), ("out=table", ".md"), ("report=table.md", ".html, .htm")]
)
def test_the_name_of_a_file_says_what_it_holds(tmp_path, capsys, option, endings):
    write_result(tmp_path, curves={}, **result())
    key, _, name = option.partition("=")
    assert main(["table", str(tmp_path), f"{key}={tmp_path / name}"]) == 2
    captured = capsys.readouterr()
    assert captured.err.endswith(f"the name must end in {endings}\n") and not captured.out
    assert not (tmp_path / name).exists()
