"""The MAE objective against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_checks import check_empty_batch, generators

from pretrain3d.backbones.contract import Level
from pretrain3d.backbones.decoders import UNetDecoder
from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.config import UserError
from pretrain3d.objectives import PRETRAINING
from pretrain3d.objectives.mae import MAE
from pretrain3d.registry import build

PATCH = (16, 8, 16)


def make_batch(channels: int = 1, batch: int = 2) -> dict[str, torch.Tensor]:
    inside = torch.ones(batch, 1, *PATCH, dtype=torch.bool)
    inside[0, :, 11:] = False  # the volume ends in the patch
    return {"image": torch.randn(batch, channels, *PATCH), "inside": inside}


@pytest.fixture
def backbone() -> ResEnc:
    return ResEnc([4, 6, 8], [1, 1, 1], [1, 2, 2], in_channels=1)


@pytest.fixture
def method(backbone) -> MAE:
    return MAE(backbone.levels, 1, PATCH, UNetDecoder, block=4)


@pytest.mark.parametrize("channels", [1, 2])
def test_loss_by_loops(channels):
    backbone = ResEnc([4, 6], [1, 1], [1, 2], in_channels=channels)
    method = MAE(backbone.levels, channels, PATCH, UNetDecoder, block=4)
    batch = make_batch(channels)
    prepared = method.prepare(batch, generators(0, 1))
    outputs = method(backbone, prepared)
    losses = method.loss(outputs, prepared)
    predicted, image = outputs["reconstruction"].detach().numpy(), batch["image"].numpy()
    keep, inside = prepared["keep"].numpy(), batch["inside"].numpy()
    errors, trivial = [], []
    for b in range(2):
        for c in range(channels):
            seen = [image[b, c][v] for v in np.ndindex(PATCH) if keep[b, 0][v] and inside[b, 0][v]]
            mean = np.mean(seen)
            for v in np.ndindex(PATCH):
                if not keep[b, 0][v] and inside[b, 0][v]:
                    errors.append((predicted[b, c][v] - image[b, c][v]) ** 2)
                    trivial.append((mean - image[b, c][v]) ** 2)
    assert losses["loss"].item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert losses["mean_predictor"].item() == pytest.approx(np.mean(trivial), rel=1e-5)
    assert losses["loss"].dtype == torch.float32 and not losses["mean_predictor"].requires_grad


def test_a_batch_without_hidden_voxels_inside_gives_zero():
    assert check_empty_batch("mae", block=4)["loss"].item() == 0.0


def test_pictures_show_the_first_sample(backbone, method):
    batch = make_batch()
    prepared = method.prepare(batch, generators(0, 1))
    outputs = method(backbone, prepared)
    pictures = method.pictures(outputs, prepared)
    assert list(pictures) == ["original", "masked", "reconstructed"]
    assert all(p.shape == PATCH[:2] and p.dtype == np.float32 for p in pictures.values())
    keep = prepared["keep"][0, 0, :, :, 8].numpy()
    np.testing.assert_array_equal(pictures["original"], batch["image"][0, 0, :, :, 8])
    np.testing.assert_array_equal(pictures["masked"], np.where(keep, pictures["original"], 0))
    predicted = outputs["reconstruction"][0, 0, :, :, 8].detach().numpy()
    np.testing.assert_array_equal(pictures["reconstructed"], np.where(keep, pictures["original"], predicted))


def test_registered_with_its_default_block():
    method = build(
        PRETRAINING,
        {"name": "mae", "ratio": 0.5},
        "module.method",
        levels=(Level(4, (1, 1, 1)), Level(6, (2, 2, 2))),
        in_channels=1,
        patch_size=(48, 48, 80),
        decoder=UNetDecoder,
    )
    assert method.block == (4, 4, 8) and method.ratio == 0.5


@pytest.mark.parametrize("arguments", [{"ratio": 1.0}, {"ratio": 0.0}, {"block": 16}, {"ratio": -0.5}])
def test_masks_that_leave_nothing_are_refused(backbone, arguments):
    with pytest.raises(UserError, match="nothing to predict or nothing to see"):
        MAE(backbone.levels, 1, (16, 16, 16), UNetDecoder, **arguments)


@pytest.mark.parametrize("block", [0, -4, (0, 4, 4)])
def test_blocks_without_a_side_are_refused(backbone, block):
    with pytest.raises(UserError, match=r"mae: block is .*; every side must be 1 voxel or more"):
        MAE(backbone.levels, 1, (16, 16, 16), UNetDecoder, block=block)


@pytest.mark.slow
def test_it_learns_to_inpaint():
    """Smooth waves: what is hidden follows from what is visible, and a trained network says so."""
    torch.manual_seed(0)
    backbone = ResEnc([8, 16, 32], [1, 1, 1], [1, 2, 2])
    method = MAE(backbone.levels, 1, (16, 16, 16), UNetDecoder, block=2)
    parameters = [*backbone.parameters(), *method.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 16)] * 3, indexing="ij"))
    inside = torch.ones(4, 1, 16, 16, 16, dtype=torch.bool)
    history = []
    for step in range(150):
        waves = torch.einsum("bd,dxyz->bxyz", 6 * torch.rand(4, 3), grid) + 6 * torch.rand(4, 1, 1, 1)
        batch = {"image": 1.4 * torch.sin(waves)[:, None], "inside": inside}
        draws = [torch.Generator().manual_seed(step * 4 + sample) for sample in range(4)]
        prepared = method.prepare(batch, draws)
        losses = method.loss(method(backbone, prepared), prepared)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append([losses["loss"].item(), losses["mean_predictor"].item()])
    first, last = np.mean(history[:5], axis=0), np.mean(history[-20:], axis=0)
    assert first[0] > 0.5 * first[1], "an untrained network knows little"
    assert last[0] < 0.2 * last[1]
