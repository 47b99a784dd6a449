"""The pretraining of SwinUNETR, on any backbone: restore two corrupted views, tell their rotation, match them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain3d.config import UserError
from pretrain3d.devices import sent
from pretrain3d.objectives.contract import Backbone, Decoder, PyramidLevel
from pretrain3d.objectives.corruptions import cut_out_windows, host_rng, restored_pictures
from pretrain3d.objectives.hidden import mean_errors
from pretrain3d.objectives.inpainting import visible_mean
from pretrain3d.objectives.simclr import nt_xent
from pretrain3d.parallel import all_gather

QUARTERS = 4  # rotations about z, by 0, 90, 180 and 270 degrees
EMBEDDING = 512


class SwinMix(nn.Module):
    """Two views of every patch: turned about z, cut out, and mixed with another patch of the batch.

    A view is the patch turned by a random number of quarters; then boxes of it become noise, and boxes of it become
    those of another sample's view (not of its own: a draw of itself leaves the view as it is). Three losses are added:
    L1 between the decoded view and the turned patch, everywhere; cross-entropy of the quarters; NT-Xent between the
    views of a patch, over the batch of all processes. Patches must not be mirrored along both x and y beforehand
    (``data.flip_axes``): that is half a turn, and the quarters could be told from each other only up to it.

    Args:
        levels, in_channels, patch_size, decoder: see `contract.Method`; x and y of the patch must be equal.
        drop: at most this share of a view becomes noise, and at most this share another sample's.
        temperature: of NT-Xent.
        reconstruction, rotation, contrast: weights of the three losses.

    Raises:
        UserError: a patch that is not square in x and y or a single voxel at the coarsest level, a share or a weight
            that is none, or no weight above 0.

    Source: Tang et al., "Self-supervised pre-training of Swin transformers for 3D medical image analysis" (2022), with
    weights 1, 1, 1 and temperature 0.5 as in its code and in nnssl. There the rotation is read from one corner token
    and the embedding from its neighbour; here both from the mean of the coarsest level, normalised over the views of
    the batch where they are contrasted. Without that the large part that all means share stays, all cosines begin near
    1, and the contrast was seen to stay at log(2 N - 1); with the embedding's input alone normalised, the rotation was
    not learned instead. There and here the image is
    restored from that level alone. There the noise is made to span [0, 1] in images of [0, 1]; here it spans the range
    of the sample's normalised intensities. Voxels outside the volume do not count in L1.
    """

    measure = "mean absolute error"  # see `contract.Method`

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        in_channels: int,
        patch_size: Sequence[int],
        decoder: Decoder,
        drop: float = 0.3,
        temperature: float = 0.5,
        reconstruction: float = 1.0,
        rotation: float = 1.0,
        contrast: float = 1.0,
    ) -> None:
        super().__init__()
        if patch_size[0] != patch_size[1]:
            raise UserError(
                f"swin_mix turns patches about z; data.patch_size is {list(patch_size)}, take x and y of the same size"
            )
        if all(size <= step for size, step in zip(patch_size, levels[-1].stride, strict=True)):
            raise UserError(
                f"swin_mix: data.patch_size {list(patch_size)} is a single voxel at the coarsest level of the "
                f"backbone, whose stride is {list(levels[-1].stride)}; take a larger patch"
            )
        if not 0 <= drop < 1:
            raise UserError(f"swin_mix: drop is {drop}; a share from 0 to below 1, 0.3 is usual")
        if temperature <= 0:
            raise UserError(f"swin_mix: temperature is {temperature}; above 0, 0.5 is usual")
        self.weights = {"reconstruction": reconstruction, "rotation": rotation, "contrast": contrast}
        for name, weight in self.weights.items():
            if weight < 0:
                raise UserError(f"swin_mix: the weight {name} is {weight}; 0 or more")
        if not any(self.weights.values()):
            raise UserError(f"swin_mix: the weights {', '.join(self.weights)} are all 0, so that nothing is trained")
        self.drop, self.temperature = drop, temperature
        self.decoder = decoder(levels, in_channels, skips=False)
        channels = levels[-1].channels
        self.norm = nn.BatchNorm1d(channels, affine=False, track_running_stats=False) if contrast else nn.Identity()
        self.turn_head = nn.Linear(channels, QUARTERS)
        self.match_head = nn.Linear(channels, EMBEDDING)

    def check_mirrors(self, flip_axes: Sequence[int]) -> None:
        """See `contract.Method`."""
        if self.weights["rotation"] and {0, 1} <= set(flip_axes):
            raise UserError(
                f"swin_mix: data.flip_axes={list(flip_axes)} mirrors x and y, which together is half a turn, so that "
                "the rotation cannot be told; take [0, 2] or [1, 2]"
            )

    def check_batch(self, batch_size: int, processes: int) -> None:
        """See `contract.Method`."""
        if self.weights["contrast"] and batch_size * processes < 2:
            raise UserError(
                "swin_mix tells the patches of a batch apart; data.batch_size is 1, take 2 or more, or contrast=0"
            )

    def prepare(self, batch: dict[str, Any], generator: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Makes both views of every sample; see `contract.Method.prepare`.

        Returns:
            ``inputs`` and ``targets`` (2 B, C, X, Y, Z), the first views and then the second ones; ``quarters`` (2 B)
            int64; ``inside`` (2 B, 1, X, Y, Z) bool, turned like the image; ``keep`` (2 B, 1, X, Y, Z) bool, True:
            everything is restored.
        """
        image, inside = batch["image"], batch["inside"]
        rngs = [host_rng(draws) for draws in generator]
        inputs, targets, within, quarters = [], [], [], []
        for _ in range(2):
            turns = [int(rng.integers(QUARTERS)) for rng in rngs]
            turned = torch.stack([sample.rot90(k, (1, 2)) for sample, k in zip(image, turns, strict=True)])
            dropped = torch.stack([self._dropped(*drawn) for drawn in zip(turned, rngs, generator, strict=True)])
            inputs.append(self._swapped(dropped, rngs))
            targets.append(turned)
            within.append(torch.stack([sample.rot90(k, (1, 2)) for sample, k in zip(inside, turns, strict=True)]))
            quarters += turns
        return {
            "inputs": torch.cat(inputs),
            "targets": torch.cat(targets),
            "quarters": sent(torch.tensor(quarters), image.device),
            "inside": torch.cat(within),
            "keep": torch.ones_like(torch.cat(within)),
        }

    def _dropped(self, image: Tensor, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        """(C, X, Y, Z) with boxes of noise, uniform in the range of the image."""
        low, high = image.aminmax()
        image = image.clone()
        for window in cut_out_windows(rng, image.shape[1:], self.drop):
            patch = image[:, *window]
            noise = torch.rand(patch.shape, device=image.device, generator=generator)
            patch.copy_(low + (high - low) * noise)
        return image

    def _swapped(self, images: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        """(B, C, X, Y, Z), each with boxes of another one of the batch."""
        swapped = images.clone()
        for row, rng in enumerate(rngs):
            # The partner is that many places further, so that the draw does not depend on the place in the batch.
            other = (row + int(rng.integers(len(images)))) % len(images)
            if other != row:
                for window in cut_out_windows(rng, images.shape[2:], self.drop):
                    swapped[row][:, *window] = images[other][:, *window]
        return swapped

    def forward(self, backbone: Backbone, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Restores this process' views, and looks at those of all processes in training.

        Returns:
            ``reconstruction`` (2 B, C, X, Y, Z); of N patches, B or in training those of all processes, both views:
            ``turns`` (N, 2, 4) logits, ``embeddings`` (N, 2, D) float32, and their ``quarters`` (N, 2).
        """
        features = backbone(prepared["inputs"], None)
        summary, quarters = by_patch(features[-1].float().mean((2, 3, 4))), by_patch(prepared["quarters"])
        if self.training:  # validation batches are not paired between processes
            summary, quarters = all_gather(summary), all_gather(quarters)
        with torch.autocast(summary.device.type, enabled=False):  # cosines near 1 are to be told apart
            summary = self.norm(summary.flatten(0, 1)).unflatten(0, (-1, 2))  # (N, 2, channels)
            turns, embeddings = self.turn_head(summary), self.match_head(summary)
        restored = self.decoder(features)[0]
        return {"reconstruction": restored, "turns": turns, "embeddings": embeddings, "quarters": quarters}

    def loss(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weighted sum of the three losses, of the whole batch of all processes.

        Returns:
            ``loss``; ``reconstruction``, ``rotation`` and ``contrast``, not weighted; ``mean_predictor``, the L1 of the
            mean of each input; ``trivial``, the weighted sum of that, log 4 and log(2 N - 1): what a network that
            learned nothing has; ``rotation_accuracy``; ``top1``, the share of views whose nearest is their partner.
        """
        targets, inside = prepared["targets"].float(), prepared["inside"]
        guesses = {
            "loss": outputs["reconstruction"].float(),
            "mean_predictor": visible_mean(prepared["inputs"].float(), inside),
        }
        errors = mean_errors(guesses, targets, inside, self.training, torch.abs)
        turns, quarters = outputs["turns"].float().flatten(0, 1), outputs["quarters"].flatten()
        views = outputs["embeddings"].float()
        contrast, top1 = nt_xent(views[:, 0], views[:, 1], self.temperature)
        rotation = F.cross_entropy(turns, quarters)
        parts = {"reconstruction": errors["loss"], "rotation": rotation, "contrast": contrast}
        mean_predictor = errors["mean_predictor"]
        levels = {
            "reconstruction": mean_predictor,
            "rotation": mean_predictor.new_full((), math.log(QUARTERS)),
            "contrast": mean_predictor.new_full((), math.log(2 * len(views) - 1)),
        }
        return {
            "loss": self._total(parts),
            **{name: part.detach() for name, part in parts.items()},
            "mean_predictor": mean_predictor,
            "trivial": self._total(levels),
            "rotation_accuracy": (turns.detach().argmax(1) == quarters).float().mean(),
            "top1": top1,
        }

    def _total(self, parts: dict[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()

    def pictures(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """``original``, ``corrupted``, ``restored``, of the first view; see `corruptions.restored_pictures`."""
        return restored_pictures(outputs["reconstruction"], prepared)


def by_patch(views: Tensor) -> Tensor:
    """First views and then second ones, (2 B, ...), to both views of every patch, (B, 2, ...)."""
    return views.unflatten(0, (2, -1)).movedim(0, 1)
