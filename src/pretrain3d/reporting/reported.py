"""What tables and reports read of runs: folders, or result files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain3d.config import UserError, read_yaml
from pretrain3d.reporting.cost import cost_of
from pretrain3d.reporting.pooling import pooled
from pretrain3d.reporting.results import read_result, read_rows
from pretrain3d.reporting.rows import distinct, kind_of, rows_of
from pretrain3d.reporting.run_folder import RunFolder
from pretrain3d.reporting.tables import Table, check_paths, cost_table, leakage_table, make_tables


@dataclass(frozen=True)
class Run:
    """What a report reads of a run: a folder, or (a baseline somewhere else) a result file alone.

    Attributes:
        label: its name, unlike that of every other run of the report.
        folder: where pictures and metrics may lie; of pooled folds that of the first.
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


@dataclass(frozen=True)
class Reported:
    """What tables and reports show.

    Attributes:
        runs: as given.
        rows: row name -> its repetitions, tested runs; the folds of a seed are one, under the name of all.
    """

    runs: list[Run]
    rows: dict[str, list[Run]]

    def tables(self) -> list[Table]:
        """The results, tested cases that the pretraining of a run had seen, and what its training cost.

        Raises:
            UserError: none of the runs was trained or tested.
        """
        tested = {run.label: run.result for run in self.runs if run.result is not None}
        further = (leakage_table(tested), cost_table({run.label: run.cost for run in self.runs}))
        tables = make_tables(results_of(self.rows)) + [table for table in further if table is not None]
        if not tables:
            raise UserError(
                f"there is nothing to show yet: {', '.join(run.label for run in self.runs)} has made no step"
            )
        return tables


def read_runs(paths: Sequence[str | Path]) -> Reported:
    """What tables and reports need of run folders or ``result.json`` files.

    Raises:
        UserError: none is given, one is given twice, is not there, or is a detector without a result; folds that
            cannot be pooled.
    """
    check_paths(paths)
    runs: list[Run] = []
    for path in map(Path, paths):
        folder = path if path.is_dir() else path.parent
        result = None if is_pretraining(path) else read_result(path)
        config = read_yaml(folder / "config.yaml") if result is None else result["config"]
        rows = read_rows(folder / "metrics.csv") if path.is_dir() and (folder / "metrics.csv").exists() else []
        name = result["run"] if result is not None else str(config.get("name") or folder.name)
        cost = cost_of(RunFolder(folder)) if result is None else result.get("cost") or {}
        runs.append(Run(distinct(name, [run.label for run in runs]), folder, result, config, rows, cost))
    return Reported(runs, _rows(runs))


def results_of(rows: Mapping[str, Sequence[Run]]) -> dict[str, list[dict[str, Any]]]:
    """Those of the runs."""
    return {name: [run.result for run in row if run.result is not None] for name, row in rows.items()}


def _rows(runs: Sequence[Run]) -> dict[str, list[Run]]:
    tested = [(run, run.result) for run in runs if run.result is not None]
    labels = [run.label for run in runs]
    rows: dict[str, list[Run]] = {}
    for name, row in rows_of([result for _, result in tested]).items():
        for members in row:
            first = tested[members[0]][0]
            if len(members) > 1:
                result = pooled([tested[i][1] for i in members], [tested[i][0].folder for i in members])
                first = replace(first, label=distinct(result["run"], labels), result=result)
                labels.append(first.label)
            rows.setdefault(name, []).append(first)
    return rows


def _module(config: dict[str, Any]) -> str | None:
    return (config.get("module") or {}).get("name")
