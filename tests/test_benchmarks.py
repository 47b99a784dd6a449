"""What every benchmark stands on: the verdict about its targets."""

import sys
from pathlib import Path

import pytest

FOLDER = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import harness

    yield harness
    del sys.modules["harness"]


@pytest.mark.parametrize(
    ("bound", "at_most", "status"), [(4.0, False, 0), (4.1, False, 1), (4.0, True, 0), (3.9, True, 1)]
)
def test_a_missed_target_is_status_1(harness, capsys, bound, at_most, status):
    results = {"ours": [2.0, 1.0, 900.0, 2.0, 2.0], "theirs": [8.0, 8.0, 8.0, 0.1, 9.0]}
    target = harness.Target("speed", lambda medians: medians["theirs"] / medians["ours"], bound, at_most)
    assert harness.report("title", "s", "inputs", (), results, [target]) == status
    printed = capsys.readouterr().out
    assert ("MISSED" in printed) == bool(status) and ("reached" in printed) != bool(status)
    assert "2.000 s  (1.000 .. 900.000, 5 runs)" in printed


def test_one_missed_target_among_several_is_status_1(harness):
    targets = [harness.Target(str(bound), lambda medians: medians["ours"], bound) for bound in (1.0, 3.0, 2.0)]
    assert harness.report("title", "s", "inputs", (), {"ours": [2.0]}, targets) == 1


def test_candidates_take_turns(harness):
    order = []
    results = harness.interleave({name: lambda name=name: order.append(name) or 1.0 for name in "ab"})
    assert "".join(order) == "ab" * 5 and results == {"a": [1.0] * 5, "b": [1.0] * 5}


def test_what_cannot_run_says_why(harness, capsys):
    assert harness.not_run("the peer is missing") == 2
    assert capsys.readouterr().err == "not run: the peer is missing\n"
