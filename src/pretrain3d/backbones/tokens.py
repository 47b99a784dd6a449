"""Transformers over the tokens of a volume: what Primus and the plain ViT share.

One token is one patch of voxels. Tokens are always ordered as a flattened (x, y, z) grid, z fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain3d.backbones.attention import rotation_table
from pretrain3d.backbones.contract import Level, Triple, check_drop_path, check_image, check_sizes, triple
from pretrain3d.config import UserError, by_text
from pretrain3d.sparse import visible_cells


class PatchEmbedding(nn.Module):
    """Each patch of voxels to one vector; the weight is that of a convolution whose kernel is its stride.

    Computed as one matrix product, which is fast everywhere; the backward pass of such convolutions is not.
    """

    def __init__(self, in_channels: int, dim: int, patch: Triple) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, in_channels, *patch))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.trunc_normal_(self.weight, std=self.weight[0].numel() ** -0.5)

    def forward(self, image: Tensor) -> Tensor:
        """(B, in_channels, X, Y, Z) -> (B, dim, X / patch x, Y / patch y, Z / patch z)."""
        px, py, pz = self.weight.shape[2:]
        cells = (
            image.unflatten(4, (-1, pz)).unflatten(3, (-1, py)).unflatten(2, (-1, px))
        )  # (B, C, x, px, y, py, z, pz)
        cells = cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # (B, x, y, z, C px py pz)
        return F.linear(cells, self.weight.flatten(1), self.bias).movedim(-1, 1)


class TokenStack(nn.Module):
    """Learned positions, Transformer blocks and a final norm.

    Args:
        blocks: each is called as ``block(tokens (B, N, C), rotation, mask)``, see `attention.attend`.
        dim: C.
        grid: (3,) tokens along x, y, z that the learned positions are made for; other grids interpolate them.
        head_dim: of the rotary positions; ``None`` = only the learned ones.
        checkpointing: recompute activations in the backward pass: less memory, about a third more time.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], dim: int, grid: Triple, head_dim: int | None, checkpointing: bool
    ) -> None:
        super().__init__()
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim, *grid), std=0.02))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.head_dim = head_dim
        self.checkpointing = checkpointing

    def forward(self, grid: Tensor, index: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Positions are added to all tokens; those of ``index`` alone go through the blocks.

        Args:
            grid: (B, C, x, y, z), the tokens at their places.
            index: (B, K), which tokens; ``None`` = all.
            valid: (B, K) bool, False = a filler that no token attends to; ``None`` = there is none.

        Returns:
            (B, K, C).
        """
        shape = grid.shape[2:]
        tokens = (grid + self._positions(shape)).flatten(2).transpose(1, 2)  # (B, N, C)
        rotation = None
        if self.head_dim is not None:
            rotation = rotation_table(shape, self.head_dim, grid.device)
        if index is not None:
            tokens = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))  # (B, K, C)
            if rotation is not None:
                rotation = rotation[0][0, 0][index][:, None], rotation[1][0, 0][index][:, None]
        mask = None if valid is None else valid[:, None, None]
        recompute = self.checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                tokens = checkpoint(block, tokens, rotation, mask, use_reentrant=False)
            else:
                tokens = block(tokens, rotation, mask)
        return self.norm(tokens)

    def _positions(self, shape: torch.Size) -> Tensor:
        if self.positions.shape[1:] == shape:
            return self.positions
        return F.interpolate(self.positions[None], size=shape, mode="trilinear", align_corners=False)[0]


def visible_first(visible: Tensor, num_visible: int | None = None) -> tuple[Tensor, Tensor | None]:
    """The places of the visible tokens.

    Args:
        visible: (B, N) bool.
        num_visible: how many are visible in every sample, where the caller knows: nothing waits for the device.

    Returns:
        index (B, K) in rising order, K = the most visible tokens of a sample, at least 1; and valid (B, K) bool, False
        where a sample with fewer is filled up with hidden ones, ``None`` when none is.
    """
    order = (~visible).byte().argsort(dim=1, stable=True)
    if num_visible is not None:
        assert visible.device.type != "cpu" or visible.sum(1).eq(num_visible).all(), (num_visible, visible.sum(1))
        return order[:, :num_visible], None
    counts = visible.sum(1)
    numbers = counts.tolist()
    most = max(1, *numbers)
    filled = torch.arange(most, device=visible.device) < counts[:, None]
    return order[:, :most], None if min(numbers) == most else filled


class TokenBackbone(nn.Module):
    """An embedding of patches and a `TokenStack`; fulfils `contract.Backbone` with one level, the final tokens.

    Hidden voxels are 0, and a token without a visible voxel is dropped: it costs nothing, and its place in the output
    is 0.

    A subclass says which blocks it is made of: ``name`` for errors, ``block(dim, heads, drop_path)``, and ``rotary``,
    whether attention turns queries and keys by their positions.

    Args:
        embed_dim: C, a multiple of ``heads``, with rotary positions of 6 times ``heads``.
        depth: number of blocks.
        heads: of the attention.
        patch: voxels of a token, one number or one per axis.
        image_size: voxels that the learned positions are made for, one number or one per axis; images of another size
            interpolate them. Best the patch size of the pretraining.
        in_channels: of the image.
        drop_path: rate of stochastic depth at the last block, rising linearly from 0 at the first.
        checkpointing: recompute activations in the backward pass: less memory, about a third more time.

    Raises:
        UserError: a size below 1, a drop_path outside [0, 1), a width that the heads do not divide, or an image size
            that is no multiple of the patch.
    """

    name: str
    block: Callable[[int, int, float], nn.Module]
    rotary: bool

    runtime_arguments = frozenset({"drop_path", "checkpointing"})
    input_weights = ("embedding.weight",)
    position_weights = ("encoder.positions",)  # learned for the grid of image_size

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        heads: int,
        patch: int | tuple[int, int, int] = 8,
        image_size: int | tuple[int, int, int] = 160,
        in_channels: int = 1,
        drop_path: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        check_sizes(self.name, embed_dim=embed_dim, depth=depth, heads=heads, patch=patch, image_size=image_size)
        check_drop_path(self.name, drop_path)
        unit = heads * (6 if self.rotary else 1)
        if embed_dim % unit:
            raise UserError(
                f"{self.name}: embed_dim is {embed_dim}; with {heads} heads it must be a multiple of {unit}"
            )
        super().__init__()
        self.in_channels = in_channels
        self.patch, size = triple(patch), triple(image_size)
        self.arguments: dict[str, Any] = {
            "embed_dim": embed_dim,
            "depth": depth,
            "heads": heads,
            "patch": list(self.patch),
            "image_size": list(size),
            "in_channels": in_channels,
            "drop_path": drop_path,
            "checkpointing": checkpointing,
        }
        if any(s % p for s, p in zip(size, self.patch, strict=True)):
            raise UserError(f"image_size is {by_text(size)}; it must be a multiple of the patch, {by_text(self.patch)}")
        self.grid: Triple = (size[0] // self.patch[0], size[1] // self.patch[1], size[2] // self.patch[2])
        self.size_multiple = self.patch
        self.levels = (Level(embed_dim, self.patch, tokens=True),)
        self.embedding = PatchEmbedding(in_channels, embed_dim, self.patch)
        self.encoder = self.make_stack(depth, drop_path)

    def make_stack(self, depth: int, drop_path: float = 0.0) -> TokenStack:
        """A new stack of this backbone's kind of blocks, width and grid, with positions of its own: a decoder's too."""
        dim, heads = self.arguments["embed_dim"], self.arguments["heads"]
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        blocks = [type(self).block(dim, heads, rate) for rate in rates]
        rotary_dim = dim // heads if self.rotary else None
        return initialise(TokenStack(blocks, dim, self.grid, rotary_dim, self.arguments["checkpointing"]))

    def embed(self, image: Tensor) -> Tensor:
        """The patches as vectors, without positions: (B, in_channels, X, Y, Z) -> (B, C, x, y, z).

        Raises:
            UserError: channels or size do not fit.
        """
        check_image(image, self.in_channels, self.size_multiple)
        return self.embedding(image)

    def encode(self, embedded: Tensor) -> list[Tensor]:
        """From what `embed` returns, changed or not, to the features: (B, C, x, y, z) -> [(B, C, x, y, z)]."""
        return [self._as_grid(self.encoder(embedded), embedded)]

    def forward(self, image: Tensor, keep: Tensor | None = None, num_visible: int | None = None) -> list[Tensor]:
        """See `contract.Backbone`.

        Args:
            image: (B, C, X, Y, Z).
            keep: (B, 1, X, Y, Z) bool, False = hidden.
            num_visible: tokens with a visible voxel, the same number in every sample, where the caller knows it.

        Raises:
            UserError: channels or size do not fit.
        """
        if keep is None:
            return self.encode(self.embed(image))
        embedded = self.embed(image.masked_fill(~keep, 0.0))  # not a product: a hidden NaN stays hidden
        visible = visible_cells(keep, self.patch).flatten(1)  # (B, N)
        index, valid = visible_first(visible, num_visible)
        attended = valid
        if valid is not None:  # a sample of which nothing is visible: attention over nothing is NaN
            attended = valid | (torch.arange(valid.shape[1], device=valid.device) == 0)
        tokens = self.encoder(embedded, index, attended)  # (B, K, C)
        shown = visible.gather(1, index)[..., None]
        places = tokens.new_zeros(len(tokens), visible.shape[1], tokens.shape[2])
        places = places.scatter(1, index[..., None].expand_as(tokens), tokens.masked_fill(~shown, 0.0))
        return [self._as_grid(places, embedded)]

    def layers(self) -> list[tuple[nn.Module, ...]]:
        """See `contract.Backbone`: the blocks; the final norm belongs to the last one."""
        *blocks, last = self.encoder.blocks
        return [*((block,) for block in blocks), (last, self.encoder.norm)]

    @staticmethod
    def _as_grid(tokens: Tensor, like: Tensor) -> Tensor:
        """(B, N, C) -> (B, C, x, y, z), contiguous for the convolutions that follow."""
        return tokens.transpose(1, 2).contiguous().view(len(tokens), -1, *like.shape[2:])


def initialise(stack: TokenStack) -> TokenStack:
    """Truncated normals of 0.02 and zero biases; the output matrices of block i are divided by sqrt(2 i), i from 1.

    Source: Fang et al., "EVA-02" (2023); Bao et al., "BEiT" (2022), section 2.5.
    """
    for module in stack.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    block: Any
    for number, block in enumerate(stack.blocks, start=1):
        for output in block.outputs():
            output.weight.data.div_((2.0 * number) ** 0.5)
    return stack
