"""Masks: exact counts, seeds, blocks."""

from __future__ import annotations

import math

import pytest
import torch
from method_checks import generators

from pretrain3d.objectives.masking import block_mask, block_size, hidden_cells


@pytest.mark.parametrize(("block", "hidden", "total"), [(16, 750, 1000), (8, 6000, 8000)])
def test_reference_counts(block, hidden, total):
    keep = block_mask((160, 160, 160), (block,) * 3, 0.75, generators(0, 1))
    assert keep.shape == (2, 1, 160, 160, 160) and keep.dtype == torch.bool
    cells = keep[:, 0, ::block, ::block, ::block]
    assert cells[0].numel() == total
    assert [(~sample).sum().item() for sample in cells] == [hidden, hidden]
    assert (~keep).sum().item() == 2 * hidden * block**3


@pytest.mark.parametrize(
    ("shape", "block"), [((8, 12, 4), (4, 4, 2)), ((9, 7, 5), (4, 3, 2)), ((3, 65, 16), (16, 16, 16))]
)
def test_blocks_by_loops(shape, block):
    keep = block_mask(shape, block, 0.6, generators(3))[0, 0]
    assert keep.shape == shape
    grid = [math.ceil(s / b) for s, b in zip(shape, block, strict=True)]
    hidden = 0
    for i in range(grid[0]):
        for j in range(grid[1]):
            for k in range(grid[2]):
                start = [n * b for n, b in zip((i, j, k), block, strict=True)]
                cell = keep[tuple(slice(a, a + b) for a, b in zip(start, block, strict=True))]
                assert cell.all() or not cell.any(), "a block is visible or hidden, never both"
                hidden += not cell.any()
    assert hidden == hidden_cells(math.prod(grid), 0.6) == int(0.6 * math.prod(grid))


def test_a_mask_depends_on_its_own_generator_alone():
    shape, block = (16, 16, 16), (4, 4, 4)
    together = block_mask(shape, block, 0.75, generators(5, 6))
    swapped = block_mask(shape, block, 0.75, generators(6, 5))
    alone = block_mask(shape, block, 0.75, generators(6))
    assert torch.equal(together.flip(0), swapped) and torch.equal(together[1:], alone)
    assert not torch.equal(together[0], together[1])


def test_every_cell_is_hidden_equally_often():
    keep = block_mask((4, 4, 4), (2, 2, 2), 0.75, generators(*range(2000)))
    share = (~keep[:, 0, ::2, ::2, ::2]).float().mean(0)
    assert (share - 0.75).abs().max() < 4 * (0.75 * 0.25 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("ratio", "cells", "expected"), [(0.29, 100, 29), (0.75, 1000, 750), (0.75, 27, 20), (0.6, 5, 3)]
)
def test_hidden_cells_is_the_whole_part(ratio, cells, expected):
    assert hidden_cells(cells, ratio) == expected


def test_block_size_is_proportional():
    sides = {240: 16, 160: 16, 192: 16, 128: 16, 120: 8, 96: 8, 80: 8, 64: 8, 48: 4, 40: 4, 32: 4, 16: 2}
    assert {size: block_size((size,) * 3)[0] for size in sides} == sides
    assert block_size((160, 80, 48)) == (16, 8, 4)
