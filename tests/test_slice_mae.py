"""The slice-wise objective: slices keep to themselves, and the 3D weights are those that a volume would use."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
from torch import nn

from pretrain3d.backbones.convolution import Conv3d
from pretrain3d.backbones.decoders import UNetDecoder
from pretrain3d.backbones.primus import Primus
from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.config import UserError
from pretrain3d.objectives.masking import hidden_cells, slice_mask
from pretrain3d.objectives.slice_mae import SliceMAE, fold, unfold

SHAPE = (16, 24, 8)


@pytest.mark.parametrize("axis", range(3))
def test_masks_by_loops(axis):
    shape, block = (12, 10, 16), (4, 3, 5)
    keep = slice_mask(shape, block, 0.75, axis, generators(0)[0])[0]
    assert keep.shape == shape
    across = [other for other in range(3) if other != axis]
    grid = [math.ceil(shape[other] / block[other]) for other in across]
    patterns = set()
    for index in range(shape[axis]):
        plane = keep.select(axis, index)
        hidden = 0
        for i, j in np.ndindex(*grid):
            rows, columns = (slice(n * block[a], (n + 1) * block[a]) for n, a in zip((i, j), across, strict=True))
            cell = plane[rows, columns]
            assert cell.all() or not cell.any(), "a block is visible or hidden, never both"
            hidden += not cell.any()
        assert hidden == hidden_cells(math.prod(grid), 0.75)
        patterns.add(plane.numpy().tobytes())
    assert len(patterns) > shape[axis] // 2, "every slice has a mask of its own"


def test_reference_count():
    keep = slice_mask((160, 160, 160), (16, 16, 16), 0.75, 2, generators(0)[0])[0]
    assert ((~keep).sum((0, 1)) == 75 * 16**2).all()


def test_axes_are_drawn_evenly_by_the_sample():
    _, method = make("slice_mae", (8, 8, 8), block=4)
    prepared = method.prepare(make_batch((8, 8, 8), batch=600), generators(*range(600)))
    counts = np.bincount(prepared["axes"], minlength=3)
    assert counts.min() > 200 - 4 * (600 * 2 / 9) ** 0.5


def drawn(axis: int, batch: dict[str, torch.Tensor], method: SliceMAE) -> dict:
    """`SliceMAE.prepare` of a sample whose slices are stacked along an axis."""
    seed = next(seed for seed in range(50) if method.prepare(batch, generators(seed))["axes"] == [axis])
    return method.prepare(batch, generators(seed))


@pytest.mark.parametrize("axis", range(3))
def test_no_context_crosses_slices(axis):
    backbone, method = make("slice_mae", SHAPE, block=4)
    batch = make_batch(SHAPE, batch=1)
    prepared = drawn(axis, batch, method)
    changed = batch["image"].clone()
    changed.select(axis + 2, 3).add_(torch.randn_like(changed.select(axis + 2, 3)))
    with torch.no_grad():
        a = method(backbone, prepared)["reconstruction"]
        b = method(backbone, {**prepared, "inputs": changed})["reconstruction"]
    differs = (a - b).abs().movedim(axis + 2, 0).flatten(1).amax(1) > 1e-5
    assert differs.nonzero().flatten().tolist() == [3]


def test_a_sample_is_the_same_alone_and_in_a_batch():
    backbone, method = make("slice_mae", SHAPE, block=4)
    batch = make_batch(SHAPE, batch=4)
    prepared = method.prepare(batch, generators(0, 1, 2, 3))
    assert len(set(prepared["axes"])) > 1
    with torch.no_grad():
        together = method(backbone, prepared)["reconstruction"]
        for row in range(4):
            alone = method.prepare({key: value[row, None] for key, value in batch.items()}, generators(row))
            torch.testing.assert_close(method(backbone, alone)["reconstruction"][0], together[row], atol=1e-4, rtol=0)


@pytest.mark.parametrize("axis", range(3))
def test_fold_and_unfold(axis):
    volumes = torch.randn(2, 3, 4, 5, 6)
    slices = fold(volumes, axis)
    assert len(slices) == 2 * volumes.shape[axis + 2] and slices.shape[axis + 2] == 1
    assert torch.equal(slices[1].select(axis + 1, 0), volumes[0].select(axis + 1, 1))
    assert torch.equal(unfold(slices, axis, 2), volumes)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), ((1, 3, 3), (1, 2, 2)), (1, 1)])
def test_a_slice_is_convolved_like_the_inside_of_a_stack_of_its_copies(axis, kernel, stride):
    padding = tuple(k // 2 for k in (kernel if isinstance(kernel, tuple) else (kernel,) * 3))
    conv = Conv3d(2, 3, kernel, stride, padding)
    shape = [8, 6, 10]
    shape[axis] = 1
    image = torch.randn(2, 2, *shape)
    repeats = [1, 1, 1, 1, 1]
    repeats[axis + 2] = 9
    thick = conv(image.repeat(repeats))
    inside = thick.narrow(axis + 2, thick.shape[axis + 2] // 2, 1)
    torch.testing.assert_close(conv(image, flat=axis), inside, atol=1e-5, rtol=1e-5)


def test_slices_are_upsampled_to_the_mean_of_what_a_volume_would_become():
    levels = ResEnc([2, 3], [1, 1], [1, 2]).levels
    decoder = UNetDecoder(levels, 1)
    coarse = torch.randn(2, 3, 4, 1, 3)
    expected = F.conv_transpose3d(coarse, decoder.ups[0].weight, decoder.ups[0].bias, 2).mean(3, keepdim=True)
    seen = []
    decoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    decoder([torch.zeros(2, 2, 8, 1, 6), coarse])
    torch.testing.assert_close(seen[0][:, :2], expected)


def test_every_tap_of_every_kernel_learns():
    backbone, method = make("slice_mae", (16, 16, 16))
    prepared = method.prepare(make_batch((16, 16, 16)), generators(0, 1))
    method.loss(method(backbone, prepared), prepared)["loss"].backward()
    for module in nn.ModuleList([backbone, method]).modules():
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
            assert module.weight.grad is not None and (module.weight.grad.abs().amax((0, 1)) > 0).all()


@pytest.mark.parametrize("masking", ["zero", "sparse"])
def test_checkpointing_changes_nothing(masking):
    torch.manual_seed(0)
    backbone, method = make("slice_mae", SHAPE, block=4)
    state, gradients = backbone.state_dict(), []
    for checkpointing in (False, True):
        other = ResEnc([4, 6, 8], [1, 1, 1], [1, 2, 2], masking=masking, checkpointing=checkpointing)
        other.load_state_dict(state)
        prepared = method.prepare({**make_batch(SHAPE), "image": torch.ones(2, 1, *SHAPE).cumsum(2)}, generators(0, 1))
        method.loss(method(other, prepared), prepared)["loss"].backward()
        gradients.append([p.grad for p in other.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_loss_voxels_are_hidden_and_hidden_voxels_are_not_read():
    check_hidden_is_scored("slice_mae", SHAPE, block=4)


def test_contract():
    check_bf16_gradients("slice_mae")
    check_own_draws("slice_mae")
    assert check_empty_batch("slice_mae")["loss"] == 0
    check_pictures("slice_mae", ["original", "masked", "reconstructed"])


def test_mistakes():
    with pytest.raises(UserError, match=r"slice_mae: ratio 0.0.*nothing to predict or nothing to see"):
        make("slice_mae", SHAPE, ratio=0.0)
    with pytest.raises(UserError, match=r"slice_mae: ratio 0.75.*the 1 blocks"):
        make("slice_mae", (16, 4, 4), block=4)  # a slice across x is a single block
    with pytest.raises(UserError, match=r"a slice of \[1, 4, 4\] .*\[16, 4, 4\] is a single voxel at the coarsest"):
        make("slice_mae", (16, 4, 4), block=2)
    with pytest.raises(UserError, match="Primus takes no single slices; take resenc_xs"):
        SliceMAE.check_backbone(Primus(embed_dim=24, depth=1, heads=2, image_size=16))
    SliceMAE.check_backbone(ResEnc([4, 8], [1, 1], [1, 2]))
    with pytest.raises(UserError, match="is one voxel on the coarsest level"):
        ResEnc([4, 8], [1, 1], [1, 2])(torch.zeros(1, 1, 2, 1, 2))
