"""Deformable DETR: matching and losses against loops, denoising queries, gradients, prediction, and that it learns."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from pretrain3d import boxes as box_ops
from pretrain3d.__main__ import main
from pretrain3d.backbones.contract import Level
from pretrain3d.config import UserError
from pretrain3d.detection import DETECTORS, queries
from pretrain3d.detection.deformable import DeformableAttention
from pretrain3d.detection.detr import DeformableDETR
from pretrain3d.detection.queries import candidates, denoising_queries, inverse_sigmoid, match, to_relative, to_voxels
from pretrain3d.detection.transformer import EncoderLayer, SelfAttention, SineEmbedding, TokenGrids
from pretrain3d.evaluation.metric import DetectionMetric
from pretrain3d.registry import check

LEVELS = [Level(8, (1, 1, 1)), Level(8, (1, 2, 2)), Level(12, (2, 4, 4)), Level(16, (4, 8, 8))]
SHAPE = (8, 16, 16)
SMALL = {"hidden": 16, "heads": 2, "points": 2, "encoder_layers": 1, "decoder_layers": 2, "ffn": 16, "num_queries": 9}


def features(batch: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [[n // s for n, s in zip(SHAPE, level.stride, strict=True)] for level in LEVELS]
    maps = [torch.randn(batch, lv.channels, *n, generator=generator) for lv, n in zip(LEVELS, sizes, strict=True)]
    return [m.requires_grad_() for m in maps]


def make_batch(objects: bool = True) -> dict[str, torch.Tensor]:
    """Two images with two and one object; padding has a gap in front in the second."""
    boxes = torch.tensor([[[1.0, 2, 3, 4, 8, 9], [4, 8, 8, 7, 14, 13]], [[0, 0, 0, 0, 0, 0], [0, 4, 4, 4, 10, 12]]])
    valid = torch.tensor([[True, True], [False, True]]) & objects
    labels = torch.tensor([[0, 2], [0, 1]])
    return {"image": torch.zeros(2, 1, *SHAPE), "boxes": boxes * valid[..., None], "labels": labels, "valid": valid}


def random_targets(batch: int, count: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low = torch.rand(batch, count, 3) * 8
    boxes = torch.cat([low, low + 1 + torch.rand(batch, count, 3) * 6], dim=-1)
    return boxes, torch.randint(0, classes, (batch, count)), torch.rand(batch, count) < 0.8


def test_relative_boxes_come_back() -> None:
    boxes, _, _ = random_targets(2, 5)
    relative = to_relative(boxes, SHAPE)
    torch.testing.assert_close(relative[0, 0, 0], (boxes[0, 0, 0] + boxes[0, 0, 3]) / 2 / SHAPE[0])
    torch.testing.assert_close(relative[0, 0, 5], (boxes[0, 0, 5] - boxes[0, 0, 2]) / SHAPE[2])
    torch.testing.assert_close(to_voxels(relative, SHAPE), boxes, atol=1e-5, rtol=1e-5)
    values = torch.tensor([0.0, 0.2, 1.0])
    torch.testing.assert_close(inverse_sigmoid(values).sigmoid(), values, atol=2e-5, rtol=0)


def cost_by_definition(logit: torch.Tensor, box: torch.Tensor, target: torch.Tensor, label: int) -> float:
    p = logit[label].sigmoid().item()
    gain = 0.75 * (1 - p) * -math.log(p) - 0.25 * p * -math.log(1 - p)
    l1 = (box - to_relative(target, SHAPE)).abs().sum().item()
    return 2 * gain + 5 * l1 - 2 * box_ops.aligned_giou(to_voxels(box, SHAPE), target).item()


@pytest.mark.parametrize(("count", "objects"), [(12, 3), (5, 5), (3, 5), (40, 1)])
def test_matching_is_optimal(count: int, objects: int) -> None:
    logits, boxes = torch.randn(2, count, 3), torch.rand(2, count, 6) * 0.5 + 0.25
    targets, labels, valid = random_targets(2, objects)
    valid[0, 0], valid[1] = False, True
    (got,) = match(candidates(logits, boxes, targets, labels, valid, SHAPE, 1.0, 0.75))
    for image in range(2):
        there = valid[image].nonzero()[:, 0].tolist()
        cost = {
            (n, q): cost_by_definition(logits[image, q], boxes[image, q], targets[image, n], int(labels[image, n]))
            for n, q in itertools.product(there, range(count))
        }
        chosen = got[image].tolist()
        pairs = [(n, q) for n, q in enumerate(chosen) if q >= 0]
        assert len(pairs) == min(len(there), count) == len({q for _, q in pairs})
        assert all(n in there for n, _ in pairs)
        best = math.inf  # over all ways to give each object a query of its own, or each query an object
        if len(there) <= count:
            for order in itertools.permutations(range(count), len(there)):
                best = min(best, sum(cost[pair] for pair in zip(there, order, strict=True)))
        else:
            for order in itertools.permutations(there, count):
                best = min(best, sum(cost[n, q] for q, n in enumerate(order)))
        assert sum(cost[pair] for pair in pairs) == pytest.approx(best, abs=1e-4)


def test_hundreds_of_objects_and_broken_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, labels, valid = random_targets(2, 200)
    logits, predicted = torch.randn(2, 150, 3), torch.rand(2, 150, 6)
    tokens, token_boxes = torch.randn(2, 600, 3), torch.rand(2, 600, 6)
    tokens[0, :50], tokens[1] = torch.nan, torch.nan
    rest = (boxes, labels, valid, SHAPE, 1.0, 0.75)
    at_once = candidates(tokens, token_boxes, *rest)
    monkeypatch.setattr(queries, "PAIRS", 1)  # image by image, as when there are many tokens
    few, many = match(candidates(logits, predicted, *rest), candidates(tokens, token_boxes, *rest))
    assert torch.equal(many, match(at_once)[0])
    for image in range(2):
        count = int(valid[image].sum())
        assert (few[image] >= 0).sum() == min(count, 150) and (many[image][valid[image]] >= 0).all()
        assert len(many[image][valid[image]].unique()) == count and (many[image][~valid[image]] == -1).all()


def loss_by_definition(outputs, batch, query, layer_logits, layer_boxes) -> list[float]:
    """Classification, L1, GIoU of one layer, with the given matches."""
    total = [0.0, 0.0, 0.0]
    for image, (logits, boxes) in enumerate(zip(layer_logits, layer_boxes, strict=True)):
        owner = {q: n for n, q in enumerate(query[image].tolist()) if q >= 0}
        for q, k in itertools.product(range(len(logits)), range(3)):
            p = logits[q, k].sigmoid().item()
            positive = q in owner and int(batch["labels"][image, owner[q]]) == k
            total[0] += -0.75 * (1 - p) * math.log(p) if positive else -0.25 * p * math.log(1 - p)
        for q, n in owner.items():
            target = batch["boxes"][image, n]
            total[1] += 5 * (boxes[q] - to_relative(target, SHAPE)).abs().sum().item()
            total[2] += 2 * (1 - box_ops.aligned_giou(to_voxels(boxes[q], SHAPE), target).item())
    return [value / max(int(batch["valid"].sum()), 1) for value in total]


def test_losses_equal_loops() -> None:
    detector, batch = DeformableDETR(LEVELS, 3, **SMALL), make_batch()
    outputs = detector(features(), SHAPE)
    losses = {key: value.item() for key, value in detector.loss(outputs, batch).items()}
    rest = (batch["boxes"], batch["labels"], batch["valid"], SHAPE, 1.0, 0.75)
    expected = []
    groups = [*zip(outputs["logits"], outputs["boxes"], strict=True)]
    groups.append((outputs["proposal_logits"], outputs["proposal_boxes"]))
    for logits, boxes in groups:
        (query,) = match(candidates(logits, boxes, *rest))
        expected.append(loss_by_definition(outputs, batch, query, logits, boxes))
    first, last, proposals = expected
    assert [losses[key] for key in ("classification", "l1", "giou")] == pytest.approx(last, rel=1e-4)
    assert losses["auxiliary"] == pytest.approx(sum(first), rel=1e-4)
    assert losses["proposals"] == pytest.approx(sum(proposals), rel=1e-4)
    assert losses["loss"] == pytest.approx(sum(map(sum, expected)), rel=1e-4) and losses["unmatched"] == 0


def test_a_query_knows_its_box_before_it_reads() -> None:
    detector = DeformableDETR(LEVELS, 3, **SMALL)
    grid = detector.grids.grid(SHAPE, torch.device("cpu"))
    content, memory = torch.randn(1, 1, 16), torch.zeros(1, len(grid.boxes), 16)
    small, large = torch.full((1, 1, 6), 0.2), torch.full((1, 1, 6), 0.4)
    logits = [detector.decoder(content, boxes, memory, grid, None)[0] for boxes in (small, large)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_denoising_loss_equals_loops() -> None:
    detector, batch = DeformableDETR(LEVELS, 3, denoising=12, **SMALL), make_batch()
    outputs = detector(features(), SHAPE, batch)
    copies = outputs["denoising_logits"].shape[2]
    assert copies == 12  # 3 groups of 2 positives and 2 negatives
    expected = 0.0
    for logits, boxes in zip(outputs["denoising_logits"], outputs["denoising_boxes"], strict=True):
        for group in range(3):
            part = slice(4 * group, 4 * group + 4)
            query = torch.where(batch["valid"], torch.arange(2), -1)
            kept = [
                logits[image, part].masked_fill(~batch["valid"][image].repeat(2)[:, None], -1e4) for image in (0, 1)
            ]
            expected += sum(loss_by_definition(outputs, batch, query, torch.stack(kept), boxes[:, part])) / 3
    assert detector.loss(outputs, batch)["denoising"].item() == pytest.approx(expected, rel=1e-4)


def test_one_transfer_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    detector, batch = DeformableDETR(LEVELS, 3, denoising=12, **SMALL), make_batch()
    outputs = detector(features(), SHAPE, batch)
    calls = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: calls.append(self) or cpu(self))
    for name in ("item", "tolist", "nonzero", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_, n=name: pytest.fail(f"{n} waits for the device"))
    detector.loss(outputs, batch)
    assert len(calls) == 1


@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize("denoising", [0, 12])
def test_every_parameter_gets_a_finite_gradient(objects: bool, denoising: int) -> None:
    detector, maps, batch = DeformableDETR(LEVELS, 3, denoising=denoising, **SMALL), features(), make_batch(objects)
    for head in (*detector.decoder.box_heads, detector.proposal_box_head):
        nn.init.normal_(head.change.layers[-1].weight, std=0.1)  # they start at 0: their input gets no gradient then
    for attention in (module for module in detector.modules() if isinstance(module, DeformableAttention)):
        nn.init.normal_(attention.offsets.weight, std=0.1)  # so do these: positions get no gradient then
    losses = detector.loss(detector(maps, SHAPE, batch if detector.needs_targets else None), batch)
    losses["loss"].backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert [m.grad is not None for m in maps] == [False, True, True, True]
    if objects:
        silent = [name for name, parameter in detector.named_parameters() if parameter.grad.abs().sum() == 0]
        assert not silent
    else:
        assert losses["l1"] == 0 and losses["giou"] == 0 and losses["loss"] > 0
        assert not denoising or losses["denoising"] == 0


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        detector, batch = DeformableDETR(LEVELS, 3, checkpointing=checkpointing, **SMALL), make_batch()
        detector.loss(detector(features(), SHAPE), batch)["loss"].backward()
        gradients.append([parameter.grad for parameter in detector.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_permuted_queries_permute_the_outputs() -> None:
    detector = DeformableDETR(LEVELS, 3, **SMALL)
    grid = detector.grids.grid(SHAPE, torch.device("cpu"))
    memory, content, boxes = torch.randn(2, len(grid.boxes), 16), torch.randn(2, 7, 16), torch.rand(2, 7, 6)
    for head in detector.decoder.box_heads:
        nn.init.normal_(head.change.layers[-1].weight)
    order = torch.randperm(7)
    plain = detector.decoder(content, boxes, memory, grid, None)
    permuted = detector.decoder(content[:, order], boxes[:, order], memory, grid, None)
    for one, other in zip(plain, permuted, strict=True):
        torch.testing.assert_close(one[:, :, order], other, atol=1e-5, rtol=1e-4)
        assert (one - one[:, :, order]).abs().max() > 0.01


def test_queries_are_the_best_proposals() -> None:
    detector = DeformableDETR(LEVELS, 3, **SMALL)
    outputs = detector(features(), SHAPE)
    scores = outputs["proposal_logits"].amax(-1)
    best = scores.topk(9).indices
    # box heads start at no change, so queries still lie where they were proposed: at their tokens, sized by level
    grid = detector.grids.grid(SHAPE, torch.device("cpu"))
    torch.testing.assert_close(outputs["boxes"][-1], grid.boxes[best], atol=1e-4, rtol=1e-3)


def test_tokens_lie_in_the_middle_of_their_voxels() -> None:
    grid = TokenGrids([(1, 2, 2), (2, 4, 4)], 0.05).grid(SHAPE, torch.device("cpu"))
    assert grid.shapes == ((8, 8, 8), (4, 4, 4)) and grid.boxes.shape == (8**3 + 4**3, 6)
    x, y, z = 3, 0, 5
    center = [(x + 0.5) / 8, (y + 0.5) / 8, (z + 0.5) / 8]
    assert grid.boxes[(x * 8 + y) * 8 + z].tolist() == pytest.approx([*center, 0.05, 0.05, 0.05])
    assert grid.boxes[-1].tolist() == pytest.approx([0.875, 0.875, 0.875, 0.1, 0.1, 0.1])
    large = TokenGrids([(1, 2, 2), (2, 4, 4)], 0.6).grid(SHAPE, torch.device("cpu")).boxes[:, 3:]
    assert large[0].tolist() == pytest.approx([0.6] * 3) and large[-1].tolist() == pytest.approx([0.95] * 3)


def test_positions_say_where_to_look_and_are_not_read() -> None:
    """Where a query looks does not depend on it before training; what is read there never holds a position."""
    grid = TokenGrids([(2, 4, 4), (4, 8, 8)], 0.05).grid(SHAPE, torch.device("cpu"))
    layer, x = EncoderLayer(16, 2, 2, 2, 16), torch.randn(1, len(grid.boxes), 16)
    position = torch.randn(len(grid.boxes), 16)
    torch.testing.assert_close(layer(x, position, grid), layer(x, 0 * position, grid))
    mixing = SelfAttention(16, 2)
    nn.init.zeros_(mixing.query_key.weight)
    torch.testing.assert_close(mixing(x, position[None], None), mixing(x, 0 * position[None], None))


def test_no_gradient_flows_through_a_box_or_into_a_proposal() -> None:
    detector = DeformableDETR(LEVELS, 3, **SMALL)
    for head in detector.decoder.box_heads:
        nn.init.normal_(head.change.layers[-1].weight, std=0.1)
    outputs = detector(features(), SHAPE)
    (outputs["logits"][-1].sum() + outputs["boxes"][-1].sum()).backward()
    proposals = (detector.proposal, detector.proposal_classifier, detector.proposal_box_head)
    for part in (*proposals, detector.decoder.box_heads[0]):
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in part.parameters())
    assert all(parameter.grad.any() for parameter in detector.decoder.box_heads[1].parameters())


def test_classifiers_start_at_the_published_prior() -> None:
    detector = DeformableDETR(LEVELS, 3, **SMALL)
    for classifier in (detector.proposal_classifier, *detector.decoder.classifiers):
        assert classifier.bias.sigmoid().tolist() == pytest.approx([0.05] * 3)


def test_sine_embedding_equals_its_definition() -> None:
    sine = SineEmbedding(3, 16)  # 8 pairs: 3, 3 and 2
    values = torch.rand(4, 3)
    got = sine(values)
    pairs = [(axis, i, n) for axis, n in enumerate((3, 3, 2)) for i in range(n)]
    for row in range(4):
        angles = [values[row, axis].item() * 2 * math.pi / 10_000 ** (i / n) for axis, i, n in pairs]
        expected = [*map(math.sin, angles), *map(math.cos, angles)]
        assert got[row].tolist() == pytest.approx(expected, abs=1e-5)


def test_denoising_queries_move_faces_as_far_as_they_should() -> None:
    boxes = torch.tensor([[[2.0, 4, 4, 6, 10, 12], [0, 0, 0, 0, 0, 0]]])
    valid, labels = torch.tensor([[True, False]]), torch.tensor([[1, 0]])
    made = denoising_queries(boxes, labels, valid, (64, 64, 64), 400, 4)
    assert made.groups == 100 and made.boxes.shape == (1, 400, 6)
    assert torch.equal(made.valid[0], torch.tensor([True, False]).repeat(200))
    torch.manual_seed(7)
    first = denoising_queries(boxes + 20, labels, valid, (64, 64, 64), 400, 4)
    torch.manual_seed(7)
    assert torch.equal(first.boxes, denoising_queries(boxes + 20, labels, valid, (64, 64, 64), 400, 4).boxes)
    corners = to_voxels(first.boxes, (64, 64, 64)).view(100, 2, 2, 6)[:, :, 0]
    target, half = boxes[0, 0] + 20, (boxes[0, 0, 3:] - boxes[0, 0, :3]).repeat(2) / 2
    shift = (corners - target) / half
    assert shift[:, 0].abs().max() <= 1.001 and shift[:, 0].abs().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (box_ops.sizes(corners) >= 0).all() and shift[:, 1].abs().mean() > 1
    positive, negative = (box_ops.aligned_iou(corners[:, i], target).mean() for i in (0, 1))
    assert positive > 2 * negative
    flipped = (first.labels.view(100, 2, 2)[:, :, 0] != 1).float().mean().item()
    assert flipped == pytest.approx(0.25 * 3 / 4, abs=0.08)


def test_denoising_queries_are_seen_by_their_group_only() -> None:
    valid = torch.tensor([[True, False], [True, True]])
    made = denoising_queries(torch.ones(2, 2, 6), torch.zeros(2, 2, dtype=torch.long), valid, SHAPE, 8, 2)
    seen = made.visible(3)
    assert seen.shape == (2, 11, 11)
    for image, row, column in itertools.product(range(2), range(11), range(11)):
        if column >= 8:
            expected = True
        elif row >= 8:
            expected = False
        else:
            expected = row == column or (row // 4 == column // 4 and bool(valid[image, column % 2]))
        assert seen[image, row, column].item() == expected, (image, row, column)


def test_denoising_leaves_the_queries_alone() -> None:
    detector, batch = DeformableDETR(LEVELS, 3, denoising=12, **SMALL), make_batch()
    for head in detector.decoder.box_heads:
        nn.init.normal_(head.change.layers[-1].weight)
    trained = detector(features(), SHAPE, batch)
    plain = detector.eval()(features(), SHAPE)
    assert "denoising_logits" in trained and "denoising_logits" not in plain
    for key in plain:
        torch.testing.assert_close(plain[key], trained[key], atol=1e-4, rtol=1e-4)


def test_classes_that_are_not_annotated_have_no_classification_loss() -> None:
    detector, batch = DeformableDETR(LEVELS, 3, **SMALL), make_batch()
    batch["annotated"] = torch.tensor([[True, False, True], [True, True, True]])
    outputs = {key: value.detach().requires_grad_() for key, value in detector(features(), SHAPE).items()}
    detector.loss(outputs, batch)["loss"].backward()
    for gradient in (outputs["logits"].grad.transpose(0, 1), outputs["proposal_logits"].grad):
        assert (gradient[0][..., 1] == 0).all() and (gradient[0][..., [0, 2]] != 0).all() and (gradient[1] != 0).all()


def test_boxes_and_losses_are_float32_under_autocast() -> None:
    detector, batch = DeformableDETR(LEVELS, 3, denoising=12, **SMALL), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = detector(features(), SHAPE, batch)
        losses = detector.loss(outputs, batch)
        found = detector.predict(outputs, SHAPE)
    assert outputs["boxes"].dtype == outputs["proposal_boxes"].dtype == torch.float32
    assert losses["loss"].dtype == torch.float32 and found[0].boxes.dtype == found[0].scores.dtype == torch.float32
    losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters())


def test_predict_gives_what_the_last_layer_says() -> None:
    detector, batch = DeformableDETR(LEVELS, 3, detections_per_patch=5, **SMALL), make_batch()
    logits, boxes = torch.full((2, 2, 9, 3), -9.0), torch.rand(2, 2, 9, 6)
    logits[-1, 0, 4, 2], boxes[-1, 0, 4] = 4.0, to_relative(batch["boxes"][0, 1], SHAPE)
    logits[-1, 0, 7, 0], boxes[-1, 0, 7] = 3.0, to_relative(batch["boxes"][0, 0], SHAPE)
    logits[-1, 0, 7, 1] = 2.0
    boxes[-1, 1, 0], logits[-1, 1, 0, 0] = torch.tensor([1.0, 0.5, 0.5, 1.0, 0.5, 0.5]), 4.0  # half of it outside
    found = detector.predict({"logits": logits, "boxes": boxes}, SHAPE)
    assert [len(f) for f in found] == [5, 5] and found[0].labels[:3].tolist() == [2, 0, 1]
    torch.testing.assert_close(found[0].boxes[:3], batch["boxes"][0, [1, 0, 0]], atol=1e-4, rtol=0)
    assert found[0].scores[0].item() == pytest.approx(1 / (1 + math.exp(-4))) and (found[0].scores.diff() <= 0).all()
    assert found[1].boxes[0].tolist() == pytest.approx([4, 4, 4, 8, 12, 12], abs=1e-4)


def test_objects_without_a_query_are_counted() -> None:
    detector = DeformableDETR(LEVELS, 3, **(SMALL | {"num_queries": 3}))
    boxes, labels, _ = random_targets(2, 8)
    valid = torch.arange(8) < torch.tensor([[8], [2]])
    batch = {"image": torch.zeros(2, 1, *SHAPE), "boxes": boxes, "labels": labels, "valid": valid}
    assert detector.loss(detector(features(), SHAPE), batch)["unmatched"].item() == 5 / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 20, "heads": 8}, "hidden is 20; expected an even multiple of heads=8"),
        ({"num_queries": 0}, "num_queries is 0; expected at least 1"),
        ({"encoder_layers": -1}, "encoder_layers is -1; expected 0 or more"),
        ({"base_scale": 1.5}, "base_scale is 1.5"),
        ({"detection_levels": [2, 7]}, "detection_levels is .*between 0 and 3"),
        ({"detection_levels": [1, 2]}, r"detection_levels is \[1, 2\]; the coarsest level, 3, must be among them"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DeformableDETR(LEVELS, 2, **arguments)


def test_it_takes_no_anchors() -> None:
    node = {"name": "deformable_detr", "anchors": {"boxes": [[4, 4, 4]]}}
    with pytest.raises(UserError, match="unknown argument 'anchors'"):
        check(DETECTORS, node, "module.detector", given=("levels", "num_classes"))


def half_a_batch(rank: int, port: int, folder: str) -> None:
    """One of two processes: its image of the batch, gradients averaged; only one of them has objects."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    detector = DeformableDETR(LEVELS, 3, **SMALL)
    batch = make_batch()
    batch["valid"][1] = False
    maps, half = [m[rank : rank + 1] for m in features()], {k: v[rank : rank + 1] for k, v in batch.items()}
    parallel = nn.parallel.DistributedDataParallel(detector)  # reduces only while it is alive
    losses = detector.loss(parallel(maps, SHAPE), half)
    losses["loss"].backward()
    torch.save({n: p.grad for n, p in detector.named_parameters()} | {"loss": losses["loss"]}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(half_a_batch, args=(29637, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    detector, batch = DeformableDETR(LEVELS, 3, **SMALL), make_batch()
    batch["valid"][1] = False
    loss = detector.loss(detector(features(), SHAPE), batch)["loss"]
    loss.backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert (parts[0]["loss"] + parts[1]["loss"]).item() / 2 == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in detector.named_parameters():
        torch.testing.assert_close(parts[0][name], parameter.grad, atol=1e-5, rtol=1e-4)


class TinyBackbone(nn.Module):
    levels = (Level(16, (2, 2, 2)), Level(24, (4, 4, 4)), Level(32, (8, 8, 8)))

    def __init__(self) -> None:
        super().__init__()
        widths = [1, *(level.channels for level in self.levels)]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(a, b, 3, 2, 1), nn.InstanceNorm3d(b), nn.ReLU(),
                nn.Conv3d(b, b, 3, 1, 1), nn.InstanceNorm3d(b), nn.ReLU(),
            )
            for a, b in itertools.pairwise(widths)
        )  # fmt: skip

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        return maps


def blobs(count: int, size: int = 24) -> dict[str, torch.Tensor]:
    """Volumes with up to three bright (label 0) or dark (label 1) cubes in noise."""
    image = 0.3 * torch.randn(count, 1, size, size, size)
    boxes, labels = torch.zeros(count, 3, 6), torch.randint(0, 2, (count, 3))
    valid = torch.arange(3) <= (torch.arange(count) % 3)[:, None]
    for index, n in valid.nonzero().tolist():
        low = torch.randint(0, size - 7, (3,))
        high = low + torch.randint(3, 8, (3,))
        where = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        image[index, 0][where] += 1.5 - 3.0 * labels[index, n]
        boxes[index, n] = torch.cat([low, high])
    return {"image": image, "boxes": boxes, "labels": labels, "valid": valid}


@pytest.mark.slow
@pytest.mark.parametrize("denoising", [0, 24])
def test_it_overfits_a_few_volumes(denoising: int) -> None:
    torch.manual_seed(0)
    backbone, shape = TinyBackbone(), (24, 24, 24)
    small = {"hidden": 32, "heads": 4, "points": 2, "encoder_layers": 1, "decoder_layers": 2, "ffn": 64}
    detector = DeformableDETR(
        backbone.levels, 2, detection_levels=[0, 1, 2], num_queries=12, denoising=denoising, **small
    )
    parameters = [*backbone.parameters(), *detector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    batch = blobs(6)
    for _ in range(50):
        outputs = detector(backbone(batch["image"]), shape, batch if detector.needs_targets else None)
        optimizer.zero_grad()
        detector.loss(outputs, batch)["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 12.0)
        optimizer.step()
    metric = DetectionMetric(["bright", "dark"])
    with torch.no_grad():
        found = detector.eval().predict(detector(backbone.eval()(batch["image"]), shape), shape)
    for index, one in enumerate(found):
        valid = batch["valid"][index]
        metric.update(index, one, batch["boxes"][index][valid], batch["labels"][index][valid])
    assert metric.compute()["AP@0.10"] > 0.9


@pytest.mark.slow
def test_the_commands_take_it(phantom_store: Path, phantom_raw: Path, tmp_path: Path) -> None:
    """Denoising, averaging and bf16 as the config has them; then test, predict and export from what it saved."""
    line = [
        "fit", "--config", "configs/detect/phantom_detr.yaml", "name=detr", f"out={tmp_path}",
        f"data.store={phantom_store}", "data.patch_size=[32,32,32]", "data.num_workers=0", "module.warmup_steps=1",
        "module.overlap=0", "trainer.max_steps=2", "trainer.val_every_n_steps=2", "trainer.checkpoint_every_n_steps=1",
        "trainer.log_every_n_steps=1", "trainer.accelerator=cpu",
    ]  # fmt: skip
    assert main(line) == 0
    run = tmp_path / "detr"
    assert main(["test", str(run), "samples=20", "pictures=0"]) == 0
    assert "AP@0.10" in json.loads((run / "result.json").read_text())["metrics"]
    image = min((phantom_raw / "imagesTs").glob("*_0000.nii.gz"))
    assert main(["predict", str(run / "checkpoints" / "last.ckpt"), str(image), f"out={tmp_path / 'found'}"]) == 0
    assert main(["export", str(run), f"out={tmp_path / 'backbone.pt'}"]) == 0
    assert (tmp_path / "found" / "predictions.json").is_file() and (tmp_path / "backbone.pt").is_file()
