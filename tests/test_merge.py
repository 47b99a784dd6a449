"""Merging over tiles and views: what is dropped, joined and weighted."""

import pytest
import torch

from pretrain3d import boxes as box_ops
from pretrain3d.config import UserError
from pretrain3d.detection.contract import Detections
from pretrain3d.detection.merge import (
    Merging,
    TileDetections,
    ViewDetections,
    _best_of_tiles,
    _part_of_whole,
    center_weight,
    is_cut,
    merge,
    merge_tiles,
    merge_views,
)

PATCH = (32, 32, 32)


def tile_detections(rows: list[tuple[list[float], float, int, list[float], bool]]) -> TileDetections:
    """Rows of (box, score, label, tile, cut) with weight 1."""
    boxes, scores, labels, tiles, cut = zip(*rows, strict=True)
    found = Detections(torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels))
    extents = [list(each) for each in dict.fromkeys(tuple(tile) for tile in tiles)]
    tile = torch.tensor([extents.index(each) for each in tiles])
    return TileDetections(found, torch.ones(len(rows)), torch.tensor(cut), tile, torch.tensor(extents))


def merged(rows: list[tuple[list[float], float, int, list[float], bool]], tile_iou: float = 0.5) -> Detections:
    return merge_tiles(tile_detections(rows), Merging(tile_iou=tile_iou)).found


LEFT, RIGHT = [0.0, 0, 0, 32, 32, 32], [16.0, 0, 0, 48, 32, 32]


@pytest.mark.parametrize(
    "center, weight", [((48, 48, 48), 1.0), ((48, 48, 0), 0.923), ((48, 0, 0), 0.684), ((0, 0, 0), 0.5)]
)
def test_center_weight_known_values(center, weight):
    box = torch.tensor([[c - 1.0 for c in center] + [c + 1.0 for c in center]])
    assert center_weight(box, (96, 96, 96)).item() == pytest.approx(weight, abs=1e-3)


def test_cut_means_an_inner_border():
    boxes = torch.tensor([[0.0, 5, 5, 9, 9, 9], [5, 5, 5, 32, 9, 9], [5, 5, 5, 9, 9, 31.5], [5, 5, 5, 9, 9, 9]])
    assert is_cut(boxes, PATCH, (0, 0, 0), (64, 32, 40)).tolist() == [False, True, True, False]
    assert is_cut(boxes, PATCH, (32, 0, 8), (64, 32, 40)).tolist() == [True, False, False, False]


def test_a_sliver_of_an_object_that_another_tile_sees_whole_goes():
    whole, sliver = [18.0, 4, 4, 44, 30, 30], [18.0, 4, 4, 21, 30, 30]  # IoU 0.12 only
    rows = [(whole, 0.8, 0, RIGHT, False), ([29.0, 4, 4, 32, 30, 30], 0.9, 0, LEFT, True)]
    found = merged(rows)
    assert found.boxes.tolist() == [whole] and found.scores.tolist() == pytest.approx([0.8])
    other_class = [(whole, 0.8, 0, RIGHT, False), (sliver, 0.9, 1, LEFT, True)]
    assert len(merged(other_class)) == 2
    clear_sliver = [(whole, 0.1, 0, RIGHT, False), ([29.0, 4, 4, 32, 30, 30], 0.9, 0, LEFT, True)]
    assert len(merged(clear_sliver)) == 2  # the whole one is hardly believed


def test_parts_that_agree_where_both_tiles_look_become_one():
    rows = [([4.0, 8, 8, 32, 20, 20], 0.9, 0, LEFT, True), ([16.0, 8, 9, 44, 20, 20], 0.8, 0, RIGHT, True)]
    found = merged(rows)
    assert found.boxes.tolist() == [[4, 8, 8, 44, 20, 20]] and found.scores.tolist() == pytest.approx([0.9])


@pytest.mark.parametrize(("start", "left"), [(24.0, 1), (26.0, 2)])  # 0.6 and 0.4 of it inside
def test_a_cut_box_goes_when_more_than_half_of_it_is_in_a_whole_one(start, left):
    whole, cut = [18.0, 4, 4, 44, 30, 30], [22.0, 4, start, 32, 30, start + 10]
    assert len(merged([(whole, 0.8, 0, RIGHT, False), (cut, 0.9, 0, LEFT, True)])) == left


@pytest.mark.parametrize("share_cut", [0.0, 0.6, 1.0])
def test_parts_of_wholes_are_those_of_the_definition(share_cut):
    """Of several chunks of parts, which are compared with the wholes near them only."""
    low = torch.rand(900, 3) * torch.tensor([20.0, 200, 50])
    boxes = torch.cat([low, low + 2 + 18 * torch.rand(900, 3)], dim=1)
    rank, cut = torch.rand(900), torch.rand(900) < share_cut
    shared = box_ops.intersection(boxes[:, None], boxes[None])
    covers = (shared > 0.5 * box_ops.area(boxes)[:, None]) & (rank[None] >= rank[:, None]) & ~cut[None]
    expected = cut & covers.any(dim=1)
    assert torch.equal(_part_of_whole(boxes, rank, cut), expected) and bool(expected.any()) == (0 < share_cut < 1)


@pytest.mark.parametrize(("shift", "left"), [(3.0, 1), (5.0, 2)])  # IoU 0.6 and 0.41 where both tiles look
def test_parts_agree_from_an_iou_of_a_half(shift, left):
    one, other = [4.0, 8, 8, 32, 20, 20], [16.0, 8, 8 + shift, 44, 20, 20 + shift]
    assert len(merged([(one, 0.9, 0, LEFT, True), (other, 0.8, 0, RIGHT, True)])) == left


def test_parts_that_disagree_stay_and_weak_ones_move_no_border():
    apart = [([4.0, 0, 0, 32, 8, 8], 0.9, 0, LEFT, True), ([16.0, 20, 20, 44, 30, 30], 0.8, 0, RIGHT, True)]
    assert len(merged(apart)) == 2
    weak = [([4.0, 8, 8, 32, 20, 20], 0.9, 0, LEFT, True), ([16.0, 8, 8, 44, 20, 20], 0.1, 0, RIGHT, True)]
    found = merged(weak)
    assert found.boxes.tolist() == [[4, 8, 8, 32, 20, 20]]


def test_parts_seen_in_one_tile_are_two_objects():
    boxes = [4.0, 8, 8, 32, 20, 20], [4.0, 8, 10, 32, 20, 22]  # IoU 0.71
    rows = [(boxes[0], 0.9, 0, LEFT, True), (boxes[1], 0.8, 0, LEFT, True)]
    assert merged(rows, tile_iou=0.8).boxes.tolist() == [*boxes]


def test_boxes_of_the_tile_with_the_better_view_win_and_keep_their_score():
    rows = [([4.0, 4, 4, 10, 10, 10], 0.8, 0, LEFT, False), ([4.0, 4, 5, 10, 10, 10], 0.9, 0, RIGHT, False)]
    view = tile_detections(rows)
    view.weights = torch.tensor([1.0, 0.6])
    result = merge_tiles(view, Merging())
    assert result.found.boxes[:, 2].tolist() == [4] and result.weights.tolist() == [1]
    assert result.found.scores.tolist() == pytest.approx([0.8])


def test_views_are_averaged_by_clustering_and_maximised_by_nms():
    box = torch.tensor([[4.0, 4, 4, 10, 10, 10]])
    label = torch.zeros(1, dtype=torch.long)
    views = [Detections(box[:n], torch.tensor([s])[:n], label[:n]) for s, n in ((0.9, 1), (0.6, 1), (0, 0), (0, 0))]
    views = [ViewDetections(view, torch.ones(len(view))) for view in views]
    clustered = merge_views(views, Merging())
    assert clustered.scores.tolist() == pytest.approx([(0.9 + 0.6) / 4]) and torch.equal(clustered.boxes, box)
    assert merge_views(views, Merging(method="nms")).scores.tolist() == pytest.approx([0.9])
    for method in ("clustering", "nms"):
        assert merge_views(views[:1], Merging(method=method)).scores.tolist() == pytest.approx([0.9])


def test_within_a_tile_the_best_score_wins_and_between_tiles_the_better_place():
    near, apart = [4.0, 4, 5, 10, 10, 11], [20.0, 20, 20, 26, 26, 26]
    rows = [([4.0, 4, 4, 10, 10, 10], 0.8, 0, LEFT, False), (near, 0.9, 0, LEFT, False), (near, 0.7, 1, LEFT, False),
            (apart, 0.3, 0, LEFT, False), (near, 0.85, 0, RIGHT, False)]  # fmt: skip
    view = tile_detections(rows)
    view.weights = torch.tensor([1.0, 0.6, 1, 1, 0.5])
    found = merge_tiles(view, Merging()).found
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.3]) and found.labels.tolist() == [0, 1, 0]


def test_the_best_of_each_tile_is_class_wise_nms_of_that_tile():
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(500, 3, generator=generator) * 20
    found = Detections(
        torch.cat([low, low + 4 + 6 * torch.rand(500, 3, generator=generator)], dim=1),
        torch.randint(0, 50, (500,), generator=generator) / 50,  # many equal scores
        torch.randint(0, 3, (500,), generator=generator),
    )
    tile = torch.randint(0, 70, (500,), generator=generator)
    tile[tile == 13] = 14  # a tile without boxes
    kept = _best_of_tiles(found, tile, 70, 0.1)
    expected = []
    for index in range(70):
        members = (tile == index).nonzero()[:, 0]
        part = found[members]
        expected += members[box_ops.batched_nms(part.boxes, part.scores, part.labels, 0.1)].tolist()
    assert sorted(kept.tolist()) == sorted(expected)


def test_small_and_doubtful_boxes_are_left_out():
    rows = [([4.0, 4, 4, 10, 10, 6], 0.8, 0, LEFT, False), ([20.0, 4, 4, 26, 10, 10], 0.2, 0, LEFT, False),
            ([20.0, 20, 20, 26, 26, 26], 0.5, 0, LEFT, False)]  # fmt: skip
    view = tile_detections(rows)
    assert len(merge([view], Merging())) == 3
    assert merge([view], Merging(min_size=3.0)).scores.tolist() == pytest.approx([0.5, 0.2])
    assert merge([view], Merging(min_score=0.5, min_size=3.0)).scores.tolist() == [0.5]  # from it on


@pytest.mark.parametrize(
    ("values", "message"),
    [({"method": "mean"}, "'mean'"), ({"view_iou": 1.0}, "view_iou is 1.0"), ({"tile_iou": -0.1}, "tile_iou is -0.1"),
     ({"max_per_class": 0}, "max_per_class 0"), ({"min_size": -1.0}, "min_size is -1.0")],
)  # fmt: skip
def test_settings_out_of_range_are_named(values, message):
    with pytest.raises(UserError, match=message):
        Merging(**values)
    assert Merging(**Merging(view_iou=0.3).to_dict()) == Merging(view_iou=0.3)
