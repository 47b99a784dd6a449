"""MONAI's Swin Transformer, the encoder of SwinUNETR. Weights keep MONAI's names."""

from __future__ import annotations

import torch
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

from pretrain3d.backbones.contract import Level, check_drop_path, check_image, check_sizes
from pretrain3d.backbones.monai_encoders import own_convolutions, strides
from pretrain3d.config import UserError

STAGES = (1, 2, 3, 4)
HEADS = (3, 6, 12, 24)
PATCH = 2  # voxels of an embedded patch


class Swin(nn.Module):
    """Five levels at strides 2 to 32, the first of them the embedded patches; fulfils `contract.Backbone`.

    Hidden voxels are set to 0. Windows need a whole grid, so no token is dropped.

    Args:
        feature_size: channels of the finest level, a multiple of 12; they double from level to level. Published sizes
            are 24, 48 and 96.
        depths: blocks of each of the four stages.
        window: side of an attention window in tokens.
        v2: a residual block of convolutions before each stage, as in the released VoCo and SwinUNETR-V2 weights.
        in_channels: of the image.
        drop_path: rate of stochastic depth at the last block, rising linearly from 0 at the first.
        checkpointing: recompute activations in the backward pass: less memory, about a third more time.

    Raises:
        UserError: a feature size that the heads do not divide, a size below 1, or a drop_path outside [0, 1).

    Source: Hatamizadeh et al., "Swin UNETR" (2022); He et al., "SwinUNETR-V2" (2023). The outputs are normalised over
    their channels without learned parameters, as there.
    """

    runtime_arguments = frozenset({"drop_path", "checkpointing"})
    input_weights = ("swinViT.patch_embed.proj.weight",)

    def __init__(
        self,
        feature_size: int = 48,
        depths: tuple[int, int, int, int] = (2, 2, 2, 2),
        window: int = 7,
        v2: bool = True,
        in_channels: int = 1,
        drop_path: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if feature_size < 12 or feature_size % 12:
            raise UserError(f"swin: feature_size is {feature_size}; it must be a multiple of 12, usually 24, 48 or 96")
        check_sizes("swin", depths=depths, window=window)
        check_drop_path("swin", drop_path)
        self.arguments = {
            "feature_size": feature_size,
            "depths": list(depths),
            "window": window,
            "v2": v2,
            "in_channels": in_channels,
            "drop_path": drop_path,
            "checkpointing": checkpointing,
        }
        self.in_channels = in_channels
        self.checkpointing = checkpointing
        self.levels = tuple(Level(feature_size * s[0] // PATCH, s) for s in strides(2, 4, 8, 16, 32))
        self.size_multiple = self.levels[-1].stride
        device = torch.get_default_device()
        with torch.device("cpu"):  # MONAI reads numbers from tensors as it builds, which the meta device has not
            self.swinViT = SwinTransformer(
                in_chans=in_channels,
                embed_dim=feature_size,
                window_size=(window,) * 3,
                patch_size=(PATCH,) * 3,
                depths=depths,
                num_heads=HEADS,
                drop_path_rate=drop_path,
                use_checkpoint=checkpointing,
                use_v2=v2,
            )
        own_convolutions(self.swinViT).to(device)

    def embed(self, image: Tensor) -> Tensor:
        """The patches as vectors: (B, in_channels, X, Y, Z) -> (B, C, X / 2, Y / 2, Z / 2).

        Raises:
            UserError: channels or size do not fit.
        """
        check_image(image, self.in_channels, self.size_multiple)
        return self.swinViT.patch_embed(image)

    def encode(self, embedded: Tensor) -> list[Tensor]:
        """From what `embed` returns, changed or not, to the features, finest first."""
        net = self.swinViT
        x = embedded
        features = [net.proj_out(x, normalize=True)]
        for stage in self.layers():
            for part in stage:
                x = part(x.contiguous())  # (B, 2 C, x / 2, y / 2, z / 2) after the last one
            features.append(net.proj_out(x, normalize=True))
        return features

    def layers(self) -> list[tuple[nn.Module, ...]]:
        """See `contract.Backbone`: the stages, in version 2 each with the convolutions before it."""
        kinds = ("layers{}c.0", "layers{}.0") if self.swinViT.use_v2 else ("layers{}.0",)
        return [tuple(self.swinViT.get_submodule(kind.format(stage)) for kind in kinds) for stage in STAGES]

    def forward(self, image: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        """See `contract.Backbone`.

        Raises:
            UserError: channels or size do not fit.
        """
        if keep is not None:
            image = image.masked_fill(~keep, 0.0)
        return self.encode(self.embed(image))
