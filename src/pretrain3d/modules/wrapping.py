"""The wrapper through which processes share gradients, when other parameters begin to learn."""

from __future__ import annotations

import gc

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from pretrain3d.config import UserError


def wrap_anew(module: lightning.LightningModule, why: str) -> None:
    """Wraps the module of a running training in a new `DistributedDataParallel`.

    A wrapper reduces exactly the parameters that required a gradient when it was made: one that is frozen later
    keeps it waiting for ever (or costs a search of the graph in every step with ``find_unused_parameters``), and
    one that is freed later is never reduced, so that the processes drift apart unnoticed. All processes come here
    at the same step, whether they trained up to it or resumed there.

    Args:
        module: whose parameters were frozen or freed.
        why: begins the error.

    Raises:
        UserError: the strategy shards the parameters.
    """
    strategy = module.trainer.strategy
    if type(strategy) is DDPStrategy:  # DeepSpeed's is one of its heirs
        strategy.model = module
        gc.collect()  # the old wrapper's buckets are as large as all gradients
        _finish(module.device)  # the new one sends weights on a stream of its own: not before the last step is over
        strategy.configure_ddp()
        _finish(module.device)
    elif not isinstance(strategy, SingleDeviceStrategy):
        raise UserError(
            f"{why}, which works on one device and with trainer.strategy=ddp, not with {type(strategy).__name__}"
        )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
