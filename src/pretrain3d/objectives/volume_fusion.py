"""Volume Fusion: two images are mixed by boxes of different weights; the network says which weight each voxel has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain3d.config import UserError
from pretrain3d.objectives.contract import Backbone, Decoder, PyramidLevel
from pretrain3d.objectives.corruptions import host_rng
from pretrain3d.parallel import all_sum

SMOOTH = 1e-5  # of the Dice


class VolumeFusion(nn.Module):
    """A pseudo-segmentation: voxel v is ``a fg(v) + (1 - a) bg(v)`` with ``a = target(v) / (classes - 1)``.

    Every patch of the batch is the foreground of one fused patch and the background of the one before it (the last one
    of the first). Boxes with one class each, uniform over all classes, are laid on class 0 in turn; a later box covers
    an earlier one. Loss: cross-entropy plus soft Dice, 1 : 1, background included.

    Args:
        levels, in_channels, patch_size, decoder: see `contract.Method`.
        classes: number of mixing weights, evenly from 0 to 1.
        boxes: (2,) fewest and most boxes per patch.
        side: (2,) shortest and longest side of a box, as shares of the axis.

    Raises:
        UserError: fewer than two classes or a range that is none.

    Source: Wang et al., "MIS-FM" (2023), as in the OpenMind study: five classes, 10 to 39 boxes, sides of 8 to 100
    voxels in patches of 160. The study loads two patches for each one that is fused; here each loaded patch is used
    twice, so ``batch_size`` is what the network sees. The authors' own code now lays blocks of one size per patch on a
    grid, none of class 0. Voxels outside either volume do not count.
    """

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        in_channels: int,
        patch_size: Sequence[int],
        decoder: Decoder,
        classes: int = 5,
        boxes: tuple[int, int] = (10, 39),
        side: tuple[float, float] = (0.05, 0.625),
    ) -> None:
        super().__init__()
        if classes < 2:
            raise UserError(f"volume_fusion: classes is {classes}; at least 2 are needed to tell apart")
        if not 1 <= boxes[0] <= boxes[1]:
            raise UserError(f"volume_fusion: boxes is {list(boxes)}; two rising numbers of boxes, at least 1")
        if not 0 < side[0] <= side[1] <= 1:
            raise UserError(
                f"volume_fusion: side is {list(side)}; two rising shares of the patch, above 0 and at most 1"
            )
        self.classes, self.boxes, self.side = classes, boxes, side
        self.decoder = decoder(levels, classes)

    def check_batch(self, batch_size: int, processes: int) -> None:
        """See `contract.Method`; the partners are of one process."""
        if batch_size < 2:
            raise UserError("volume_fusion mixes the patches of a batch; data.batch_size is 1, take 2 or more")

    def prepare(self, batch: dict[str, Any], generator: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Fuses every patch with the next one; see `contract.Method.prepare`.

        A validation batch of one patch is fused with its own reflection in the centre.

        Returns:
            ``inputs`` (B, C, X, Y, Z); ``targets`` (B, X, Y, Z) int64, classes; ``inside`` (B, 1, X, Y, Z) bool, inside
            both volumes; ``keep`` (B, 1, X, Y, Z) bool, True: the whole patch is classified.
        """
        image, inside = batch["image"], batch["inside"]
        if len(image) == 1:
            background, behind = image.flip((2, 3, 4)), inside.flip((2, 3, 4))
        else:
            background, behind = image.roll(-1, 0), inside.roll(-1, 0)
        shape = image.shape[2:]
        targets = torch.zeros((len(image), *shape), dtype=torch.int64, device=image.device)
        for target, draws in zip(targets, generator, strict=True):
            for window, label in self.draw_boxes(host_rng(draws), shape):
                target[window] = label
        weight = (targets.float() / (self.classes - 1))[:, None]  # (B, 1, X, Y, Z)
        return {
            "inputs": torch.lerp(background, image, weight),
            "targets": targets,
            "keep": torch.ones_like(inside),
            "inside": inside & behind,
        }

    def draw_boxes(
        self, rng: np.random.Generator, shape: Sequence[int]
    ) -> list[tuple[tuple[slice, slice, slice], int]]:
        """Boxes and their classes, in the order in which they are laid."""
        size = np.array(shape)
        shortest, longest = (np.maximum(1, np.round(share * size).astype(int)) for share in self.side)
        number = int(rng.integers(*self.boxes, endpoint=True))
        sides = rng.integers(shortest, longest, (number, 3), endpoint=True)
        starts = rng.integers(0, size - sides, endpoint=True)
        labels = rng.integers(self.classes, size=number)
        drawn = []
        for (x, y, z), (i, j, k), label in zip(
            starts.tolist(), (starts + sides).tolist(), labels.tolist(), strict=True
        ):
            drawn.append(((slice(x, i), slice(y, j), slice(z, k)), label))
        return drawn

    def forward(self, backbone: Backbone, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns: ``logits`` (B, classes, X, Y, Z)."""
        return {"logits": self.decoder(backbone(prepared["inputs"], None))[0]}

    def loss(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy, one mean over the voxels of the batch of all processes, plus Dice, one mean over its samples.

        Returns:
            ``loss``; its parts ``cross_entropy`` and ``dice`` (1 - the mean over samples and classes of the soft Dice);
            ``uniform``, the loss when every class is equally likely everywhere; ``prior``, the cross-entropy when the
            shares of the classes in the batch are predicted everywhere; ``accuracy``; ``mIoU``, the mean over the
            classes that were there or predicted, each over the whole batch.
        """
        logits, inside = outputs["logits"].float(), prepared["inside"]  # (B, K, X, Y, Z), (B, 1, X, Y, Z)
        classes = torch.arange(self.classes, device=logits.device).view(1, -1, 1, 1, 1)
        truth = (prepared["targets"][:, None] == classes) & inside  # (B, K, X, Y, Z)
        found = (logits.detach().argmax(1, keepdim=True) == classes) & inside
        logs = logits.log_softmax(1)
        sums = [
            -(logs * truth).sum(),
            self._dice(logs.exp() * inside, truth).sum(),
            self._dice((inside / self.classes).expand_as(truth), truth).sum(),
            inside.sum().float(),
            logits.new_full((), len(logits)),
        ]
        counted = [mask.sum((0, 2, 3, 4)).float() for mask in (found & truth, found | truth, truth)]  # (K) each
        totals = torch.cat([torch.stack(sums), *counted])
        if self.training:  # validation batches are not paired between processes
            totals = all_sum(totals)
        entropy, dice, uniform_dice, voxels, samples = totals[:5]
        hits, unions, counts = totals[5:].detach().view(3, -1)
        shares = counts / counts.sum().clamp(min=1.0)
        cross_entropy, dice = entropy / voxels.clamp(min=1.0), 1 - dice / samples
        uniform_entropy = math.log(self.classes) * (voxels > 0)
        return {
            "loss": cross_entropy + dice,
            "cross_entropy": cross_entropy.detach(),
            "dice": dice.detach(),
            "uniform": (uniform_entropy + 1 - uniform_dice / samples).detach(),
            "prior": -torch.xlogy(shares, shares).sum(),
            "accuracy": hits.sum() / voxels.detach().clamp(min=1.0),
            "mIoU": (hits / unions.clamp(min=1.0)).sum() / (unions > 0).sum().clamp(min=1),
        }

    @staticmethod
    def _dice(probabilities: Tensor, truth: Tensor) -> Tensor:
        """Soft Dice of each sample, the mean over the classes: (B, K, X, Y, Z), 0 outside -> (B)."""
        both = (probabilities * truth).sum((2, 3, 4))
        total = (probabilities + truth).sum((2, 3, 4))
        return ((2 * both + SMOOTH) / (total + SMOOTH)).mean(1)

    def pictures(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Central slices along z of the first sample: ``fused`` (first channel), ``weights`` and ``predicted_weights``.

        The weights, from 0 to 1, are stretched to the range of the fused slice, whose window the pictures share.
        """
        middle = prepared["inputs"].shape[-1] // 2
        fused = prepared["inputs"][0, 0, :, :, middle].float()
        low, high = fused.min(), fused.max()
        found = outputs["logits"][0, :, :, :, middle].argmax(0)
        slices = {"fused": fused}
        for name, labels in (("weights", prepared["targets"][0, :, :, middle]), ("predicted_weights", found)):
            slices[name] = low + (high - low) * labels / (self.classes - 1)
        return {name: array.detach().cpu().numpy() for name, array in slices.items()}
