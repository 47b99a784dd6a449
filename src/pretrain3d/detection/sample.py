"""Which anchors the classification loss looks at: hard-negative sampling."""

from __future__ import annotations

import torch
from torch import Tensor

PER_IMAGE = 32  # sampled anchors per image of the batch
POSITIVE_FRACTION = 0.33
POOL = 20  # negatives are drawn from the POOL * wanted highest-scoring ones


@torch.no_grad()
def hard_negatives(scores: Tensor, positive: Tensor, usable: Tensor, seed: Tensor) -> Tensor:
    """Draws positives at random and negatives at random from the highest-scoring ones, over the whole batch.

    At most ``0.33 * 32 * B`` positives; for n positives ``2.03 * max(1, n)`` negatives. Sizes are masked rather than
    indexed, so that nothing waits for the device, and draws depend on ``seed`` only: a resumed run repeats them.

    Args:
        scores: (B, M) highest class logit (or score) per anchor.
        positive: (B, M) bool.
        usable: (B, M) bool, False = neither positive nor negative.
        seed: () int64, for instance the number of steps done.

    Returns:
        (B, M) bool, the sampled anchors.

    Source: nnDetection v0.1, HardNegativeSamplerBatched.
    """
    most_positives = max(1, int(PER_IMAGE * len(scores) * POSITIVE_FRACTION))
    per_positive = abs(1 - 1 / POSITIVE_FRACTION)
    positive, negative = (positive & usable).flatten(), (~positive & usable).flatten()
    draw = _random(positive.shape[0], seed, positive.device)

    kept_positive = _largest(torch.where(positive, draw, -1.0), most_positives)
    num_positives = kept_positive.sum()
    wanted = (num_positives.clamp(min=1) * per_positive).long()
    most_negatives = int(most_positives * per_positive)
    ranked = torch.where(negative, scores.float().flatten(), -torch.inf)
    pool = ranked.topk(min(POOL * most_negatives, len(ranked))).indices  # best first
    place = torch.arange(len(pool), device=pool.device)
    in_pool = (place < POOL * wanted) & negative[pool]
    order = torch.where(in_pool, draw[pool], -1.0).sort(descending=True, stable=True).indices
    chosen = torch.zeros_like(in_pool)
    chosen[order] = place < wanted
    sampled = kept_positive.clone()
    sampled[pool] |= chosen & in_pool
    return sampled.view_as(usable)


def _largest(values: Tensor, count: int) -> Tensor:
    """Bool mask of the ``count`` largest values that are not negative."""
    best = values.topk(min(count, len(values)))
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[best.indices] = best.values >= 0
    return mask


def _random(count: int, seed: Tensor, device: torch.device) -> Tensor:
    """(count,) float32 in [0, 1), a hash of (index, seed) that is the same on every device.

    Source: the 32-bit integer finaliser with constant 0x45d9f3b, here in int64 so that nothing overflows.
    """
    value = (torch.arange(count, device=device) + seed.to(device) * 0x9E3779B1) & 0xFFFFFFFF
    for _ in range(2):
        value = ((value ^ (value >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return ((value ^ (value >> 16)) >> 8).float() / 2**24
