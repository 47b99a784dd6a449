"""What tables and reports read of runs: folders, or result files alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain3d.config import UserError, read_yaml
from pretrain3d.reporting.cost import cost_of
from pretrain3d.reporting.results import read_result, read_rows
from pretrain3d.reporting.run_folder import RunFolder
from pretrain3d.reporting.tables import Table, check_paths, cost_table, kind_of, leakage_table, make_tables


@dataclass(frozen=True)
class Run:
    """What a report reads of a run: a folder, or (a baseline somewhere else) a result file alone.

    Attributes:
        label: its name, unlike that of every other run of the report.
        folder: where pictures and metrics may lie.
        result: of a tested detector, of a baseline, or of a tested reconstruction.
        config: resolved.
        rows: of ``metrics.csv``.
        cost: of its training, see `reporting.cost`; empty for a baseline.
    """

    label: str
    folder: Path
    result: dict[str, Any] | None
    config: dict[str, Any]
    rows: list[dict[str, str]]
    cost: dict[str, Any]

    def curve(self, key: str) -> tuple[Sequence[float], Sequence[float]]:
        """Steps and values of a logged key; empty when it was not logged."""
        points = [(int(row["step"]), float(row[key])) for row in self.rows if key in row]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def is_detection(self) -> bool:
        if self.result is not None:
            return kind_of(self.result) == "detection"
        return _module(self.config) == "detection"


def is_pretraining(path: str | Path) -> bool:
    """Whether ``path`` is the folder of a run that is no detector and was not tested: it has curves but no result."""
    path = Path(path)
    if not path.is_dir() or (path / "result.json").exists() or not (path / "config.yaml").exists():
        return False
    return _module(read_yaml(path / "config.yaml")) != "detection"


def tables_of(runs: Sequence[Run]) -> list[Table]:
    """The results of runs, tested cases that their pretraining had seen, and what their training cost.

    Raises:
        UserError: none of them was trained or tested.
    """
    results = {run.label: run.result for run in runs if run.result is not None}
    further = (leakage_table(results), cost_table({run.label: run.cost for run in runs}))
    tables = make_tables(list(results.values())) + [table for table in further if table is not None]
    if not tables:
        raise UserError(f"there is nothing to show yet: {', '.join(run.label for run in runs)} has made no step")
    return tables


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """What tables and reports need of run folders or ``result.json`` files.

    Raises:
        UserError: none is given, one is given twice, is not there, or is a detector without a result.
    """
    check_paths(paths)
    runs: list[Run] = []
    for path in map(Path, paths):
        folder = path if path.is_dir() else path.parent
        result = None if is_pretraining(path) else read_result(path)
        config = read_yaml(folder / "config.yaml") if result is None else result["config"]
        rows = read_rows(folder / "metrics.csv") if path.is_dir() and (folder / "metrics.csv").exists() else []
        name = result["run"] if result is not None else str(config.get("name") or folder.name)
        again = sum(re.sub(r" #\d+$", "", run.label) == name for run in runs)
        cost = cost_of(RunFolder(folder)) if result is None else result.get("cost") or {}
        runs.append(Run(f"{name} #{again + 1}" if again else name, folder, result, config, rows, cost))
    return runs


def _module(config: dict[str, Any]) -> str | None:
    return (config.get("module") or {}).get("name")
