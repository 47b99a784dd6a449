"""LUNA16's CPM by the official rules, from the challenge's own files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.delimited import Delimited, read_rows, read_table
from pretrain3d.evaluation.froc import FALSE_POSITIVES_PER_CASE, froc_sensitivity
from pretrain3d.evaluation.matching import ClassMatches
from pretrain3d.evaluation.statistics import interval, plain_and_drawn

MARKS_PER_SCAN = 100
UNKNOWN_DIAMETER_MM = 10.0  # of findings whose diameter is given as -1
MISSED = -1e9  # the score of a nodule that nothing hit, in the vectors of the official script
BAND_RATES = 2.0 ** np.linspace(-3, 3, 61)  # every tenth is one of the seven that CPM averages
POINT = ("coordX", "coordY", "coordZ")
SCAN = "seriesuid"


@dataclass(frozen=True)
class Marks:
    """Points in scans.

    Attributes:
        scan: (N,) int, index into the list of scans.
        points_mm: (N, 3) float64, world.
        values: (N,) float64: probability of a mark, diameter in mm of a finding.
    """

    scan: np.ndarray
    points_mm: np.ndarray
    values: np.ndarray

    def sorted_by_scan(self, num_scans: int) -> tuple[Marks, np.ndarray]:
        """The marks scan by scan in their order, and where each scan starts, (num_scans + 1,)."""
        order = np.argsort(self.scan, kind="stable")
        bounds = np.searchsorted(self.scan[order], np.arange(num_scans + 1))
        return Marks(self.scan[order], self.points_mm[order], self.values[order]), bounds


NONE = Marks(np.zeros(0, np.int64), np.zeros((0, 3)), np.zeros(0))


@dataclass(frozen=True)
class Hits:
    """What the marks of all scans did.

    Attributes:
        matches: one row per nodule found (with its best mark) and one per false positive, for `froc_curve`.
        counts: "scans", "nodules", "marks" (after the cap), "TP", "FN", "FP", "double_detections_ignored",
            "ignored_on_excluded", as the official script counts them.
    """

    matches: ClassMatches
    counts: dict[str, int]


def read_scans(path: str | Path) -> list[str]:
    """The scans that count, one per line, with or without a header.

    Raises:
        UserError: there is none, or one appears twice.
    """
    scans: dict[str, int] = {}
    for line, row in zip(*read_rows(path), strict=True):
        scan = row[0].strip()
        if scan in scans:
            raise UserError(f"{path} line {line}: scan {scan!r} was listed in line {scans[scan]} already")
        scans[scan] = line
    names = [scan for scan in scans if scan.lower() != SCAN]
    if not names:
        raise UserError(f"{path}: no scan is listed; expected one series id per line")
    return names


def read_marks(path: str | Path, scans: Sequence[str]) -> Marks:
    """A submission: seriesuid, coordX, coordY, coordZ, probability.

    Raises:
        UserError: a value that is not a number, or a scan that is not listed; names the line.
    """
    table = read_table(path, (SCAN, *POINT, "probability"))
    scan = _scan_indices(table, scans)
    for index in np.flatnonzero(scan < 0):
        name = table.column(SCAN)[index]
        raise UserError(f"{table.path} line {table.lines[index]}: scan {name!r} is not in the list of scans")
    return Marks(scan, _points(table), table.numbers("probability"))


def read_findings(path: str | Path, scans: Sequence[str]) -> tuple[Marks, int]:
    """Nodules or excluded findings: seriesuid, coordX, coordY, coordZ, diameter_mm (-1 unknown).

    The lists of the challenge hold all scans; findings of scans that are not listed (another fold's) are left out.

    Returns:
        the findings, and how many were left out.

    Raises:
        UserError: a value that is not a number, or a diameter of 0; names the line.
    """
    table = read_table(path, (SCAN, *POINT, "diameter_mm"))
    scan, diameter = _scan_indices(table, scans), table.numbers("diameter_mm")
    for index in np.flatnonzero(diameter == 0):
        raise UserError(f"{table.path} line {table.lines[index]}: diameter_mm is 0; expected mm, or -1 for unknown")
    points, kept = _points(table), scan >= 0
    return Marks(scan[kept], points[kept], diameter[kept]), int((~kept).sum())


def _points(table: Delimited) -> np.ndarray:
    return np.stack([table.numbers(name) for name in POINT], axis=1)


def _scan_indices(table: Delimited, scans: Sequence[str]) -> np.ndarray:
    """(N,) index of each row's scan, -1 where it is not listed. Numbers are the same with and without leading zeros."""
    known = {str(int(scan)): index for index, scan in enumerate(scans) if scan.isdecimal()}
    known |= {scan: index for index, scan in enumerate(scans)}
    names = table.column(SCAN)
    index = {name: known.get(name, known.get(str(int(name)), -1) if name.isdecimal() else -1) for name in set(names)}
    return np.array([index[name] for name in names], np.int64)


def match_marks(marks: Marks, nodules: Marks, excluded: Marks, num_scans: int) -> Hits:
    """Which nodules were found, and by which score; which marks are false positives.

    A mark hits a finding when it lies closer to its centre than half its diameter. A nodule counts once, with its best
    hit; marks on nodules or excluded findings are never false positives.

    Source: Setio et al., Validation, comparison, and combination of algorithms for automatic detection of pulmonary
        nodules (2017), and the challenge's evaluation script: of more than 100 marks of a scan, those above the 101st
        score count; a mark inside two nodules finds both.
    """
    marks, mark_bounds = best_marks(marks, num_scans).sorted_by_scan(num_scans)
    nodules, nodule_bounds = nodules.sorted_by_scan(num_scans)
    excluded, excluded_bounds = excluded.sorted_by_scan(num_scans)
    on_nodule = np.zeros(len(marks.scan), bool)
    on_excluded = np.zeros(len(marks.scan), bool)
    best = np.full(len(nodules.scan), -np.inf)
    double = 0
    for scan in range(num_scans):
        m, n, e = (slice(b[scan], b[scan + 1]) for b in (mark_bounds, nodule_bounds, excluded_bounds))
        inside = _inside(marks.points_mm[m], nodules.points_mm[n], nodules.values[n])  # (marks, nodules)
        on_nodule[m] = inside.any(axis=1)
        on_excluded[m] = _inside(marks.points_mm[m], excluded.points_mm[e], excluded.values[e]).any(axis=1)
        best[n] = np.where(inside, marks.values[m, None], -np.inf).max(axis=0, initial=-np.inf)
        double += int(np.maximum(inside.sum(axis=0) - 1, 0).sum())
    found, false = best > -np.inf, ~on_nodule & ~on_excluded
    counts = {
        "scans": num_scans, "nodules": len(best), "marks": len(marks.scan), "TP": int(found.sum()),
        "FN": int((~found).sum()), "FP": int(false.sum()), "double_detections_ignored": double,
        "ignored_on_excluded": int((on_excluded & ~on_nodule).sum()),
    }  # fmt: skip
    case = np.concatenate([nodules.scan[found], marks.scan[false]])
    scores = np.concatenate([best[found], marks.values[false]])
    objects = np.bincount(nodules.scan, minlength=num_scans)
    return Hits(_as_matches(case, scores, np.arange(len(case)) < found.sum(), objects), counts)


def best_marks(marks: Marks, num_scans: int, limit: int = MARKS_PER_SCAN) -> Marks:
    """In scans with more than `limit` marks, those whose score is above that of the next one (so ties at it go)."""
    order = np.lexsort((-marks.values, marks.scan))
    scan = marks.scan[order]
    rank = np.arange(len(scan)) - np.searchsorted(scan, scan)
    least = np.full(num_scans, -np.inf)
    least[scan[rank == limit]] = marks.values[order[rank == limit]]
    kept = (marks.values > least[marks.scan]) | np.isneginf(least[marks.scan])
    return Marks(marks.scan[kept], marks.points_mm[kept], marks.values[kept])


def _inside(points: np.ndarray, centers: np.ndarray, diameters: np.ndarray) -> np.ndarray:
    """(N, M) bool: squared distances against squared radii, as the script compares them."""
    distance = np.zeros((len(points), len(centers)))
    for axis in range(3):
        distance += (points[:, axis, None] - centers[None, :, axis]) ** 2
    return distance < (np.where(diameters < 0, UNKNOWN_DIAMETER_MM, diameters) / 2) ** 2


def _as_matches(case: np.ndarray, scores: np.ndarray, hits: np.ndarray, objects: np.ndarray) -> ClassMatches:
    order = np.argsort(-scores, kind="stable")
    return ClassMatches(case[order], scores[order], hits[order, None], objects, np.ones(len(objects), bool))


def evaluate(matches: ClassMatches, samples: int = 0, seed: int = 0) -> dict[str, Any]:
    """CPM, the sensitivities it is the mean of, and with `samples` their 95 % bootstrap intervals over scans.

    Returns:
        {"CPM", "sensitivity": {"0.125": ..., "8": ...}, "intervals": {"CPM": [low, high], "sensitivity": {...}},
        "froc": {"false_positives_per_scan", "sensitivity", "low", "high"}}; null where there is no nodule, intervals
        also where all nodules lie in a single scan.
    """
    weights = plain_and_drawn(len(matches.objects), samples, seed)
    curve = froc_sensitivity(matches, 0, weights, BAND_RATES)  # (1 + S, 61)
    seven = curve[:, ::10]
    names = [f"{rate:g}" for rate in FALSE_POSITIVES_PER_CASE]
    rates = {name: interval(column) for name, column in zip(names, seven.T, strict=True)}
    cpm = interval(seven.mean(axis=1))
    band = [interval(column) for column in curve.T]
    froc = {"sensitivity" if end == "value" else end: [row[end] for row in band] for end in ("value", "low", "high")}
    return {
        "CPM": cpm["value"],
        "sensitivity": {name: row["value"] for name, row in rates.items()},
        "intervals": {"CPM": _bounds(cpm), "sensitivity": {name: _bounds(row) for name, row in rates.items()}},
        "froc": {"false_positives_per_scan": BAND_RATES.tolist(), **froc},
    }


def _bounds(row: dict[str, float | None]) -> list[float | None] | None:
    return None if row["low"] is None else [row["low"], row["high"]]


def evaluate_vectors(labels: Sequence[float], scores: Sequence[float], num_scans: int) -> dict[str, Any]:
    """CPM and sensitivities from the vectors that the official script writes: one row per nodule and false positive.

    Args:
        labels: 1 for a nodule, 0 for a false positive.
        scores: probabilities; a nodule that nothing hit has `MISSED` (or less) and counts in the denominator only.
        num_scans: scans behind the vectors, also those without a row.
    """
    nodule, score = np.asarray(labels) > 0, np.asarray(scores, np.float64)
    assert nodule.shape == score.shape == (len(score),), f"{nodule.shape} labels for {score.shape} scores"
    rows = ~nodule | (score > MISSED)
    objects = np.zeros(num_scans, np.int64)
    objects[0] = nodule.sum()
    matches = _as_matches(np.zeros(int(rows.sum()), np.int64), score[rows], nodule[rows], objects)
    result = evaluate(matches)
    return {"CPM": result["CPM"], "sensitivity": result["sensitivity"]}


def score_files(
    predictions: str | Path,
    targets: str | Path,
    cases: str | Path,
    excluded: str | Path | None = None,
    samples: int = 0,
) -> dict[str, Any]:
    """`evaluate` of a submission, with the "counts" of `Hits`; `targets` and `cases` are lists of the challenge.

    Raises:
        UserError: see the readers; also when no nodule lies in a listed scan.
    """
    scans = read_scans(cases)
    marks = read_marks(predictions, scans)
    nodules, elsewhere = read_findings(targets, scans)
    if not len(nodules.scan):
        more = f"; its {elsewhere} are of other scans" if elsewhere else ""
        raise UserError(f"{targets}: no nodule in the scans of {cases}{more}")
    others = read_findings(excluded, scans)[0] if excluded else NONE
    hits = match_marks(marks, nodules, others, len(scans))
    counts = hits.counts | {"nodules_of_other_scans": elsewhere}
    return evaluate(hits.matches, samples) | {"counts": counts}
