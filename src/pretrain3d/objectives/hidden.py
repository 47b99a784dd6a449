"""What methods share that hide blocks of voxels and predict them: the mask, the error, the pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain3d.config import UserError
from pretrain3d.objectives import inpainting
from pretrain3d.objectives.masking import block_mask, block_size, hidden_cells
from pretrain3d.parallel import all_sum


def checked_block(
    method: str,
    patch_size: Sequence[int],
    ratio: float,
    block: int | Sequence[int] | None,
) -> tuple[int, int, int]:
    """The side of a mask block in voxels, one per axis.

    Args:
        method: name, for the error.
        patch_size: (3,) voxels.
        ratio: share of blocks to hide.
        block: one number, (3,), or ``None`` = `masking.block_size` of the patch.

    Raises:
        UserError: a side below 1, or a mask that hides nothing or everything.
    """
    if block is None:
        block = block_size(patch_size)
    x, y, z = (block,) * 3 if isinstance(block, int) else block
    if min(x, y, z) < 1:
        raise UserError(f"{method}: block is {block}; every side must be 1 voxel or more")
    num_cells = math.prod(-(-size // side) for size, side in zip(patch_size, (x, y, z), strict=True))
    if not 0 < hidden_cells(num_cells, ratio) < num_cells:
        raise UserError(
            f"{method}: ratio {ratio} of the {num_cells} blocks of {(x, y, z)} in a patch of {tuple(patch_size)} "
            "leaves nothing to predict or nothing to see; ratio is between 0 and 1, 0.75 is usual"
        )
    return x, y, z


def hidden_losses(
    prediction: Tensor,
    prepared: dict[str, Any],
    training: bool,
    error: Callable[[Tensor], Tensor] = torch.square,
    in_paint: Callable[[Tensor, Tensor], Tensor] = inpainting.linear,
) -> dict[str, Tensor]:
    """Mean error over the hidden voxels inside the volume: one mean for the whole batch of all processes.

    Args:
        prediction: (B, C, X, Y, Z).
        prepared: ``targets`` (B, C, X, Y, Z); ``keep`` and ``inside`` (B, 1, X, Y, Z) bool.
        training: False also gives ``inpainting_linear``, and leaves other processes alone (validation batches are not
            paired between them).
        error: of a difference, voxel by voxel.
        in_paint: (targets, visible) -> a guess for ``inpainting_linear``, from the context that the network had.

    Returns:
        ``loss``; ``mean_predictor``, the same error when the mean of the visible voxels of each sample is predicted,
        which a network that learned anything is below; in validation ``inpainting_linear``, the same error of
        `inpainting.linear`, which a network that learned more than smoothness is below.
    """
    targets = prepared["targets"].float()  # (B, C, X, Y, Z)
    visible = prepared["keep"] & prepared["inside"]  # (B, 1, X, Y, Z)
    guesses = {"loss": prediction.float(), "mean_predictor": inpainting.visible_mean(targets, visible)}
    if not training:
        guesses["inpainting_linear"] = in_paint(targets, visible)
    scored = ~prepared["keep"] & prepared["inside"]  # (B, 1, X, Y, Z)
    return mean_errors(guesses, targets, scored, training, error)


def mean_errors(
    guesses: dict[str, Tensor],
    targets: Tensor,
    scored: Tensor,
    training: bool,
    error: Callable[[Tensor], Tensor] = torch.square,
) -> dict[str, Tensor]:
    """The mean error of each guess over the scored voxels: in training one mean for the batch of all processes.

    Args:
        guesses: (B, C, X, Y, Z) or what broadcasts to it, by name; only that of ``loss`` keeps its gradient.
        targets: (B, C, X, Y, Z) float32.
        scored: (B, 1, X, Y, Z) bool.
        training, error: see `hidden_losses`.
    """
    sums = [error(guess - targets).mul(scored).sum() for guess in guesses.values()]
    totals = torch.stack([*sums, scored.sum().float() * targets.shape[1]])
    if training:
        totals = all_sum(totals)
    means = totals[:-1] / totals[-1].clamp(min=1.0)
    return {name: mean if name == "loss" else mean.detach() for name, mean in zip(guesses, means, strict=True)}


def hidden_pictures(prediction: Tensor, prepared: dict[str, Any], axis: int = 2) -> dict[str, np.ndarray]:
    """Central slices of the first sample's first channel, in normalised intensities.

    Args:
        prediction, prepared: see `hidden_losses`.
        axis: across which the slice lies.

    Returns:
        ``original``; ``masked`` (hidden voxels 0); ``reconstructed`` (the prediction where hidden, the original
        elsewhere): (X, Y) float32 each, or the two other axes in order.
    """
    middle = prepared["targets"].shape[axis + 2] // 2
    original, keep, predicted = (
        volumes[0, 0].select(axis, middle) for volumes in (prepared["targets"].float(), prepared["keep"], prediction)
    )
    predicted = predicted.float()
    slices = {
        "original": original,
        "masked": original.masked_fill(~keep, 0.0),
        "reconstructed": torch.where(keep, original, predicted),
    }
    return {name: array.detach().cpu().numpy() for name, array in slices.items()}


class HiddenBlocks(nn.Module):
    """A method that hides blocks of every sample and predicts the intensities there; a subclass has ``forward``.

    Args:
        name: of the method, for errors.
        patch_size, ratio, block: see `checked_block`.
    """

    measure = "mean squared error"  # see `contract.Method`
    error: Callable[[Tensor], Tensor] = staticmethod(torch.square)  # of a difference, voxel by voxel

    def __init__(self, name: str, patch_size: Sequence[int], ratio: float, block: int | Sequence[int] | None) -> None:
        super().__init__()
        self.ratio = ratio
        self.block = checked_block(name, patch_size, ratio, block)

    def prepare(self, batch: dict[str, Any], generator: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """The image, and which of it is visible; see `contract.Method.prepare`.

        Returns:
            ``inputs`` and ``targets`` (B, C, X, Y, Z), the whole image (the backbone hides what ``keep`` says);
            ``keep`` and ``inside`` (B, 1, X, Y, Z) bool, True = visible, True = inside the volume.
        """
        image = batch["image"]
        keep = block_mask(image.shape[2:], self.block, self.ratio, generator).to(image.device)
        return {"inputs": image, "targets": image, "keep": keep, "inside": batch["inside"]}

    def loss(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean error over the hidden voxels inside the volume; see `hidden_losses`."""
        return hidden_losses(outputs["reconstruction"], prepared, self.training, self.error)

    def pictures(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """``original``, ``masked``, ``reconstructed``; see `hidden_pictures`."""
        return hidden_pictures(outputs["reconstruction"], prepared)
