"""What every detector gives back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SIZE = 0.01  # voxels; only what clipping left of a box outside the image is smaller


@dataclass
class Detections:
    """Scored boxes of one image (a patch or a volume), best first.

    Attributes:
        boxes: (N, 6) float32, half-open voxels of that image.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64 class indices from 0.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        count = len(self.scores)
        assert self.boxes.shape == (count, 6), f"{tuple(self.boxes.shape)} boxes for {count} scores"
        assert self.labels.shape == (count,), f"{tuple(self.labels.shape)} labels for {count} scores"

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: Tensor) -> Detections:
        """The detections that an index or a bool mask picks."""
        return Detections(self.boxes[index], self.scores[index], self.labels[index])

    def cpu(self) -> Detections:
        return Detections(self.boxes.cpu(), self.scores.cpu(), self.labels.cpu())

    @classmethod
    def concatenate(cls, parts: list[Detections]) -> Detections:
        """All detections in the given order, of one part or more."""
        return cls(
            torch.cat([part.boxes for part in parts]),
            torch.cat([part.scores for part in parts]),
            torch.cat([part.labels for part in parts]),
        )
