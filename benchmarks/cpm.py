"""CPM of a LUNA16-sized submission: matching and FROC, alone and with 1,000 bootstrap samples, and reading the files.

Checked against the challenge's rules as plain loops on the same marks; the published submission's CPM is a test.
Times are processor seconds.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path

import numpy as np
from harness import Target, interleave, report, timed

from pretrain3d.evaluation.luna16 import Marks, evaluate, evaluate_vectors, match_marks, score_files

SCANS, MARKS, NODULES, EXCLUDED, SAMPLES = 888, 55_677, 1186, 35_192, 1000


def make(seed: int = 0) -> tuple[Marks, Marks, Marks]:
    """Findings anywhere in 300 mm; a tenth of the marks lie on a finding of their scan, and score higher."""
    rng = np.random.default_rng(seed)

    def anywhere(count: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(0, SCANS, count), rng.uniform(0, 300, (count, 3))

    nodules = Marks(*anywhere(NODULES), rng.uniform(4, 30, NODULES))
    excluded = Marks(*anywhere(EXCLUDED), np.where(rng.random(EXCLUDED) < 0.8, -1.0, rng.uniform(3, 20, EXCLUDED)))
    scan, points = anywhere(MARKS)
    scores = rng.beta(1, 6, MARKS)
    for findings, share in ((nodules, 0.05), (excluded, 0.05)):
        chosen = np.flatnonzero(rng.random(MARKS) < share)
        source = rng.integers(0, len(findings.scan), len(chosen))
        scan[chosen] = findings.scan[source]
        points[chosen] = findings.points_mm[source] + rng.normal(0, 2, (len(chosen), 3))
        scores[chosen] = rng.beta(4, 2, len(chosen))
    return Marks(scan, points, scores), nodules, excluded


def as_loops(marks: Marks, nodules: Marks, excluded: Marks) -> tuple[list[float], list[float]]:
    """(label, score) of every nodule and false positive, one pair of points at a time."""
    rows: list[list[tuple[list[float], float]]] = [[] for _ in range(3 * SCANS)]
    for kind, part in enumerate((marks, nodules, excluded)):
        for scan, point, value in zip(part.scan, part.points_mm.tolist(), part.values.tolist(), strict=True):
            rows[3 * scan + kind].append((point, value))
    labels, scores = [], []
    for scan in range(SCANS):
        found, of_nodules, others = rows[3 * scan : 3 * scan + 3]
        if len(found) > 100:
            limit = sorted(score for _, score in found)[-101]
            found = [mark for mark in found if mark[1] > limit]
        left = set(range(len(found)))
        for kind, findings in ((1, of_nodules), (0, others)):
            for (x, y, z), diameter in findings:
                square = ((10.0 if diameter < 0 else diameter) / 2) ** 2
                best = -1e9
                for index, ((a, b, c), score) in enumerate(found):
                    if (x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2 < square:
                        best = max(best, score)
                        left.discard(index)
                if kind:
                    labels.append(1.0)
                    scores.append(best)
        labels += [0.0] * len(left)
        scores += [found[index][1] for index in left]
    return labels, scores


def write_files(folder: Path, marks: Marks, nodules: Marks, excluded: Marks) -> dict[str, Path]:
    """The lists as files of the challenge."""
    parts = {"predictions": (marks, "probability"), "targets": (nodules, "diameter_mm"),
             "excluded": (excluded, "diameter_mm")}  # fmt: skip
    for name, (part, value) in parts.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["seriesuid", "coordX", "coordY", "coordZ", value])
            rows = zip(part.scan, part.points_mm.tolist(), part.values.tolist(), strict=True)
            writer.writerows([f"{scan:05d}", *point, number] for scan, point, number in rows)
    (folder / "cases.csv").write_text("\n".join(f"{scan:05d}" for scan in range(SCANS)) + "\n")
    return {name: folder / f"{name}.csv" for name in (*parts, "cases")}


def main() -> int:
    """Runs the benchmark; 1 when a target is missed."""
    lists = make()

    def ours(samples: int = 0) -> float:
        return evaluate(match_marks(*lists, SCANS).matches, samples)["CPM"]

    def loops() -> float:
        return evaluate_vectors(*as_loops(*lists), SCANS)["CPM"]

    if abs(ours() - loops()) > 1e-9:
        print(f"the two do not measure the same: CPM {ours()} and {loops()}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), *lists)
        results = interleave({
            "CPM": timed(ours),
            f"CPM and {SAMPLES} samples": timed(lambda: ours(SAMPLES)),
            "CPM from the files": timed(lambda: score_files(**files)),
            "the rules as loops": timed(loops),
        })  # fmt: skip
    return report(
        f"LUNA16: CPM {ours():.6f}, the same by the rules as plain loops",
        "s",
        f"{SCANS} scans, {MARKS} marks, {NODULES} nodules, {EXCLUDED} excluded findings",
        (),
        results,
        [
            Target("seconds for the CPM", lambda m: m["CPM"], 0.3, at_most=True),
            Target(f"seconds with {SAMPLES} samples", lambda m: m[f"CPM and {SAMPLES} samples"], 5.0, at_most=True),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
