"""SimCLR in 3D: two overlapping crops of a volume are to look more alike than any two others of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain3d.config import UserError
from pretrain3d.objectives.collapse import spread
from pretrain3d.objectives.contract import Backbone, Decoder, PyramidLevel
from pretrain3d.objectives.crops import cut, partner_positions, random_positions
from pretrain3d.objectives.projection import Projector, pooled_channels, pooled_views
from pretrain3d.parallel import all_gather


class SimCLR(nn.Module):
    """Pairs of crops of a region, at most half a side apart along each axis, compared by NT-Xent.

    Args:
        levels, in_channels, patch_size, decoder: see `contract.Method`. All levels are pooled, nothing is decoded, and
            the patch is the region that the crops are cut from.
        crop_size: (3,) voxels, or one number; ``None`` = a cube with the region's shortest side.
        pairs: of crops per region. Crops of other pairs of the same region count as negatives.
        temperature: of NT-Xent.
        hidden, embedding: widths of the projector.

    Raises:
        UserError: a crop that does not fit into the region, fewer than 1 pair, or a temperature that is not positive.

    Source: Chen et al., "A simple framework for contrastive learning of visual representations" (2020), equation 1; in
    3D Wald et al., "An OpenMind for 3D medical vision" (2024): regions of 192 x 192 x 64, crops of 64, two pairs. Its
    code takes negatives from one process only; here they come from all processes, with gradient, as in the paper (of
    gradients that are accumulated, each batch for itself).
    """

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        in_channels: int,
        patch_size: Sequence[int],
        decoder: Decoder,
        crop_size: int | tuple[int, int, int] | None = None,
        pairs: int = 2,
        temperature: float = 0.5,
        hidden: int = 2048,
        embedding: int = 2048,
    ) -> None:
        super().__init__()
        if crop_size is None:
            crop_size = min(patch_size)
        self.view_size = (crop_size,) * 3 if isinstance(crop_size, int) else tuple(crop_size)
        if any(not 0 < side <= extent for side, extent in zip(self.view_size, patch_size, strict=True)):
            raise UserError(f"simclr: crop_size {self.view_size} does not fit into data.patch_size {tuple(patch_size)}")
        if pairs < 1:
            raise UserError(f"simclr: pairs is {pairs}; at least 1")
        if temperature <= 0:
            raise UserError(f"simclr: temperature is {temperature}; above 0, 0.5 is usual")
        self.region = tuple(patch_size)
        self.pairs = pairs
        self.temperature = temperature
        self.projector = Projector(pooled_channels(levels), hidden, embedding)

    def check_batch(self, batch_size: int, processes: int) -> None:
        """See `contract.Method`."""
        if batch_size * processes * self.pairs < 2:
            raise UserError(
                "simclr tells the pairs of a batch apart; data.batch_size and pairs are 1, take 2 or more of either"
            )

    def prepare(self, batch: dict[str, Any], generator: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Cuts the views; see `contract.Method.prepare`.

        Returns:
            ``inputs`` (B, 2 * pairs, C, x, y, z): the first of each pair, then their partners in the same order.
        """
        views = []
        for image, draws in zip(batch["image"], generator, strict=True):
            first = random_positions(self.region, self.view_size, self.pairs, draws)
            second = partner_positions(first, self.region, self.view_size, draws)
            views.append(cut(image, torch.cat([first, second]), self.view_size))
        return {"inputs": torch.stack(views)}

    def forward(self, backbone: Backbone, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns: ``embeddings`` (B, 2 * pairs, D) float32; in training of the regions of all processes."""
        features = pooled_views(backbone, prepared["inputs"])
        if self.training:  # validation batches are not paired between processes
            features = all_gather(features)
        return {"embeddings": self.embeddings(features)}

    def embeddings(self, features: Tensor) -> Tensor:
        """Pooled features of all levels as the loss compares them; see `contract.ViewMethod`."""
        return self.projector(features)

    def loss(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """NT-Xent over all pairs.

        Returns:
            ``loss``; ``trivial``, log(2N - 1), what it is when all crops look alike; ``top1``, the share of crops whose
            nearest other one is their partner; ``embedding_std``, see `collapse.spread`.
        """
        embeddings = outputs["embeddings"]
        first, second = (half.flatten(0, 1) for half in embeddings.float().split(self.pairs, dim=1))
        loss, top1 = nt_xent(first, second, self.temperature)
        with torch.no_grad():
            std = spread(embeddings.flatten(0, 1))
        trivial = loss.new_full((), math.log(2 * len(first) - 1))
        return {"loss": loss, "trivial": trivial, "top1": top1, "embedding_std": std}

    def after_step(self) -> None:
        """Nothing follows the network; see `contract.ViewMethod.after_step`."""

    def pictures(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Returns: ``view`` and ``partner``, central slices along z of the first pair, (x, y) float32 each."""
        views = prepared["inputs"][0, :, 0, :, :, self.view_size[2] // 2].float().cpu().numpy()
        return {"view": views[0], "partner": views[self.pairs]}


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The normalised, temperature-scaled cross entropy: each of 2N vectors is to find its partner among the 2N - 1.

    Args:
        first, second: (N, D); row i of one and row i of the other are partners.
        temperature: that cosines are divided by.

    Returns:
        the loss, a mean over 2N; and the share of vectors whose nearest neighbour is their partner.
    """
    vectors = F.normalize(torch.cat([first, second]), dim=1)  # (2N, D)
    logits = vectors @ vectors.T / temperature  # (2N, 2N)
    logits = logits.masked_fill(torch.eye(len(vectors), dtype=torch.bool, device=logits.device), -torch.inf)
    partner = torch.arange(len(vectors), device=logits.device).roll(len(first))
    loss = F.cross_entropy(logits, partner)
    return loss, (logits.detach().argmax(dim=1) == partner).float().mean()
