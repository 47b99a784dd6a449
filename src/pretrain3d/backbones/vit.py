"""The plain Vision Transformer over patches of a volume; `vit_b` is ViT-B."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain3d.backbones.tokens import (
    DropPath,
    Rotation,
    TokenBackbone,
    TokenStack,
    attend,
    check_heads,
    initialise,
    triple,
)

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
        """(B, N, C) -> (B, N, C); see `tokens.attend`."""
        query, key, value = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.drop_path(self.proj(attend(query, key, value, self.heads, rotation, mask)))
        return x + self.drop_path(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class ViT(TokenBackbone):
    """The encoder; fulfils `contract.Backbone`, see `tokens.TokenBackbone` for what ``keep`` does.

    Learned positions only, no class token, a final norm.

    Args:
        embed_dim: C, a multiple of ``heads``.
        depth: number of blocks.
        heads: of the attention.
        patch: voxels of a token, one number or one per axis.
        image_size: voxels that the learned positions are made for, one number or one per axis; images of another size
            interpolate them. Best the patch size of the pretraining.
        in_channels: of the image.
        drop_path: rate of stochastic depth at the last block, rising linearly from 0 at the first.
        checkpointing: recompute activations in the backward pass: less memory, about a third more time.

    Raises:
        UserError: a width that the heads do not divide, or an image size that is no multiple of the patch.

    Source: Dosovitskiy et al., "An image is worth 16x16 words" (2021). MONAI's ViT of the same name holds 28 M more
    parameters, cross-attention that is never used.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        heads: int,
        patch: int | tuple[int, int, int] = 16,
        image_size: int | tuple[int, int, int] = 160,
        in_channels: int = 1,
        drop_path: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        check_heads("vit", embed_dim, heads, 1)
        super().__init__(
            {
                "embed_dim": embed_dim,
                "depth": depth,
                "heads": heads,
                "patch": list(triple(patch)),
                "image_size": list(triple(image_size)),
                "in_channels": in_channels,
                "drop_path": drop_path,
                "checkpointing": checkpointing,
            }
        )

    def make_stack(self, depth: int, drop_path: float = 0.0) -> TokenStack:
        """See `tokens.TokenBackbone.make_stack`."""
        dim, heads = self.arguments["embed_dim"], self.arguments["heads"]
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        blocks = [Block(dim, heads, rate) for rate in rates]
        return initialise(TokenStack(blocks, dim, self.grid, None, self.arguments["checkpointing"]))


def vit_b(
    patch: int | tuple[int, int, int] = 16,
    image_size: int | tuple[int, int, int] = 160,
    in_channels: int = 1,
    drop_path: float = 0.0,
    checkpointing: bool = False,
) -> ViT:
    """12 blocks of width 768, 12 heads; 89.0 M parameters with patches of 16^3 at 160^3."""
    return ViT(768, 12, 12, patch, image_size, in_channels, drop_path, checkpointing)
