"""Masked autoencoder: hide blocks of the image, predict their intensities from what is visible."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pretrain3d.config import UserError
from pretrain3d.objectives.contract import Backbone, Decoder, PyramidLevel
from pretrain3d.objectives.hidden import HiddenBlocks
from pretrain3d.objectives.masking import hidden_cells
from pretrain3d.sparse import visible_cells


class MAE(HiddenBlocks):
    """Hidden blocks are not used by the backbone; a decoder predicts the normalised intensities there.

    On a pyramid of convolutions they are 0 in the input, and a U-Net decoder follows. On a Transformer only the visible
    tokens are encoded; a learned token takes the hidden places, and a light decoder of the backbone's kind of blocks
    looks at all of them.

    Args:
        levels, in_channels, patch_size, decoder: see `contract.Method`.
        ratio: share of blocks that are hidden, in (0, 1).
        block: side of a block in voxels, (3,) or one number; ``None`` = one token on a Transformer, else
            `masking.block_size` of the patch.
        decoder_blocks: Transformer blocks of the decoder, ``None`` = 2; only for Transformers.

    Raises:
        UserError: a mask that hides nothing or everything, or decoder blocks for a backbone that has none.

    Source: He et al., "Masked autoencoders are scalable vision learners" (2022); on ResEnc-L Wald et al., "Revisiting
    MAE pre-training for 3D medical image segmentation" (2024), on Primus Wald et al., "An OpenMind for 3D medical
    vision" (2024). The target is the intensity itself, without normalisation per block. Unlike the reference code,
    voxels outside the volume do not count, and on a Transformer the loss is over the hidden voxels (there the mask of
    the loss has its first two axes exchanged).
    """

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        in_channels: int,
        patch_size: Sequence[int],
        decoder: Decoder,
        ratio: float = 0.75,
        block: int | tuple[int, int, int] | None = None,
        decoder_blocks: int | None = None,
    ) -> None:
        stride, tokens = levels[0].stride, levels[0].tokens
        if decoder_blocks is not None and not (tokens and decoder_blocks >= 0):
            raise UserError(f"mae: decoder_blocks is {decoder_blocks}; it is null, or 0 or more for a Transformer")
        super().__init__("mae", patch_size, ratio, stride if block is None and tokens else block)
        self.tokens, self.stride = tokens, stride
        self.num_visible: int | None = None
        if self.tokens:
            self.num_visible = visible_tokens(patch_size, self.block, self.stride, ratio)
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(levels[0].channels), std=0.02))
            self.decoder = decoder(levels, in_channels, 2 if decoder_blocks is None else decoder_blocks)
        else:
            self.decoder = decoder(levels, in_channels)

    def forward(self, backbone: Backbone, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns: ``reconstruction`` (B, C, X, Y, Z), in normalised intensities."""
        if not self.tokens:
            features = backbone(prepared["inputs"], prepared["keep"])
            return {"reconstruction": self.decoder(features)[0]}
        seen = backbone(prepared["inputs"], prepared["keep"], self.num_visible)[0]  # (B, C, x, y, z), 0 where hidden
        shown = visible_cells(prepared["keep"], self.stride)  # (B, 1, x, y, z)
        filled = torch.where(shown, seen, self.mask_token.view(1, -1, 1, 1, 1))
        return {"reconstruction": self.decoder([filled])[0]}


def visible_tokens(patch_size: Sequence[int], block: Sequence[int], stride: Sequence[int], ratio: float) -> int | None:
    """Tokens with a visible voxel, where every mask leaves the same number; else ``None``.

    Args:
        patch_size, block, stride: (3,) voxels of the patch, of a mask block and of a token.
        ratio: share of blocks that are hidden.
    """
    even = all(p % b == 0 and b % s == 0 for p, b, s in zip(patch_size, block, stride, strict=True))
    if not even:
        return None
    num_cells = math.prod(p // b for p, b in zip(patch_size, block, strict=True))
    return (num_cells - hidden_cells(num_cells, ratio)) * math.prod(b // s for b, s in zip(block, stride, strict=True))
