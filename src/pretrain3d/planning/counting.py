"""The bytes that operations keep alive, and the operations of a GPU on the tensors of a CPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pretrain3d.backbones.convolution import Conv3d


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live.

    Attributes:
        live: now.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def without_ways_of_a_cpu(network: nn.Module) -> None:
    """Every convolution is computed as on a GPU."""
    for module in network.modules():
        if type(module) is Conv3d:
            module.__class__ = _PlainConv3d


class _PlainConv3d(Conv3d):
    def forward(self, x: Tensor, flat: int | None = None) -> Tensor:
        return nn.Conv3d.forward(self, x)


class GpuAutocast(TorchFunctionMode):
    """Within it `torch.autocast("cpu")` gives the types of `torch.autocast("cuda")`.

    Only of what the networks here do that is on one list of PyTorch's ``autocast_mode`` and not on the other.
    """

    FULL = (F.group_norm, F.layer_norm, F.interpolate, F.softmax, Tensor.softmax)  # in float32 on a GPU
    AS_IT_IS = (F.avg_pool3d,)  # in float32 on a CPU

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_autocast_enabled("cpu") or func not in (*self.FULL, *self.AS_IT_IS):
            return func(*args, **kwargs)
        if func in self.FULL:
            args, kwargs = tree_map(lambda value: value.float() if isinstance(value, Tensor) else value, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)
