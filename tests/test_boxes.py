"""Box functions against loops written from their definitions."""

import math

import numpy as np
import pytest
import torch

from pretrain3d import boxes as B


def random_boxes(count: int, seed: int, extent: float = 30.0, largest: float = 12.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 3, generator=generator) * extent
    return torch.cat([low, low + 1 + torch.rand(count, 3, generator=generator) * largest], dim=1)


def slow_iou(a, b) -> float:
    shared = math.prod(max(0.0, min(a[i + 3], b[i + 3]) - max(a[i], b[i])) for i in range(3))
    union = sum(math.prod(box[i + 3] - box[i] for i in range(3)) for box in (a, b)) - shared
    return shared / union if union > 0 else 0.0


def slow_giou(a, b) -> float:
    hull = math.prod(max(a[i + 3], b[i + 3]) - min(a[i], b[i]) for i in range(3))
    shared = math.prod(max(0.0, min(a[i + 3], b[i + 3]) - max(a[i], b[i])) for i in range(3))
    union = sum(math.prod(box[i + 3] - box[i] for i in range(3)) for box in (a, b)) - shared
    return shared / union - (hull - union) / hull


def slow_nms(boxes, scores, threshold, labels=None) -> list[int]:
    """Greedy suppression by its definition; the IoU is `boxes.iou`, tested on its own."""
    above = (B.iou(boxes, boxes) > threshold).tolist()
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    kept: list[int] = []
    for i in order:
        rivals = [j for j in kept if labels is None or labels[i] == labels[j]]
        if not any(above[i][j] for j in rivals):
            kept.append(i)
    return kept


def test_half_open_boxes_count_voxels():
    volume_a, volume_b = np.zeros((12, 12, 12), bool), np.zeros((12, 12, 12), bool)
    volume_a[3:6, 2:9, 1:4] = True
    volume_b[4:8, 5:11, 0:3] = True
    a, b = torch.tensor([[3, 2, 1, 6, 9, 4]]), torch.tensor([[4, 5, 0, 8, 11, 3]])
    assert B.area(a).item() == volume_a.sum()
    expected = (volume_a & volume_b).sum() / (volume_a | volume_b).sum()
    assert B.iou(a, b).item() == pytest.approx(expected, abs=1e-7)
    assert B.centers(a).tolist() == [[4.5, 5.5, 2.5]] and B.sizes(a).tolist() == [[3, 7, 3]]


def test_pairwise_overlaps_equal_their_definitions():
    a, b = random_boxes(15, 0), random_boxes(20, 1)
    iou = [[slow_iou(x, y) for y in b.tolist()] for x in a.tolist()]
    giou = [[slow_giou(x, y) for y in b.tolist()] for x in a.tolist()]
    torch.testing.assert_close(B.iou(a, b), torch.tensor(iou), atol=1e-6, rtol=0)
    torch.testing.assert_close(B.giou(a, b), torch.tensor(giou), atol=1e-6, rtol=0)
    torch.testing.assert_close(B.aligned_giou(a, b[:15]), B.giou(a, b).diagonal(), atol=0, rtol=0)


def test_empty_inputs_and_empty_boxes():
    none, point = torch.zeros(0, 6), torch.tensor([[4.0, 4, 4, 4, 4, 4]])
    assert B.iou(none, random_boxes(3, 0)).shape == (0, 3)
    assert B.iou(point, point).item() == 0
    assert len(B.nms(none, torch.zeros(0), 0.5)) == 0
    assert len(B.batched_nms(none, torch.zeros(0), torch.zeros(0, dtype=torch.long), 0.5)) == 0
    fused = B.weighted_box_clustering(none, *[torch.zeros(0)] * 4, iou_threshold=0.5)
    assert [len(part) for part in fused] == [0, 0, 0]


def test_clip_cuts_and_never_inverts():
    boxes = torch.tensor([[-3.0, 2, 5, 4, 30, 9], [40, 1, 1, 50, 2, 2]])
    assert B.clip(boxes, (10, 20, 8)).tolist() == [[0, 2, 5, 4, 20, 8], [10, 1, 1, 10, 2, 2]]


def test_encode_and_decode_round_trip_and_known_value():
    boxes, anchors = random_boxes(50, 2), random_boxes(50, 3)
    torch.testing.assert_close(B.decode(B.encode(boxes, anchors), anchors), boxes, atol=1e-4, rtol=0)
    deltas = B.encode(torch.tensor([[2.0, 0, 0, 6, 8, 4]]), torch.tensor([[0.0, 0, 0, 4, 4, 4]]))
    torch.testing.assert_close(deltas, torch.tensor([[0.5, 0.5, 0, 0, math.log(2), 0]]))


def test_decode_cuts_the_exponential():
    box = B.decode(torch.tensor([[0.0, 0, 0, 100, 0, 0]]), torch.tensor([[0.0, 0, 0, 4, 4, 4]]))
    assert B.sizes(box)[0].tolist() == pytest.approx([4 * 62.5, 4, 4])


def test_overlaps_are_float32_under_autocast():
    boxes = torch.tensor([[250.0, 251, 253, 255, 257, 259]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for result in (B.iou(boxes, boxes), B.decode(B.encode(boxes, boxes), boxes), B.clip(boxes, (300, 300, 300))):
            assert result.dtype == torch.float32
        assert B.iou(boxes, boxes).item() == 1.0


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("extent", [5.0, 30.0, 200.0])
def test_nms_is_greedy_suppression(threshold, extent):
    boxes = random_boxes(400, 5, extent)
    scores = torch.rand(400, generator=torch.Generator().manual_seed(6)).mul(50).round() / 50  # with ties
    expected = slow_nms(boxes, scores, threshold)
    assert B.nms(boxes, scores, threshold).tolist() == expected
    assert B.nms(boxes, scores, threshold, max_keep=7).tolist() == expected[:7]


def test_nms_over_several_chunks_of_long_chains():
    # a row of boxes, each overlapping only its neighbours: every second one survives, over all chunks
    start = torch.arange(1100.0)[:, None] * torch.tensor([[0.5, 0, 0]])
    boxes = torch.cat([start, start + 1], dim=1)
    scores = torch.linspace(1, 0.1, 1100)
    assert B.nms(boxes, scores, 0.3).tolist() == list(range(0, 1100, 2))
    shuffled = torch.randperm(1100, generator=torch.Generator().manual_seed(0))
    assert B.nms(boxes[shuffled], scores[shuffled], 0.3).tolist() == slow_nms(boxes[shuffled], scores[shuffled], 0.3)


def test_an_equal_iou_survives():
    boxes = torch.tensor([[0.0, 0, 0, 4, 1, 1], [0, 0, 0, 2, 1, 1]])  # IoU exactly 0.5
    assert B.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0, 1]
    assert B.nms(boxes, torch.tensor([0.9, 0.8]), 0.499).tolist() == [0]


def test_batched_nms_keeps_classes_apart():
    boxes, generator = random_boxes(300, 7, 10.0), torch.Generator().manual_seed(8)
    scores, labels = torch.rand(300, generator=generator), torch.randint(0, 4, (300,), generator=generator)
    expected = slow_nms(boxes, scores, 0.3, labels)
    assert B.batched_nms(boxes, scores, labels, 0.3).tolist() == expected
    assert B.batched_nms(boxes, scores, labels, 0.3, max_keep=9).tolist() == expected[:9]


CLUSTER = torch.tensor([[0.0, 0, 0, 10, 10, 10], [1, 0, 0, 11, 10, 10], [0, 2, 0, 10, 12, 10]])  # IoU 1, 9/11, 2/3
CLUSTER_SCORES = torch.tensor([0.9, 0.6, 0.5])


@pytest.mark.parametrize("views, score", [(1, 0.6939), (3, 0.6939), (8, 0.2602)])
def test_weighted_box_clustering_known_answer(views, score):
    labels, ones = torch.zeros(3, dtype=torch.long), torch.ones(3)
    boxes, scores, _ = B.weighted_box_clustering(CLUSTER, CLUSTER_SCORES, labels, ones, ones * views, 0.5)
    assert scores.tolist() == pytest.approx([score], abs=1e-4)
    assert boxes[0].tolist() == pytest.approx([0.2847, 0.3866, 0, 10.2847, 10.3866, 10], abs=1e-3)


def test_clustering_scores_do_not_depend_on_the_number_of_views():
    for views in (1, 2, 8):
        boxes, scores = CLUSTER[:1].repeat(views, 1), torch.full((views,), 0.7)
        labels, expected = torch.zeros(views, dtype=torch.long), torch.full((views,), float(views))
        fused = B.weighted_box_clustering(boxes, scores, labels, torch.ones(views), expected, 0.5)
        assert fused[1].tolist() == pytest.approx([0.7]) and torch.allclose(fused[0], CLUSTER[:1])


def test_clustering_separates_classes_and_distant_boxes():
    boxes = torch.cat([CLUSTER, CLUSTER[:1] + 50, CLUSTER[:1]])
    scores, labels = torch.tensor([0.9, 0.6, 0.5, 0.4, 0.3]), torch.tensor([0, 0, 0, 0, 1])
    fused, score, label = B.weighted_box_clustering(boxes, scores, labels, torch.ones(5), torch.ones(5), 0.5)
    assert label.tolist() == [0, 0, 1] and score.tolist() == pytest.approx([0.6939, 0.4, 0.3], abs=1e-4)
    torch.testing.assert_close(fused[1:], boxes[3:])
