"""The predicted boxes of one input file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pretrain3d.geometry import Frame

LPS = np.array([-1.0, -1.0, 1.0])  # RAS millimetres to those of DICOM, ITK and LUNA16, and back


@dataclass(frozen=True, eq=False)
class Found:
    """The predicted boxes of one input file.

    Attributes:
        frame: of the volume that was predicted.
        boxes: (N, 6) in its voxels (cached axes, half-open).
        scores: (N,).
        labels: (N,).
        image: (C, X, Y, Z) what the network saw, for pictures; None: not kept.
        odd: what is odd about the file, in words, see `data.oddity`.
    """

    frame: Frame
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    image: np.ndarray | None = None
    odd: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.scores)

    def best_first(self) -> Found:
        """The same boxes in descending score."""
        order = np.argsort(-np.asarray(self.scores, np.float64), kind="stable")
        boxes = np.asarray(self.boxes).reshape(-1, 6)[order]
        return replace(self, boxes=boxes, scores=np.asarray(self.scores)[order], labels=np.asarray(self.labels)[order])

    def restored(self) -> dict[str, Any]:
        """Best first: boxes in the voxels of the input file, and the same boxes in RAS millimetres.

        Returns:
            ``boxes`` (N, 6), ``scores``, ``labels``, ``center_mm`` (N, 3), ``size_mm`` (N, 3) along the axes of the
            input file, and ``axes`` (3, 3), whose columns are the directions of those axes in the world.
        """
        found = self.best_first()
        boxes = self.frame.to_original(found.boxes)
        return {"boxes": boxes, "scores": found.scores, "labels": found.labels, **self.frame.to_world(found.boxes)}
