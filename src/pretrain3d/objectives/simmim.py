"""SimMIM: replace hidden patches by a learned token after the patch embedding, predict their intensities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain3d.config import UserError
from pretrain3d.objectives.contract import Decoder, Embedding, PyramidLevel
from pretrain3d.objectives.hidden import HiddenBlocks
from pretrain3d.sparse import visible_cells

ERRORS = {"l1": torch.abs, "l2": torch.square}


class SimMIM(HiddenBlocks):
    """All tokens are encoded, the hidden ones as one learned token at their positions; a light head predicts the image.

    Args:
        levels, in_channels, patch_size, decoder: see `contract.Method`; the backbone has ``embed`` and ``encode``
            (Primus, ViT, Swin).
        ratio: share of blocks that are hidden, in (0, 1).
        block: side of a block in voxels, (3,) or one number, a multiple of the patches that are embedded; ``None`` =
            one token on a Transformer of one level, else `masking.block_size` of the patch.
        error: "l1" or "l2", of the normalised intensities.

    Raises:
        UserError: a mask that hides nothing or everything, or cuts tokens.

    Source: Xie et al., "SimMIM" (2022), section 3: L1, ratio 0.6, block of 32 pixels. The reference code for volumes
    has L2, ratio 0.75 and one token (8^3 voxels) per block. As there, the head is transposed convolutions; the paper
    has a linear one. Unlike both, voxels outside the volume do not count.
    """

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        in_channels: int,
        patch_size: Sequence[int],
        decoder: Decoder,
        ratio: float = 0.6,
        block: int | tuple[int, int, int] | None = None,
        error: Literal["l1", "l2"] = "l1",
    ) -> None:
        stride = levels[0].stride
        super().__init__("simmim", patch_size, ratio, stride if block is None and levels[0].tokens else block)
        self.stride = stride
        if any(side % token for side, token in zip(self.block, self.stride, strict=True)):
            raise UserError(f"simmim: block is {self.block}; it must be a multiple of a token, {self.stride}")
        self.error = ERRORS[error]
        self.measure = {"l1": "mean absolute error", "l2": "mean squared error"}[error]  # see `contract.Method`
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(levels[0].channels), std=0.02))
        self.decoder = decoder(levels, in_channels)

    @staticmethod
    def check_backbone(backbone: Any) -> None:
        """See `contract.Method`."""
        if not (hasattr(backbone, "embed") and hasattr(backbone, "encode")):
            raise UserError(
                f"module.method simmim replaces embedded patches and a {type(backbone).__name__} has none; "
                "take backbone=primus_m, vit_b or swin, or module.method.name=mae"
            )

    def forward(self, backbone: Embedding, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns: ``reconstruction`` (B, C, X, Y, Z), in normalised intensities."""
        keep = prepared["keep"]
        # masked before the embedding too: a hidden NaN would reach the gradient of its weight
        embedded = backbone.embed(prepared["inputs"].masked_fill(~keep, 0.0))  # (B, C, x, y, z)
        shown = visible_cells(keep, self.stride)  # (B, 1, x, y, z)
        embedded = torch.where(shown, embedded, self.mask_token.view(1, -1, 1, 1, 1))
        return {"reconstruction": self.decoder(backbone.encode(embedded))[0]}
