"""Models Genesis: restore an image whose intensities were bent, shuffled and painted over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain3d.config import UserError
from pretrain3d.objectives import corruptions
from pretrain3d.objectives.contract import Backbone, Decoder, PyramidLevel
from pretrain3d.objectives.hidden import mean_errors
from pretrain3d.objectives.inpainting import visible_mean

SAMPLED = 65536  # voxels that percentiles are taken from


class ModelsGenesis(nn.Module):
    """The input is the image flipped, locally shuffled, bent and painted, in this order; the target is only flipped.

    The corruptions are made for intensities in [0, 1]: between the two percentiles of the sample's own voxels, or in a
    fixed window. Input and target are then brought back to normalised intensities, the ones that a detector will see;
    what lies beyond the range is clipped in both. Probabilities are those of the original.

    Args:
        levels, in_channels, patch_size, decoder: see `contract.Method`.
        flip: probability of a flip of a random axis, up to three times in turn, the same for input and target.
        shuffle: probability of `corruptions.shuffle_windows`.
        bend: probability of a random intensity curve, `corruptions.bezier_table`.
        paint: probability of painting.
        in_paint: share of painting that is in-painting, the rest is out-painting.
        percentiles: (2,) of the voxels inside the volume that become 0 and 1, per sample and channel.
        window: (2,) normalised intensities that become 0 and 1 instead, the same for all samples.

    Raises:
        UserError: a probability or a range that is none.

    Source: Zhou et al., "Models Genesis" (2021). The 3D reference code of the study feeds z-scored images to maps that
    are defined on [0, 1], which collapses two thirds of the voxels to the ends of the curve, and flips the channel axis
    instead of the third spatial one. Voxels outside the volume do not count.
    """

    measure = "mean squared error"  # see `contract.Method`

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        in_channels: int,
        patch_size: Sequence[int],
        decoder: Decoder,
        flip: float = 0.4,
        shuffle: float = 0.5,
        bend: float = 0.9,
        paint: float = 0.9,
        in_paint: float = 0.2,
        percentiles: tuple[float, float] = (0.5, 99.5),
        window: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.probability = {"flip": flip, "shuffle": shuffle, "bend": bend, "paint": paint, "in_paint": in_paint}
        for name, value in self.probability.items():
            if not 0 <= value <= 1:
                raise UserError(f"models_genesis: {name} is {value}; it is a probability from 0 to 1")
        if not 0 <= percentiles[0] < percentiles[1] <= 100:
            raise UserError(f"models_genesis: percentiles are {list(percentiles)}; two rising numbers from 0 to 100")
        if window is not None and not window[0] < window[1]:
            raise UserError(f"models_genesis: window is {list(window)}; two rising normalised intensities")
        self.percentiles, self.window = percentiles, window
        self.decoder = decoder(levels, in_channels)

    def prepare(self, batch: dict[str, Any], generator: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Corrupts every sample; see `contract.Method.prepare`.

        Returns:
            ``inputs`` and ``targets`` (B, C, X, Y, Z); ``inside`` (B, 1, X, Y, Z) bool, flipped like them; ``keep``
            (B, 1, X, Y, Z) bool, True: the whole patch is restored, nothing is hidden by a mask.
        """
        image, inside = batch["image"], batch["inside"]
        low, high = self._range(image, inside)  # (B, C, 1, 1, 1)
        unit = ((image - low) / (high - low)).clamp_(0.0, 1.0)
        inputs, targets = torch.empty_like(unit), torch.empty_like(unit)
        within = torch.empty_like(inside)
        for row, device_generator in enumerate(generator):
            rng = corruptions.host_rng(device_generator)
            axes = self._flipped_axes(rng)
            targets[row], within[row] = unit[row].flip(axes), inside[row].flip(axes)
            inputs[row] = self._corrupted(targets[row], rng, device_generator)
        return {
            "inputs": inputs * (high - low) + low,
            "targets": targets * (high - low) + low,
            "keep": torch.ones_like(within),
            "inside": within,
        }

    def _range(self, image: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised intensities that become 0 and 1: (B, C, 1, 1, 1) each."""
        if self.window is not None:
            low, high = (image.new_full((1, 1, 1, 1, 1), edge) for edge in self.window)
            return low, high
        step = (image[0, 0].numel() // SAMPLED) | 1  # odd: even steps meet the same planes again and again
        values = image.flatten(2)[..., ::step].masked_fill(~inside.flatten(2)[..., ::step], float("nan"))
        shares = torch.stack([image.new_full((), percentile / 100) for percentile in self.percentiles])
        low, high = torch.nanquantile(values, shares, dim=2).nan_to_num()[..., None, None, None]  # (B, C, 1, 1, 1) each
        return low, torch.where(high > low, high, low + 1.0)  # a constant image becomes 0

    def _happens(self, what: str, rng: np.random.Generator) -> bool:
        return bool(rng.random() < self.probability[what])

    def _flipped_axes(self, rng: np.random.Generator) -> list[int]:
        """Axes of (C, X, Y, Z) that are reversed in the end: an axis drawn twice is as it was."""
        flips = [0, 0, 0]
        for _ in range(3):
            if not self._happens("flip", rng):
                break
            flips[rng.integers(3)] += 1
        return [axis + 1 for axis, count in enumerate(flips) if count % 2]

    def _corrupted(self, image: Tensor, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        """(C, X, Y, Z) in [0, 1] -> the same, corrupted."""
        if self._happens("shuffle", rng):
            image = corruptions.shuffle_windows(image, rng, generator)
        if self._happens("bend", rng):
            image = corruptions.look_up(image, corruptions.bezier_table(rng))
        if self._happens("paint", rng):
            painter = corruptions.in_paint if self._happens("in_paint", rng) else corruptions.out_paint
            image = painter(image, rng, generator)
        return image

    def forward(self, backbone: Backbone, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns: ``reconstruction`` (B, C, X, Y, Z), in normalised intensities."""
        return {"reconstruction": self.decoder(backbone(prepared["inputs"], None))[0]}

    def loss(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean squared error over all voxels inside the volume: one mean for the whole batch of all processes.

        Returns:
            ``loss``; ``mean_predictor``, the same error when the mean of each sample is predicted; ``copy``, the same
            error when the corrupted input is returned. A network that learned anything is below both.
        """
        targets, inside = prepared["targets"].float(), prepared["inside"]
        guesses = {
            "loss": outputs["reconstruction"].float(),
            "mean_predictor": visible_mean(targets, inside),
            "copy": prepared["inputs"].float(),
        }
        return mean_errors(guesses, targets, inside, self.training)

    def pictures(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """``original``, ``corrupted``, ``restored``; see `corruptions.restored_pictures`."""
        return corruptions.restored_pictures(outputs["reconstruction"], prepared)
