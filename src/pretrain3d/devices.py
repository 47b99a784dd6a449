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


def computes_in(precision: str, device_type: str) -> bool:
    """Whether a device has the arithmetic of a precision, "32", "bf16" or "fp16"; all but CPUs are taken to.

    A CPU without it imitates it, 20 to 50 times slower than float32: all of them fp16; bf16 x86 before AVX-512, and Arm
    before its own extension.
    """
    return device_type != "cpu" or precision == "32" or (precision == "bf16" and cpu_has_bf16())


def cpu_has_bf16() -> bool:
    """Whether convolutions in bf16 are done by oneDNN here, not by PyTorch's loops."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def short_precision(precision: object) -> str:
    """Lightning's name of a precision as "32", "bf16" or "fp16"."""
    name = str(precision)
    return "bf16" if "bf16" in name else "fp16" if name.startswith("16") else "32"
