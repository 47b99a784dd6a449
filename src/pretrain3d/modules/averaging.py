"""Exponential moving average of the weights, saved and resumed as part of the module."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average(nn.Module):
    """A running average of several networks, held in copies under the same names.

    The decay ramps up as ``min(decay, (1 + n) / (10 + n))`` over the updates ``n``, so that a short run is not an
    average with its random start. Buffers are copied, not averaged.

    Args:
        networks: name -> network to follow; ``self.<name>`` is its averaged copy, in eval mode and without gradients.
        decay: weight of the past per optimiser step, in (0, 1).
    """

    updates: torch.Tensor

    def __init__(self, networks: dict[str, nn.Module], decay: float) -> None:
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
        weight = (1.0 - torch.clamp((1 + count) / (10 + count), max=self.decay)).float()
        for name in self.names:
            average = self.get_submodule(name)
            for old, new in zip(average.parameters(), networks[name].parameters(), strict=True):
                old.lerp_(new.detach().to(old.dtype), weight.to(old.dtype))
            for buffer, value in zip(average.buffers(), networks[name].buffers(), strict=True):
                buffer.copy_(value)

    def train(self, mode: bool = True) -> Average:
        """Stays in eval mode: the copies are for prediction only."""
        return super().train(False)
