"""The 3D convolution of every network here: torch's, with the CPU's traps and shortcuts handled in one place."""

from __future__ import annotations

import torch
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

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, out_channels, X', Y', Z')."""
        if x.device.type != "cpu":
            return super().forward(x)
        if any(size < kernel for size, kernel in zip(x.shape[2:], self.kernel_size, strict=True)):
            bias = None if self.bias is None else self.bias.float()
            with torch.autocast("cpu", enabled=False):
                return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)
        if self.in_channels <= 2 * NARROW and self.out_channels <= NARROW:
            return super().forward(x.to(memory_format=torch.channels_last_3d)).contiguous()
        return super().forward(x)
