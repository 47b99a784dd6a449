"""Encoder and decoder of Deformable DETR in 3D.

Source: Zhu et al. 2021, "Deformable DETR", with iterative box refinement; queries take their position from their
current box in every layer, as in Liu et al. 2022, "DAB-DETR". Layers are post-norm, without dropout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain3d.backbones.contract import Triple
from pretrain3d.detection.deformable import DeformableAttention
from pretrain3d.detection.queries import inverse_sigmoid

TEMPERATURE = 10_000.0
LARGEST = 0.95  # relative size of a proposal before it is refined


@dataclass(frozen=True)
class TokenGrid:
    """The S tokens of all levels of an image: finest level first, last axis fastest.

    Attributes:
        boxes: (S, 6) float32 centre and proposed size, relative to the image.
        shapes: voxels per axis of each level.
        voxels: (L, 3) float32, the same on the device.
    """

    boxes: Tensor
    shapes: tuple[Triple, ...]
    voxels: Tensor


class TokenGrids:
    """Makes the token grid of an image shape once per device and keeps it.

    Args:
        strides: per level, finest first.
        base_scale: size of a proposal on the finest level as part of the image; coarser levels scale it by their
            relative stride.
    """

    def __init__(self, strides: Sequence[Triple], base_scale: float) -> None:
        self.strides = tuple(strides)
        self.base_scale = base_scale
        self._grids: dict[tuple[tuple[int, ...], torch.device], TokenGrid] = {}

    def grid(self, image_shape: Sequence[int], device: torch.device) -> TokenGrid:
        """The tokens of an image that is a multiple of every stride."""
        key = (tuple(int(n) for n in image_shape), device)
        if key not in self._grids:
            self._grids[key] = self._make(key[0], device)
        return self._grids[key]

    def _make(self, image_shape: tuple[int, ...], device: torch.device) -> TokenGrid:
        boxes, shapes = [], []
        for stride in self.strides:
            assert all(n % s == 0 for n, s in zip(image_shape, stride, strict=True)), f"{image_shape} / {stride}"
            x, y, z = (n // s for n, s in zip(image_shape, stride, strict=True))
            axes = [(torch.arange(n) + 0.5) / n for n in (x, y, z)]
            centers = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
            ratio = torch.tensor(stride) / torch.tensor(self.strides[0])
            sizes = (self.base_scale * ratio).clamp(max=LARGEST).expand(len(centers), 3)
            boxes.append(torch.cat([centers, sizes], dim=-1))
            shapes.append((x, y, z))
        # inference mode would mark the cached tensors as unusable in a later training step
        with torch.inference_mode(False):
            stacked = torch.cat(boxes).to(device=device, dtype=torch.float32, copy=True)
            voxels = torch.tensor(shapes, dtype=torch.float32, device=device)
        return TokenGrid(stacked, tuple(shapes), voxels)


class SineEmbedding(nn.Module):
    """Relative coordinates in [0, 1] as sines and cosines of 2 pi x at falling frequencies (temperature 10,000).

    Args:
        values: coordinates per row.
        channels: of the embedding, even; each coordinate gets the same number of pairs, the first ones one more where
            they do not divide (128 channels for 3 axes: 22, 21 and 21 pairs).
    """

    which: Tensor
    frequency: Tensor

    def __init__(self, values: int, channels: int) -> None:
        super().__init__()
        assert channels % 2 == 0, channels
        pairs = [channels // 2 // values + (index < channels // 2 % values) for index in range(values)]
        which = torch.repeat_interleave(torch.arange(values), torch.tensor(pairs))
        exponent = torch.cat([torch.arange(count) / count for count in pairs if count])
        self.register_buffer("which", which, persistent=False)
        self.register_buffer("frequency", 2 * math.pi / TEMPERATURE**exponent, persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """(..., values) -> (..., channels), float32."""
        angles = values.float().index_select(-1, self.which) * self.frequency
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class SelfAttention(nn.Module):
    """Multi-head attention among queries; positions enter queries and keys, not values."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key = nn.Linear(channels, 2 * channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        for layer in (self.query_key, self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, position: Tensor, visible: Tensor | None) -> Tensor:
        """(B, Q, C) twice and (B or 1, Q, Q) bool, True where the row may look at the column -> (B, Q, C)."""
        query, key = self.query_key(x + position).chunk(2, dim=-1)
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (query, key, self.value(x)))
        mask = None if visible is None else visible[:, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # (B, H, Q, D)
        return self.output(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear layers with ReLU between them; widths from the input's to the output's."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class BoxHead(nn.Module):
    """Three layers to the change of a box in logits; float32 under autocast, since bf16 moves boxes by voxels.

    It starts at no change.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.change = MLP(channels, channels, channels, 6)
        nn.init.zeros_(self.change.layers[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        """(B, Q, C) and (B or 1, Q, 6) relative boxes -> (B, Q, 6) relative boxes, centre and size in (0, 1)."""
        with torch.autocast(x.device.type, enabled=False):
            return (self.change(x.float()) + inverse_sigmoid(reference)).sigmoid()


class EncoderLayer(nn.Module):
    """Deformable self-attention of all tokens, then two linear layers."""

    def __init__(self, channels: int, heads: int, num_levels: int, points: int, ffn: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(channels, heads, num_levels, points)
        self.attention_norm = nn.LayerNorm(channels)
        self.ffn = MLP(channels, ffn, channels)
        self.ffn_norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, position: Tensor, grid: TokenGrid) -> Tensor:
        """(B, S, C) tokens and their (S, C) positions -> (B, S, C)."""
        reference = grid.boxes[None, :, :3]
        x = self.attention_norm(x + self.attention(x + position, reference, x, grid.shapes, grid.voxels))
        return self.ffn_norm(x + self.ffn(x))


class DecoderLayer(nn.Module):
    """Self-attention of queries, deformable attention to the memory, then two linear layers."""

    def __init__(self, channels: int, heads: int, num_levels: int, points: int, ffn: int) -> None:
        super().__init__()
        self.mixing = SelfAttention(channels, heads)
        self.mixing_norm = nn.LayerNorm(channels)
        self.reading = DeformableAttention(channels, heads, num_levels, points)
        self.reading_norm = nn.LayerNorm(channels)
        self.ffn = MLP(channels, ffn, channels)
        self.ffn_norm = nn.LayerNorm(channels)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, memory: Tensor, grid: TokenGrid, visible: Tensor | None
    ) -> Tensor:
        """(B, Q, C) queries and positions, (B, Q, 6) boxes, (B, S, C) memory -> (B, Q, C)."""
        x = self.mixing_norm(x + self.mixing(x, position, visible))
        x = self.reading_norm(x + self.reading(x + position, reference, memory, grid.shapes, grid.voxels))
        return self.ffn_norm(x + self.ffn(x))


class Decoder(nn.Module):
    """Layers that each classify the queries and refine their boxes.

    Args:
        layers: Ly.
        num_classes: K.
        class_bias: of the class logits before training.
        channels, heads, num_levels, points, ffn: see `DecoderLayer`.
    """

    def __init__(
        self,
        layers: int,
        num_classes: int,
        class_bias: float,
        channels: int,
        heads: int,
        num_levels: int,
        points: int,
        ffn: int,
    ) -> None:
        super().__init__()
        self.sine = SineEmbedding(6, 3 * channels)
        self.position = MLP(3 * channels, channels, channels)
        self.layers = nn.ModuleList(DecoderLayer(channels, heads, num_levels, points, ffn) for _ in range(layers))
        self.classifiers = nn.ModuleList(nn.Linear(channels, num_classes) for _ in range(layers))
        self.box_heads = nn.ModuleList(BoxHead(channels) for _ in range(layers))
        for classifier in self.classifiers:
            nn.init.constant_(classifier.bias, class_bias)  # type: ignore[arg-type]

    def forward(
        self, x: Tensor, boxes: Tensor, memory: Tensor, grid: TokenGrid, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Refines the queries layer by layer; no gradient flows through a box into the next layer.

        Args:
            x: (B, Q, C) content of the queries.
            boxes: (B, Q, 6) relative, centre and size.
            memory: (B, S, C) tokens of the encoder.
            grid: where the tokens lie.
            visible: (B or 1, Q, Q) bool, see `SelfAttention`; None = all see all.

        Returns:
            logits (Ly, B, Q, K) and boxes (Ly, B, Q, 6) of every layer.
        """
        x = x + self.position(self.sine(boxes))  # a change of a box can only be told by who knows the box
        logits, refined = [], []
        for layer, classifier, box_head in zip(self.layers, self.classifiers, self.box_heads, strict=True):
            reference = boxes.detach()
            x = layer(x, self.position(self.sine(reference)), reference, memory, grid, visible)
            boxes = box_head(x, reference)
            logits.append(classifier(x))
            refined.append(boxes)
        return torch.stack(logits), torch.stack(refined)
