"""Losses of anchor-based detectors, all in float32, and what they are divided by.

None of them needs an object in the batch: without one they are zero but still connected to the outputs, so every
parameter gets a gradient and data-parallel training does not wait for one that never comes.

Under data parallelism gradients are *averaged* over processes. Whatever is summed over the batch here (positives, Dice
terms) is therefore made global, so that n processes train exactly like one with the whole batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain3d import boxes as box_ops
from pretrain3d.parallel import all_sum, world_size


def focal(logits: Tensor, targets: Tensor, gamma: float, alpha: float) -> Tensor:
    """Sigmoid focal loss per element: -alpha_t (1 - p_t)^gamma log(p_t); alpha weighs the objects, 1 - alpha the rest.

    Args:
        logits: any shape.
        targets: same shape, bool.
        gamma: focusing exponent, 0 = weighted cross entropy.
        alpha: in [0, 1].

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", equation 5.
    """
    wrong = torch.where(targets, -logits, logits)  # sigmoid(wrong) = 1 - p_t, softplus(wrong) = -log(p_t)
    weight = torch.where(targets, alpha, 1.0 - alpha)
    loss = weight * F.softplus(wrong)
    if gamma == 0:
        return loss
    miss = torch.sigmoid(wrong)
    return loss * (miss if gamma == 1 else miss**gamma)


def box_l1(deltas: Tensor, boxes: Tensor, anchors: Tensor, positive: Tensor) -> Tensor:
    """Sum over positive pairs and the six deltas of |predicted - encoded|: (B, P, 6) x 3 and (B, P) bool -> ()."""
    boxes = torch.where(positive[..., None], boxes, anchors)  # padding has no size to take the logarithm of
    difference = (deltas - box_ops.encode(boxes, anchors)).abs().sum(dim=-1)
    return (difference * positive).sum()


def box_giou(deltas: Tensor, boxes: Tensor, anchors: Tensor, positive: Tensor) -> Tensor:
    """Sum over positive pairs of 1 - GIoU of the decoded box (nnDetection: -GIoU, same gradient, negative values)."""
    deltas = torch.where(positive[..., None], deltas, 0.0)
    boxes = torch.where(positive[..., None], boxes, anchors)
    difference = 1.0 - box_ops.aligned_giou(box_ops.decode(deltas, anchors), boxes)
    return (difference * positive).sum()


def dice_and_cross_entropy(logits: Tensor, target: Tensor, use: Tensor, smooth: float) -> tuple[Tensor, Tensor]:
    """Soft Dice over the batch of all processes (foreground classes, softmax) and voxel-wise cross entropy.

    Args:
        logits: (B, K + 1, X, Y, Z), class 0 = background.
        target: (B, X, Y, Z) integer class indices.
        use: (B,) bool; images that are not completely annotated stay out.
        smooth: added to numerator and denominator; nnDetection 1e-5, the pretraining study 0 in the numerator.

    Returns:
        Dice loss in [0, 1] and cross entropy; both 0 when no image is used. With ``smooth`` a class that neither the
        target nor, beyond rounding, the prediction contains counts as found; without, as missed, with no gradient.
    """
    num_classes = logits.shape[1]
    weight = use.float()
    target = target.long()
    voxels = F.cross_entropy(logits, target, reduction="none").flatten(1).mean(dim=1)  # (B,)
    used = all_sum(weight.sum())
    cross_entropy = (voxels * weight).sum() / (used / world_size()).clamp(min=1e-6)
    probabilities = logits.softmax(dim=1)
    terms = []
    for index in range(1, num_classes):  # a one-hot volume of all classes would be the largest tensor of the step
        p, t = probabilities[:, index].flatten(1), (target == index).flatten(1)
        sums = torch.stack([(p * t).sum(dim=1), p.sum(dim=1), t.sum(dim=1).float()])  # (3, B)
        terms.append((sums * weight).sum(dim=1))
    shared, predicted, true = all_sum(torch.stack(terms)).unbind(dim=1)  # (K,) each
    dice = 1.0 - ((2 * shared + smooth) / (predicted + true + smooth).clamp(min=1e-8)).mean()
    return dice * (used > 0), cross_entropy


class PositiveNormaliser(nn.Module):
    """Running number of positive anchors per step and process, at least 1, that losses are divided by.

    An exponential moving average with bias correction: after t steps sum_i beta^(t-i) (1 - beta) n_i / (1 - beta^t).
    Its state is saved with the weights. In evaluation mode the last value is used unchanged.

    Args:
        beta: weight of the past; 0 divides by the positives of this step.
    """

    mean: Tensor
    steps: Tensor

    def __init__(self, beta: float) -> None:
        super().__init__()
        assert 0 <= beta < 1, beta
        self.beta = beta
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def forward(self, positive: Tensor) -> Tensor:
        """Bool mask of positives -> () divisor."""
        if self.training:
            count = all_sum(positive.sum().float()) / world_size()
            self.mean.mul_(self.beta).add_(count, alpha=1 - self.beta)
            self.steps.add_(1)
        correction = 1 - torch.pow(torch.full_like(self.mean, self.beta), self.steps)
        return (self.mean / correction.clamp(min=1e-6)).clamp(min=1.0)
