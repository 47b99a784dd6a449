"""ATSS against a slow implementation of its definition."""

import math

import pytest
import torch

from pretrain3d import boxes as box_ops
from pretrain3d.detection.anchors import AnchorGrid, Anchors
from pretrain3d.detection.assign import atss
from pretrain3d.detection.sample import hard_negatives

CPU = torch.device("cpu")


def slow_atss(grid: AnchorGrid, boxes: torch.Tensor, num_candidates: int) -> list[int]:
    """Matched box per anchor, -1 for background, by the definition; loops over every box and every anchor."""
    overlap = box_ops.iou(boxes, grid.boxes)
    middle = box_ops.centers(grid.boxes)
    winner: dict[int, tuple[float, int]] = {}
    for n, box in enumerate(boxes):
        distance = (middle - box_ops.centers(box)).square().sum(dim=1).tolist()
        candidates, offset = [], 0
        for shape in grid.shapes:
            count = math.prod(shape) * grid.per_position
            closest = sorted(range(offset, offset + count), key=lambda m: (round(distance[m], 3), m))
            candidates += closest[: num_candidates * grid.per_position]  # at most all anchors of the level
            offset += count
        values = [float(overlap[n, m]) for m in candidates]
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
        for m, value in zip(candidates, values, strict=True):
            if value >= mean + deviation and value > 0:
                winner[m] = max(winner.get(m, (-1.0, 0)), (value, -n))
    return [-winner[m][1] if m in winner else -1 for m in range(len(grid.boxes))]


def random_boxes(count: int, shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 3, generator=generator) * torch.tensor(shape) - 2
    return torch.cat([low, low + 1 + 14 * torch.rand(count, 3, generator=generator)], dim=1)


GRIDS = {
    "three levels": (Anchors({"boxes": [[4, 4, 4], [7, 6, 5]]}, [(2, 2, 2), (4, 4, 4), (8, 8, 8)]), (24, 16, 24)),
    "anisotropic": (Anchors({"sizes": [[3, 6], [5], [4, 8]]}, [(1, 4, 4), (2, 8, 8)]), (6, 32, 24)),
    "coarse level with fewer positions than candidates": (
        Anchors({"boxes": [[4] * 3] * 3}, [(4,) * 3, (16,) * 3]),
        (16,) * 3,
    ),
    "one anchor": (Anchors({"boxes": [[6, 6, 6]]}, [(16, 16, 16)]), (16, 16, 16)),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("num_candidates", [1, 4, 9])
def test_equals_the_definition(name, num_candidates):
    anchors, shape = GRIDS[name]
    grid = anchors.grid(shape, CPU)
    for seed in range(2):
        boxes = random_boxes(9, shape, seed)
        found = atss(grid, boxes[None], torch.ones(1, 9, dtype=torch.bool), num_candidates)
        assert found.matches(len(grid.boxes))[0].tolist() == slow_atss(grid, boxes, num_candidates)


def test_boxes_at_equal_distance_of_many_anchors():
    anchors, shape = GRIDS["three levels"]
    grid = anchors.grid(shape, CPU)
    boxes = torch.tensor([[4.0, 4, 4, 8, 8, 8], [6, 6, 6, 10, 10, 10], [5, 4, 4, 9, 8, 8], [5, 4, 4, 9, 8, 8]])
    found = atss(grid, boxes[None], torch.ones(1, 4, dtype=torch.bool))
    assert found.matches(len(grid.boxes))[0].tolist() == slow_atss(grid, boxes, 4)


@pytest.mark.parametrize("side", [3.25, 4.75, 6.5])
def test_equal_overlaps_reach_their_own_mean(side):
    grid = Anchors({"boxes": [[5, 5, 5]] * 3}, [(4, 4, 4)]).grid((16, 16, 16), CPU)
    box = torch.tensor([[8 - side / 2] * 3 + [8 + side / 2] * 3])  # in the middle of 8 positions of 3 equal anchors
    found = atss(grid, box[None], torch.ones(1, 1, dtype=torch.bool), 8)
    assert found.positive.sum() == 24 and len(found.iou.unique()) == 1


def test_a_batch_with_padding_equals_its_images():
    anchors, shape = GRIDS["three levels"]
    grid = anchors.grid(shape, CPU)
    boxes = torch.zeros(3, 7, 6)
    valid = torch.zeros(3, 7, dtype=torch.bool)
    for image, count in enumerate((7, 3, 0)):
        boxes[image, :count] = random_boxes(count, shape, image)
        valid[image, :count] = True
    matches = atss(grid, boxes, valid).matches(len(grid.boxes))
    for image, count in enumerate((7, 3, 0)):
        assert matches[image].tolist() == slow_atss(grid, boxes[image, :count], 4)


def test_every_anchor_is_positive_at_most_once():
    anchors, shape = GRIDS["three levels"]
    grid = anchors.grid(shape, CPU)
    boxes = random_boxes(60, shape, 3)
    found = atss(grid, boxes[None], torch.ones(1, 60, dtype=torch.bool))
    claimed = found.anchor[found.positive]
    assert len(claimed) == len(claimed.unique()) > 20
    torch.testing.assert_close(
        found.iou[found.positive], box_ops.aligned_iou(grid.boxes[claimed], boxes[found.box[found.positive]])
    )


def test_a_box_outside_the_image_has_no_anchor():
    anchors, shape = GRIDS["three levels"]
    boxes = torch.tensor([[[200.0, 200, 200, 204, 204, 204]]])
    assert not atss(anchors.grid(shape, CPU), boxes, torch.ones(1, 1, dtype=torch.bool)).positive.any()


@pytest.mark.parametrize("positives, negatives", [(0, 2), (1, 2), (5, 10), (42, 85), (300, 85)])
def test_hard_negative_counts(positives, negatives):
    generator = torch.Generator().manual_seed(0)
    positive = torch.zeros(4, 5000, dtype=torch.bool)
    positive.view(-1)[torch.randperm(20000, generator=generator)[:positives]] = True
    scores, usable = torch.randn(4, 5000, generator=generator), torch.ones(4, 5000, dtype=torch.bool)
    usable[:, :100] = False
    usable |= positive
    sampled = hard_negatives(scores, positive, usable, torch.tensor(3))
    assert not (sampled & ~usable).any()
    chosen = sampled & ~positive
    assert int((sampled & positive).sum()) == min(positives, 42)
    assert int(chosen.sum()) == negatives
    pool = scores[usable & ~positive].sort(descending=True).values[: 20 * negatives]
    assert (
        scores[chosen].min() >= pool[-1] and scores[chosen].mean() < pool[:negatives].mean()
    )  # random within the pool
    if negatives > 2:  # all of it, the worse half too
        assert scores[chosen].min() < pool[10 * negatives]
    again = hard_negatives(scores, positive, usable, torch.tensor(3))
    other = hard_negatives(scores, positive, usable, torch.tensor(4))
    assert torch.equal(sampled, again) and not torch.equal(sampled, other)


def test_no_more_hard_negatives_than_there_are():
    scores = torch.arange(12.0)[None]
    positive, usable = scores < 4, scores < 8
    assert torch.equal(hard_negatives(scores, positive, usable, torch.tensor(0)), usable)
