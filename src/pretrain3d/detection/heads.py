"""The convolutional heads of an anchor-based detector, and their outputs in the order of the anchors."""

from __future__ import annotations

from torch import Tensor, nn

from pretrain3d.backbones.convolution import Conv3d
from pretrain3d.detection.necks import num_groups

GROUP_CHANNELS = 16  # per group of a head's norms


class Head(nn.Module):
    """Convolutions with group norm and ReLU, then an output convolution; shared by all levels.

    All weights start at N(0, 0.01), biases at 0.
    """

    def __init__(self, in_channels: int, channels: int, num_convs: int, out_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(num_convs):
            layers += [
                Conv3d(channels if index else in_channels, channels, kernel_size=3, padding=1, bias=False),
                nn.GroupNorm(num_groups(channels, GROUP_CHANNELS), channels),
                nn.ReLU(inplace=True),
            ]
        self.hidden = nn.Sequential(*layers)
        self.output = Conv3d(channels if num_convs else in_channels, out_channels, kernel_size=3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        return self.output(self.hidden(features))


def per_anchor(output: Tensor, values: int) -> Tensor:
    """(B, A * values, X, Y, Z) -> (B, X * Y * Z * A, values)."""
    batch = len(output)
    return (
        output.flatten(2).view(batch, -1, values, output[0, 0].numel()).permute(0, 3, 1, 2).reshape(batch, -1, values)
    )
