"""result.json is whole or absent, plain JSON, and checked when read."""

import errno
import json
import os

import numpy as np
import pytest
import torch

from pretrain3d.config import UserError
from pretrain3d.reporting import results
from pretrain3d.reporting.results import (
    commit,
    environment,
    is_current,
    read_result,
    write_json,
    write_result,
    write_text,
)

ENTRY = {"value": 0.5, "low": 0.4, "high": 0.6}


def write(folder, **changes):
    given = {
        "run": "a", "metrics": {"mAP": ENTRY}, "per_class": {"nodule": {"mAP": ENTRY}, "absent": None}, "curves": {},
        "cases": [{"case": "c0"}], "config": {"name": "a"}, "seed": 0, "data": {"hash": "h", "name": "d"},
    }  # fmt: skip
    return write_result(folder, **(given | changes))


def test_round_trip_with_commit_and_environment(tmp_path):
    path = write(tmp_path / "run", asked={"step": 3, "split": "test"}, test_seconds=2.5)
    result = read_result(tmp_path / "run")
    assert result == read_result(path)
    assert result["metrics"] == {"mAP": ENTRY} and result["test_seconds"] == 2.5
    assert result["environment"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert result["cost"] is None and result["backbone"] is None


def test_arrays_scalars_and_nan_become_plain_json(tmp_path):
    value = {"a": np.float32(0.5), "b": np.arange(2), "c": torch.tensor([1.0, float("nan")]), "d": (tmp_path, True)}
    write_json(tmp_path / "x.json", {**value, 3: float("inf")})
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert read == {"a": 0.5, "b": [0, 1], "c": [1.0, None], "d": [str(tmp_path), True], "3": None}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "x.txt", "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(tmp_path / "x.txt", "new")
    assert (tmp_path / "x.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda result: result.pop("metrics"), "lacks metrics"),
        (lambda result: result["metrics"].update(mAP=0.5), r"mAP is 0.5; expected \{value, low, high\}"),
        (lambda result: result["per_class"]["nodule"].update(mAP={}), "nodule mAP is {}"),
        (lambda result: result["per_class"].update(nodule=0.5), "nodule is 0.5; expected"),
        (lambda result: result["metrics"]["mAP"].update(low="0.4"), 'mAP is .*"low": "0.4"'),
        (lambda result: result.update(metrics=[0.5]), r"metrics is \[0.5\]; expected an object"),
        (lambda result: result.update(cases=3), "cases is 3; expected a list"),
        (lambda result: result.update(cases=["c0"]), 'cases holds "c0"; expected an object for each case'),
        (lambda result: result.update(run=None), "run is null; expected a text"),
        (lambda result: result.update(seed="0"), 'seed is "0"; expected a whole number'),
        (lambda result: result.update(data="phantom"), 'data is "phantom"; expected an object or null'),
        (lambda result: result.update(by_size={"0-500": 0.5}), "by_size 0-500 is 0.5; expected"),
        (lambda result: result.update(by={"site": {"A": {"metrics": {"mAP": 1}}}}), "site A mAP is 1; expected"),
    ],
)
def test_a_wrong_result_is_named(tmp_path, change, message):
    path = write(tmp_path)
    result = json.loads(path.read_text())
    change(result)
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match=message):
        read_result(path)


def test_what_is_no_result_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no result.json; run `pretrain3d test"):
        read_result(tmp_path)
    with pytest.raises(UserError, match=r"nothing.json does not exist"):
        read_result(tmp_path / "nothing.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(UserError, match="is not a JSON file"):
        read_result(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object, got a list"):
        read_result(tmp_path / "list.json")


def test_a_result_is_current_for_exactly_what_was_asked(tmp_path):
    asked = {"step": 3, "samples": np.int64(10)}
    assert not is_current(tmp_path / "result.json", asked)
    path = write(tmp_path, asked=asked)
    assert is_current(path, asked) and is_current(path, {"samples": 10, "step": 3})
    assert not is_current(path, {**asked, "step": 4})


def test_environment_names_versions_and_machine():
    found = environment()
    assert found["monai"] and found["lightning"] and found["cpu"] and found["cores"] >= 1


def test_commit_is_the_checkout_of_the_package_or_nothing(tmp_path, monkeypatch):
    here = commit()
    assert here is None or (len(here["hash"]) == 40 and isinstance(here["dirty"], bool))
    elsewhere = tmp_path / "results.py"
    elsewhere.write_text("")
    monkeypatch.setattr(results, "__file__", str(elsewhere))
    assert commit() is None
    monkeypatch.setenv("PATH", "")  # no git at all
    assert commit() is None
