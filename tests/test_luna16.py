"""LUNA16's CPM: the official script's rules as plain loops, its known answers, and what is wrong in a file."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from test_froc import slow_froc

from pretrain3d.__main__ import main
from pretrain3d.config import UserError
from pretrain3d.evaluation.luna16 import (
    MISSED,
    NONE,
    Marks,
    best_marks,
    evaluate,
    evaluate_vectors,
    match_marks,
    read_findings,
    read_marks,
    read_scans,
    score_files,
)
from pretrain3d.evaluation.statistics import resample

Finding = tuple[np.ndarray, float, bool]  # centre, diameter, included
Mark = tuple[np.ndarray, float]


def slow_script(
    marks: dict[int, list[Mark]], findings: dict[int, list[Finding]], scans: list[int]
) -> tuple[list[float], list[float], dict[str, int]]:
    """The evaluation script of the challenge, one candidate and one finding at a time."""
    labels: list[float] = []
    scores: list[float] = []
    counts = dict.fromkeys(("marks", "TP", "FN", "FP", "double_detections_ignored", "ignored_on_excluded"), 0)
    for scan in scans:
        candidates = list(marks.get(scan, []))
        if len(candidates) > 100:
            limit = sorted((score for _, score in candidates), reverse=True)[100]
            candidates = [mark for mark in candidates if mark[1] > limit]
        counts["marks"] += len(candidates)
        left = set(range(len(candidates)))
        ordered = sorted(findings.get(scan, []), key=lambda finding: not finding[2])  # nodules first
        for center, diameter, included in ordered:
            radius = (10.0 if diameter < 0 else diameter) / 2
            hits = []
            for index, (point, score) in enumerate(candidates):
                if sum((point[axis] - center[axis]) ** 2 for axis in range(3)) < radius**2:
                    if included:
                        hits.append(score)
                        left.discard(index)
                    elif index in left:
                        counts["ignored_on_excluded"] += 1
                        left.discard(index)
            if included:
                counts["double_detections_ignored"] += max(len(hits) - 1, 0)
                counts["TP" if hits else "FN"] += 1
                labels.append(1.0)
                scores.append(max(hits, default=-1e9))
        counts["FP"] += len(left)
        labels += [0.0] * len(left)
        scores += [candidates[index][1] for index in left]
    return labels, scores, counts


def random_lists(seed: int, num_scans: int = 12) -> tuple[dict[int, list[Mark]], dict[int, list[Finding]]]:
    """Points on a grid (some lie exactly on a radius), few distinct scores, a scan without marks, many capped."""
    rng = np.random.default_rng(seed)
    marks: dict[int, list[Mark]] = {}
    findings: dict[int, list[Finding]] = {}
    for scan in range(num_scans):
        count = int(rng.integers(0, 4))
        centers = rng.integers(0, 40, (count + 4, 3)).astype(float)
        diameters = rng.choice([6.0, 10.0, 13.0], count + 4)
        diameters[count:] = np.where(rng.random(4) < 0.7, -1.0, diameters[count:])
        findings[scan] = [(c, float(d), i < count) for i, (c, d) in enumerate(zip(centers, diameters, strict=True))]
        number = 0 if scan == 3 else int(rng.integers(60, 160))
        near = rng.random(number) < 0.3
        points = np.where(
            near[:, None],
            centers[rng.integers(0, len(centers), number)] + rng.integers(-5, 6, (number, 3)),
            rng.integers(0, 40, (number, 3)),
        )
        scores = rng.integers(0, 60, number) / 60
        marks[scan] = [(p, float(s)) for p, s in zip(points.astype(float), scores, strict=True)]
    return marks, findings


def as_marks(rows: list[tuple[int, np.ndarray, float]]) -> Marks:
    scan = np.array([row[0] for row in rows], np.int64)
    points = np.array([row[1] for row in rows], float).reshape(-1, 3)
    return Marks(scan, points, np.array([row[2] for row in rows], float))


def arrays(marks: dict[int, list[Mark]], findings: dict[int, list[Finding]]) -> tuple[Marks, Marks, Marks]:
    """Marks, nodules and excluded findings, in a shuffled order."""
    rows = [(scan, point, score) for scan, of_scan in marks.items() for point, score in of_scan]
    rows = [rows[index] for index in np.random.default_rng(0).permutation(len(rows))]
    kinds = [
        [(scan, center, diameter) for scan, of_scan in findings.items() for center, diameter, i in of_scan if i is kind]
        for kind in (True, False)
    ]
    return as_marks(rows), as_marks(kinds[0]), as_marks(kinds[1])


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_script_as_loops(seed: int) -> None:
    marks, findings = random_lists(seed)
    labels, scores, counts = slow_script(marks, findings, list(range(12)))
    hits = match_marks(*arrays(marks, findings), 12)
    assert {key: hits.counts[key] for key in counts} == counts
    assert min(counts.values()) > 0, "every rule must have been at work"
    expected = sorted(zip(labels, scores, strict=True))
    nodules = [(1.0, score) for score in hits.matches.scores[hits.matches.hits[:, 0]]]
    others = [(0.0, score) for score in hits.matches.scores[~hits.matches.hits[:, 0]]]
    assert sorted(nodules + others + [(1.0, -1e9)] * counts["FN"]) == expected

    seen = [(score, label > 0) for label, score in zip(labels, scores, strict=True) if score > -1e8]
    cpm = slow_froc([s for s, _ in seen], [hit for _, hit in seen], 12, int(sum(labels)))
    result = evaluate(hits.matches)
    assert result["CPM"] == pytest.approx(cpm, abs=1e-12)
    assert np.mean(list(result["sensitivity"].values())) == pytest.approx(cpm, abs=1e-12)
    assert evaluate_vectors(labels, scores, 12)["CPM"] == pytest.approx(cpm, abs=1e-12)


def test_a_bootstrap_sample_is_the_script_on_copied_scans() -> None:
    marks, findings = random_lists(5)
    result = evaluate(match_marks(*arrays(marks, findings), 12).matches, samples=12, seed=3)
    values = []
    for weight in resample(12, 12, seed=3):
        labels, scores, _ = slow_script(marks, findings, [scan for scan in range(12) for _ in range(weight[scan])])
        seen = [(score, label > 0) for label, score in zip(labels, scores, strict=True) if score > -1e8]
        values.append(slow_froc([s for s, _ in seen], [hit for _, hit in seen], 12, int(sum(labels))))
    np.testing.assert_allclose(result["intervals"]["CPM"], np.quantile(values, [0.025, 0.975]), atol=1e-12)
    band = result["froc"]
    assert band["false_positives_per_scan"][::10] == [0.125, 0.25, 0.5, 1, 2, 4, 8]
    assert band["sensitivity"][::10] == list(result["sensitivity"].values())
    assert [band["low"][30], band["high"][30]] == result["intervals"]["sensitivity"]["1"]


@pytest.mark.parametrize("num_scans", [1, 9])
def test_nodules_of_a_single_scan_have_no_interval(num_scans: int) -> None:
    nodules = Marks(np.zeros(2, np.int64), np.array([[0.0, 0, 0], [50, 0, 0]]), np.full(2, 8.0))
    marks = Marks(np.arange(num_scans), np.zeros((num_scans, 3)), np.linspace(0.9, 0.1, num_scans))
    result = evaluate(match_marks(marks, nodules, NONE, num_scans).matches, samples=300)
    assert result["CPM"] == 0.5 and result["intervals"]["CPM"] is None
    assert result["intervals"]["sensitivity"]["1"] is None and set(result["froc"]["low"]) == {None}


def test_a_mark_hits_strictly_within_the_radius() -> None:
    nodule = as_marks([(0, np.zeros(3), 10.0)])
    for distance, found in ((4.999, 1), (5.0, 0)):
        marks = as_marks([(0, np.array([0.0, distance, 0.0]), 0.5)])
        assert match_marks(marks, nodule, as_marks([]), 1).counts["TP"] == found
        unknown = as_marks([(0, np.zeros(3), -1.0)])
        assert match_marks(marks, as_marks([]), unknown, 1).counts["FP"] == 1 - found


def test_a_mark_in_two_nodules_finds_both_and_the_cap_is_strict() -> None:
    nodules = as_marks([(0, np.zeros(3), 10.0), (0, np.array([2.0, 0, 0]), 10.0)])
    hits = match_marks(as_marks([(0, np.array([1.0, 0, 0]), 0.5)]), nodules, as_marks([]), 1)
    assert hits.counts["TP"] == 2 and hits.counts["FP"] == 0
    rows = [(0, np.zeros(3), score) for score in [0.9] * 60 + [0.5] * 41] + [(1, np.zeros(3), 0.1)] * 100
    kept = best_marks(as_marks(rows), 2)
    assert (kept.scan == 0).sum() == 60 and (kept.scan == 1).sum() == 100


def test_the_published_submission_gives_its_cpm(testdata: Path, tmp_path: Path) -> None:
    folder = testdata / "data" / "luna16_froc"
    known = json.loads((folder / "EXPECTED.json").read_text())["deeplung_dpn26"]
    targets, excluded, cases, predictions = (str(folder / name) for name in known["inputs"])
    out = tmp_path / "out.json"
    line = [f"predictions={predictions}", f"targets={targets}", f"excluded={excluded}", f"cases={cases}"]
    assert main(["score", "protocol=luna16", *line, f"out={out}", "samples=20"]) == 0
    written = json.loads(out.read_text())
    assert written["CPM"] == pytest.approx(known["recomputed_sensitivity"].pop("CPM"), abs=1e-6)
    assert written["sensitivity"] == pytest.approx(known["recomputed_sensitivity"], abs=1e-6)
    low, high = written["intervals"]["CPM"]
    assert low < written["CPM"] < high
    for key in ("scans", "nodules", "TP", "FN", "FP", "double_detections_ignored", "ignored_on_excluded"):
        assert written["counts"][key] == known[key]
    assert written["counts"]["marks"] == known["candidates_after_cap"]


def test_the_official_vectors_give_their_cpm(testdata: Path) -> None:
    folder = testdata / "data" / "luna16_froc"
    known = json.loads((folder / "EXPECTED.json").read_text())["official_script_output"]
    with gzip.open(folder / known["inputs"][0], "rt") as file:
        labels, scores = zip(*[map(float, row) for row in csv.reader(file)], strict=True)
    result = evaluate_vectors(labels, scores, 888)
    assert result["CPM"] == pytest.approx(0.7291014, abs=1e-7)
    assert result["sensitivity"]["8"] == pytest.approx(known["sensitivity"]["8"], abs=1e-7)


POINTS = "seriesuid,coordX,coordY,coordZ"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Three scans with numbers as ids; found, missed, a false positive, a mark on an excluded finding."""
    contents = {
        "predictions": f"{POINTS},probability\n1,0,0,0,0.9\n1,50,0,0,0.8\n2,9,0,0,0.7\n",
        "targets": f"{POINTS},diameter_mm\n00001,1,0,0,6\n00003,1,0,0,6\n00009,0,0,0,5\n",
        "excluded": f"{POINTS},diameter_mm\n00002,8,0,0,-1\n",
        "cases": "00001\n00002\n00003\n",
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.csv").write_text(content)
    return {name: tmp_path / f"{name}.csv" for name in contents}


def test_files_in_every_spelling(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    plain = score_files(**files)  # one false positive in three scans, above the found nodule's score nothing
    assert plain["CPM"] == 0.5 and plain["counts"]["FP"] == 1 and plain["counts"]["nodules_of_other_scans"] == 1
    text = files["predictions"].read_text()
    files["predictions"].write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.replace(",", "\t").encode()))
    files["cases"].write_text("seriesuid\r\n00001\r\n\r\n00002\r\n00003\r\n")
    shuffled = [",".join(reversed(row.split(","))) for row in files["targets"].read_text().splitlines()]
    files["targets"].write_text("\n".join(shuffled) + "\n\n")
    assert score_files(**files) == plain
    assert score_files(**(files | {"excluded": None}))["counts"]["FP"] == 2
    assert main(["score", "protocol=luna16", *(f"{key}={path}" for key, path in files.items()), "samples=10"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("CPM ") and "0.500 [" in shown and "1 nodules of scans that" in shown


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("predictions", "0.8", "high", "predictions.csv line 3: probability is 'high', not a finite number"),
        ("predictions", "50", "nan", "predictions.csv line 3: coordX is 'nan', not a finite number"),
        ("predictions", "2,9", "00007,9", "predictions.csv line 4: scan '00007' is not in the list of scans"),
        ("predictions", ",0.9", "", "predictions.csv line 2: 4 cells, but the header names 5"),
        ("predictions", "probability", "score", "predictions.csv line 1: the header lacks probability"),
        ("targets", "00001,1,0,0,6", "00001,1,0,0,0", "targets.csv line 2: diameter_mm is 0"),
        ("targets", "0000", "0004", "targets.csv: no nodule in the scans of"),
        ("excluded", "8", "", "excluded.csv line 2: coordX is '', not a finite number"),
        ("cases", "00002", "00001", "cases.csv line 2: scan '00001' was listed in line 1 already"),
        ("cases", "00001\n00002\n00003\n", "seriesuid\n", "cases.csv: no scan is listed"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], name: str, old: str, new: str, said: str
) -> None:
    files[name].write_text(files[name].read_text().replace(old, new))
    assert main(["score", "protocol=luna16", *(f"{key}={path}" for key, path in files.items())]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and len(captured.err.splitlines()) == 1 and not captured.out


def test_other_mistakes(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"{key}={path}" for key, path in files.items()]
    for arguments, said in [
        (["protocol=luna", *given], "did you mean 'luna16'"),
        (["protocol=luna16", *given[:2]], "missing cases=VALUE"),
        (["protocol=luna16", *given, "by=x"], "unknown option 'by'"),
        (["protocol=luna16", *given[:-1], "cases=none.csv"], "none.csv: cannot be read"),
    ]:
        assert main(["score", *arguments]) == 2
        assert said in capsys.readouterr().err
    files["cases"].write_bytes(b"\x1f\x8b broken")
    with pytest.raises(UserError, match="a broken gzip file"):
        read_scans(files["cases"])


def test_readers_give_places_in_the_list(files: dict[str, Path]) -> None:
    scans = read_scans(files["cases"])
    assert scans == ["00001", "00002", "00003"]
    assert read_marks(files["predictions"], scans).scan.tolist() == [0, 0, 1]
    findings, elsewhere = read_findings(files["targets"], scans)
    assert findings.scan.tolist() == [0, 2] and elsewhere == 1
    assert MISSED == -1e9
