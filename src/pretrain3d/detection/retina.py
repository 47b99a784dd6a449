"""Retina U-Net: dense anchors on a feature pyramid, with a segmentation head that only helps training.

Source: Jaeger et al. 2018, "Retina U-Net"; Baumgartner et al. 2021, "nnDetection". Two published recipes are built in:

| | `study` (pretraining study, 2025) | `nndetection` (v0.1) |
|---|---|---|
| classification | focal (1, 0.75), class mean, anchor sum, weight 0.3 | cross entropy on sampled anchors |
| regression | L1 of the deltas, sum | GIoU of the decoded boxes |
| divided by | moving average of the positives, beta 0.7 | positives of the step |
| segmentation | Dice (no smoothing) + cross entropy, half each | Dice (1e-5) + cross entropy, half each |

Both regress all positives; v0.1 only those it sampled (at most 42 of 4 images), whose mean is the same on average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain3d import boxes as box_ops
from pretrain3d.backbones.contract import Level, Triple, triple
from pretrain3d.backbones.convolution import Conv3d
from pretrain3d.config import UserError
from pretrain3d.detection.anchors import AnchorGrid, Anchors
from pretrain3d.detection.assign import Assignment, atss
from pretrain3d.detection.contract import MIN_SIZE, Detections
from pretrain3d.detection.heads import Head, per_anchor
from pretrain3d.detection.losses import PositiveNormaliser, box_giou, box_l1, dice_and_cross_entropy, focal
from pretrain3d.detection.necks import FPN, SimplePyramid, chosen_levels, pyramid_levels
from pretrain3d.detection.sample import hard_negatives

RECIPES: dict[str, dict[str, str | float]] = {
    "study": {"classification": "focal", "regression": "l1", "beta": 0.7, "smooth": 0.0},
    "nndetection": {"classification": "hard_negative", "regression": "giou", "beta": 0.0, "smooth": 1e-5},
}
SEGMENTATIONS = ("none", "foreground", "classes")
FOCAL_GAMMA, FOCAL_ALPHA = 1.0, 0.75
CLASSIFICATION_WEIGHT = {"focal": 0.3, "hard_negative": 1.0}
SEGMENTATION_WEIGHT = 0.5
PRIOR = 0.01  # probability of an object per anchor before training
ATSS_CANDIDATES = 4
CANDIDATES_PER_PATCH = 10_000


class RetinaUNet(nn.Module):
    """One-stage detector on any backbone of the registry.

    Args:
        levels: the backbone's levels, finest first; from a single one a pyramid is made, see `necks.SimplePyramid`.
        num_classes: K.
        anchors: base sizes in voxels on the finest detection level: ``{"sizes": [xs, ys, zs]}`` (all combinations) or
            ``{"boxes": [[x, y, z], ...]}``; coarser levels scale them by their relative stride.
        detection_levels: indices into the levels that predict boxes, ascending; None = the last four (five when there
            are seven), but never the first level, as nnDetection plans them.
        fpn_channels: channels of the pyramid's detection levels.
        head_channels: channels inside the heads; None = ``fpn_channels``.
        num_convs: hidden convolutions per head, before its output.
        recipe: "study" or "nndetection".
        classification: "focal" or "hard_negative"; None = the recipe's.
        classification_weight: factor of that loss; None = 0.3 of the focal loss (a mean over classes), 1 of the sampled
            one. Short trainings on few small objects need more: with 0.3, regression and segmentation hold the
            backbone for the first thousand steps.
        regression: "l1" or "giou"; None = the recipe's.
        segmentation: "foreground" (object or not), "classes" (one channel per class) or "none".
        segmentation_conv: the 3x3x3 conv of the finest pyramid level, which the published recipes have; without it the
            segmentation is a 1x1x1 conv of the merged features. It is half the cost of a narrow detector on a CPU.
        nms_iou: class-wise suppression of a patch's boxes, in (0, 1].
        detections_per_patch: boxes kept per patch.

    Raises:
        UserError: an argument is none of the above, a number out of its range, or a level index the backbone does not
            have.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        num_classes: int,
        anchors: Mapping[str, Sequence[Sequence[float]]],
        detection_levels: Sequence[int] | None = None,
        fpn_channels: int = 128,
        head_channels: int | None = None,
        num_convs: int = 2,
        recipe: str = "study",
        classification: str | None = None,
        classification_weight: float | None = None,
        regression: str | None = None,
        segmentation: str = "foreground",
        segmentation_conv: bool = True,
        nms_iou: float = 0.6,
        detections_per_patch: int = 100,
    ) -> None:
        super().__init__()
        preset = RECIPES[_one_of("recipe", recipe, tuple(RECIPES))]
        self.classification = _one_of(
            "classification", classification or str(preset["classification"]), ("focal", "hard_negative")
        )
        preset_weight = CLASSIFICATION_WEIGHT[self.classification]
        self.classification_weight = preset_weight if classification_weight is None else classification_weight
        if not self.classification_weight > 0:
            raise UserError(f"detector.classification_weight is {classification_weight}; it must be above 0")
        self.regression = _one_of("regression", regression or str(preset["regression"]), ("l1", "giou"))
        self.segmentation = _one_of("segmentation", segmentation, SEGMENTATIONS)
        width = fpn_channels if head_channels is None else head_channels
        _check(nms_iou, num_convs, fpn_channels=fpn_channels, head_channels=width,
               detections_per_patch=detections_per_patch)  # fmt: skip
        self.smooth = float(preset["smooth"])
        self.num_classes = num_classes
        self.nms_iou = nms_iou
        self.detections_per_patch = detections_per_patch
        single, levels = levels[0] if len(levels) == 1 else None, pyramid_levels(levels)
        self.detection_levels = chosen_levels(detection_levels, len(levels))
        self.anchors = Anchors(anchors, [triple(levels[index].stride) for index in self.detection_levels])

        outputs = sorted({*self.detection_levels, *([] if segmentation == "none" else [0])})
        self.pyramid = None
        if single is not None:
            levels = levels[: self.detection_levels[-1] + 1]
            self.pyramid = SimplePyramid(single, outputs[0], len(levels) - 1)
        plain = () if segmentation_conv or 0 in self.detection_levels else (0,)
        self.fpn = FPN(levels, outputs, fpn_channels, full_from=self.detection_levels[0], plain=plain)
        per_position = self.anchors.per_position
        self.classifier = Head(fpn_channels, width, num_convs, per_position * num_classes)
        self.regressor = Head(fpn_channels, width, num_convs, per_position * 6)
        nn.init.constant_(self.classifier.output.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]
        self.scales = nn.Parameter(torch.ones(len(self.detection_levels)))
        if segmentation != "none":
            channels = 2 if segmentation == "foreground" else num_classes + 1
            self.segmenter = Conv3d(self.fpn.channels[0], channels, kernel_size=1)
        self.normaliser = PositiveNormaliser(float(preset["beta"]))

    def forward(self, features: list[Tensor], image_shape: Sequence[int]) -> dict[str, Tensor]:
        """Backbone features, finest first -> logits (B, M, K), deltas (B, M, 6) and segmentation (B, S, X, Y, Z).

        M runs over levels, positions and anchor sizes as in `AnchorGrid`. The segmentation and the fine pyramid levels
        that only it needs are computed in training mode alone.
        """
        segment = self.segmentation != "none" and self.training
        finest = None if segment else self.detection_levels[0]
        maps = self.fpn(features if self.pyramid is None else self.pyramid(features, finest), finest)
        logits, deltas = [], []
        for scale, index in zip(self.scales, self.detection_levels, strict=True):
            logits.append(per_anchor(self.classifier(maps[index]), self.num_classes))
            deltas.append(per_anchor(self.regressor(maps[index]), 6) * scale)
        outputs = {"logits": torch.cat(logits, dim=1), "deltas": torch.cat(deltas, dim=1)}
        if segment:
            segmentation = self.segmenter(maps[0])
            if segmentation.shape[2:] != tuple(image_shape):  # a backbone whose finest level has a stride
                segmentation = F.interpolate(segmentation, tuple(image_shape), mode="trilinear")
            outputs["segmentation"] = segmentation
        return outputs

    def loss(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Training losses of a batch, float32.

        Args:
            outputs: of `forward`.
            batch: ``image`` (B, C, X, Y, Z) for its shape, ``boxes`` (B, N, 6), ``labels`` (B, N), ``valid`` (B, N);
                ``mask`` (B, X, Y, Z) when there is a segmentation head; optional ``annotated`` (B, K) bool: classes
                that are not annotated in an image have no classification loss there, and such an image no segmentation
                loss.

        Returns:
            ``loss`` = the sum of ``classification``, ``regression`` and, when the outputs hold a segmentation,
            ``segmentation_dice`` and ``segmentation_ce``; ``positives``: positive anchors per image, for the log.
        """
        with torch.autocast(outputs["logits"].device.type, enabled=False):
            logits, deltas = outputs["logits"].float(), outputs["deltas"].float()
            grid = self.anchors.grid(batch["image"].shape[2:], logits.device)
            assigned = atss(grid, batch["boxes"], batch["valid"], ATSS_CANDIDATES)
            divisor = self.normaliser(assigned.positive)
            annotated = batch.get("annotated")
            if annotated is None:
                annotated = torch.ones(len(logits), self.num_classes, dtype=torch.bool, device=logits.device)
            parts = {
                "classification": self._classification(logits, assigned, batch["labels"], annotated, divisor),
                "regression": self._regression(deltas, grid, assigned, batch["boxes"]) / divisor,
            }
            if "segmentation" in outputs:
                dice, cross_entropy = self._segmentation(outputs["segmentation"].float(), batch["mask"], annotated)
                parts["segmentation_dice"] = SEGMENTATION_WEIGHT * dice
                parts["segmentation_ce"] = SEGMENTATION_WEIGHT * cross_entropy
            total = torch.stack(list(parts.values())).sum()
        return {"loss": total, **parts, "positives": assigned.positive.sum() / len(logits)}

    def _classification(
        self, logits: Tensor, assigned: Assignment, labels: Tensor, annotated: Tensor, divisor: Tensor
    ) -> Tensor:
        label = labels.gather(1, assigned.box)
        targets = torch.zeros(logits.flatten(1).shape, dtype=torch.uint8, device=logits.device)
        targets.scatter_reduce_(1, assigned.anchor * self.num_classes + label, assigned.positive.byte(), "amax")
        truth = targets.view_as(logits).bool()
        usable = annotated[:, None]  # (B, 1, K)
        if self.classification == "focal":
            loss = focal(logits, truth, FOCAL_GAMMA, FOCAL_ALPHA)
            return self.classification_weight * (loss * usable).mean(dim=-1).sum() / divisor
        highest = logits.masked_fill(~usable, -torch.inf).amax(dim=-1).detach()
        seed = self.normaliser.steps
        sampled = hard_negatives(highest, truth.any(dim=-1), usable.any(dim=-1).expand_as(highest), seed)
        weight = sampled[..., None] & usable
        loss = F.binary_cross_entropy_with_logits(logits, truth.float(), weight=weight.float(), reduction="sum")
        return self.classification_weight * loss / weight.sum().clamp(min=1)

    def _regression(self, deltas: Tensor, grid: AnchorGrid, assigned: Assignment, boxes: Tensor) -> Tensor:
        # every candidate pair is computed and the positive ones counted: their number is never asked for
        predicted = deltas.gather(1, assigned.anchor[..., None].expand(-1, -1, 6))  # (B, P, 6)
        target = boxes.float().gather(1, assigned.box[..., None].expand(-1, -1, 6))
        loss = box_l1 if self.regression == "l1" else box_giou
        return loss(predicted, target, grid.boxes[assigned.anchor], assigned.positive)

    def _segmentation(self, logits: Tensor, mask: Tensor, annotated: Tensor) -> tuple[Tensor, Tensor]:
        target = mask > 0 if self.segmentation == "foreground" else mask
        return dice_and_cross_entropy(logits, target, annotated.all(dim=1), self.smooth)

    @torch.no_grad()
    def predict(self, outputs: dict[str, Tensor], image_shape: Sequence[int]) -> list[Detections]:
        """The best boxes of each image, in its voxels and inside it: class-wise NMS of the 10,000 highest scores."""
        shape = triple(image_shape)
        with torch.autocast(outputs["logits"].device.type, enabled=False):
            logits, deltas = outputs["logits"].float(), outputs["deltas"].float()
            grid = self.anchors.grid(shape, logits.device)
            return [self._decode(logits[i], deltas[i], grid.boxes, shape) for i in range(len(logits))]

    def _decode(self, logits: Tensor, deltas: Tensor, anchors: Tensor, shape: Triple) -> Detections:
        best = logits.flatten().topk(min(CANDIDATES_PER_PATCH, logits.numel()))
        anchor, labels = best.indices // self.num_classes, best.indices % self.num_classes
        scores = best.values.sigmoid()
        boxes = box_ops.clip(box_ops.decode(deltas[anchor], anchors[anchor]), shape)
        keep = (scores > 0) & box_ops.not_smaller(boxes, MIN_SIZE)
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
        kept = box_ops.batched_nms(boxes, scores, labels, self.nms_iou, self.detections_per_patch)
        return Detections(boxes[kept], scores[kept], labels[kept])


def retinanet(
    levels: Sequence[Level],
    num_classes: int,
    anchors: Mapping[str, Sequence[Sequence[float]]],
    detection_levels: Sequence[int] | None = None,
    fpn_channels: int = 128,
    head_channels: int | None = None,
    num_convs: int = 2,
    recipe: str = "study",
    classification: str | None = None,
    classification_weight: float | None = None,
    regression: str | None = None,
    nms_iou: float = 0.6,
    detections_per_patch: int = 100,
) -> RetinaUNet:
    """`RetinaUNet` without the segmentation head; pyramid levels finer than the detection levels are not computed."""
    return RetinaUNet(**locals(), segmentation="none")


def _check(nms_iou: float, num_convs: int, **positive: int) -> None:
    """Refuses numbers out of their range."""
    for name, value in positive.items():
        if value < 1:
            raise UserError(f"detector.{name} is {value}; expected at least 1")
    if num_convs < 0:
        raise UserError(f"detector.num_convs is {num_convs}; expected 0 or more")
    if not 0 < nms_iou <= 1:
        raise UserError(f"detector.nms_iou is {nms_iou}; expected a number above 0 and at most 1")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise UserError(f"detector.{name} is {value!r}; expected one of {', '.join(allowed)}")
    return value
