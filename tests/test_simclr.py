"""SimCLR and what views are made of, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from pretrain3d.backbones.contract import Level
from pretrain3d.backbones.decoders import UNetDecoder
from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.config import UserError
from pretrain3d.data.views import ViewAugmentation
from pretrain3d.objectives import PRETRAINING
from pretrain3d.objectives.crops import cut, partner_positions, random_positions
from pretrain3d.objectives.projection import Projector, pooled, pooled_channels
from pretrain3d.objectives.simclr import SimCLR, nt_xent
from pretrain3d.registry import build

REGION, CROP = (16, 12, 8), (8, 8, 4)


def draws(batch: int = 2, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + sample) for sample in range(batch)]


def coordinates(batch: int = 2) -> torch.Tensor:
    """(B, 3, X, Y, Z): every voxel says where it lies."""
    axes = [torch.arange(size, dtype=torch.float32) for size in REGION]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None].expand(batch, -1, -1, -1, -1).clone()


def small(**arguments) -> tuple[ResEnc, SimCLR]:
    backbone = ResEnc([4, 6], [1, 1], [1, 2], in_channels=3)
    arguments = {"crop_size": CROP, "hidden": 16, "embedding": 8, **arguments}
    return backbone, SimCLR(backbone.levels, 3, REGION, UNetDecoder, **arguments)


def test_nt_xent_by_loops():
    first, second = torch.randn(5, 4), torch.randn(5, 4)
    second[:2] = first[:2] + 0.1
    loss, top1 = nt_xent(first, second, 0.5)
    z = torch.cat([first, second]).double().numpy()
    losses, hits = [], []
    for i in range(10):
        similar = {k: z[i] @ z[k] / np.linalg.norm(z[i]) / np.linalg.norm(z[k]) for k in range(10) if k != i}
        partner = (i + 5) % 10
        losses.append(-math.log(math.exp(similar[partner] / 0.5) / sum(math.exp(s / 0.5) for s in similar.values())))
        hits.append(max(similar, key=similar.__getitem__) == partner)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert top1.item() == pytest.approx(np.mean(hits)) and 0 < top1.item() < 1


def test_crops_that_all_look_alike_cost_the_trivial_level():
    _, method = small(pairs=3)
    losses = method.eval().loss({"embeddings": torch.ones(4, 6, 8)}, {})
    assert losses["loss"].item() == pytest.approx(losses["trivial"].item(), abs=1e-5)
    assert losses["trivial"].item() == pytest.approx(math.log(2 * 12 - 1))
    assert losses["embedding_std"].item() == pytest.approx(0.0, abs=1e-3)


def test_partners_are_at_most_half_a_side_away_and_reach_everywhere():
    generator = torch.Generator().manual_seed(0)
    first = random_positions(REGION, CROP, 4000, generator)
    second = partner_positions(first, REGION, CROP, generator)
    last = torch.tensor(REGION) - torch.tensor(CROP)
    for positions in (first, second):
        assert (positions >= 0).all() and (positions <= last).all()
        assert (positions.amin(0) == 0).all() and (positions.amax(0) == last).all()
    apart = (first - second).abs()
    assert apart.amax(0).tolist() == [4, 4, 2]  # half a side, along each axis
    counts = torch.bincount(first[:, 1], minlength=5) / 4000
    assert counts.tolist() == pytest.approx([0.2] * 5, abs=0.03)  # each place alike


def test_views_hold_the_voxels_of_their_places():
    image = coordinates(1)[0]
    views = cut(image, torch.tensor([[0, 0, 0], [8, 4, 4], [3, 1, 2]]), CROP)
    assert views.shape == (3, 3, *CROP)
    assert views[:, :, 0, 0, 0].tolist() == [[0, 0, 0], [8, 4, 4], [3, 1, 2]]
    assert views[1, :, -1, -1, -1].tolist() == [15, 11, 7]
    _, method = small()
    prepared = method.prepare({"image": coordinates()}, draws())
    starts = prepared["inputs"][..., 0, 0, 0]  # (B, V, 3)
    assert ((starts[:, :2] - starts[:, 2:]).abs() <= torch.tensor(CROP) / 2).all()
    alone = method.prepare({"image": coordinates(1)}, draws(seed=1)[:1])["inputs"]
    torch.testing.assert_close(prepared["inputs"][1:], alone, rtol=0, atol=0)  # whatever batch it lands in


def test_every_parameter_learns_and_the_loss_is_float32_under_bf16():
    backbone, method = small()
    with torch.autocast("cpu", torch.bfloat16):
        prepared = method.prepare({"image": torch.randn(2, 3, *REGION)}, draws())
        outputs = method(backbone, prepared)
    assert outputs["embeddings"].shape == (2, 4, 8) and outputs["embeddings"].dtype == torch.float32
    method.loss(outputs, prepared)["loss"].backward()
    for name, parameter in nn.ModuleDict({"backbone": backbone, "method": method}).named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert {key: value.shape for key, value in method.pictures(outputs, prepared).items()} == {
        "view": CROP[:2], "partner": CROP[:2],
    }  # fmt: skip


def test_pooled_features_are_the_means_of_all_levels():
    levels = (Level(2, (1, 1, 1)), Level(3, (2, 2, 2)))
    features = [torch.randn(2, 2, 4, 4, 4), torch.randn(2, 3, 2, 2, 2).bfloat16()]
    vector = pooled(features)
    assert vector.shape == (2, pooled_channels(levels)) and vector.dtype == torch.float32
    assert vector[1, 3].item() == pytest.approx(features[1][1, 1].float().mean().item(), abs=1e-6)
    assert pooled(features[:1]).shape == (2, 2)  # a network with one level


def test_projector_takes_away_what_all_images_share():
    projector = Projector(6, 64, 32)
    features = torch.randn(5, 7, 6)
    embeddings, shifted = (projector(values) for values in (features, features + 100))
    assert embeddings.shape == (5, 7, 32)
    torch.testing.assert_close(embeddings, shifted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(projector.eval()(features), embeddings)  # no running statistics


@pytest.mark.slow
def test_it_learns_to_find_partners():
    """Each region has waves of its own length and direction: its crops find each other among those of others."""
    torch.manual_seed(0)
    backbone, method = small(pairs=1, temperature=0.2, hidden=32, embedding=16)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *method.parameters()], lr=1e-2)
    history = []
    for step in range(60):
        waves = torch.einsum("bcd,bdxyz->bcxyz", 0.5 * torch.randn(6, 3, 3), coordinates(6))
        prepared = method.prepare({"image": torch.sin(waves)}, draws(6, seed=100 * step))
        losses = method.loss(method(backbone, prepared), prepared)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append([losses["loss"].item(), losses["top1"].item()])
    first, last = np.mean(history[:3], axis=0), np.mean(history[-10:], axis=0)
    assert last[0] < 0.8 * losses["trivial"].item() < first[0]
    assert last[1] > 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": 16}, "does not fit into data.patch_size"),
        ({"pairs": 0}, "pairs is 0; at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0; above 0"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        small(**arguments)


def test_registered_with_a_cube_of_the_shortest_side():
    node = {"name": "simclr", "hidden": 8, "embedding": 8}
    given = {"levels": (Level(4, (1, 1, 1)),), "in_channels": 1, "patch_size": (48, 48, 32), "decoder": UNetDecoder}
    assert build(PRETRAINING, node, "module.method", **given).view_size == (32, 32, 32)


def test_changed_intensities_of_views_keep_what_is_not_changed():
    settings = ViewAugmentation(intensity={"low_resolution": {"range": [0.8, 1]}, "blur": False}).intensities
    assert settings["low_resolution"] == {"p": 0.1, "range": (0.8, 1.0), "channel_p": 0.5} and "blur" not in settings
    assert ViewAugmentation().intensities["low_resolution"]["p"] == 0.1


def test_views_change_each_on_its_own_and_the_same_way_every_time():
    views = torch.arange(2 * 3 * 4 * 4 * 4, dtype=torch.float32).view(2, 3, 1, 4, 4, 4)
    flips = ViewAugmentation(intensity=False)
    changed = flips(views.clone(), seed=5, sample_index=[7, 8])
    again = flips(views[1:].clone(), seed=5, sample_index=[8])
    torch.testing.assert_close(changed[1:], again, rtol=0, atol=0)
    assert not torch.equal(flips(views.clone(), seed=6, sample_index=[7, 8]), changed)
    sorts = [view.flatten(2).sort(dim=2).values for view in (views, changed)]
    torch.testing.assert_close(*sorts, rtol=0, atol=0)  # only moved
    moves = {tuple((view - view.min()).flatten().tolist()) for view in changed.flatten(0, 1)}
    assert len(moves) > 2
    noisy = ViewAugmentation({"noise": {"p": 1.0, "range": [0.5, 0.5]}}, flip_axes=[], quarter_turns=False)
    noise = noisy(torch.zeros(1, 2, 1, 8, 8, 8), seed=5, sample_index=[7])[0]
    assert noise.std().item() > 0.3 and not torch.equal(noise[0], noise[1])
    assert ViewAugmentation().intensities["low_resolution"]["p"] == 0.1


def test_views_stay_as_they_are_when_nothing_is_asked_for():
    views = torch.randn(2, 2, 1, 4, 6, 4)
    still = ViewAugmentation(intensity=False, flip_axes=[], quarter_turns=False)
    torch.testing.assert_close(still(views.clone(), 0, [0, 1]), views, rtol=0, atol=0)
    with pytest.raises(UserError, match="views of 4 x 6 cannot be turned"):
        ViewAugmentation(intensity=False)(views, 0, [0, 1])
    with pytest.raises(UserError, match="axes are 0, 1 and 2"):
        ViewAugmentation(flip_axes=[3])
