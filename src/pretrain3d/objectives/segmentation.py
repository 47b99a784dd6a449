"""Supervised pretraining: say of every voxel which organ or object it belongs to, on one data set or on many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain3d.config import UserError
from pretrain3d.objectives.contract import Decoder, PyramidLevel
from pretrain3d.parallel import all_sum

SMOOTH = 1e-5  # of the Dice
NEVER = -1e4  # logit of a class that a sample says nothing about: its probability is exactly 0


class Segmentation(nn.Module):
    """Cross-entropy plus soft Dice, 1 : 1, on a decoder's outputs; the Dice of a class is over the whole global batch.

    ``softmax``: one class per voxel, or background. ``sigmoid``: one output per class and data set, so that sets which
    draw the same organ by other rules do not contradict each other.

    Only what was annotated is learned. A sample teaches the classes of its own set that were annotated in its case; the
    other outputs get a gradient of exactly zero from it: with ``sigmoid`` they are not looked at, with ``softmax`` they
    are left out of the sum that the probabilities are divided by, so that background is told from the annotated classes
    alone. Voxels outside the volume, and those labelled with a class that was not annotated, do not count. A class
    without a voxel in the batch counts in the cross-entropy only, since its Dice would be a constant.

    Args:
        levels, in_channels, patch_size, decoder: see `contract.Method`.
        classes: names of the classes of each data set; outputs stand in this order.
        make_stem: a copy of the backbone's stem; ``None`` where it has none that can be replaced.
        outputs: see above; several data sets need ``sigmoid``.
        deep_supervision: losses at all levels of the decoder but its coarsest, with weights 1, 1/2, 1/4, ... that add
            up to 1; a coarser target is the label at the middle of each cell.
        stems: data sets that have a stem of their own instead of the backbone's, which all others share.

    Raises:
        UserError: no classes, ``softmax`` for several sets, an unknown set in ``stems``, a backbone without what the
            arguments need.

    Source: Ulrich et al., "MultiTalent" (2023), for ``sigmoid``; Isensee et al., nnU-Net, for ``softmax`` and the
    deep supervision. MultiTalent sums both losses over the classes that are annotated in the batch; here they are means
    over these classes, so that the size of a step does not depend on how many there are.
    """

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        in_channels: int,
        patch_size: Sequence[int],
        decoder: Decoder,
        classes: dict[str, list[str]],
        make_stem: Callable[[], nn.Module] | None = None,
        outputs: Literal["softmax", "sigmoid"] = "softmax",
        deep_supervision: bool = False,
        stems: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        _check_sets(classes, outputs, stems, make_stem)
        self.exclusive = outputs == "softmax"
        counts = [len(names) + self.exclusive for names in classes.values()]
        ends = list(accumulate(counts))
        self.channels = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]  # of each set
        names_before = accumulate(map(len, classes.values()))
        self.first_class = [0, *names_before][:-1]
        self.num_outputs = _num_outputs(levels) if deep_supervision else 1
        more = {"outputs": self.num_outputs} if self.num_outputs > 1 else {}
        self.decoder = decoder(levels, ends[-1], **more)
        self.stem_of_set = [1 + stems.index(name) if name in stems else 0 for name in classes]
        self.stems = nn.ModuleList(make_stem() for _ in stems) if make_stem is not None else nn.ModuleList()
        self.compilable = not stems  # which sample has which stem

    def prepare(self, batch: dict[str, Any], generator: Sequence[torch.Generator] = ()) -> dict[str, Any]:
        """Takes the labels out of the batch; nothing is drawn.

        Args:
            batch: with ``semantic`` (B, X, Y, Z) and ``semantic_annotated`` (B, K), else ``mask`` and ``annotated``.
            generator: not used.

        Returns:
            ``inputs`` (B, C, X, Y, Z); ``targets`` (B, X, Y, Z) integers, 0 = background, 1.. the classes of all sets;
            ``annotated`` (B, K) bool; ``sets`` (B) int; ``inside`` and ``keep``, all True, (B, 1, X, Y, Z) bool.
        """
        names = ("semantic", "semantic_annotated") if "semantic" in batch else ("mask", "annotated")
        image, inside = batch["image"], batch["inside"]
        return {
            "inputs": image,
            "targets": batch[names[0]],
            "annotated": batch[names[1]],
            "sets": batch.get("set_index", [0] * len(image)),
            "inside": inside,
            "keep": torch.ones_like(inside),
        }

    def forward(self, backbone: Any, prepared: dict[str, Any]) -> dict[str, list[Tensor]]:
        """Returns: ``logits``, finest first, (B, outputs, X / s, Y / s, Z / s) at the strides of the finest levels."""
        stem = (self._stem(backbone.stem, prepared["sets"]),) if len(self.stems) else ()
        return {"logits": self.decoder(backbone(prepared["inputs"], None, *stem))}

    def _stem(self, shared: nn.Module, sets: Sequence[int]) -> Callable[..., Tensor]:
        """A stem that treats every sample with that of its set."""
        stems = [shared, *self.stems]
        chosen = [self.stem_of_set[index] for index in sets]

        def stem(image: Tensor, *more: Any) -> Tensor:
            x = torch.cat([stems[which](image[row : row + 1], *more) for row, which in enumerate(chosen)])
            idle = [p.sum() for which, module in enumerate(stems) if which not in chosen for p in module.parameters()]
            return x + 0.0 * torch.stack(idle).sum() if idle else x  # DDP waits for a gradient of every parameter

        return stem

    def of_set(self, logits: Tensor, index: int) -> Tensor:
        """Those of one data set: (..., outputs, X, Y, Z) -> (..., n, X, Y, Z); with ``softmax`` background first."""
        return logits.movedim(-4, 0)[self.channels[index]].movedim(0, -4)

    def found(self, logits: Tensor) -> Tensor:
        """Which voxels each class of a set is said to have: (n, X, Y, Z) of `of_set` -> (classes, X, Y, Z) bool."""
        if not self.exclusive:
            return logits > 0
        classes = torch.arange(1, len(logits), device=logits.device)
        return logits.argmax(0) == classes.view(-1, 1, 1, 1)

    def loss(self, outputs: dict[str, list[Tensor]], prepared: dict[str, Any]) -> dict[str, Tensor]:
        """Deep supervision adds up levels; the parts are those of the finest one.

        Returns:
            ``loss``; ``cross_entropy``, of ``softmax`` the mean over the voxels, of ``sigmoid`` the mean over the
            classes of the mean over their voxels; ``dice_loss``, 1 - soft Dice, the mean over the foreground classes;
            ``trivial``, the loss of answering with each class's share of the batch everywhere.
        """
        totals = torch.stack([self._sums(logits, prepared) for logits in outputs["logits"]])
        if self.training:  # validation batches are not paired between processes
            totals = all_sum(totals)
        parts = [self._losses(level) for level in totals]
        weights = [0.5**level for level in range(len(parts))]
        loss = torch.stack([w * (a + b) for w, (a, b) in zip(weights, parts, strict=True)]).sum() / sum(weights)
        return {
            "loss": loss,
            "cross_entropy": parts[0][0].detach(),
            "dice_loss": parts[0][1].detach(),
            "trivial": self._trivial(totals[0].detach()),
        }

    def _sums(self, logits: Tensor, prepared: dict[str, Any]) -> Tensor:
        """(outputs, 5): per output the `voxel_sums` of the batch, from which every loss is made."""
        steps = [full // size for full, size in zip(prepared["inputs"].shape[2:], logits.shape[2:], strict=True)]
        middle = tuple(slice(step // 2, None, step) for step in steps)
        targets, inside = prepared["targets"][(..., *middle)], prepared["inside"][(..., *middle)][:, 0]
        sets = prepared["sets"]
        sums = []
        for index, channels in enumerate(self.channels):
            rows = [row for row, other in enumerate(sets) if other == index]
            if not rows:
                sums.append(logits.new_zeros(channels.stop - channels.start, 5, dtype=torch.float32))
                continue
            first, count = self.first_class[index], channels.stop - channels.start - self.exclusive
            sums.append(
                voxel_sums(
                    torch.stack([logits[row, channels] for row in rows]).flatten(2).float(),
                    torch.stack([targets[row] for row in rows]).flatten(1),
                    torch.stack([inside[row] for row in rows]).flatten(1),
                    torch.stack([prepared["annotated"][row, first : first + count] for row in rows]),
                    first,
                    self.exclusive,
                )
            )
        return torch.cat(sums)

    def _losses(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and Dice loss from (outputs, 5) sums."""
        shared, found, true, entropy, voxels = totals.unbind(1)
        if self.exclusive:
            cross_entropy = entropy.sum() / voxels.sum().clamp(min=1.0)
        else:
            known = voxels > 0
            cross_entropy = (entropy / voxels.clamp(min=1.0)).sum() / known.sum().clamp(min=1)
        dice = (2 * shared + SMOOTH) / (found + true + SMOOTH)
        return cross_entropy, self._foreground_mean(1 - dice, true)

    def _trivial(self, totals: Tensor) -> Tensor:
        true, voxels = totals[:, 2], totals[:, 4]
        if self.exclusive:
            share = voxels / voxels.sum().clamp(min=1.0)
            entropy = -torch.xlogy(share, share).sum()
        else:
            share = true / voxels.clamp(min=1.0)
            both = -torch.xlogy(share, share) - torch.xlogy(1 - share, 1 - share)
            entropy = both.sum() / (voxels > 0).sum().clamp(min=1)
        return entropy + self._foreground_mean(1 - share, true)

    def _foreground_mean(self, values: Tensor, true: Tensor) -> Tensor:
        """The mean over the foreground classes that have a voxel; 0 where none has."""
        first = 1 if self.exclusive else 0
        present = true[first:] > 0
        return (values[first:] * present).sum() / present.sum().clamp(min=1)

    def pictures(self, outputs: dict[str, Any], prepared: dict[str, Any]) -> dict[str, np.ndarray]:
        """See `slices`; of the first sample."""
        index, labels = prepared["sets"][0], prepared["targets"][0]
        found = self.found(self.of_set(outputs["logits"][0][0].float(), index))
        local = torch.where(labels > 0, labels - self.first_class[index], 0)
        return slices(prepared["inputs"][0, 0], local, found)


def slices(image: Tensor, labels: Tensor, found: Tensor) -> dict[str, np.ndarray]:
    """The slice along z with the most labelled voxels: ``image``, ``labels`` and ``predicted``.

    Labels are stretched to the range of the image, whose window the pictures share.

    Args:
        image: (X, Y, Z).
        labels: (X, Y, Z) integers, 0 = background.
        found: (K, X, Y, Z) bool, which voxels each class is said to have.
    """
    z = int((labels > 0).sum((0, 1)).argmax())
    numbers = torch.arange(1, len(found) + 1, device=found.device).view(-1, 1, 1)
    plane, predicted = image[:, :, z].float(), (found[..., z] * numbers).amax(0)
    low, high = plane.min(), plane.max()
    shown = {"image": plane}
    for name, drawn in (("labels", labels[:, :, z]), ("predicted", predicted)):
        shown[name] = low + (high - low) * drawn / len(found)
    return {name: array.detach().cpu().float().numpy() for name, array in shown.items()}


def voxel_sums(
    logits: Tensor, targets: Tensor, inside: Tensor, annotated: Tensor, first: int, exclusive: bool
) -> Tensor:
    """What the losses of some samples of one data set are made of.

    Args:
        logits: (B, n, V) float32; with ``exclusive`` background comes first.
        targets: (B, V) integers, 0 = background, ``first`` + 1 = the first class of the set.
        inside: (B, V) bool; other voxels do not count.
        annotated: (B, K) bool, K classes without background.
        first: classes of other sets before these.
        exclusive: softmax over the outputs instead of a sigmoid of each.

    Returns:
        (n, 5): over samples and voxels the sums of probability where it is true, probability, truth, cross-entropy
        and, for the mean of the last, voxels: with ``exclusive`` each voxel at its true class, else all voxels at every
        annotated class.
    """
    local = torch.where(targets > 0, targets.long() - first, 0)  # (B, V)
    known = F.pad(annotated, (1, 0), value=True)  # (B, 1 + K)
    counted = inside & known.gather(1, local)
    classes = torch.arange(0 if exclusive else 1, annotated.shape[1] + 1, device=logits.device)
    truth = (local[:, None] == classes[:, None]) & counted[:, None]  # (B, n, V)
    if exclusive:
        logs = logits.masked_fill(~known[..., None], NEVER).log_softmax(1)
        chances, entropy, voxels = logs.exp() * counted[:, None], -(logs * truth), truth
    else:
        scored = counted[:, None] & annotated[..., None]
        truth = truth & scored
        chances = logits.sigmoid() * scored
        entropy, voxels = F.softplus(torch.where(truth, -logits, logits)) * scored, scored
    return torch.stack(
        [part.sum((0, 2)) for part in (chances * truth, chances, truth.float(), entropy, voxels.float())], 1
    )


def _num_outputs(levels: Sequence[PyramidLevel]) -> int:
    """Outputs of deep supervision: of every level but the coarsest, the lowest dropped."""
    if set(levels[0].stride) != {1} or len(levels) < 2:
        raise UserError(
            "supervised: deep_supervision needs a pyramid from the image's resolution on; this backbone has "
            f"{len(levels)} level(s) from stride {tuple(levels[0].stride)} on; set module.method.deep_supervision=false"
        )
    return max(1, len(levels) - 2)


def _check_sets(
    classes: dict[str, list[str]], outputs: str, stems: Sequence[str], make_stem: Callable[[], nn.Module] | None
) -> None:
    sets = ", ".join(classes)
    for name, names in classes.items():
        if not names:
            raise UserError(f"supervised: data set {name} has no class to learn; see data.labels")
    if outputs == "softmax" and len(classes) > 1:
        raise UserError(f"supervised: softmax is for one data set, these are {sets}; set module.method.outputs=sigmoid")
    for name in stems:
        if name not in classes:
            raise UserError(f"supervised: stems names {name!r}; the data sets are {sets}")
    if stems and make_stem is None:
        raise UserError("supervised: stems per data set need a backbone with a stem, such as resenc_s; set stems=[]")
    if len(set(stems)) == len(classes):
        raise UserError(
            "supervised: every data set has a stem of its own, so nothing trains the backbone's, which is exported; "
            "leave out the set that is nearest to the detector's"
        )
