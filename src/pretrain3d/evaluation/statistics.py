"""How sure the numbers are: bootstrap over cases (or patients) and trainings, alone and paired between two rows.

A row is one method: one run, or several repetitions that differ by their seed, each of all cases: see `reporting.rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.evaluation.matching import Matches
from pretrain3d.evaluation.protocol import as_number, summarise, values

SAMPLES = 1000
LEVEL = 0.95
# least share of samples that must know a value: what rests on a single patient is in 63 to 75 % of them,
# what rests on two in 86 % and more
LEAST_KNOWN = 0.8
Numbers = tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]  # as `values` gives them
Groups = Mapping[str, str]  # case id -> patient


def evaluate_with_intervals(matches: Matches, samples: int = SAMPLES, groups: Groups | None = None) -> dict[str, Any]:
    """What `result.json` holds of a set of cases: {"metrics", "per_class"} of `bootstrap`, {"curves", "cases"}."""
    summary = summarise(matches)
    return bootstrap(matches, samples, groups=groups) | {key: summary[key] for key in ("curves", "cases")}


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


def plain_and_drawn(num_cases: int, samples: int, seed: int = 0, groups: Sequence[str] | None = None) -> np.ndarray:
    """The plain set, every case once, then the samples of `resample`, (1 + S, C); of a single patient no sample."""
    units = num_cases if groups is None else len(set(groups))
    return _after_plain(resample(num_cases, samples if units > 1 else 0, seed, groups))


def _after_plain(drawn: np.ndarray) -> np.ndarray:
    return np.vstack([np.ones((1, drawn.shape[1]), np.int64), drawn])


def bootstrap(
    matches: Matches,
    samples: int = SAMPLES,
    seed: int = 0,
    groups: Groups | None = None,
    numbers: Callable[[Matches, np.ndarray], Numbers] = values,
) -> dict[str, dict[str, Any]]:
    """Every key with its 95 % percentile interval. The cases are matched once; samples only weigh them.

    Args:
        groups: case id -> group (patient), whose cases are drawn together. Default: every case on its own.
        numbers: what is to be known of the matching, for every weighting of its cases (S, C).

    Returns:
        {"metrics": {key: {"value", "low", "high"}}, "per_class": {class: {key: {...}}}}; None without objects.
        Samples that hold no object of a class say nothing about it and are left out of its interval; a mean over
        classes takes the plain value of the class there. A single patient, and a class whose objects lie in a single
        one, has none: nothing is known of another one.
    """
    patients = None if groups is None else [groups[case_id] for case_id in matches.case_ids]
    return intervals(*numbers(matches, plain_and_drawn(len(matches.case_ids), samples, seed, patients)))


def row_samples(
    rows: Sequence[Sequence[Matches]], samples: int, seed: int = 0, groups: Groups | None = None
) -> list[Numbers]:
    """The numbers of several rows on the same bootstrap samples, drawn level by level.

    1. The repetitions (seeds) of a row: n - 1 of its n with replacement, each row for itself. Their mean then varies
       as much as the mean of n does, where n draws would vary too little by (n - 1) / n.
    2. The patients: with replacement, the same for every row and repetition.

    Of the drawn repetitions the mean is taken. A few cannot show how much seeds differ: where these alone made all the
    difference, two methods that are equal would have p < 0.05 in 33, 13, 10 and 7 of 100 comparisons of 2, 3, 4 and 10
    seeds each. Where no level has more than one thing to draw (a single patient and run) there are no samples, and so
    neither interval nor p value.

    Args:
        rows: of each row its repetitions: a run, or the folds of a cross-validation that were matched together.

    Returns:
        per row {key: (1 + S,)} and {class: {key: (1 + S,)}}: the plain value, then the samples.

    Raises:
        UserError: runs on different cases or classes.

    Source: n - 1 draws: Rao and Wu, Resampling inference with complex survey data (1988).
    """
    assert rows and all(rows), "every row needs a run"
    first = rows[0][0]
    for run in (run for row in rows for run in row):
        if run.classes != first.classes:
            raise UserError(f"runs with different classes cannot be paired: {first.classes} and {run.classes}")
        if lonely := sorted(set(run.case_ids) ^ set(first.case_ids)):
            raise UserError(f"runs on different cases cannot be paired: {lonely[0]!r} is in one of them only")
    ids, patients = first.case_ids, None if groups is None else [groups[case_id] for case_id in first.case_ids]
    if all(len(row) == 1 for row in rows) and len(set(patients or ids)) == 1:
        samples = 0
    rng, weights = np.random.default_rng([seed, 1]), _after_plain(resample(len(ids), samples, seed, patients))
    return [
        _weighted_mean([values(run, weights) for run in row], _mean_weights(rng, len(row), samples)) for row in rows
    ]


def intervals(overall: dict[str, np.ndarray], per_class: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """{"metrics", "per_class"} with `interval` of every array (1 + S,)."""
    return {
        "metrics": {key: interval(row) for key, row in overall.items()},
        "per_class": {name: {key: interval(row) for key, row in rows.items()} for name, rows in per_class.items()},
    }


def differences(a: Numbers, b: Numbers) -> dict[str, dict[str, Any]]:
    """b minus a, sample by sample.

    Returns:
        {"metrics": {key: {"a", "b", "difference", "low", "high", "p"}}, "per_class": {class: {key: {...}}}}. `p` is the
        two-sided bootstrap p value: twice the smaller share of differences on either side of 0 (zeros on both), with
        one added to counts and samples so that it is never 0; None where there is no interval.
    """
    (all_a, class_a), (all_b, class_b) = a, b
    return {
        "metrics": {key: _difference(all_a[key], all_b[key]) for key in all_a},
        "per_class": {
            name: {key: _difference(row[key], class_b[name][key]) for key in row} for name, row in class_a.items()
        },
    }


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p values of several comparisons: below a level, they hold jointly at that level. None stays None.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979): the i-th smallest of m (from 0) times
        m - i, never less than the one before, at most 1.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, index) in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * p))
        adjusted[index] = least
    return adjusted


def interval(row: np.ndarray) -> dict[str, float | None]:
    """{"value", "low", "high"} of the plain value and its samples (1 + S,).

    None for nan, without samples, and where less than `LEAST_KNOWN` of them are numbers.
    """
    low, high = _percentiles(row[1:]) if not np.isnan(row[0]) else (np.nan, np.nan)
    return {"value": as_number(row[0]), "low": as_number(low), "high": as_number(high)}


def _percentiles(samples: np.ndarray) -> np.ndarray:
    finite = samples[~np.isnan(samples)]
    tail = (1 - LEVEL) / 2
    known = len(finite) > 0 and len(finite) >= LEAST_KNOWN * len(samples)
    return np.quantile(finite, [tail, 1 - tail]) if known else np.full(2, np.nan)


def _difference(a: np.ndarray, b: np.ndarray) -> dict[str, float | None]:
    row = interval(b - a)
    samples = (b - a)[1:]
    samples = samples[~np.isnan(samples)]
    sides = min(int((samples <= 0).sum()), int((samples >= 0).sum()))
    return {
        "a": as_number(a[0]),
        "b": as_number(b[0]),
        "difference": row["value"],
        "low": row["low"],
        "high": row["high"],
        "p": min(1.0, 2 * (sides + 1) / (len(samples) + 1)) if row["low"] is not None else None,
    }


def _mean_weights(rng: np.random.Generator, count: int, samples: int) -> np.ndarray:
    """(count, 1 + S) share of each repetition in the plain mean, and in each sample of one less than there are."""
    draws = max(count - 1, 1)
    drawn = rng.multinomial(draws, np.full(count, 1 / count), size=samples).T / draws
    return np.hstack([np.full((count, 1), 1 / count), drawn])


def _weighted_mean(parts: list[Numbers], shares: np.ndarray) -> Numbers:
    """The mean of R runs by `shares` (R, 1 + S), over those that are not nan."""

    def mean(rows: list[np.ndarray]) -> np.ndarray:
        if len(rows) == 1:  # untouched
            return rows[0]
        table = np.stack(rows)
        share = np.where(np.isnan(table), 0.0, shares)
        total = (share * np.nan_to_num(table)).sum(axis=0)
        norm = share.sum(axis=0)
        return np.divide(total, norm, out=np.full(len(total), np.nan), where=norm > 0)

    overall, per_class = parts[0]
    return (
        {key: mean([part[0][key] for part in parts]) for key in overall},
        {name: {key: mean([part[1][name][key] for part in parts]) for key in row} for name, row in per_class.items()},
    )
