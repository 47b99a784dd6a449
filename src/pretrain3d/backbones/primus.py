"""Primus: a Transformer over patches of 8^3 voxels with rotary positions; `primus_m` is the released Primus-M."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain3d.backbones.attention import DropPath, Rotation, attend
from pretrain3d.backbones.tokens import TokenBackbone

NORM_EPS = 1e-5  # as the released networks
LAYER_SCALE = 0.1


class Attention(nn.Module):
    """Self-attention with rotary positions, no bias of the keys, and a norm before the output projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None) -> Tensor:
        """(B, N, C) -> (B, N, C); see `attention.attend`."""
        x = attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, rotation, mask)
        return self.proj(self.norm(x))


class SwiGLU(nn.Module):
    """Gated linear unit of 8/3 the width, with a norm before the output projection. Source: Shazeer (2020)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim * 8 // 3
        self.fc1_g = nn.Linear(dim, hidden)
        self.fc1_x = nn.Linear(dim, hidden)
        self.norm = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.fc2(self.norm(F.silu(self.fc1_g(x)) * self.fc1_x(x)))


class Block(nn.Module):
    """Attention and gated unit, each behind a norm and scaled per channel before it is added."""

    def __init__(self, dim: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, heads)
        self.gamma_1 = nn.Parameter(torch.full((dim,), LAYER_SCALE))
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = SwiGLU(dim)
        self.gamma_2 = nn.Parameter(torch.full((dim,), LAYER_SCALE))
        self.drop_path = DropPath(drop_path)

    def outputs(self) -> tuple[nn.Linear, nn.Linear]:
        """The last matrix of each branch."""
        return self.attn.proj, self.mlp.fc2

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None) -> Tensor:
        """(B, N, C) -> (B, N, C); see `attention.attend`."""
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), rotation, mask))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class Primus(TokenBackbone):
    """The encoder; fulfils `contract.Backbone`, see `tokens.TokenBackbone` for what ``keep`` does.

    Source: Wald et al., "Primus: Enforcing attention usage for 3D medical image segmentation" (2025); the blocks are
    those of Fang et al., "EVA-02" (2023). The order of tokens is x, y, z; released files have another, see
    `checkpoints.released_primus`.
    """

    name = "primus"
    block = Block
    rotary = True


Size = int | tuple[int, int, int]


def primus_s(
    image_size: Size = 160, in_channels: int = 1, drop_path: float = 0.0, checkpointing: bool = False
) -> Primus:
    """12 blocks of width 396, 6 heads; 26,268,285 parameters with its decoder at 160^3."""
    return Primus(396, 12, 6, 8, image_size, in_channels, drop_path, checkpointing)


def primus_b(
    image_size: Size = 160, in_channels: int = 1, drop_path: float = 0.0, checkpointing: bool = False
) -> Primus:
    """12 blocks of width 792, 12 heads; 97,958,065 parameters with its decoder at 160^3."""
    return Primus(792, 12, 12, 8, image_size, in_channels, drop_path, checkpointing)


def primus_m(
    image_size: Size = 160, in_channels: int = 1, drop_path: float = 0.0, checkpointing: bool = False
) -> Primus:
    """16 blocks of width 864, 12 heads; 151,786,529 parameters with its decoder at 160^3."""
    return Primus(864, 16, 12, 8, image_size, in_channels, drop_path, checkpointing)


def primus_l(
    image_size: Size = 160, in_channels: int = 1, drop_path: float = 0.0, checkpointing: bool = False
) -> Primus:
    """24 blocks of width 1056, 16 heads; 331,823,761 parameters with its decoder at 160^3."""
    return Primus(1056, 24, 16, 8, image_size, in_channels, drop_path, checkpointing)
