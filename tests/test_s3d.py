"""S3D against its definition: nothing hidden is read, statistics of what is visible, tokens elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_checks import (
    check_bf16_gradients,
    check_empty_batch,
    check_hidden_is_scored,
    check_own_draws,
    check_pictures,
    generators,
    make,
    make_batch,
)

from pretrain3d.backbones.contract import Level
from pretrain3d.backbones.primus import Primus
from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.config import UserError
from pretrain3d.objectives.masking import block_mask
from pretrain3d.objectives.s3d import S3D, Densify
from pretrain3d.sparse import active_voxels

SHAPE = (16, 16, 16)


def test_loss_voxels_are_hidden_and_hidden_voxels_are_not_read():
    check_hidden_is_scored("s3d", block=4)


def test_no_gradient_reaches_a_hidden_voxel():
    """Not even the shell next to visible ones, where the reference code leaks."""
    backbone, method = make("s3d", SHAPE, block=4)
    image = torch.randn(2, 1, *SHAPE, requires_grad=True)
    prepared = method.prepare({**make_batch(SHAPE), "image": image}, generators(0, 1))
    method(backbone, prepared)["reconstruction"].square().sum().backward()
    assert image.grad is not None and not image.grad[~prepared["keep"]].any() and image.grad[prepared["keep"]].any()


def test_contract():
    check_bf16_gradients("s3d")
    check_own_draws("s3d")
    assert check_empty_batch("s3d")["loss"] == 0
    check_pictures("s3d", ["original", "masked", "reconstructed"])


@pytest.mark.parametrize("convolve", [False, True])
def test_densify_by_loops(convolve):
    densify = Densify(3, convolve)
    active = torch.rand(2, 1, 4, 3, 5) < 0.4
    features = torch.randn(2, 3, 4, 3, 5) * active
    expected = np.empty(features.shape)
    token = densify.token.detach().numpy()
    for b, c in np.ndindex(2, 3):
        values = [features[b, c][v].item() for v in np.ndindex(4, 3, 5) if active[b, 0][v]]
        for v in np.ndindex(4, 3, 5):
            normed = (features[b, c][v].item() - np.mean(values)) / np.sqrt(np.var(values) + 1e-5)
            expected[b, c][v] = normed if active[b, 0][v] else token[c]
    got = densify(features, active).detach()
    if convolve:
        got, expected = got, densify.project(torch.from_numpy(expected).float()).detach().numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_size_on_resenc_l():
    strides = ((s, s, s) for s in (1, 2, 4, 8, 16, 32))
    channels = (32, 64, 128, 256, 320, 320)
    levels = [Level(c, s) for c, s in zip(channels, strides, strict=True)]
    densify = S3D(levels, 1, (160, 160, 160), lambda *_: torch.nn.Identity()).densify
    tokens = sum(level.token.numel() for level in densify)
    projections = sum(p.numel() for level in densify for p in level.project.parameters())
    assert (tokens, projections) == (1_120, 7_853_120)


def test_levels_finer_than_the_mask_are_a_quarter_active_and_coarser_ones_all():
    keep = block_mask((80, 80, 80), (8, 8, 8), 0.75, generators(0))
    shares = [active_voxels(keep, (s, s, s)).float().mean().item() for s in (1, 2, 4, 8, 16)]
    assert shares == [0.25, 0.25, 0.25, 0.25, 1.0]


def test_backbones_that_are_not_sparse_are_refused():
    with pytest.raises(UserError, match=r"ResEnc has masking=zero; take resenc_xs.*backbone.masking=sparse"):
        S3D.check_backbone(ResEnc([4, 8], [1, 1], [1, 2]))
    with pytest.raises(UserError, match="Primus has no sparse masking"):
        S3D.check_backbone(Primus(embed_dim=24, depth=1, heads=2, image_size=16))
    S3D.check_backbone(ResEnc([4, 8], [1, 1], [1, 2], masking="sparse"))


def test_masks_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match=r"s3d: ratio 1.0.*nothing to predict or nothing to see"):
        make("s3d", SHAPE, ratio=1.0)
