"""Anchor positions and sizes from their definition, and how well sizes cover boxes."""

import itertools

import pytest
import torch

from pretrain3d import boxes as box_ops
from pretrain3d.config import UserError
from pretrain3d.detection.anchors import Anchors, base_sizes, best_iou, mean_best_iou

CPU = torch.device("cpu")


def test_grid_equals_a_loop_over_positions():
    anchors = Anchors({"sizes": [[4, 8], [6], [2, 3]]}, [(2, 4, 4), (4, 8, 4)])
    grid = anchors.grid((8, 16, 8), CPU)
    expected = []
    for stride in ((2, 4, 4), (4, 8, 4)):
        scale = [stride[i] / (2, 4, 4)[i] for i in range(3)]
        for x, y, z in itertools.product(range(8 // stride[0]), range(16 // stride[1]), range(8 // stride[2])):
            center = [(p + 0.5) * s for p, s in zip((x, y, z), stride, strict=True)]
            for size in itertools.product([4, 8], [6], [2, 3]):
                half = [0.5 * n * f for n, f in zip(size, scale, strict=True)]
                expected.append([c - h for c, h in zip(center, half, strict=True)])
                expected[-1] += [c + h for c, h in zip(center, half, strict=True)]
    torch.testing.assert_close(grid.boxes, torch.tensor(expected))
    assert grid.shapes == ((4, 4, 2), (2, 2, 2)) and grid.per_position == 4


def test_explicit_boxes_are_taken_as_they_are():
    sizes = Anchors({"boxes": [[4, 4, 4], [8, 6, 5]]}, [(2, 2, 2), (4, 4, 4)]).level_sizes()
    assert sizes.tolist() == [[[4, 4, 4], [8, 6, 5]], [[8, 8, 8], [16, 12, 10]]]


def test_the_middle_of_a_cell_is_the_middle_of_its_voxels():
    grid = Anchors({"boxes": [[4, 4, 4]]}, [(4, 4, 4)]).grid((8, 8, 8), CPU)
    assert grid.boxes[0].tolist() == [0, 0, 0, 4, 4, 4]  # an object of one cell at the corner is met exactly
    assert box_ops.centers(grid.boxes).mean(dim=0).tolist() == [4, 4, 4]  # symmetric: a flip maps anchors onto anchors


def test_grids_are_cached_per_shape_and_float32():
    anchors = Anchors({"boxes": [[300, 7, 7]]}, [(4, 4, 4)])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        first = anchors.grid((512, 8, 8), CPU)
    assert anchors.grid((512, 8, 8), CPU) is first
    assert anchors.grid((256, 8, 8), CPU) is not first
    assert first.boxes.dtype == torch.float32 and not first.boxes.is_inference()
    assert box_ops.centers(first.boxes)[-1, 0].item() == 510


def test_27_anchors_from_three_sizes_per_axis():
    assert len(base_sizes({"sizes": [[4, 8, 16]] * 3})) == 27


@pytest.mark.parametrize(
    "base",
    [
        {"sizes": [[4], [4]]},
        {"boxes": [[4, 4]]},
        {"boxes": []},
        {"sizes": [[4], [], [4]]},
        {"boxes": [[4, 4, 0]]},
        {"boxes": [[4, 4, float("nan")]]},
        {"boxes": [["four", 4, 4]]},
        {"shapes": [[4, 4, 4]]},
        {"sizes": [[4]] * 3, "boxes": [[4, 4, 4]]},
        {},
    ],
)
def test_unreadable_sizes_name_the_value(base):
    with pytest.raises(UserError, match=r"anchors: .*expected"):
        base_sizes(base)


def test_mean_best_iou_equals_centred_boxes():
    generator = torch.Generator().manual_seed(0)
    anchors = 2 + 10 * torch.rand(2, 5, 3, generator=generator)
    sizes = 2 + 10 * torch.rand(40, 3, generator=generator)
    for index in range(2):
        centred = [torch.cat([-s / 2, s / 2], dim=1) for s in (sizes, anchors[index])]
        expected = box_ops.iou(*centred).amax(dim=1)
        torch.testing.assert_close(best_iou(anchors, sizes)[index], expected)
        torch.testing.assert_close(mean_best_iou(anchors, sizes)[index], expected.mean())


def test_a_plan_without_anchors_says_why_and_what_to_do() -> None:
    with pytest.raises(UserError, match=r"held no objects when it was made; .*`pretrain3d plan STORE`"):
        base_sizes(None)
