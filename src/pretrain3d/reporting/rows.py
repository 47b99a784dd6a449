"""Which results are one row of a table or of a comparison: those of trainings that differ by seed or fold only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain3d.reporting.run_folder import AROUND, without

Result = dict[str, Any]


def rows_of(results: Sequence[Result]) -> dict[str, list[int]]:
    """Row name -> places of its results, in the order given.

    Results share a row where configuration, name (``...-f0-s3``: both numbers may differ), data and test are the same
    but for seed and fold. All of them stay apart where a seed and fold come twice, or a fold with other cases.
    """
    groups: dict[str, list[int]] = {}
    for index, result in enumerate(results):
        config = without(result["config"], ("seed", "name", "fold", "data.fold", *AROUND))
        key = json.dumps([_unnumbered([result["run"], config], result), _how_tested(result), data_of(result)])
        groups.setdefault(key, []).append(index)
    rows: dict[str, list[int]] = {}
    for group in groups.values():
        numbers = {(results[index]["seed"], _fold(results[index])) for index in group}
        of_folds = {(_fold(results[index]), cases_of(results[index])) for index in group}
        together = len(numbers) == len(group) > 1 and len(of_folds) == len({fold for fold, _ in of_folds})
        for members in [group] if together else [[index] for index in group]:
            first = results[members[0]]
            name = f"{_unnumbered(first['run'], first)} ({_counted(numbers)})" if together else first["run"]
            again = sum(other == name or other.startswith(f"{name} #") for other in rows)
            rows[f"{name} #{again + 1}" if again else name] = members
    return rows


def _counted(numbers: set[tuple[int, Any]]) -> str:
    """``"3 seeds"``, ``"5 folds"``, or ``"15 runs"`` that differ by both."""
    seeds, folds = map(set, zip(*numbers, strict=True))
    return f"{len(numbers)} {'seeds' if len(folds) == 1 else 'folds' if len(seeds) == 1 else 'runs'}"


def _how_tested(result: Result) -> list[Any]:
    """What the results of a row share besides the configuration.

    Which weights `test` took, after how many steps (unless `trainer.max_time` ended them), on what, and whether `sweep`
    had chosen the merging.
    """
    asked, trainer = result.get("asked") or {}, result["config"].get("trainer")
    timed = isinstance(trainer, Mapping) and trainer.get("max_time") is not None
    step = asked.get("step") if asked.get("checkpoint") == "last" and not timed else None
    return [*map(asked.get, ("checkpoint", "split", "patches")), asked.get("threshold") is not None, step]


def data_of(result: Result) -> list[Any]:
    """The data set that a result is of, and its classes.

    The hash is of the images alone, which may have been annotated anew or for another task.
    """
    data = result.get("data") or {}
    return [data.get("hash"), data.get("name"), sorted(result.get("per_class") or {})]


def cases_of(result: Result) -> tuple[str, ...]:
    """The cases that a result is of, each with its number of objects."""
    return tuple(sorted(json.dumps([case.get("case"), case.get("objects")]) for case in result.get("cases") or []))


def _fold(result: Result) -> Any:
    config = result["config"]
    return (config.get("data") or {}).get("fold", config.get("fold"))


def _unnumbered(value: Any, result: Result) -> Any:
    """Names of the seed and fold in texts (``...-f0-s3``, also in the path of a backbone) -> ``...-f*-s*``."""
    if isinstance(value, Mapping):
        return {key: _unnumbered(item, result) for key, item in sorted(value.items())}
    if isinstance(value, list):
        return [_unnumbered(item, result) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(rf"-f{_fold(result)}(?!\d)", "-f*", value)
    return re.sub(rf"-s{result['seed']}(?!\d)", "-s*", value)
