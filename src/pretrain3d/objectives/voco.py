"""VoCo: a crop is to be as similar to each crop of a grid as it overlaps with it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain3d.config import UserError
from pretrain3d.devices import sent
from pretrain3d.objectives.collapse import spread
from pretrain3d.objectives.contract import Backbone, Decoder, PyramidLevel
from pretrain3d.objectives.crops import cut, grid_positions, overlaps, random_positions
from pretrain3d.objectives.projection import Projector, pooled_channels, pooled_views
from pretrain3d.parallel import all_gather

EPS = 1e-6  # of both published forms
Distance = Callable[[Tensor], Tensor]


class VoCo(nn.Module):
    """Random crops (targets) of a region against the crops of a grid that tiles it (bases).

    Two published forms, with y the labels and s the positive part of a cosine:

    - ``bases: stop_gradient``: one network; targets learn towards bases that stand still, and bases learn from the
      regularisation alone. With s of target and base: sum(-y log(1 - |y - s|)) / sum(y) + the mean of s^2 where y = 0;
      + the mean of s between bases.
    - ``bases: teacher``: a slow copy of the projector sees the same features. Within a volume, with s of the target
      and the teacher's base: the same first term + the mean of -log(1 - s) where y = 0. Between a volume and the next
      one of the batch: both terms again, with s of the projector's own target and base, and the teacher's s as y;
      + the mean of s^2 between bases.

    Args:
        levels, in_channels, patch_size, decoder: see `contract.Method`. All levels are pooled, nothing is decoded, and
            the patch is the region.
        grid: (3,) number of bases along each axis; it must divide the region, whose share is the size of all crops.
        targets: random crops per region.
        bases: the form, see above.
        momentum: weight of the past in the teacher, per optimiser step; for ``teacher`` only.
        feature_dropout: share of the pooled channels that the projector does not see in training, drawn per crop.
        hidden, embedding, hidden_layers: of the projector.

    Raises:
        UserError: a grid that does not divide the region or has one crop, or a number out of range.

    Source: Wu, Zhuang and Chen, "VoCo" (CVPR 2024), and "Large-scale 3D medical image pre-training with geometric
    context priors" (2024). ``stop_gradient`` is the first paper's loss as nnssl has it (OpenMind: 4 x 4 x 1 bases, 4
    targets); the code beside that paper differs from it by a teacher of the whole network, which its authors dropped in
    the second paper and which is not offered here. ``teacher`` is the code of the second paper (3 x 3 x 1 bases, 2
    targets, momentum 0.9, dropout 0.2, one hidden layer of 1024). Unlike there, dropout takes single channels of the
    student's features (there a slip drops whole crops), the teacher follows after the optimiser's step, and in the
    regularisation both bases of a pair learn, as its formula has it (there the second one stands still). In both forms
    every mean is over the batch of all processes.
    """

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        in_channels: int,
        patch_size: Sequence[int],
        decoder: Decoder,
        grid: tuple[int, int, int] = (3, 3, 1),
        targets: int = 4,
        bases: Literal["stop_gradient", "teacher"] = "stop_gradient",
        momentum: float = 0.9,
        feature_dropout: float = 0.0,
        hidden: int = 2048,
        embedding: int = 2048,
        hidden_layers: int = 2,
    ) -> None:
        super().__init__()
        if any(count < 1 or extent % count for count, extent in zip(grid, patch_size, strict=True)) or max(grid) < 2:
            raise UserError(
                f"voco: grid {tuple(grid)} does not divide data.patch_size {tuple(patch_size)} into two or more crops"
            )
        if targets < 1 or not 0 <= momentum < 1 or not 0 <= feature_dropout < 1:
            raise UserError(
                f"voco: targets={targets} must be at least 1, momentum={momentum} and "
                f"feature_dropout={feature_dropout} from 0 to below 1"
            )
        if hidden_layers < 1:
            raise UserError(f"voco: hidden_layers is {hidden_layers}; at least 1")
        self.region = tuple(patch_size)
        self.view_size = tuple(extent // count for extent, count in zip(patch_size, grid, strict=True))
        self.base_positions = grid_positions(self.view_size, grid)  # (N, 3) on the CPU
        self.targets = targets
        self.momentum = momentum
        self.feature_dropout = feature_dropout
        self.channels = pooled_channels(levels)
        self.projector = Projector(self.channels, hidden, embedding, hidden_layers)
        self.teacher = copy.deepcopy(self.projector).requires_grad_(False) if bases == "teacher" else None

    def check_batch(self, batch_size: int, processes: int) -> None:
        """See `contract.Method`."""
        if self.teacher is not None and batch_size * processes < 2:
            raise UserError("voco with bases: teacher compares volumes; data.batch_size is 1, take 2 or more")

    def prepare(self, batch: dict[str, Any], generator: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Cuts the crops; see `contract.Method.prepare`.

        Returns:
            ``inputs`` (B, T + N, C, x, y, z): targets, then bases; ``labels`` (B, T, N): the share of each target that
            lies in each base; with dropout ``kept`` (B, T + N, channels) bool.
        """
        views, labels, kept = [], [], []
        for image, draws in zip(batch["image"], generator, strict=True):
            targets = random_positions(self.region, self.view_size, self.targets, draws)
            positions = torch.cat([targets, self.base_positions])
            views.append(cut(image, positions, self.view_size))
            labels.append(overlaps(targets, self.base_positions, self.view_size))
            if self.feature_dropout:
                kept.append(torch.rand(len(positions), self.channels, generator=draws) >= self.feature_dropout)
        device = batch["image"].device
        prepared = {"inputs": torch.stack(views), "labels": sent(torch.stack(labels), device)}
        if kept:
            prepared["kept"] = sent(torch.stack(kept), device)
        return prepared

    def forward(self, backbone: Backbone, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of this process' regions, in training of those of all processes.

        Returns:
            ``embeddings`` (B, T + N, D) float32; with a teacher ``teacher``, its own; ``labels`` (B, T, N).
        """
        # validation batches are not paired between processes
        gather: Callable[[Tensor], Tensor] = all_gather if self.training else lambda value: value
        features = pooled_views(backbone, prepared["inputs"])  # (B, T + N, channels)
        outputs = {"labels": gather(prepared["labels"])}
        if self.teacher is not None:
            with torch.no_grad():
                outputs["teacher"] = self.teacher(gather(features))
        if self.training and self.feature_dropout:
            features = features * prepared["kept"] / (1.0 - self.feature_dropout)
        outputs["embeddings"] = self.embeddings(gather(features))
        return outputs

    def embeddings(self, features: Tensor) -> Tensor:
        """Pooled features of all levels as the loss compares them; see `contract.ViewMethod`."""
        return self.projector(features)

    def loss(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the class.

        Returns:
            ``loss``, its parts ``positive``, ``negative``, ``regularisation`` (and ``inter``); ``trivial``: what
            positive + negative is at best when all pairs are equally similar; ``top1``: the share of targets whose most
            similar base is the one they overlap most; ``similarity_entropy``: of the similarities of a target, scaled
            to sum 1, from 0 (one base) to 1 (all alike); ``embedding_std``: see `collapse.spread`.
        """
        labels, embeddings = outputs["labels"], outputs["embeddings"]
        targets, bases = embeddings.tensor_split([self.targets], dim=1)  # (B, T, D), (B, N, D)
        distance = torch.square if self.teacher is None else _log_distance
        if self.teacher is None:
            similarities = similarity(targets, bases.detach())  # (B, T, N)
            parts = terms(labels, similarities, distance)
            parts["regularisation"] = between(bases).mean()
        else:
            teacher_targets, teacher_bases = outputs["teacher"].tensor_split([self.targets], dim=1)
            similarities = similarity(targets, teacher_bases)
            parts = terms(labels, similarities, distance)
            parts["inter"] = self._inter(targets, bases, teacher_targets, teacher_bases)
            parts["regularisation"] = between(bases).square().mean()
        with torch.no_grad():
            report = {"trivial": trivial(labels, distance), **_report(labels, similarities)}
            report["embedding_std"] = spread(embeddings.flatten(0, 1))
        return {"loss": torch.stack(list(parts.values())).sum(), **parts, **report}

    def _inter(self, targets: Tensor, bases: Tensor, teacher_targets: Tensor, teacher_bases: Tensor) -> Tensor:
        """Targets of each volume against bases of the next one, the last against the first."""
        labels = similarity(teacher_targets, teacher_bases.roll(-1, dims=0))
        parts = terms(labels, similarity(targets, bases.roll(-1, dims=0)), _log_distance)
        return parts["positive"] + parts["negative"]

    @torch.no_grad()
    def after_step(self) -> None:
        """The teacher follows the projector; see `contract.ViewMethod.after_step`."""
        if self.teacher is not None:
            for old, new in zip(self.teacher.parameters(), self.projector.parameters(), strict=True):
                old.lerp_(new, 1.0 - self.momentum)

    def pictures(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Central slices along z of the first region, (x, y) float32 each.

        Returns:
            ``target``: the first; ``nearest_base``: what it overlaps most; ``chosen_base``: what it is most similar to.
        """
        embeddings = outputs["embeddings"][:1]
        targets, bases = embeddings.tensor_split([self.targets], dim=1)
        chosen = int(similarity(targets, bases)[0, 0].argmax())
        nearest = int(prepared["labels"][0, 0].argmax())
        slices = prepared["inputs"][0, :, 0, :, :, self.view_size[2] // 2].float().cpu().numpy()
        rows = {"target": 0, "nearest_base": self.targets + nearest, "chosen_base": self.targets + chosen}
        return {name: slices[row] for name, row in rows.items()}


def similarity(targets: Tensor, bases: Tensor) -> Tensor:
    """The positive part of the cosine: (B, T, D), (B, N, D) -> (B, T, N) in [0, 1]."""
    cosines = F.normalize(targets, dim=-1) @ F.normalize(bases, dim=-1).transpose(1, 2)
    return cosines.clamp(0.0, 1.0)


def between(bases: Tensor) -> Tensor:
    """`similarity` of every two bases of a region: (B, N, D) -> (B, N (N - 1) / 2)."""
    first, second = torch.triu_indices(bases.shape[1], bases.shape[1], offset=1, device=bases.device)
    return similarity(bases, bases)[:, first, second]


def _log_distance(similarities: Tensor) -> Tensor:
    return -(1.0 - similarities + EPS).log()


def terms(labels: Tensor, similarities: Tensor, distance: Distance) -> dict[str, Tensor]:
    """``positive``: the mean of -log(1 - |label - similarity|), weighted by the label; ``negative``: the mean of
    ``distance`` over the pairs whose label is 0.

    Args:
        labels, similarities: (..., N) in [0, 1].
        distance: of a similarity from 0.
    """
    apart = labels == 0
    positive = labels * _log_distance((labels - similarities).abs())
    negative = distance(similarities) * apart
    return {"positive": positive.sum() / (labels.sum() + EPS), "negative": negative.sum() / (apart.sum() + EPS)}


def trivial(labels: Tensor, distance: Distance) -> Tensor:
    """The smallest positive + negative that one similarity for all pairs gives, of 0, 0.05, ..., 1."""
    constants = torch.linspace(0.0, 1.0, 21, device=labels.device)[:, None]  # (21, 1)
    labels = labels.flatten()
    positive = (labels * _log_distance((labels - constants).abs())).sum(dim=1) / (labels.sum() + EPS)  # (21)
    return (positive + distance(constants[:, 0])).min()


def _report(labels: Tensor, similarities: Tensor) -> dict[str, Tensor]:
    shares = (similarities + EPS) / (similarities + EPS).sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=-1) / math.log(labels.shape[-1])
    top1 = similarities.argmax(dim=-1) == labels.argmax(dim=-1)
    return {"top1": top1.float().mean(), "similarity_entropy": entropy.mean()}
