"""Augmentation of several views of one sample, each on its own: mirrored, turned, and changed in intensity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain3d.config import UserError
from pretrain3d.data import intensity as intensities
from pretrain3d.data.batch import generator

DEFAULTS = intensities.DEFAULTS | {"low_resolution": intensities.DEFAULTS["low_resolution"] | {"p": 0.1}}


class ViewAugmentation:
    """Changes views that were cut already, so that where they lie is still known exactly.

    All draws of a view are a pure function of the seed, its sample's index and its number in the sample.

    Args:
        intensity: True, False or changed values of `DEFAULTS`, see `data.intensity`.
        flip_axes: axes mirrored at random, each with probability 1/2.
        quarter_turns: turn by 0, 90, 180 or 270 degrees about axis 2, where views are square there.

    Raises:
        UserError: an unknown operation or axis.

    Source: nnssl's views for VoCo and SimCLR.
    """

    def __init__(
        self,
        intensity: dict[str, Any] | bool = True,
        flip_axes: Sequence[int] = (0, 1, 2),
        quarter_turns: bool = True,
    ) -> None:
        if any(axis not in (0, 1, 2) for axis in flip_axes):
            raise UserError(f"module.views.flip_axes={list(flip_axes)}: axes are 0, 1 and 2")
        self.intensities = intensities.settings_from_config(intensity, DEFAULTS)
        self.flip_axes = tuple(flip_axes)
        self.quarter_turns = quarter_turns

    @torch.no_grad()
    def __call__(self, views: Tensor, seed: int, sample_index: Sequence[int]) -> Tensor:
        """Waits for no device.

        Args:
            views: (B, V, C, x, y, z) float32, normalised; overwritten.
            seed: of the run, >= 0.
            sample_index: (B,) global indices.

        Returns:
            (B, V, C, x, y, z) float32.

        Raises:
            UserError: quarter turns of views that are not square.
        """
        num_views, x, y = views.shape[1], views.shape[3], views.shape[4]
        if self.quarter_turns and x != y:
            raise UserError(f"views of {x} x {y} cannot be turned by 90 degrees; set module.views.quarter_turns=false")
        for sample, index in zip(views, sample_index, strict=True):
            for number in range(num_views):
                self._change(sample[number], seed, index * num_views + number)
        return views

    def _change(self, view: Tensor, seed: int, index: int) -> None:
        rng = generator(seed, index, "view")
        flips = [axis + 1 for axis, drawn in enumerate(rng.random(3) < 0.5) if drawn and axis in self.flip_axes]
        turns = int(rng.integers(4))
        changed = view.flip(flips) if flips else view
        if self.quarter_turns and turns:
            changed = torch.rot90(changed, turns, (1, 2))
        drawn = intensities.draw(rng, self.intensities, len(view))
        if changed is not view:
            view.copy_(changed)
        intensities.apply(view, drawn, seed, index)
