"""What every detector promises to the LightningModule that trains it, and gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain3d.config import UserError
from pretrain3d.registry import CONTRACTS

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


class Detector(Protocol):
    """A detector; an ``nn.Module`` built as ``DETECTORS[name](levels, num_classes, **arguments)``.

    One that has an argument ``anchors`` gets the plan's; with ``detection_levels``, too, the plan's levels. With
    ``needs_targets = True`` ``forward`` also takes ``targets=batch`` in training; with ``one_size = True`` it only sees
    images as large as the training patch.
    """

    def forward(self, features: list[Tensor], image_shape: Sequence[int]) -> dict[str, Tensor]:
        """From the backbone's features, finest first, and the (3,) voxels of the image to what the others take."""

    def loss(self, outputs: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        """``loss`` is the total, float32; the rest are parts for the log, all of shape ().

        Args:
            outputs: of `forward`, in training mode.
            batch: the final batch of the data side: ``boxes`` (B, N, 6), ``labels`` and ``valid`` (B, N), ``annotated``
                (B, K), ``mask`` (B, X, Y, Z), ... A class that is not annotated in an image teaches nothing there.
        """

    def predict(self, outputs: dict[str, Tensor], image_shape: Sequence[int]) -> list[Detections]:
        """The boxes of each image of the batch, in its voxels and inside it."""


def check_detections(found: Any, images: int, num_classes: int, detector: object) -> Tensor:
    """Refuses predictions of another form; their values are for the device to look at, which nobody waits for.

    Args:
        found: of `Detector.predict`.
        images: how many it saw.
        num_classes: K.
        detector: for the error.

    Returns:
        () bool: a score is outside [0, 1], a label is none of the K, or a box is inverted.

    Raises:
        UserError: no list of one `Detections` per image, or labels that are no int64.
    """
    where = f"{type(detector).__name__}.predict"
    if not isinstance(found, list) or len(found) != images or not all(isinstance(one, Detections) for one in found):
        kinds = sorted({type(one).__name__ for one in found}) if isinstance(found, list) else [type(found).__name__]
        count = f"{len(found)} x " if isinstance(found, list) else ""
        raise UserError(
            f"{where} gives {count}{'/'.join(kinds)} for {images} images; expected one Detections of each ({CONTRACTS})"
        )
    if wrong := {str(one.labels.dtype) for one in found} - {"torch.int64"}:
        raise UserError(f"{where} gives labels of {wrong.pop()}; expected int64 ({CONTRACTS})")
    every = Detections.concatenate(found)
    bad = (every.scores < 0) | (every.scores > 1) | (every.labels < 0) | (every.labels >= num_classes)
    return (bad | (every.boxes[:, 3:] < every.boxes[:, :3]).any(dim=1)).any()
