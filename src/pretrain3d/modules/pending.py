"""Looking at a loss without stopping the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from pretrain3d.config import UserError
from pretrain3d.parallel import all_sum, gather_objects
from pretrain3d.registry import CONTRACTS


def total_of(losses: Any, head: nn.Module) -> Tensor:
    """The total among what ``head.loss`` gave.

    Raises:
        UserError: that is no dict of tensors of shape (), or it has no ``loss``.
    """
    where = f"{type(head).__name__}.loss"
    if not isinstance(losses, Mapping) or "loss" not in losses:
        found = f"the keys {', '.join(losses)}" if isinstance(losses, Mapping) else f"a {type(losses).__name__}"
        raise UserError(f"{where} gives {found}; expected a dict with the total under 'loss' ({CONTRACTS})")
    for key, value in losses.items():
        if not isinstance(value, Tensor) or value.ndim:
            found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"{where} gives {key} {found}; expected a tensor of shape () ({CONTRACTS})")
    total: Tensor = losses["loss"]
    return total


@dataclass(frozen=True)
class PendingLoss:
    """A training loss that nobody looked at yet, on its way to the host.

    What goes there is the sum over processes, which is not finite where one of them is not: so all of them stop, and
    none waits for one that did.

    Attributes:
        step: of the optimiser.
        totals: (2,) of all processes: the losses, and how many of them were told to stop.
        copied: recorded after the copy from a GPU.
        own: of this process.
        cases: of this process' batch.
    """

    step: int
    totals: Tensor
    copied: torch.cuda.Event | None
    own: Tensor
    cases: tuple[str, ...]

    @classmethod
    def of(cls, step: int, loss: Tensor, cases: Sequence[str], told_to_stop: bool = False) -> PendingLoss:
        own, copied = loss.detach(), None
        totals = all_sum(torch.stack([own, own.new_full((), float(told_to_stop))]))
        if totals.is_cuda:
            totals, copied = totals.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        return cls(step, totals, copied, own, tuple(cases))

    def values(self) -> tuple[float, bool]:
        """The sum, and whether any process was told to stop; waits for the copy alone, not for what the device was
        given to do since."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, told_to_stop = self.totals.tolist()
        return loss, told_to_stop > 0

    def culprits(self) -> tuple[float, list[str]]:
        """Where the sum is not finite: the first loss that is not, and the cases of all such processes, once each."""
        losses = gather_objects((float(self.own), self.cases))
        found = [(loss, cases) for loss, cases in losses if not isfinite(loss)] or losses
        return found[0][0], list(dict.fromkeys(case for _, cases in found for case in cases))
