"""The plain Vision Transformer over patches of a volume; `vit_b` is ViT-B."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain3d.backbones.attention import DropPath, Rotation, attend
from pretrain3d.backbones.tokens import TokenBackbone

NORM_EPS = 1e-6
MLP_RATIO = 4


class Block(nn.Module):
    """Attention and two-layer perceptron, each behind a norm."""

    def __init__(self, dim: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)
        self.drop_path = DropPath(drop_path)

    def outputs(self) -> tuple[nn.Linear, nn.Linear]:
        """The last matrix of each branch."""
        return self.proj, self.fc2

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None) -> Tensor:
        """(B, N, C) -> (B, N, C); see `attention.attend`."""
        query, key, value = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.drop_path(self.proj(attend(query, key, value, self.heads, rotation, mask)))
        return x + self.drop_path(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class ViT(TokenBackbone):
    """The encoder; fulfils `contract.Backbone`, see `tokens.TokenBackbone` for what ``keep`` does.

    Learned positions only, no class token, a final norm.

    Source: Dosovitskiy et al., "An image is worth 16x16 words" (2021). MONAI's ViT of the same name holds 28 M more
    parameters, cross-attention that is never used.
    """

    name = "vit"
    block = Block
    rotary = False


def vit_b(
    patch: int | tuple[int, int, int] = 16,
    image_size: int | tuple[int, int, int] = 160,
    in_channels: int = 1,
    drop_path: float = 0.0,
    checkpointing: bool = False,
) -> ViT:
    """12 blocks of width 768, 12 heads; 89.0 M parameters with patches of 16^3 at 160^3."""
    return ViT(768, 12, 12, patch, image_size, in_channels, drop_path, checkpointing)
