"""Several processes, each on the simulated device, as NCCL would have them: what they exchange must lie on the device.

Gloo carries it, which takes tensors of the host alone. Gradients are averaged here, not by `DistributedDataParallel`:
what that does is PyTorch's. Called as `simulated_device.py`, once for each process, with the variables that Lightning's
own launcher sets (``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from simulated_device import OnDevice, SimulatedAccelerator, Watch, main
from torch import Tensor, distributed
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

EXCHANGES = ("all_reduce", "all_gather", "broadcast")
WAITING = ("barrier", "all_gather_object", "broadcast_object_list")
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))  # Lightning takes the variable away after a run


def as_nccl() -> None:
    """Exchanges refuse tensors of the host from now on, and those that make the host wait are recorded."""
    for name in EXCHANGES:
        setattr(distributed, name, _exchanging(name, getattr(distributed, name)))
    for name in WAITING:
        setattr(distributed, name, _waiting(name, getattr(distributed, name)))


def _exchanging(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def exchange(*args: Any, **kwargs: Any) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and not isinstance(tensor, OnDevice):
                raise RuntimeError(f"{name} of a tensor of the host, which NCCL refuses: {tuple(tensor.shape)}")
        args, kwargs = tree_map(lambda leaf: leaf.host if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
        with _disable_current_modes():
            return real(*args, **kwargs)

    return exchange


def _waiting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def wait(*args: Any, **kwargs: Any) -> Any:
        Watch.note(name)
        return real(*args, **kwargs)

    return wait


class SimulatedProcesses(DDPStrategy):
    """DDP without its wrapper."""

    def __init__(self, device: torch.device, precision: Any) -> None:
        devices = [device] * PROCESSES
        super().__init__(SimulatedAccelerator(), devices, LightningEnvironment(), precision_plugin=precision)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        _init_dist_connection(self.cluster_environment, "gloo", timeout=self._timeout)

    def configure_ddp(self) -> None: ...

    def pre_backward(self, closure_loss: Tensor) -> None: ...

    def post_backward(self, closure_loss: Tensor) -> None:
        for name, parameter in self.lightning_module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"DDP would wait for a gradient of {name}"
                distributed.all_reduce(parameter.grad)
                parameter.grad.div_(PROCESSES)


def together(device: torch.device, precision: Any) -> dict[str, Any]:
    return {"strategy": SimulatedProcesses(device, precision), "devices": PROCESSES}


if __name__ == "__main__":
    as_nccl()
    main(json.loads(sys.argv[1]), together)
