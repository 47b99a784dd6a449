"""`metrics.csv`: one row per optimiser step, each step once, however often the run was killed and resumed."""

from __future__ import annotations

import csv
import io
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from pretrain3d.files import write_text
from pretrain3d.reporting.results import read_rows

FLUSH_SECONDS = 10.0


class MetricsCSV(Logger):
    """A wide table: column ``step``, then the logged keys in alphabetical order.

    A row's ``step`` is the number of optimiser steps taken, so a checkpoint of step k goes with the rows up to k
    (Lightning itself logs k - 1 there). Numbers are written with `repr`, so that two runs can be compared exactly.
    Rows stay in memory; the file is replaced as a whole every few seconds, before a checkpoint and at the end.

    Args:
        folder: the run's folder; rows of a ``metrics.csv`` that is already there are kept until `start_from`.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._rows: dict[int, dict[str, str]] = {}
        if self.path.exists():
            self._rows = {int(row["step"]): row for row in read_rows(self.path)}
        self._changed = False
        self._next_flush = time.monotonic() + FLUSH_SECONDS

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration lies beside the table in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Merges values into the row of ``step`` (Lightning's count, which is one behind the steps taken)."""
        assert step is not None, "a row needs a step"
        row = self._rows.setdefault(step + 1, {"step": str(step + 1)})
        row.update({key: repr(float(value)) for key, value in metrics.items() if key != "epoch"})
        self._changed = True
        if time.monotonic() >= self._next_flush:
            self.flush()

    @rank_zero_only
    def start_from(self, step: int) -> None:
        """Forgets the rows after ``step``, which a resumed run (0: a new one) writes again."""
        late = [key for key in self._rows if key > step]
        for key in late:
            del self._rows[key]
        self._changed |= bool(late)
        self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Replaces the file, when there is something new."""
        if not self._changed:
            return
        start = time.monotonic()
        columns = ["step", *sorted(set().union(*self._rows.values()) - {"step"})]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows[step] for step in sorted(self._rows))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, text.getvalue())
        self._changed = False
        now = time.monotonic()
        self._next_flush = now + max(FLUSH_SECONDS, 20 * (now - start))  # at most 5 % of the time on a long table

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.flush()
