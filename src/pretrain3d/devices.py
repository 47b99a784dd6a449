"""What of a device decides about a run: its memory, the precision of its arithmetic, and the way to it."""

from __future__ import annotations

import os

import torch
from torch import Tensor

GIB = 2**30


def device_memory_gb() -> tuple[float, str]:
    """GiB of the GPU, or of the machine where there is none; and which."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB, torch.cuda.get_device_name(0)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, "this machine, which has no GPU"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, which nothing waits for.

    What lies in memory that is not pinned CUDA copies, from 64 KB on, after all else that the device has to do, and the
    host waits for that.
    """
    if device.type not in ("cpu", "mps"):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def is_full_precision(precision: object) -> bool:
    """Whether Lightning's name of a precision is one of float32's."""
    return str(precision) in ("32-true", "32", "None")
