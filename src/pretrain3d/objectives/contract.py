"""What every pretraining method promises to the LightningModule that runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class PyramidLevel(Protocol):
    """What a method knows of one level of the backbone: `backbones.contract.Level`."""

    @property
    def channels(self) -> int: ...
    @property
    def stride(self) -> tuple[int, int, int]: ...
    @property
    def tokens(self) -> bool: ...


Backbone = Callable[..., list[Tensor]]  # (image, keep) -> features, finest first; on tokens (image, keep, num_visible)
# (levels, out_channels) -> module from features to outputs, the first of them at the resolution of the image;
# on tokens also (levels, out_channels, number of Transformer blocks over all tokens); skips=False: the coarsest level's
Decoder = Callable[..., torch.nn.Module]


class Embedding(Protocol):
    """What a method uses of a backbone that begins with an embedding of patches: `backbones.contract.Backbone`."""

    def embed(self, image: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, channels, x, y, z) of the finest level."""

    def encode(self, embedded: Tensor) -> list[Tensor]:
        """To the features, finest first."""


class Method(Protocol):
    """A pretraining method; an ``nn.Module`` whose parameters are its decoder, tokens and heads.

    Built as ``PRETRAINING[name](levels, in_channels, patch_size, decoder, **arguments)``: the levels of the backbone,
    finest first; the channels of the image; the (3,) voxels of a training patch; and what builds a decoder from the
    levels and the number of its output channels, see `Decoder`.

    A class that needs more of a backbone than a call has a static ``check_backbone(backbone)``, which raises a
    UserError; one to which mirrored patches may be wrong has ``check_mirrors(flip_axes)``, and one that compares or
    mixes the patches of a step ``check_batch(batch_size, processes)``, with the patches per process; both do so before
    `fit` begins. One that restores intensities has ``measure``, the name of its error, which `test` takes from
    ``loss`` (of several parts from ``reconstruction``); one that calls its networks in another way in every batch,
    ``compilable = False``.
    """

    def prepare(self, batch: dict[str, Any], generator: list[torch.Generator]) -> dict[str, Tensor]:
        """From a batch to what the networks see.

        Args:
            batch: the final batch of the data side; ``image`` (B, C, X, Y, Z), ``inside`` (B, 1, X, Y, Z).
            generator: one per sample, so that a draw depends on the sample and not on its batch.

        Returns:
            at least ``inputs``, ``targets`` and ``keep`` (B, 1, X, Y, Z) bool, True = visible.
        """

    def __call__(self, backbone: Backbone, prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Runs the backbone and the method's own networks."""

    def loss(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, Tensor]:
        """``loss`` is the total, float32; the rest are parts and baselines for the log, all of shape ().

        `test` shows three baselines of a method with a ``measure``, which are the same error of a guess:
        ``mean_predictor``, ``inpainting_linear`` and ``copy`` (of the corrupted patch as it is).
        """

    def pictures(self, outputs: dict[str, Tensor], prepared: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Slices (X, Y) float32 of the first sample, by name."""


class ViewMethod(Method, Protocol):
    """A method that compares crops (views) of a region.

    Its ``prepare`` gets generators on the CPU and returns ``inputs`` (B, V, C, x, y, z), cut but not augmented: the
    module augments each view on its own before the method sees them again. It may have
    ``embeddings(features)``, from pooled features of all levels (N, sum of channels), see `projection.pooled`, to what
    its loss compares (N, D), which is then watched for collapse, too.

    Attributes:
        view_size: (3,) voxels of a view.
    """

    view_size: tuple[int, int, int]

    def after_step(self) -> None:
        """Called after every optimiser step: a teacher follows."""
