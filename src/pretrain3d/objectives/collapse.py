"""How much features tell images apart: numbers that fall when a network has collapsed, and a warning in plain words."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_STD = 0.01  # of the spread: below, all images look alike; untrained networks have 0.06 to 0.16
MIN_LEVEL_STD = 0.001  # of a single level; the finest of untrained networks have 0.007 and more
MIN_RANK = 1.5  # of effective_rank: below, all that differs lies on one line
MIN_SAMPLES = 8  # fewer say nothing


def spread(features: Tensor) -> Tensor:
    """The standard deviation of vectors that were scaled to length 1: 1 = all directions, 0 = all the same.

    Args:
        features: (N, C).

    Returns:
        a scalar in [0, 1], float32: the root of the summed variances of the C channels. Vectors of zeros stay zeros, so
        a network that answers 0 to everything gets 0.

    Source: Chen and He, "Exploring simple siamese representation learning" (2021), figure 2, whose mean over channels
    is 1 / sqrt(C) where this is 1.
    """
    return F.normalize(features.float(), dim=1).var(dim=0, correction=0).sum().sqrt()


def effective_rank(features: Tensor) -> Tensor:
    """In how many directions vectors, scaled to length 1, differ from their mean.

    Args:
        features: (N, C).

    Returns:
        a scalar, float32: the exponential of the entropy of the singular values, from 1 (all on a line) to the smaller
        of C and N - 1.

    Source: Roy and Vetterli, "The effective rank" (2007); of features Garrido et al., "RankMe" (2023), who do not
    subtract the mean: then the direction that all share counts too.
    """
    unit = F.normalize(features.double(), dim=1)
    singular = torch.linalg.svdvals((unit - unit.mean(dim=0)).cpu())
    shares = singular / singular.sum().clamp(min=1e-300)
    return torch.special.entr(shares).sum().exp().float()


def warning(what: str, count: int, std: float, rank: float, min_std: float = MIN_STD) -> str | None:
    """What to tell the user about some vectors; None while all is well.

    Args:
        what: is looked at: "features", "embeddings", "features of level 2 of 4".
        count: number of vectors, each of another patch.
        std, rank: their `spread` and `effective_rank`.
        min_std: below, they are all the same.
    """
    if count < MIN_SAMPLES:
        return None
    advice = "Lower module.optimizer.lr, lengthen module.warmup_steps or use larger batches"
    if not math.isfinite(std) or std < min_std:
        return (
            f"the {what} have collapsed: those of {count} different patches differ by {std:.1e} of their length "
            f"(healthy: above {min_std}), so they are the same for every image. {advice}"
        )
    if rank < MIN_RANK:
        return (
            f"the {what} have collapsed onto a line: over {count} different patches their effective rank is {rank:.1f} "
            f"(healthy: above {MIN_RANK}), so they tell images apart in one way only. {advice}"
        )
    return None
