"""What a set of queries is trained on: relative boxes, one-to-one matching, and denoising queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pretrain3d import boxes as box_ops
from pretrain3d.devices import sent

CLASS_COST, L1_COST, GIOU_COST = 2.0, 5.0, 2.0
EPSILON = 1e-5  # of relative coordinates, before their logits
PAIRS = 2**24  # queries x objects whose costs are computed at once
WORST = 1e6  # cost of a pair whose cost is not finite; the non-finite loss is reported elsewhere
NEVER = 1e12  # cost of a pair that no optimum needs
FLIP = 0.25  # share of denoising queries with the label of a random class
SHIFT = 1.0  # noise of a denoising box: its faces move by less than this times half its size


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Logits of relative coordinates, finite at 0 and 1."""
    x = x.float().clamp(EPSILON, 1 - EPSILON)
    return torch.log(x / (1 - x))


def to_relative(boxes: Tensor, image_shape: Sequence[int]) -> Tensor:
    """(..., 6) boxes in voxels -> (..., 6) centre and size, relative to the image."""
    scaled = _scaled(boxes.float(), [1 / n for n in image_shape])
    low, high = scaled[..., :3], scaled[..., 3:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def to_voxels(relative: Tensor, image_shape: Sequence[int]) -> Tensor:
    """Inverse of `to_relative`."""
    center, half = relative[..., :3].float(), relative[..., 3:].float() / 2
    return _scaled(torch.cat([center - half, center + half], dim=-1), image_shape)


def _scaled(boxes: Tensor, factors: Sequence[float]) -> Tensor:
    # column by column: a tensor of factors would have to be copied to the device, which waits
    return torch.stack([boxes[..., i] * factors[i % 3] for i in range(6)], dim=-1)


@torch.no_grad()
def candidates(
    logits: Tensor,
    boxes: Tensor,
    targets: Tensor,
    labels: Tensor,
    valid: Tensor,
    image_shape: Sequence[int],
    gamma: float,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """Matching costs, reduced to what an optimal assignment can need.

    The cost of a query and an object is 2 x focal cost of its class (what the focal loss gains when the query becomes
    positive) + 5 x L1 of the relative boxes - 2 x GIoU. When N objects are matched one to one, each gets one of its N
    cheapest queries in some optimal assignment (of N queries at most N - 1 are taken), so only these leave the device.

    Args:
        logits: (B, Q, K).
        boxes: (B, Q, 6) relative.
        targets: (B, N, 6) voxels, padded.
        labels, valid: (B, N).
        image_shape: voxels of the image.
        gamma, alpha: of the focal loss.

    Returns:
        costs (B, N, min(N, Q)), infinite where the object is padding, and the indices of their queries.

    Source: Carion et al. 2020, "DETR", equation 1; weights as in the pretraining study.
    """
    step = max(1, PAIRS // (logits.shape[1] * labels.shape[1]))
    parts = zip(
        logits.float().split(step), boxes.float().split(step), targets.split(step), labels.split(step),
        valid.split(step), strict=True,
    )  # fmt: skip
    costs, queries = [], []
    for logits, boxes, targets, labels, valid in parts:
        p = logits.sigmoid()
        gain = alpha * (1 - p) ** gamma * F.softplus(-logits) - (1 - alpha) * p**gamma * F.softplus(logits)
        index = labels[:, None].expand(-1, logits.shape[1], -1)  # (B, Q, N)
        cost = CLASS_COST * gain.gather(2, index)
        cost += L1_COST * torch.cdist(boxes, to_relative(targets, image_shape), p=1)
        cost -= GIOU_COST * box_ops.giou(to_voxels(boxes, image_shape), targets)
        cost = torch.nan_to_num(cost, nan=WORST, posinf=WORST, neginf=WORST)
        cost = cost.masked_fill(~valid[:, None], torch.inf).transpose(1, 2)  # (B, N, Q)
        best = cost.topk(min(cost.shape[1:]), largest=False, sorted=False)
        costs.append(best.values)
        queries.append(best.indices)
    return torch.cat(costs), torch.cat(queries)


@torch.no_grad()
def match(*groups: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Optimal one-to-one assignments, image by image, with a single transfer from the device for all groups.

    Args:
        groups: of `candidates`: costs and query indices, each (B, N, C); B and C may differ between groups.

    Returns:
        per group (B, N) int64: the query of each object, -1 for padding and for objects that found none because there
        are more of them than queries.

    Source: Carion et al. 2020, "DETR"; the assignment is scipy's.
    """
    packed = torch.cat([part.double().flatten() for group in groups for part in group])
    values = packed.cpu().numpy()
    results, start = [], 0
    for costs, _ in groups:
        size = costs.numel()
        cost = values[start : start + size].reshape(costs.shape)
        index = values[start + size : start + 2 * size].reshape(costs.shape).astype(np.int64)
        start += 2 * size
        chosen = np.stack([_assign(*pair) for pair in zip(cost, index, strict=True)])
        results.append(sent(torch.from_numpy(chosen), costs.device))
    return results


def _assign(cost: np.ndarray, index: np.ndarray) -> np.ndarray:
    """(N, C) costs and query indices of an image -> (N,) the query of each object or -1."""
    result = np.full(len(cost), -1, dtype=np.int64)
    objects = np.flatnonzero(np.isfinite(cost[:, 0]))
    columns, place = np.unique(index[objects], return_inverse=True)
    dense = np.full((len(objects), len(columns)), NEVER)
    np.put_along_axis(dense, place.reshape(len(objects), cost.shape[1]), cost[objects], axis=1)
    row, column = linear_sum_assignment(dense)
    result[objects[row]] = columns[column]
    return result


@dataclass(frozen=True)
class Denoising:
    """Noised copies of the objects as extra queries: G groups of 2 N, in each first the positives, then the negatives.

    Attributes:
        boxes: (B, G * 2 * N, 6) relative.
        labels: (B, G * 2 * N) the class each query claims to be.
        valid: (B, G * 2 * N) bool, False = copies of padding.
        groups: G.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    groups: int

    def visible(self, num_queries: int) -> Tensor:
        """(B, D + Q, D + Q) bool, D denoising queries first: which query (row) may look at which (column).

        Queries see no denoising query. A denoising query sees its own group, without padding, and all queries.
        """
        count = self.labels.shape[1]
        group = torch.arange(count, device=self.labels.device) // (count // self.groups)
        own = (group[:, None] == group) & self.valid[:, None]  # (B, D, D)
        own = own | torch.eye(count, dtype=torch.bool, device=own.device)  # padding sees itself, not nothing
        # pads from the last dimension: columns on the right seen by denoising queries, rows below blind for them
        seen = F.pad(own, (0, num_queries), value=True)
        return torch.cat([seen, F.pad(torch.ones_like(seen[:, :1, count:]), (count, 0)).expand(-1, num_queries, -1)], 1)


@torch.no_grad()
def denoising_queries(
    boxes: Tensor, labels: Tensor, valid: Tensor, image_shape: Sequence[int], num_queries: int, num_classes: int
) -> Denoising:
    """Contrastive denoising queries; draws from torch's global generator, which the training step seeds.

    The faces of a positive move by less than half the size of the object, those of a negative by half to the whole
    size; a quarter of the labels is replaced by a random class.

    Args:
        boxes: (B, N, 6) voxels, padded.
        labels, valid: (B, N).
        image_shape: voxels of the image.
        num_queries: about how many to make; at least one group of 2 N.
        num_classes: K.

    Source: Zhang et al. 2023, "DINO", section 3.3.
    """
    batch, count = labels.shape
    groups = max(1, num_queries // (2 * count))
    filled = torch.where(valid[..., None], to_relative(boxes, image_shape), 0.5)  # padding has no size
    copies = filled[:, None, None].expand(batch, groups, 2, count, 6)
    center, half = copies[..., :3], copies[..., 3:] / 2
    corners = torch.stack([center - half, center + half], dim=-2)  # (B, G, 2, N, 2, 3)
    amount = torch.rand_like(corners)
    amount[:, :, 1] += 1
    sign = torch.randint_like(corners, 2) * 2 - 1
    moved = (corners + SHIFT * sign * amount * half[..., None, :]).clamp(0, 1)
    low, high = moved.amin(dim=-2), moved.amax(dim=-2)  # faces that passed each other change places
    noised = torch.cat([(low + high) / 2, high - low], dim=-1)
    claimed = labels[:, None, None].expand(batch, groups, 2, count)
    flip = torch.rand(claimed.shape, device=labels.device) < FLIP
    claimed = torch.where(flip, torch.randint_like(claimed, num_classes), claimed)
    real = valid[:, None, None].expand(batch, groups, 2, count)
    return Denoising(noised.flatten(1, 3), claimed.flatten(1), real.flatten(1), groups)
