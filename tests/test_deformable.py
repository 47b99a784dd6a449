"""Multi-scale deformable attention against a loop over queries, heads, levels, points and corners."""

import itertools
import math

import pytest
import torch

from pretrain3d.detection.deformable import DeformableAttention, _directions, sample_levels

SHAPES = [(4, 6, 3), (2, 3, 3), (1, 1, 2)]


def trilinear(volume: torch.Tensor, place: list[float]) -> torch.Tensor:
    """(D, X, Y, Z) read at relative coordinates; voxel i covers [i, i + 1) / n, zeros outside."""
    at = [u * n - 0.5 for u, n in zip(place, volume.shape[1:], strict=True)]
    result = torch.zeros(volume.shape[0])
    for corner in itertools.product((0, 1), repeat=3):
        index = [math.floor(a) + c for a, c in zip(at, corner, strict=True)]
        share = math.prod(1 - abs(a - i) for a, i in zip(at, index, strict=True))
        if all(0 <= i < n for i, n in zip(index, volume.shape[1:], strict=True)):
            result += share * volume[(slice(None), *index)]
    return result


def test_sampling_equals_a_loop() -> None:
    batch, count, heads, points, width = 2, 3, 2, 2, 4
    values = [torch.randn(batch, heads, width, *shape) for shape in SHAPES]
    locations = torch.rand(batch, count, heads, len(SHAPES), points, 3) * 1.4 - 0.2  # some lie outside
    weights = torch.rand(batch, count, heads, len(SHAPES), points)
    got = sample_levels(values, locations, weights)
    expected = torch.zeros(batch, count, heads, width)
    for b, q, h, level, p in itertools.product(*map(range, (batch, count, heads, len(SHAPES), points))):
        read = trilinear(values[level][b, h], locations[b, q, h, level, p].tolist())
        expected[b, q, h] += weights[b, q, h, level, p] * read
    torch.testing.assert_close(got, expected.flatten(2), atol=1e-5, rtol=1e-5)


def test_middles_of_voxels_read_the_voxels() -> None:
    shape = (3, 4, 5)
    value = torch.randn(1, 1, 2, *shape)
    axes = [(torch.arange(n) + 0.5) / n for n in shape]
    middles = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(1, -1, 1, 1, 1, 3)
    got = sample_levels([value], middles, torch.ones(middles.shape[:-1]))
    torch.testing.assert_close(got[0].T.reshape(2, *shape), value[0, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("box", [False, True])
def test_attention_equals_its_definition(box: bool) -> None:
    channels, heads, points = 8, 2, 3
    attention = DeformableAttention(channels, heads, len(SHAPES), points)
    for layer in (attention.offsets, attention.weights):
        torch.nn.init.normal_(layer.weight)
    query, memory = torch.randn(2, 4, channels), torch.randn(2, sum(map(math.prod, SHAPES)), channels)
    reference = torch.rand(2, 4, 6) * 0.6 + 0.2 if box else torch.rand(2, 4, 3)
    got = attention(query, reference, memory, SHAPES, torch.tensor(SHAPES).float())
    value = attention.value(memory)
    for b, q in itertools.product(range(2), range(4)):
        offsets = attention.offsets(query[b, q]).view(heads, len(SHAPES), points, 3)
        weights = attention.weights(query[b, q]).view(heads, -1).softmax(-1).view(heads, len(SHAPES), points)
        read = torch.zeros(heads, channels // heads)
        for h, level, p in itertools.product(range(heads), range(len(SHAPES)), range(points)):
            first = sum(math.prod(shape) for shape in SHAPES[:level])
            tokens = value[b, first : first + math.prod(SHAPES[level])].view(*SHAPES[level], heads, -1)[..., h, :]
            unit = reference[b, q, 3:] / 2 / points if box else 1 / torch.tensor(SHAPES[level])
            place = reference[b, q, :3] + offsets[h, level, p] * unit
            read[h] += weights[h, level, p] * trilinear(tokens.permute(3, 0, 1, 2), place.tolist())
        torch.testing.assert_close(got[b, q], attention.output(read.flatten()), atol=1e-4, rtol=1e-4)


def test_gradients_equal_finite_differences() -> None:
    value = torch.randn(1, 1, 2, 3, 2, 3, requires_grad=True)
    locations = (torch.rand(1, 2, 1, 1, 2, 3) * 0.5 + 0.27).requires_grad_()
    weights = torch.rand(1, 2, 1, 1, 2, requires_grad=True)

    def total(v: torch.Tensor, loc: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return sample_levels([v], loc, w).square().sum()

    gradients = torch.autograd.grad(total(value, locations, weights), (value, locations, weights))
    inputs = (value, locations, weights)
    for position, gradient in enumerate(gradients):
        direction = torch.randn_like(gradient)
        step = 1e-3
        moved = [[x + s * step * direction if i == position else x for i, x in enumerate(inputs)] for s in (1, -1)]
        slope = (total(*moved[0]) - total(*moved[1])) / (2 * step)
        assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=2e-2, abs=2e-3)


def test_heads_start_in_different_directions() -> None:
    directions = _directions(8)
    assert directions.abs().amax(dim=-1).tolist() == pytest.approx([1.0] * 8)
    cosine = torch.nn.functional.cosine_similarity(directions[:, None], directions, dim=-1)
    assert (cosine - 2 * torch.eye(8)).max() < 0.8
    attention = DeformableAttention(16, 8, 2, 3)
    offsets = attention.offsets(torch.randn(1, 5, 16)).view(1, 5, 8, 2, 3, 3)  # before training whatever the query
    torch.testing.assert_close(offsets[0, 2, :, 1, 2], 3 * directions)


def test_sampling_is_float32_under_autocast() -> None:
    attention = DeformableAttention(8, 2, len(SHAPES), 2)
    memory = torch.randn(1, sum(map(math.prod, SHAPES)), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(torch.randn(1, 3, 8), torch.rand(1, 3, 3), memory, SHAPES, torch.tensor(SHAPES).float())
        values = [torch.randn(1, 2, 4, *shape, dtype=torch.bfloat16) for shape in SHAPES]
        read = sample_levels(values, torch.rand(1, 3, 2, 3, 2, 3), torch.rand(1, 3, 2, 3, 2))
    assert torch.isfinite(out).all() and read.dtype == torch.float32
