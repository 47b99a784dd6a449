"""Deformable DETR in 3D: two-stage, with iterative box refinement, and denoising queries as an option.

Source: Zhu et al. 2021, "Deformable DETR"; numbers as in the pretraining study (2025). Here the content of a query is
the encoder's token that proposed it plus an embedding of the proposed box, where the original takes the latter alone.
The focal loss is summed over classes as in the original; the study's code takes their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain3d import boxes as box_ops
from pretrain3d.backbones.contract import Level, triple
from pretrain3d.config import UserError
from pretrain3d.detection.contract import MIN_SIZE, Detections
from pretrain3d.detection.necks import ChannelMapper, SimplePyramid, chosen_levels, pyramid_levels
from pretrain3d.detection.queries import Denoising, denoising_queries, match, to_voxels
from pretrain3d.detection.set_loss import Targets
from pretrain3d.detection.transformer import BoxHead, Decoder, EncoderLayer, SineEmbedding, TokenGrid, TokenGrids

PRIOR = 0.05  # probability of an object per query before training
MOST_LEVELS = 4


class DeformableDETR(nn.Module):
    """Set prediction on any backbone of the registry; no anchors, no suppression of its own.

    Args:
        levels: the backbone's levels, finest first; from a single one a pyramid is made, see `necks.SimplePyramid`.
        num_classes: K.
        detection_levels: indices into the levels that become tokens, ascending, the coarsest level of a pyramidal
            backbone among them; None = the last four, but never the first level.
        hidden: channels of the Transformer, a multiple of ``heads`` and even.
        encoder_layers, decoder_layers: their number; at least one decoder layer.
        heads: of all attentions.
        points: that a head reads per level.
        ffn: channels between the two linear layers of a Transformer layer.
        num_queries: Q; an image with more objects leaves some without one (logged as ``unmatched``).
        base_scale: size of a proposal on the finest level as part of the patch, doubled with the stride.
        denoising: about how many contrastive denoising queries are added in training; 0 = none.
        detections_per_patch: boxes kept per patch.
        checkpointing: recompute the encoder's activations in the backward pass: less memory, more time.

    Raises:
        UserError: sizes that do not fit each other, a level index the backbone does not have, or levels that leave the
            backbone's last stage without a use.
    """

    one_size = True  # places and sizes are parts of the image

    def __init__(
        self,
        levels: Sequence[Level],
        num_classes: int,
        detection_levels: Sequence[int] | None = None,
        hidden: int = 128,
        encoder_layers: int = 3,
        decoder_layers: int = 6,
        heads: int = 8,
        points: int = 4,
        ffn: int = 1024,
        num_queries: int = 300,
        base_scale: float = 0.05,
        denoising: int = 0,
        detections_per_patch: int = 100,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check(hidden, heads, base_scale, denoising, encoder_layers, decoder_layers=decoder_layers, points=points,
               ffn=ffn, num_queries=num_queries, detections_per_patch=detections_per_patch)  # fmt: skip
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.denoising = denoising
        self.needs_targets = denoising > 0
        self.detections_per_patch = detections_per_patch
        self.checkpointing = checkpointing

        single, levels = levels[0] if len(levels) == 1 else None, pyramid_levels(levels)
        chosen = chosen_levels(detection_levels, len(levels))
        chosen = chosen if detection_levels is not None else chosen[-MOST_LEVELS:]
        if single is None and chosen[-1] < len(levels) - 1:
            raise UserError(
                f"detector.detection_levels is {list(chosen)}; the coarsest level, {len(levels) - 1}, must be among "
                "them: nothing else reads it, and the stages of the backbone that make it would never learn"
            )
        self.detection_levels = chosen
        self.pyramid = None if single is None else SimplePyramid(single, chosen[0], chosen[-1])
        self.mapper = ChannelMapper(levels, chosen, hidden)
        self.grids = TokenGrids([levels[index].stride for index in chosen], base_scale)
        self.sine = SineEmbedding(3, hidden)
        self.level_embedding = nn.Parameter(torch.randn(len(chosen), hidden))

        sizes = (hidden, heads, len(chosen), points, ffn)
        bias = -math.log((1 - PRIOR) / PRIOR)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(encoder_layers))
        self.proposal = nn.Sequential(nn.Linear(hidden, hidden), nn.LayerNorm(hidden))
        self.proposal_classifier = nn.Linear(hidden, num_classes)
        self.proposal_box_head = BoxHead(hidden)
        nn.init.constant_(self.proposal_classifier.bias, bias)
        self.content = nn.Sequential(nn.Linear(hidden, hidden), nn.LayerNorm(hidden))
        self.decoder = Decoder(decoder_layers, num_classes, bias, *sizes)
        if denoising:
            self.label_embedding = nn.Embedding(num_classes, hidden)

    def forward(
        self, features: list[Tensor], image_shape: Sequence[int], targets: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Backbone features, finest first -> what each layer predicts.

        Args:
            features: one map per level of the backbone.
            image_shape: voxels of the image.
            targets: the batch, for denoising queries in training.

        Returns:
            ``logits`` (Ly, B, Q, K) and ``boxes`` (Ly, B, Q, 6) of every decoder layer, ``proposal_logits`` (B, S, K)
            and ``proposal_boxes`` (B, S, 6) of every token; with denoising queries ``denoising_logits`` and
            ``denoising_boxes`` (Ly, B, D, ...) and ``denoising_valid`` (B, D). Boxes are centre and size relative to
            the image, float32.
        """
        maps = self.mapper(features if self.pyramid is None else self.pyramid(features))
        grid = self.grids.grid(image_shape, maps[0].device)
        memory = self._encode(maps, grid)
        proposals = self.proposal(memory)
        proposal_logits = self.proposal_classifier(proposals)
        proposal_boxes = self.proposal_box_head(proposals, grid.boxes[None])
        outputs = {"proposal_logits": proposal_logits, "proposal_boxes": proposal_boxes}

        scores = proposal_logits.detach().float().amax(dim=-1)
        best = scores.topk(min(self.num_queries, scores.shape[1])).indices[..., None]  # (B, Q, 1)
        boxes = proposal_boxes.detach().gather(1, best.expand(-1, -1, 6))
        content = self.content(proposals.detach().gather(1, best.expand(-1, -1, proposals.shape[-1])))
        noised = self._denoising(targets, image_shape)
        if noised is None:
            outputs["logits"], outputs["boxes"] = self.decoder(content, boxes, memory, grid, None)
            return outputs
        content = torch.cat([self.label_embedding(noised.labels).to(content.dtype), content], dim=1)
        visible = noised.visible(boxes.shape[1])
        logits, refined = self.decoder(content, torch.cat([noised.boxes, boxes], dim=1), memory, grid, visible)
        count = noised.labels.shape[1]
        outputs |= {"logits": logits[:, :, count:], "boxes": refined[:, :, count:]}
        outputs |= {"denoising_logits": logits[:, :, :count], "denoising_boxes": refined[:, :, :count]}
        return outputs | {"denoising_valid": noised.valid}

    def _encode(self, maps: list[Tensor], grid: TokenGrid) -> Tensor:
        """Maps per level -> (B, S, C) tokens that have looked at each other."""
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        levels = [row.expand(m[0, 0].numel(), -1) for row, m in zip(self.level_embedding, maps, strict=True)]
        position = self.sine(grid.boxes[:, :3]) + torch.cat(levels)  # (S, C)
        for layer in self.encoder:
            if self.checkpointing and self.training:
                tokens = checkpoint(layer, tokens, position, grid, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = layer(tokens, position, grid)
        return tokens

    def _denoising(self, targets: dict[str, Tensor] | None, image_shape: Sequence[int]) -> Denoising | None:
        if not (self.denoising and self.training):
            return None
        assert targets is not None, "denoising queries are made from the targets"
        boxes, labels, valid = targets["boxes"], targets["labels"], targets["valid"]
        return denoising_queries(boxes, labels, valid, image_shape, self.denoising, self.num_classes)

    def loss(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Training losses of a batch, float32, divided by the number of objects in the batches of all processes.

        Args:
            outputs: of `forward`.
            batch: ``image`` (B, C, X, Y, Z) for its shape, ``boxes`` (B, N, 6), ``labels`` (B, N), ``valid`` (B, N);
                optional ``annotated`` (B, K) bool: classes that are not annotated in an image have no classification
                loss there.

        Returns:
            ``loss`` = the sum of ``classification``, ``l1`` and ``giou`` of the last decoder layer, the same of the
            other layers as ``auxiliary``, of the encoder as ``proposals`` and, where there are denoising queries, of
            these as ``denoising``; ``unmatched``: objects per image for which no query was left, for the log.
        """
        with torch.autocast(outputs["logits"].device.type, enabled=False):
            targets = Targets.of(batch, self.num_classes)
            layers = len(outputs["logits"])
            logits, boxes = outputs["logits"].float().flatten(0, 1), outputs["boxes"].flatten(0, 1)  # (Ly * B, Q, ...)
            proposal_logits, proposal_boxes = outputs["proposal_logits"].float(), outputs["proposal_boxes"]
            repeated = targets.repeat(layers)
            query, proposal = match(repeated.costs(logits, boxes), targets.costs(proposal_logits, proposal_boxes))
            per_layer = repeated.losses(logits, boxes, query).unflatten(1, (layers, -1)).sum(dim=-1)  # (3, Ly)
            classification, l1, giou = per_layer[:, -1]
            parts = {"classification": classification, "l1": l1, "giou": giou}
            if layers > 1:
                parts["auxiliary"] = per_layer[:, :-1].sum()
            parts["proposals"] = targets.losses(proposal_logits, proposal_boxes, proposal).sum()
            if "denoising_logits" in outputs:
                parts["denoising"] = self._denoising_loss(outputs, targets)
            total = torch.stack(list(parts.values())).sum()
            missed = (query[-len(targets.valid) :] < 0) & targets.valid
        return {"loss": total, **parts, "unmatched": missed.sum() / len(missed)}

    def _denoising_loss(self, outputs: dict[str, Tensor], targets: Targets) -> Tensor:
        """Every positive copy is trained on its object; negative ones are background, copies of padding are nothing."""
        logits, boxes = outputs["denoising_logits"].float(), outputs["denoising_boxes"]
        layers, _, copies, _ = logits.shape
        count = targets.valid.shape[1]
        groups = copies // (2 * count)
        place = torch.arange(copies, device=logits.device).view(groups, 2, count)
        repeated = targets.repeat(layers, groups)
        query = torch.where(repeated.valid, place[:, 0].reshape(1, -1), -1)  # (Ly * B, G * N)
        usable = outputs["denoising_valid"].repeat(layers, 1)
        return repeated.losses(logits.flatten(0, 1), boxes.flatten(0, 1), query, usable).sum() / groups

    @torch.no_grad()
    def predict(self, outputs: dict[str, Tensor], image_shape: Sequence[int]) -> list[Detections]:
        """The best boxes of each image, in its voxels and inside it: the highest scores over queries and classes."""
        shape = triple(image_shape)
        logits = outputs["logits"][-1].float().flatten(1)  # (B, Q * K)
        best = logits.topk(min(self.detections_per_patch, logits.shape[1]))
        boxes = box_ops.clip(to_voxels(outputs["boxes"][-1], shape), shape)
        results = []
        for image, (values, index) in enumerate(zip(best.values, best.indices, strict=True)):
            found = Detections(boxes[image, index // self.num_classes], values.sigmoid(), index % self.num_classes)
            keep = (found.scores > 0) & box_ops.not_smaller(found.boxes, MIN_SIZE)
            results.append(found[keep])
        return results


def _check(hidden: int, heads: int, base_scale: float, denoising: int, encoder_layers: int, **positive: int) -> None:
    """Refuses sizes that do not fit."""
    for name, value in {"hidden": hidden, "heads": heads, **positive}.items():
        if value < 1:
            raise UserError(f"detector.{name} is {value}; expected at least 1")
    if hidden % heads or hidden % 2 or hidden < 6:
        raise UserError(f"detector.hidden is {hidden}; expected an even multiple of heads={heads}, at least 6")
    if not 0 < base_scale < 1:
        raise UserError(f"detector.base_scale is {base_scale}; expected a part of the patch between 0 and 1")
    for name, value in (("denoising", denoising), ("encoder_layers", encoder_layers)):
        if value < 0:
            raise UserError(f"detector.{name} is {value}; expected 0 or more")
