"""In-painting without learning, against the equations it solves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_checks import generators, make, make_batch

from pretrain3d.objectives import inpainting
from pretrain3d.objectives.masking import block_mask


def solved(image: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Every hidden voxel equals the mean of its six neighbours, itself in place of one beyond the edge."""
    shape = image.shape
    matrix, right = np.zeros((image.size, image.size)), np.zeros(image.size)
    for row, voxel in enumerate(np.ndindex(shape)):
        matrix[row, row] = 1
        if visible[voxel]:
            right[row] = image[voxel]
            continue
        for axis in range(3):
            for step in (-1, 1):
                near = list(voxel)
                near[axis] = min(max(near[axis] + step, 0), shape[axis] - 1)
                matrix[row, np.ravel_multi_index(near, shape)] -= 1 / 6
    return np.linalg.solve(matrix, right).reshape(shape)


@pytest.mark.parametrize("shape", [(7, 4, 6), (1, 8, 5)])
def test_linear_solves_laplace(shape):
    image = torch.randn(2, 2, *shape)
    visible = torch.rand(2, 1, *shape) < 0.25
    filled = inpainting.linear(image.masked_fill(~visible, torch.nan), visible, sweeps=300)
    for b, c in np.ndindex(2, 2):
        expected = solved(image[b, c].numpy(), visible[b, 0].numpy())
        np.testing.assert_allclose(filled[b, c], expected, atol=1e-3)
    assert torch.equal(filled[visible.expand_as(image)], image[visible.expand_as(image)])


def test_linear_in_one_dimension_is_a_straight_line():
    image = torch.zeros(1, 1, 9, 1, 1)
    image[..., 8, 0, 0] = 4.0
    visible = torch.zeros_like(image, dtype=torch.bool)
    visible[..., [0, 8], 0, 0] = True
    filled = inpainting.linear(image, visible, sweeps=200)
    torch.testing.assert_close(filled.flatten(), torch.linspace(0, 4, 9), atol=1e-3, rtol=0)


def test_nothing_visible_gives_zero():
    image, visible = torch.randn(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)
    assert not inpainting.linear(image, visible).any()


def test_few_sweeps_come_close():
    grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 3, 32)] * 3, indexing="ij"))
    image = torch.sin(grid).sum(0)[None, None]
    visible = block_mask((32, 32, 32), (4, 4, 4), 0.75, generators(0))
    limit = inpainting.linear(image, visible, sweeps=300)
    error = (inpainting.linear(image, visible) - limit).square().mean()
    mean = (inpainting.visible_mean(image, visible) - limit).square().mean()
    assert error < 0.01 * mean


@pytest.mark.parametrize("name", ["mae", "s3d", "slice_mae"])
def test_validation_reports_it_beside_the_loss(name):
    shape = (16, 16, 16)
    _, method = make(name, shape)
    batch = make_batch(shape)
    prepared = method.prepare(batch, generators(0, 1))
    outputs = {"reconstruction": torch.zeros(2, 1, *shape)}
    assert "inpainting_linear" not in method.train().loss(outputs, prepared)
    found = method.eval().loss(outputs, prepared)["inpainting_linear"]
    visible = prepared["keep"] & batch["inside"]
    scored = ~prepared["keep"] & batch["inside"]
    if name == "slice_mae":  # slice by slice
        errors = []
        for row, axis in enumerate(prepared["axes"]):
            for index in range(shape[axis]):
                image, seen, counts = (
                    t[row].narrow(axis + 1, index, 1)[None] for t in (batch["image"], visible, scored)
                )
                errors.append((inpainting.linear(image, seen) - image)[counts].square())
        expected = torch.cat(errors).mean()
    else:
        expected = (inpainting.linear(batch["image"], visible) - batch["image"])[scored].square().mean()
    torch.testing.assert_close(found, expected)
