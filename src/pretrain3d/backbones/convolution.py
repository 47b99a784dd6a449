"""The 3D convolution of every network here: torch's, with the CPU's traps and shortcuts handled in one place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NARROW = 8  # channels


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d`: the same arguments, weights and result.

    On a CPU two shapes of convolution are computed another way:

    - An axis shorter than the kernel, in bfloat16: oneDNN 3.12 (torch 2.13) leaves those planes of the kernel's
      gradient uninitialised that touch only padding, and training ends in NaN. Such convolutions run in float32.
    - At most 8 output from at most 16 input channels: 1.5 to 3 times faster channels-last, forward and backward. Wider
      convolutions and the norms around them do not gain, so the result is contiguous again.
    """

    def forward(self, x: Tensor, flat: int | None = None) -> Tensor:
        """(B, C, X, Y, Z) -> (B, out_channels, X', Y', Z').

        Args:
            x: the image.
            flat: spatial axis of size 1 along which the image is constant: see `slice_axis`.
        """
        if flat is not None:
            return self._constant_along(x, flat)
        if x.device.type != "cpu":
            return super().forward(x)
        if any(size < kernel for size, kernel in zip(x.shape[2:], self.kernel_size, strict=True)):
            bias = None if self.bias is None else self.bias.float()
            with torch.autocast("cpu", enabled=False):
                return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)
        if self.in_channels <= 2 * NARROW and self.out_channels <= NARROW:
            return super().forward(x.to(memory_format=torch.channels_last_3d)).contiguous()
        return super().forward(x)

    def _constant_along(self, x: Tensor, axis: int) -> Tensor:
        """What the convolution gives for an endless stack of the same slice: in two dimensions, its kernel summed."""
        across = [other for other in range(3) if other != axis]
        kernel, bias = self.weight.sum(axis + 2), self.bias  # (out, in / groups, k, k)
        stride, padding, dilation = (
            [int(values[a]) for a in across] for values in (self.stride, self.padding, self.dilation)
        )
        plane = x.squeeze(axis + 2)  # (B, C, U, V)
        if x.device.type == "cpu" and any(size < k for size, k in zip(plane.shape[2:], kernel.shape[2:], strict=True)):
            with torch.autocast("cpu", enabled=False):  # see above
                plane = F.conv2d(plane.float(), kernel, bias, stride, padding, dilation, self.groups).to(x.dtype)
        else:
            plane = F.conv2d(plane, kernel, bias, stride, padding, dilation, self.groups)
        return plane.unsqueeze(axis + 2)


def slice_axis(image: Tensor) -> int | None:
    """The spatial axis along which (B, C, X, Y, Z) is a single slice; ``None`` for a volume.

    A slice stands for an endless stack of copies of itself. A kernel then acts by its sum over that axis, a stride and
    a pooling along it do nothing, and the same 3D weights serve slices and volumes. (Zeros around the slice would let
    it see only the central plane of every kernel.)
    """
    return next((axis for axis, size in enumerate(image.shape[2:]) if size == 1), None)


def without(stride: Sequence[int], flat: int | None) -> tuple[int, int, int]:
    """``stride`` (3,), with 1 along ``flat``."""
    x, y, z = (1 if axis == flat else int(step) for axis, step in enumerate(stride))
    return x, y, z
