"""What the blocks of the Transformers share: attention with rotary positions, and stochastic depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]  # cosine and sine, (B or 1, 1, N, head_dim)
TEMPERATURE = 10_000.0  # of the rotary frequencies


def rotation_table(grid: Sequence[int], head_dim: int, device: torch.device | None = None) -> Rotation:
    """Axial rotary positions: a third of the channel pairs of a head turns with x, a third with y, a third with z.

    The pair (2i, 2i + 1) within the third of an axis turns by ``index / 10000 ** (i / (head_dim / 6))``.

    Args:
        grid: (3,) tokens along x, y, z.
        head_dim: a multiple of 6.
        device: of the result.

    Returns:
        cosine and sine, (1, 1, N, head_dim) float32 each.

    Source: Su et al., "RoFormer" (2021), eq. 34; per axis as in Fang et al., "EVA-02" (2023).
    """
    bands = head_dim // 6
    frequencies = TEMPERATURE ** (-torch.arange(bands, device=device, dtype=torch.float32) / bands)
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
    index = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3, 1)  # (N, 3, 1)
    angles = (index * frequencies).flatten(1).repeat_interleave(2, -1)[None, None]  # (1, 1, N, head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns the pairs of neighbouring channels of (B, heads, N, head_dim) by their positions; float32."""
    cosine, sine = rotation
    even, odd = x[..., ::2], x[..., 1::2]
    return x * cosine + torch.stack([-odd, even], -1).flatten(-2) * sine


def attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, rotation: Rotation | None, mask: Tensor | None
) -> Tensor:
    """Multi-head attention.

    Args:
        query, key, value: (B, N, C).
        heads: C is a multiple of it.
        rotation: of query and key, `rotation_table`; ``None`` = no rotary positions.
        mask: (B, 1, 1, N) bool, False = not attended to; ``None`` = everything is.

    Returns:
        (B, N, C).
    """
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))  # (B, heads, N, head_dim)
    if rotation is not None:
        q, k = rotate(q, rotation).to(v.dtype), rotate(k, rotation).to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class DropPath(nn.Module):
    """Stochastic depth: the branch of a residual block is left out for some samples, in training.

    Args:
        rate: share of samples without the branch, in [0, 1).

    Source: Huang et al., "Deep networks with stochastic depth" (2016).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C); the mean over draws is ``x``."""
        if not self.training or self.rate == 0.0:
            return x
        stays = torch.rand(len(x), 1, 1, device=x.device) >= self.rate  # a product: every parameter has a gradient
        return x * (stays / (1.0 - self.rate)).to(x.dtype)
