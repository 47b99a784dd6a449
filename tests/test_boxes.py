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
    long = torch.zeros(0, dtype=torch.long)
    fused = B.weighted_box_clustering(none, torch.zeros(0), long, torch.zeros(0), long, 3, iou_threshold=0.5)
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


@pytest.mark.parametrize("small_is_better", [False, True])
def test_nms_looks_as_far_along_an_axis_as_the_threshold_allows(small_is_better):
    start = torch.arange(400.0)[:, None] * 20  # more than a chunk
    rest = torch.tensor([[0.0, 0.0]]).expand(400, 2)
    large = torch.cat([start, rest, start + 12, rest + 1], dim=1)
    small = torch.cat([start + 5.9, rest, start + 12, rest + 1], dim=1)  # IoU 0.508: the half at the far end
    boxes = torch.cat([small, large] if small_is_better else [large, small])
    assert B.nms(boxes, torch.linspace(1, 0.1, 800), 0.5).tolist() == list(range(400))


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


@pytest.mark.parametrize("views, score", [(3, 0.6939), (8, 0.2602)])
def test_weighted_box_clustering_known_answer(views, score):
    labels = torch.zeros(3, dtype=torch.long)
    boxes, scores, _ = B.weighted_box_clustering(
        CLUSTER, CLUSTER_SCORES, labels, torch.ones(3), torch.arange(3), views, 0.5
    )
    assert scores.tolist() == pytest.approx([score], abs=1e-4)
    assert boxes[0].tolist() == pytest.approx([0.2847, 0.3866, 0, 10.2847, 10.3866, 10], abs=1e-3)


def clustering_by_definition(boxes, scores, labels, weights, origin, num_views, threshold):
    """One cluster after the other, as the formula is written."""
    fused = []
    for label in sorted(set(labels.tolist())):
        left = [i for i in scores.argsort(descending=True, stable=True).tolist() if labels[i] == label]
        while left:
            best = boxes[left[0]].tolist()
            iou = {i: slow_iou(boxes[i].tolist(), best) for i in left}
            members = [i for i in left if iou[i] > threshold]
            votes = [iou[i] * float(weights[i]) for i in members]
            gains = [v * float(scores[i]) for v, i in zip(votes, members, strict=True)]
            missing = num_views - len({int(origin[i]) for i in members})
            box = [
                sum(g * float(boxes[i][k]) for g, i in zip(gains, members, strict=True)) / sum(gains) for k in range(6)
            ]
            fused.append((sum(gains) / (sum(votes) + missing * sum(votes) / len(votes)), box, label))
            left = [i for i in left if i not in members]
    return sorted(fused, key=lambda entry: -entry[0])


@pytest.mark.parametrize("threshold", [1e-5, 0.3, 0.6])
def test_weighted_box_clustering_follows_its_definition(threshold):
    generator = torch.Generator().manual_seed(3)
    boxes = random_boxes(40, 5).repeat(10, 1) + torch.randn(400, 3, generator=generator).repeat(1, 2).round() / 2
    scores, weights = torch.rand(400, generator=generator), 0.5 + torch.rand(400, generator=generator) / 2
    labels, origin = (torch.randint(0, n, (400,), generator=generator) for n in (2, 5))
    fused = B.weighted_box_clustering(boxes, scores, labels, weights, origin, 6, threshold)
    expected = clustering_by_definition(boxes, scores, labels, weights, origin, 6, threshold)
    assert 2 < len(expected) == len(fused[1]) < 400
    torch.testing.assert_close(fused[1], torch.tensor([entry[0] for entry in expected]), atol=1e-5, rtol=0)
    torch.testing.assert_close(fused[0], torch.tensor([entry[1] for entry in expected]), atol=1e-3, rtol=0)
    assert fused[2].tolist() == [entry[2] for entry in expected]


@pytest.mark.parametrize("times", [2, 5])
def test_running_every_view_again_changes_nothing(times):
    """What nnDetection's scores do not do with a view that has two boxes in a cluster, nor with other view counts."""
    boxes = torch.cat([CLUSTER, CLUSTER[:1] + 50, CLUSTER + 20])
    scores, weights = torch.tensor([0.9, 0.6, 0.5, 0.4, 0.3, 0.8, 0.7]), torch.tensor([1.0, 0.7, 1, 0.6, 1, 1, 0.8])
    labels, origin = torch.tensor([0, 0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 2, 1, 0, 1, 2])  # of 4 views
    once = B.weighted_box_clustering(boxes, scores, labels, weights, origin, 4, 0.5)
    again = torch.cat([origin + 4 * copy for copy in range(times)])
    more = B.weighted_box_clustering(
        *(part.repeat(times, *[1] * (part.dim() - 1)) for part in (boxes, scores, labels, weights)),
        again,
        4 * times,
        0.5,
    )
    for a, b in zip(once, more, strict=True):
        torch.testing.assert_close(a, b)


def test_two_boxes_of_one_view_do_not_stand_for_another_view():
    labels, ones = torch.zeros(2, dtype=torch.long), torch.ones(2)
    boxes, scores = CLUSTER[:1].repeat(2, 1), torch.tensor([0.8, 0.8])
    both = B.weighted_box_clustering(boxes, scores, labels, ones, torch.tensor([0, 1]), 2, 0.5)
    one = B.weighted_box_clustering(boxes, scores, labels, ones, torch.tensor([0, 0]), 2, 0.5)
    assert both[1].tolist() == pytest.approx([0.8]) and one[1][0] < 0.6


def test_clustering_separates_classes_and_distant_boxes():
    boxes = torch.cat([CLUSTER, CLUSTER[:1] + 50, CLUSTER[:1]])
    scores, labels = torch.tensor([0.9, 0.6, 0.5, 0.4, 0.3]), torch.tensor([0, 0, 0, 0, 1])
    one_view = torch.zeros(5, dtype=torch.long)
    fused, score, label = B.weighted_box_clustering(boxes, scores, labels, torch.ones(5), one_view, 1, 0.5)
    assert label.tolist() == [0, 0, 1] and score.tolist() == pytest.approx([0.6939, 0.4, 0.3], abs=1e-4)
    torch.testing.assert_close(fused[1:], boxes[3:])
