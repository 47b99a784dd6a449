"""Averages of the weights along a run (EMA, SWA), saved and resumed as part of the module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pretrain3d.config import UserError


class Average(nn.Module):
    """A running average of several networks, held in copies under the same names.

    With a ``decay`` it is an exponential moving average whose decay ramps up as ``min(decay, (1 + n) / (10 + n))`` over
    the updates ``n``, so that a short run is not an average with its random start. Without, every update counts the
    same. Buffers are copied, not averaged.

    Args:
        networks: name -> network to follow; ``self.<name>`` is its averaged copy, in eval mode and without gradients.
        decay: weight of the past per update, in (0, 1); None: the mean of all updates.
    """

    updates: torch.Tensor

    def __init__(self, networks: dict[str, nn.Module], decay: float | None) -> None:
        super().__init__()
        self.decay = decay
        self.names = tuple(networks)
        for name, network in networks.items():
            self.add_module(name, copy.deepcopy(network).requires_grad_(False).eval())
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, networks: dict[str, nn.Module]) -> None:
        """One step of the average towards ``networks``; waits for no device."""
        self.updates += 1
        count = self.updates.double()
        past = (count - 1) / count if self.decay is None else torch.clamp((1 + count) / (10 + count), max=self.decay)
        weight = (1.0 - past).float()
        for name in self.names:
            average = self.get_submodule(name)
            for old, new in zip(average.parameters(), networks[name].parameters(), strict=True):
                old.lerp_(new.detach().to(old.dtype), weight.to(old.dtype))
            for buffer, value in zip(average.buffers(), networks[name].buffers(), strict=True):
                buffer.copy_(value)

    def train(self, mode: bool = True) -> Average:
        """Stays in eval mode: the copies are for prediction only."""
        return super().train(False)


@dataclass(frozen=True)
class StochasticAveraging:
    """Stochastic weight averaging: from ``start_step`` on, the mean of the weights after every ``every_n_steps``.

    Attributes:
        start_step: optimiser steps before the averaging.
        every_n_steps: steps from one snapshot to the next.
        lr: factor of the learning rate at the begin and the end of each cycle of ``every_n_steps``, between which it
            falls linearly; `module.schedule` then ends at ``start_step``. None: the schedule goes on.

    Source: Izmailov et al. 2018, "Averaging weights leads to wider optima". nnDetection v0.1 (10 cycles of 2,500 steps
    after 125,000) means ``lr: [0.1, 0.001]``, but its code rises from the low to the high rate.
    """

    start_step: int
    every_n_steps: int
    lr: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for key in ("start_step", "every_n_steps"):
            if getattr(self, key) < 1:
                raise UserError(f"module.swa.{key} is {getattr(self, key)}; expected at least 1")
        if self.lr is not None and not 0 <= self.lr[1] <= self.lr[0]:
            raise UserError(f"module.swa.lr is {list(self.lr)}; expected two factors, the second not above the first")

    def check_length(self, max_steps: int) -> None:
        """Raises UserError when a run of ``max_steps`` ends before the first snapshot."""
        if self.start_step + self.every_n_steps > max_steps:
            raise UserError(
                f"module.swa: the first average comes after start_step + every_n_steps = "
                f"{self.start_step + self.every_n_steps} steps, beyond trainer.max_steps={max_steps}"
            )

    def due(self, steps_done: int) -> bool:
        """Whether the weights after so many steps count."""
        since = steps_done - self.start_step
        return since > 0 and since % self.every_n_steps == 0

    def cycle(self) -> Callable[[int], float] | None:
        """Steps since ``start_step`` -> factor of the learning rate."""
        if self.lr is None:
            return None
        high, low = self.lr
        last = max(self.every_n_steps - 1, 1)  # the step before a snapshot is taken at the low rate
        return lambda step: high + (low - high) * (step % self.every_n_steps) / last
