"""MONAI's ResNet and SegResNet as encoders. Weights keep MONAI's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from monai.networks.nets.resnet import ResNet as MonaiResNet
from monai.networks.nets.segresnet import SegResNet as MonaiSegResNet
from torch import Tensor, nn

from pretrain3d.backbones.contract import Level, Triple, check_image, check_more_than_a_voxel, check_sizes
from pretrain3d.backbones.convolution import Conv3d
from pretrain3d.config import UserError

GROUPS = 8  # of SegResNet's norms
EXPANSION = 4  # of a bottleneck's width to its output


def own_convolutions(module: nn.Module) -> nn.Module:
    """Makes every 3D convolution of a network compute as `convolution.Conv3d`; weights and results stay."""
    for part in module.modules():
        if type(part) is nn.Conv3d:
            part.__class__ = Conv3d
    return module


def instance_norms(module: nn.Module) -> None:
    """Puts an instance norm with learned scale and shift in place of every batch norm."""
    for name, part in module.named_children():
        if isinstance(part, nn.BatchNorm3d):
            setattr(module, name, nn.InstanceNorm3d(part.num_features, eps=part.eps, affine=True))
        else:
            instance_norms(part)


def strides(*values: int) -> tuple[Triple, ...]:
    """The same stride along each axis."""
    return tuple((value, value, value) for value in values)


class ResNet(nn.Module):
    """Bottleneck ResNet; five levels at strides 2 to 32; fulfils `contract.Backbone`. Hidden voxels are set to 0.

    Args:
        layers: bottlenecks of each of the four stages.
        widths: of the bottlenecks of each stage; a stage has four times as many channels.
        in_channels: of the image.
        norm: "instance", because batches of a few patches, partly hidden, make poor statistics; "batch" as in MONAI,
            which weights trained elsewhere need.

    Raises:
        UserError: lists of another length, or a size below 1.

    Source: He et al. (2016) in three dimensions, Hara et al., "Can spatiotemporal 3D CNNs retrace the history of 2D
    CNNs and ImageNet?" (2018).
    """

    runtime_arguments: frozenset[str] = frozenset()
    input_weights = ("conv1.weight",)

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        widths: Sequence[int] = (64, 128, 256, 512),
        in_channels: int = 1,
        norm: Literal["instance", "batch"] = "instance",
    ) -> None:
        super().__init__()
        if len(layers) != 4 or len(widths) != 4:
            raise UserError(f"resnet: layers and widths have one entry for each of 4 stages; got {layers} and {widths}")
        check_sizes("resnet", layers=layers, widths=widths)
        self.arguments = {"layers": list(layers), "widths": list(widths), "in_channels": in_channels, "norm": norm}
        self.in_channels = in_channels
        channels = (widths[0], *(EXPANSION * width for width in widths))
        self.levels = tuple(Level(c, s) for c, s in zip(channels, strides(2, 4, 8, 16, 32), strict=True))
        self.size_multiple: Triple = self.levels[-1].stride
        whole = MonaiResNet(
            "bottleneck",
            list(layers),
            list(widths),
            n_input_channels=in_channels,
            conv1_t_size=7,
            conv1_t_stride=2,
            bias_downsample=False,
            feed_forward=False,
        )
        if norm == "instance":
            instance_norms(whole)
        own_convolutions(whole)
        self.conv1, self.bn1, self.act, self.maxpool = whole.conv1, whole.bn1, whole.act, whole.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = whole.layer1, whole.layer2, whole.layer3, whole.layer4

    def forward(self, image: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        """See `contract.Backbone`.

        Raises:
            UserError: channels or size do not fit.
        """
        check_image(image, self.in_channels, self.size_multiple)
        check_more_than_a_voxel(image, self.size_multiple)
        if keep is not None:
            image = image.masked_fill(~keep, 0.0)
        x = self.act(self.bn1(self.conv1(image)))  # (B, c0, X / 2, Y / 2, Z / 2)
        features = [x]
        x = self.maxpool(x)
        for (layer,) in self.layers():
            x = layer(x)
            features.append(x)
        return features

    def layers(self) -> list[tuple[nn.Module, ...]]:
        """See `contract.Backbone`: the stages."""
        return [(self.layer1,), (self.layer2,), (self.layer3,), (self.layer4,)]


def resnet50(in_channels: int = 1, norm: Literal["instance", "batch"] = "instance") -> ResNet:
    """ResNet-50: stages of 3, 4, 6, 3 bottlenecks, 46.2 M parameters."""
    return ResNet((3, 4, 6, 3), (64, 128, 256, 512), in_channels, norm)


class SegResNet(nn.Module):
    """The encoder of SegResNet; fulfils `contract.Backbone`. Hidden voxels are set to 0.

    Args:
        filters: channels at the resolution of the image, a multiple of 8; they double from level to level.
        blocks: residual blocks of each level.
        in_channels: of the image.

    Raises:
        UserError: filters that the norms' groups do not divide, no blocks, or a number of them below 1.

    Source: Myronenko, "3D MRI brain tumor segmentation using autoencoder regularization" (2018).
    """

    runtime_arguments: frozenset[str] = frozenset()
    input_weights = ("convInit.conv.weight",)

    def __init__(self, filters: int = 16, blocks: Sequence[int] = (1, 2, 2, 4), in_channels: int = 1) -> None:
        super().__init__()
        if filters < GROUPS or filters % GROUPS:
            raise UserError(f"segresnet: filters is {filters}; it must be a multiple of {GROUPS}")
        check_sizes("segresnet", blocks=blocks)
        self.arguments = {"filters": filters, "blocks": list(blocks), "in_channels": in_channels}
        self.in_channels = in_channels
        steps = [2**level for level in range(len(blocks))]
        self.levels = tuple(Level(filters * step, s) for step, s in zip(steps, strides(*steps), strict=True))
        self.size_multiple: Triple = self.levels[-1].stride
        whole = MonaiSegResNet(
            init_filters=filters,
            in_channels=in_channels,
            norm=("GROUP", {"num_groups": GROUPS}),
            blocks_down=tuple(blocks),
            blocks_up=(),
        )
        own_convolutions(whole)
        self.convInit, self.down_layers = whole.convInit, whole.down_layers  # MONAI's names

    def forward(self, image: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        """See `contract.Backbone`.

        Raises:
            UserError: channels or size do not fit.
        """
        check_image(image, self.in_channels, self.size_multiple)
        if keep is not None:
            image = image.masked_fill(~keep, 0.0)
        x = self.convInit(image)  # (B, filters, X, Y, Z)
        features = []
        for layer in self.down_layers:
            x = layer(x)
            features.append(x)
        return features

    def layers(self) -> list[tuple[nn.Module, ...]]:
        """See `contract.Backbone`: the levels."""
        return [(layer,) for layer in self.down_layers]
