"""Merging over tiles and views: what is dropped, joined and weighted."""

import pytest
import torch

from pretrain3d.detection.contract import Detections
from pretrain3d.detection.merge import TileDetections, center_weight, is_cut, merge_tiles, merge_views, unflip

PATCH = (32, 32, 32)


def tile_detections(rows: list[tuple[list[float], float, int, list[float], bool]]) -> TileDetections:
    """Rows of (box, score, label, tile, cut) with weight 1."""
    boxes, scores, labels, tiles, cut = zip(*rows, strict=True)
    found = Detections(torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels))
    return TileDetections(found, torch.ones(len(rows)), torch.tensor(cut), torch.tensor(tiles))


LEFT, RIGHT = [0.0, 0, 0, 32, 32, 32], [16.0, 0, 0, 48, 32, 32]


@pytest.mark.parametrize(
    "center, weight", [((48, 48, 48), 1.0), ((48, 48, 0), 0.923), ((48, 0, 0), 0.684), ((0, 0, 0), 0.5)]
)
def test_center_weight_known_values(center, weight):
    box = torch.tensor([[c - 1.0 for c in center] + [c + 1.0 for c in center]])
    assert center_weight(box, (96, 96, 96)).item() == pytest.approx(weight, abs=1e-3)


def test_unflip_is_the_exact_mirror():
    volume = torch.zeros(8, 10, 12)
    volume[1:4, 2:9, 5:6] = 1
    flipped = volume.flip([0, 2])
    where = flipped.nonzero()
    box = torch.cat([where.amin(dim=0), where.amax(dim=0) + 1])[None].float()
    assert unflip(box, (8, 10, 12), (0, 2)).tolist() == [[1, 2, 5, 4, 9, 6]]
    assert torch.equal(unflip(unflip(box, (8, 10, 12), (1,)), (8, 10, 12), (1,)), box)


def test_cut_means_an_inner_border():
    boxes = torch.tensor([[0.0, 5, 5, 9, 9, 9], [5, 5, 5, 32, 9, 9], [5, 5, 5, 9, 9, 31.5], [5, 5, 5, 9, 9, 9]])
    assert is_cut(boxes, PATCH, (0, 0, 0), (64, 32, 40)).tolist() == [False, True, True, False]
    assert is_cut(boxes, PATCH, (32, 0, 8), (64, 32, 40)).tolist() == [True, False, False, False]


def test_a_sliver_of_an_object_that_another_tile_sees_whole_goes():
    whole, sliver = [18.0, 4, 4, 44, 30, 30], [18.0, 4, 4, 21, 30, 30]  # IoU 0.12 only
    rows = [(whole, 0.8, 0, RIGHT, False), ([29.0, 4, 4, 32, 30, 30], 0.9, 0, LEFT, True)]
    found, _ = merge_tiles(tile_detections(rows), 0.5, 100)
    assert found.boxes.tolist() == [whole] and found.scores.tolist() == pytest.approx([0.8])
    other_class = [(whole, 0.8, 0, RIGHT, False), (sliver, 0.9, 1, LEFT, True)]
    assert len(merge_tiles(tile_detections(other_class), 0.5, 100)[0]) == 2
    clear_sliver = [(whole, 0.1, 0, RIGHT, False), ([29.0, 4, 4, 32, 30, 30], 0.9, 0, LEFT, True)]
    assert len(merge_tiles(tile_detections(clear_sliver), 0.5, 100)[0]) == 2  # the whole one is hardly believed


def test_parts_that_agree_where_both_tiles_look_become_one():
    rows = [([4.0, 8, 8, 32, 20, 20], 0.9, 0, LEFT, True), ([16.0, 8, 9, 44, 20, 20], 0.8, 0, RIGHT, True)]
    found, _ = merge_tiles(tile_detections(rows), 0.5, 100)
    assert found.boxes.tolist() == [[4, 8, 8, 44, 20, 20]] and found.scores.tolist() == pytest.approx([0.9])


def test_parts_that_disagree_stay_and_weak_ones_move_no_border():
    apart = [([4.0, 0, 0, 32, 8, 8], 0.9, 0, LEFT, True), ([16.0, 20, 20, 44, 30, 30], 0.8, 0, RIGHT, True)]
    assert len(merge_tiles(tile_detections(apart), 0.5, 100)[0]) == 2
    weak = [([4.0, 8, 8, 32, 20, 20], 0.9, 0, LEFT, True), ([16.0, 8, 8, 44, 20, 20], 0.1, 0, RIGHT, True)]
    found, _ = merge_tiles(tile_detections(weak), 0.5, 100)
    assert found.boxes.tolist() == [[4, 8, 8, 32, 20, 20]]


def test_boxes_of_the_tile_with_the_better_view_win_and_keep_their_score():
    rows = [([4.0, 4, 4, 10, 10, 10], 0.8, 0, LEFT, False), ([4.0, 4, 5, 10, 10, 10], 0.9, 0, RIGHT, False)]
    view = tile_detections(rows)
    view.weights = torch.tensor([1.0, 0.6])
    found, weights = merge_tiles(view, 0.1, 100)
    assert (
        found.boxes[:, 2].tolist() == [4] and found.scores.tolist() == pytest.approx([0.8]) and weights.tolist() == [1]
    )


def test_views_are_averaged_by_clustering_and_maximised_by_nms():
    box = torch.tensor([[4.0, 4, 4, 10, 10, 10]])
    label = torch.zeros(1, dtype=torch.long)
    views = [Detections(box, torch.tensor([score]), label) for score in (0.9, 0.6)] + [Detections.concatenate([])] * 2
    weights = [torch.ones(len(view)) for view in views]
    clustered = merge_views(views, weights, "clustering", 0.5, 100)
    assert clustered.scores.tolist() == pytest.approx([(0.9 + 0.6) / 4]) and torch.equal(clustered.boxes, box)
    assert merge_views(views, weights, "nms", 0.5, 100).scores.tolist() == pytest.approx([0.9])
    assert merge_views(views[:1], weights[:1], "clustering", 0.5, 100) is views[0]
