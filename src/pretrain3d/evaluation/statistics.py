"""How sure the numbers are: bootstrap over cases (or patients), alone and paired between two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.evaluation.matching import Boxes, Matches, match
from pretrain3d.evaluation.protocol import as_number, summarise, values

SAMPLES = 1000
LEVEL = 0.95


def evaluate_with_intervals(
    predictions: Mapping[str, Boxes],
    targets: Mapping[str, Boxes],
    classes: Sequence[str],
    samples: int = SAMPLES,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What `result.json` holds of a set of cases: {"metrics", "per_class"} of `bootstrap`, {"curves", "cases"}."""
    matches = match(predictions, targets, classes)
    summary = summarise(matches)
    return bootstrap(matches, samples, seed, groups) | {key: summary[key] for key in ("curves", "cases")}


def resample(num_cases: int, samples: int, seed: int, groups: Sequence[str] | None = None) -> np.ndarray:
    """How often each bootstrap sample holds each case, (S, C) int64.

    Args:
        groups: one name per case; cases of a group (a patient) are drawn together. Default: every case on its own.
    """
    of_case = np.arange(num_cases) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    assert len(of_case) == num_cases, f"{len(of_case)} groups for {num_cases} cases"
    num_groups = int(of_case.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=samples)
    return drawn[:, of_case]


def bootstrap(
    matches: Matches, samples: int = SAMPLES, seed: int = 0, groups: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Every key with its 95 % percentile interval. The cases are matched once; samples only weigh them.

    Args:
        groups: case id -> group (patient), whose cases are drawn together. Default: every case on its own.

    Returns:
        {"metrics": {key: {"value", "low", "high"}}, "per_class": {class: {key: {...}}}}; None without objects.
        Samples that hold no object of a class say nothing about it and are left out of its interval.
    """
    overall, per_class = values(matches, _weights(matches, samples, seed, groups))
    return {
        "metrics": {key: _interval(row) for key, row in overall.items()},
        "per_class": {name: {key: _interval(row) for key, row in rows.items()} for name, rows in per_class.items()},
    }


def paired_difference(
    a: Matches, b: Matches, samples: int = SAMPLES, seed: int = 0, groups: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """b minus a on the same cases, every sample drawing the same cases for both.

    Returns:
        {"metrics": {key: {"a", "b", "difference", "low", "high", "p"}}, "per_class": {class: {key: {...}}}}. `p` is the
        two-sided bootstrap p value: twice the smaller share of differences on either side of 0 (zeros on both), with
        one added to counts and samples so that it is never 0.

    Raises:
        UserError: the runs were not scored on the same cases and classes.
    """
    if a.case_ids != b.case_ids:
        lonely = sorted(set(a.case_ids) ^ set(b.case_ids))
        raise UserError(f"runs on different cases cannot be paired: {lonely[0]!r} is in one of them only")
    if a.classes != b.classes:
        raise UserError(f"runs with different classes cannot be paired: {a.classes} and {b.classes}")
    weights = _weights(a, samples, seed, groups)
    (all_a, class_a), (all_b, class_b) = values(a, weights), values(b, weights)
    return {
        "metrics": {key: _difference(all_a[key], all_b[key]) for key in all_a},
        "per_class": {
            name: {key: _difference(row[key], class_b[name][key]) for key in row} for name, row in class_a.items()
        },
    }


def _weights(matches: Matches, samples: int, seed: int, groups: Mapping[str, str] | None) -> np.ndarray:
    """The samples (S, C) behind the plain set, every case once, as the first row."""
    names = None if groups is None else [groups[case_id] for case_id in matches.case_ids]
    weights = resample(len(matches.case_ids), samples, seed, names)
    return np.vstack([np.ones((1, len(matches.case_ids)), np.int64), weights])


def _interval(row: np.ndarray) -> dict[str, float | None]:
    low, high = _percentiles(row[1:]) if not np.isnan(row[0]) else (np.nan, np.nan)
    return {"value": as_number(row[0]), "low": as_number(low), "high": as_number(high)}


def _percentiles(samples: np.ndarray) -> np.ndarray:
    finite = samples[~np.isnan(samples)]
    tail = (1 - LEVEL) / 2
    return np.quantile(finite, [tail, 1 - tail]) if len(finite) else np.full(2, np.nan)


def _difference(a: np.ndarray, b: np.ndarray) -> dict[str, float | None]:
    row = _interval(b - a)
    samples = (b - a)[1:]
    samples = samples[~np.isnan(samples)]
    sides = min(int((samples <= 0).sum()), int((samples >= 0).sum()))
    return {
        "a": as_number(a[0]),
        "b": as_number(b[0]),
        "difference": row["value"],
        "low": row["low"],
        "high": row["high"],
        "p": None if row["value"] is None else min(1.0, 2 * (sides + 1) / (len(samples) + 1)),
    }
