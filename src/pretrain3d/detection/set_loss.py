"""What a set of queries costs and loses on the objects of a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pretrain3d import boxes as box_ops
from pretrain3d.detection.losses import focal
from pretrain3d.detection.queries import candidates, to_relative, to_voxels
from pretrain3d.parallel import all_sum, world_size

FOCAL_GAMMA, FOCAL_ALPHA = 1.0, 0.75
L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0


@dataclass(frozen=True)
class Targets:
    """The objects of a batch.

    Attributes:
        boxes: (B, N, 6) float32 voxels, padded.
        labels, valid: (B, N).
        annotated: (B, K) bool; the other classes have no classification loss in that image.
        image_shape: voxels of the images.
        divisor: () objects per process, at least one in all processes together.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    annotated: Tensor
    image_shape: tuple[int, ...]
    divisor: Tensor

    @classmethod
    def of(cls, batch: dict[str, Tensor], num_classes: int) -> Targets:
        """Those of the batch of the data contract; without ``annotated`` every class is."""
        valid = batch["valid"]
        annotated = batch.get("annotated")
        if annotated is None:
            annotated = torch.ones(len(valid), num_classes, dtype=torch.bool, device=valid.device)
        divisor = all_sum(valid.sum().float()).clamp(min=1) / world_size()
        shape = tuple(batch["image"].shape[2:])
        return cls(batch["boxes"].float(), batch["labels"], valid, annotated, shape, divisor)

    def repeat(self, layers: int, groups: int = 1) -> Targets:
        """The same images ``layers`` times, the objects of each ``groups`` times."""
        return replace(
            self,
            boxes=self.boxes.repeat(layers, groups, 1),
            labels=self.labels.repeat(layers, groups),
            valid=self.valid.repeat(layers, groups),
            annotated=self.annotated.repeat(layers, 1),
        )

    def costs(self, logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """For `queries.match`: see `queries.candidates`."""
        targets = (self.boxes, self.labels, self.valid)
        return candidates(logits, boxes, *targets, self.image_shape, FOCAL_GAMMA, FOCAL_ALPHA)

    def losses(self, logits: Tensor, boxes: Tensor, query: Tensor, usable: Tensor | None = None) -> Tensor:
        """Focal loss of all queries, 5 x L1 of the relative boxes and 2 x (1 - GIoU) of the matched ones, per image.

        Args:
            logits: (B, Q, K) float32.
            boxes: (B, Q, 6) relative.
            query: (B, N) of each object, -1 for none.
            usable: (B, Q) bool, False = no classification loss; None = all.

        Returns:
            (3, B), divided by the number of objects.
        """
        matched, index = query >= 0, query.clamp(min=0)
        truth = torch.zeros(logits.flatten(1).shape, dtype=torch.uint8, device=logits.device)
        truth.scatter_reduce_(1, index * logits.shape[-1] + self.labels, matched.byte(), "amax")
        counted = self.annotated[:, None] if usable is None else self.annotated[:, None] & usable[..., None]
        classification = focal(logits, truth.view_as(logits).bool(), FOCAL_GAMMA, FOCAL_ALPHA) * counted
        # every object is compared with some query and the matched ones counted: their number is never asked for
        chosen = boxes.gather(1, index[..., None].expand(-1, -1, 6))  # (B, N, 6)
        l1 = (chosen - to_relative(self.boxes, self.image_shape)).abs().sum(dim=-1)
        giou = 1 - box_ops.aligned_giou(to_voxels(chosen, self.image_shape), self.boxes)
        l1, giou = ((value * matched).sum(dim=1) for value in (l1, giou))
        return torch.stack([classification.sum(dim=(1, 2)), L1_WEIGHT * l1, GIOU_WEIGHT * giou]) / self.divisor
