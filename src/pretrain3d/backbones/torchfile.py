"""Files of torch.save, read without running what they name."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain3d.config import UserError


def read_torch(path: Path, name: str | Path | None = None, mmap: bool = False) -> Any:
    """What a file of torch.save holds, on the CPU: tensors, plain values and single numbers of numpy.

    Args:
        path: the file.
        name: what an error calls it; default: the path.
        mmap: leaves the tensors on the disk.

    Raises:
        UserError: it is something else, is damaged, or would run code.
    """
    name = path if name is None else name
    try:
        with torch.serialization.safe_globals(_numbers()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what a damaged or foreign file makes the unpickler raise has no common class
        code = re.search(r"GLOBAL ([\w.]+)|got <class '([\w.]+)'>", str(error))
        if code and _is_pickled(path):  # a text's first letter may be the unpickler's command, too
            raise UserError(
                f"{name} is refused: reading it would run code that it names ({code[1] or code[2]}); save its tensors "
                "and plain values alone, where you trust it"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if not isinstance(error, OSError | MemoryError) and not zipfile.is_zipfile(path):
            reason = "it is of another kind, or was cut short"  # an unpickler's word for it helps nobody
            if path.suffix == ".safetensors":
                reason = "safetensors are not read; give a file of torch.save (.pth, .pt, .ckpt)"
        raise UserError(f"{name} cannot be read as a file of torch.save: {reason}") from error


def _is_pickled(path: Path) -> bool:
    if zipfile.is_zipfile(path):
        return True
    with path.open("rb") as file:
        return file.read(1) == b"\x80"  # of every pickle since protocol 2


def _numbers() -> list[Any]:
    """What the unpickler needs for single numbers of numpy, under the names of numpy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]
    return [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype, *kinds]
