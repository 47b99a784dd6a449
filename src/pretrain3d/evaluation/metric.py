"""The detection metric of training: fed case by case, exact over any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from pretrain3d.evaluation.matching import match
from pretrain3d.evaluation.protocol import KEYS, values
from pretrain3d.parallel import rank

REPORTED = ("mAP", "AP@0.10", "AP@0.50", "FROC@0.10")
# columns of the states; every row starts with its case and the number of the update that brought it
WIDTHS = {"cases": 2, "predictions": 10, "targets": 9, "annotated": 3}


class Found(Protocol):
    """Predictions of one case: boxes (N, 6), scores (N,), labels (N,)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class DetectionMetric(Metric):
    """AP and FROC of the validation cases, the same numbers whichever process saw which case.

    A case seen twice (samplers repeat cases to fill up the last round) counts once. A process may see no case at all.

    Args:
        classes: class names; labels index into them.

    Source: torchmetrics gathers list states by concatenation. Rows in float64 keep boxes, scores, case indices exact;
        empty (0, k) rows in `sync` keep a process without cases from stalling the others or changing the dtype.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    cases: list[Tensor]
    predictions: list[Tensor]
    targets: list[Tensor]
    annotated: list[Tensor]

    def __init__(self, classes: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = list(classes)
        for name in WIDTHS:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        case: int,
        found: Found,
        target_boxes: Tensor,
        target_labels: Tensor,
        annotated: Sequence[int] | None = None,
    ) -> None:
        """Adds one whole case.

        Args:
            case: its index among the cases of the set, the same in every process.
            found: predictions, with `boxes` (N, 6), `scores` (N,) and `labels` (N,), such as a detector's `Detections`.
            target_boxes, target_labels: objects (M, 6), (M,), in the same voxels.
            annotated: class indices that were annotated in this case; default all.

        Raises:
            ValueError: a box or score that is not finite.
        """
        if not (torch.isfinite(found.boxes).all() and torch.isfinite(found.scores).all()):
            raise ValueError(f"case {case}: a predicted box or score is not finite")
        known = range(len(self.classes)) if annotated is None else annotated
        stamp = torch.tensor([case, rank() * 2**32 + self._update_count], dtype=torch.float64, device=self.device)
        self._append("cases", stamp, torch.zeros(1, 0))
        self._append("predictions", stamp, found.boxes, found.scores[:, None], found.labels[:, None])
        self._append("targets", stamp, target_boxes.reshape(-1, 6), target_labels[:, None])
        self._append("annotated", stamp, torch.tensor(list(known), dtype=torch.float64)[:, None])

    def _append(self, name: str, stamp: Tensor, *columns: Tensor) -> None:
        row = torch.cat([column.detach().to(self.device, torch.float64) for column in columns], dim=1)
        getattr(self, name).append(torch.cat([stamp.expand(len(row), 2), row], dim=1))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As in torchmetrics; a process without cases takes part with empty rows."""
        for name, width in WIDTHS.items():
            if not getattr(self, name):
                setattr(self, name, [torch.zeros(0, width, dtype=torch.float64, device=self.device)])
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, float]:
        """`REPORTED` overall and "AP@0.10/<class>"; nan where there are no objects (or no cases)."""
        tables = {name: self._table(name) for name in WIDTHS}
        stamps: dict[int, float] = {}  # one update per case: the first of the lowest rank
        for case, stamp in tables["cases"]:
            stamps[int(case)] = min(stamp, stamps.get(int(case), np.inf))
        if not stamps:
            return dict.fromkeys([*REPORTED, *(f"AP@0.10/{name}" for name in self.classes)], float("nan"))
        predictions, targets = {}, {}
        for case, stamp in sorted(stamps.items()):
            rows = {name: _rows_of(table, case, stamp) for name, table in tables.items()}
            key = f"{case:012d}"  # sorts as the number does
            found, true = rows["predictions"], rows["targets"]
            predictions[key] = {"boxes": found[:, :6], "scores": found[:, 6], "labels": found[:, 7].astype(int)}
            annotated = rows["annotated"][:, 0].astype(int)
            targets[key] = {"boxes": true[:, :6], "labels": true[:, 6].astype(int), "annotated": annotated}
        overall, per_class = values(match(predictions, targets, self.classes), np.ones((1, len(stamps))))
        result = {key: float(overall[key][0]) for key in KEYS if key in REPORTED}
        return result | {f"AP@0.10/{name}": float(row["AP@0.10"][0]) for name, row in per_class.items()}

    def _table(self, name: str) -> np.ndarray:
        state = getattr(self, name)  # a list of this process's rows, or all processes' as one tensor
        rows = state if isinstance(state, Tensor) else torch.cat(state) if state else torch.zeros(0, WIDTHS[name])
        return rows.double().cpu().numpy()


def _rows_of(table: np.ndarray, case: int, stamp: float) -> np.ndarray:
    """The rows of one update, without the two columns that say so."""
    return table[(table[:, 0] == case) & (table[:, 1] == stamp), 2:]
