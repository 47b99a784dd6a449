"""Looking at a loss without stopping the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PendingLoss:
    """A training loss that nobody looked at yet, on its way to the host."""

    step: int
    loss: Tensor
    copied: torch.cuda.Event | None
    cases: tuple[str, ...]

    @classmethod
    def of(cls, step: int, loss: Tensor, cases: Sequence[str]) -> PendingLoss:
        loss, copied = loss.detach(), None
        if loss.is_cuda:
            loss, copied = loss.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        return cls(step, loss, copied, tuple(cases))

    def value(self) -> float:
        """Waits for the copy alone, not for what the device was given to do since."""
        if self.copied is not None:
            self.copied.synchronize()
        return float(self.loss)
