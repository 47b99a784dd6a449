"""Retina U-Net: losses against loops, gradients, prediction, and the state that is saved."""

import math
from collections import OrderedDict

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from pretrain3d import boxes as box_ops
from pretrain3d.backbones.contract import Level
from pretrain3d.backbones.plainconv import PlainConv
from pretrain3d.config import UserError
from pretrain3d.detection import DETECTORS, retina
from pretrain3d.detection.assign import atss
from pretrain3d.detection.losses import PositiveNormaliser, box_giou, box_l1, dice_and_cross_entropy, focal
from pretrain3d.detection.retina import RetinaUNet, retinanet
from pretrain3d.detection.sample import hard_negatives
from pretrain3d.registry import build

LEVELS = [Level(8, (1, 1, 1)), Level(8, (1, 2, 2)), Level(12, (2, 4, 4)), Level(16, (4, 8, 8))]
SHAPE = (8, 16, 16)
ANCHORS = {"boxes": [[3, 5, 5], [4, 8, 8]]}
SMALL = {"fpn_channels": 8, "num_convs": 1}


def features(batch: int = 2, levels=LEVELS, shape=SHAPE, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [[n // s for n, s in zip(shape, level.stride, strict=True)] for level in levels]
    maps = [torch.randn(batch, lv.channels, *n, generator=generator) for lv, n in zip(levels, sizes, strict=True)]
    return [m.requires_grad_() for m in maps]


def make_batch(objects: bool = True, shape=SHAPE) -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[[1.0, 2, 3, 4, 8, 9], [4, 8, 8, 7, 14, 13]], [[0, 4, 4, 4, 10, 12], [0, 0, 0, 0, 0, 0]]])
    labels = torch.tensor([[0, 2], [1, 0]])
    valid = torch.tensor([[True, True], [True, False]]) & objects
    mask = torch.zeros(2, *shape, dtype=torch.uint8)
    for image in range(2):
        for box, label in zip(boxes[image][valid[image]].long().tolist(), labels[image][valid[image]], strict=True):
            mask[image, box[0] : box[3], box[1] : box[4], box[2] : box[5]] = 1 + label
    return {
        "image": torch.zeros(2, 1, *shape),
        "boxes": boxes * valid[..., None],
        "labels": labels,
        "valid": valid,
        "mask": mask,
    }


def test_focal_equals_its_definition():
    logits = torch.linspace(-6, 6, 25)
    for gamma, alpha in ((1.0, 0.75), (2.0, 0.25), (0.0, 0.5)):
        for target in (True, False):
            p = [1 / (1 + math.exp(-x)) for x in logits.tolist()]
            p_t = [q if target else 1 - q for q in p]
            alpha_t = alpha if target else 1 - alpha
            expected = torch.tensor([-alpha_t * (1 - q) ** gamma * math.log(q) for q in p_t])
            torch.testing.assert_close(
                focal(logits, torch.full((25,), target), gamma, alpha), expected, atol=1e-5, rtol=0
            )
    extreme = torch.tensor([-1e4, 1e4], requires_grad=True)
    focal(extreme, torch.tensor([True, True]), 1.0, 0.75).sum().backward()
    assert torch.isfinite(extreme.grad).all()


def test_box_losses_count_positive_pairs_only():
    anchors = torch.tensor([[[0.0, 0, 0, 4, 4, 4], [2, 2, 2, 8, 8, 8], [1, 1, 1, 5, 5, 5]]])
    boxes = torch.tensor([[[1.0, 0, 0, 5, 6, 4], [2, 2, 2, 9, 8, 9], [0, 0, 0, 0, 0, 0]]])
    positive = torch.tensor([[True, True, False]])
    deltas = torch.full((1, 3, 6), 0.1)
    deltas[:, 2] = torch.inf
    deltas.requires_grad_()
    expected_l1 = (0.1 - box_ops.encode(boxes[:, :2], anchors[:, :2])).abs().sum()
    decoded = box_ops.decode(deltas[:, :2], anchors[:, :2])
    expected_giou = (1 - box_ops.aligned_giou(decoded, boxes[:, :2])).sum()
    finite = torch.where(torch.isinf(deltas), 0.0, deltas)
    torch.testing.assert_close(box_l1(finite, boxes, anchors, positive), expected_l1)
    torch.testing.assert_close(box_giou(deltas, boxes, anchors, positive), expected_giou)


def test_dice_and_cross_entropy_equal_loops():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 3, 4, 4, 4, generator=generator)
    target = torch.randint(0, 3, (3, 4, 4, 4), generator=generator)
    use = torch.tensor([True, False, True])
    dice, cross_entropy = dice_and_cross_entropy(logits, target, use, smooth=1e-5)
    p, kept = logits.softmax(dim=1)[use], target[use]
    per_class = []
    for k in (1, 2):
        truth = (kept == k).float()
        per_class.append((2 * (p[:, k] * truth).sum() + 1e-5) / (p[:, k].sum() + truth.sum() + 1e-5))
    assert dice.item() == pytest.approx(1 - sum(per_class).item() / 2, abs=1e-6)
    assert cross_entropy.item() == pytest.approx(-p.gather(1, kept[:, None]).log().mean().item(), abs=1e-6)
    nothing = dice_and_cross_entropy(logits, target, torch.zeros(3, dtype=torch.bool), 0.0)
    assert [part.item() for part in nothing] == [0, 0]


def test_normaliser_is_a_bias_corrected_average_and_is_saved():
    normaliser = PositiveNormaliser(0.7)
    counts = [40, 0, 10, 25]
    for step, count in enumerate(counts, start=1):
        value = normaliser(torch.arange(100) < count)
        weights = [0.7 ** (step - i) * 0.3 for i in range(1, step + 1)]
        expected = sum(w * n for w, n in zip(weights, counts, strict=False)) / sum(weights)
        assert value.item() == pytest.approx(expected, rel=1e-5)
    resumed = PositiveNormaliser(0.7)
    resumed.load_state_dict(normaliser.state_dict())
    assert resumed(torch.ones(5)).item() == normaliser(torch.ones(5)).item()
    before = normaliser.state_dict()["mean"].clone()
    assert normaliser.eval()(torch.ones(50)) == normaliser(torch.zeros(50)) and torch.equal(normaliser.mean, before)
    assert PositiveNormaliser(0.0)(torch.zeros(3)).item() == 1  # never divides by less than one


@pytest.mark.parametrize("recipe", ["study", "nndetection"])
def test_loss_equals_a_loop_over_anchors(recipe):
    torch.manual_seed(0)
    detector = RetinaUNet(LEVELS, 3, ANCHORS, recipe=recipe, classification="focal", **SMALL)
    batch = make_batch()
    outputs = detector(features(), SHAPE)
    losses = detector.loss(outputs, batch)
    grid = detector.anchors.grid(SHAPE, torch.device("cpu"))
    matches = atss(grid, batch["boxes"], batch["valid"]).matches(len(grid.boxes))
    positives = int((matches >= 0).sum())
    classification = regression = 0.0
    for image in range(2):
        for anchor, match in enumerate(matches[image].tolist()):
            per_class = []
            for k in range(3):
                truth = match >= 0 and int(batch["labels"][image, match]) == k
                p = outputs["logits"][image, anchor, k].sigmoid().item()
                per_class.append(-0.75 * (1 - p) * math.log(p) if truth else -0.25 * p * math.log(1 - p))
            classification += 0.3 * sum(per_class) / 3
            if match >= 0:
                box, base = batch["boxes"][image, match], grid.boxes[anchor]
                deltas = outputs["deltas"][image, anchor]
                if recipe == "study":
                    regression += (deltas - box_ops.encode(box, base)).abs().sum().item()
                else:
                    regression += 1 - box_ops.aligned_giou(box_ops.decode(deltas, base), box).item()
    assert positives == losses["positives"] * len(matches) > 4
    assert losses["classification"].item() == pytest.approx(classification / positives, rel=1e-4)
    assert losses["regression"].item() == pytest.approx(regression / positives, rel=1e-4)
    mask, use = batch["mask"] > 0, torch.ones(2, dtype=torch.bool)
    segmentation = dice_and_cross_entropy(outputs["segmentation"], mask, use, detector.smooth)
    for key, value in zip(("segmentation_dice", "segmentation_ce"), segmentation, strict=True):
        assert losses[key].item() == pytest.approx(0.5 * value.item())
    parts = [value for key, value in losses.items() if key not in ("loss", "positives")]
    assert losses["loss"].item() == pytest.approx(sum(parts).item())


def test_sampled_cross_entropy_equals_a_loop_over_what_was_drawn(monkeypatch):
    drawn = []

    def watched(scores, positive, usable, seed):
        drawn.append((scores, positive, int(seed), hard_negatives(scores, positive, usable, seed)))
        return drawn[-1][-1]

    monkeypatch.setattr(retina, "hard_negatives", watched)
    detector = retinanet(LEVELS, 3, ANCHORS, recipe="nndetection", **SMALL)
    batch = make_batch() | {"annotated": torch.tensor([[True, False, True], [True, True, True]])}
    outputs = {key: 3 * value for key, value in detector(features(), SHAPE).items()}
    loss = detector.loss(outputs, batch)["classification"].item()
    detector.loss(outputs, batch)
    (scores, positive, seed, sampled), second = drawn
    assert second[2] != seed and not torch.equal(second[3], sampled), "others in every step"
    torch.testing.assert_close(scores[0], outputs["logits"][0][:, [0, 2]].amax(1))  # of the annotated classes
    grid = detector.anchors.grid(SHAPE, torch.device("cpu"))
    matches = atss(grid, batch["boxes"], batch["valid"]).matches(len(grid.boxes))
    assert torch.equal(positive, matches >= 0)
    terms = []
    for image, anchor in sampled.nonzero().tolist():
        match = int(matches[image, anchor])
        for k in range(3):
            if batch["annotated"][image, k]:
                p = outputs["logits"][image, anchor, k].sigmoid().item()
                terms.append(-math.log(p if match >= 0 and batch["labels"][image, match] == k else 1 - p))
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_recipes_are_the_published_ones():
    study, v01 = (RetinaUNet(LEVELS, 1, ANCHORS, recipe=recipe) for recipe in ("study", "nndetection"))
    for detector, expected in (
        (study, ("focal", 0.3, "l1", 0.7, 0.0)),
        (v01, ("hard_negative", 1.0, "giou", 0.0, 1e-5)),
    ):
        assert (
            detector.classification, detector.classification_weight, detector.regression, detector.normaliser.beta,
            detector.smooth,
        ) == expected  # fmt: skip
    for head in (study.classifier, study.regressor):  # two hidden convolutions, norms over 16 channels of 128
        convs = [layer for layer in head.modules() if isinstance(layer, nn.Conv3d)]
        assert [layer.num_groups for layer in head.modules() if isinstance(layer, nn.GroupNorm)] == [8, 8]
        assert len(convs) == 3 and all(conv.weight.std().item() == pytest.approx(0.01, rel=0.1) for conv in convs)


VARIANTS = [
    {},
    {"recipe": "nndetection"},
    {"segmentation": "classes", "detection_levels": [2]},
    {"segmentation": "none", "head_channels": 24, "num_convs": 0},
    {"detection_levels": [0, 2], "regression": "giou"},
    {"segmentation_conv": False},
]


@pytest.mark.parametrize("arguments", VARIANTS)
@pytest.mark.parametrize("objects", [True, False])
def test_every_parameter_and_level_gets_a_finite_gradient(arguments, objects):
    torch.manual_seed(1)
    detector = RetinaUNet(LEVELS, 3, ANCHORS, **(SMALL | arguments))
    maps = features()
    losses = detector.loss(detector(maps, SHAPE), make_batch(objects))
    losses["loss"].backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    used = [index for index, m in enumerate(maps) if m.grad is not None]
    finest = 0 if detector.segmentation != "none" else detector.detection_levels[0]
    assert used == list(range(finest, 4))
    if objects:
        assert all(parameter.grad.abs().sum() > 0 for parameter in detector.parameters())
    else:
        assert losses["positives"] == 0 and losses["regression"] == 0 and losses["loss"] > 0


def test_outputs_follow_the_anchor_grid():
    detector = RetinaUNet(LEVELS, 3, ANCHORS, detection_levels=[1, 2], **SMALL)
    outputs = detector(features(), SHAPE)
    count = len(detector.anchors.grid(SHAPE, torch.device("cpu")).boxes)
    assert outputs["logits"].shape == (2, count, 3) and outputs["deltas"].shape == (2, count, 6)
    assert outputs["segmentation"].shape == (2, 2, *SHAPE)
    assert outputs["logits"].sigmoid().mean().item() == pytest.approx(0.01, abs=0.01)
    # a change at one position of one level moves the outputs of the anchors around it, and only of that level
    maps = detector.fpn(features())
    bias = torch.zeros_like(maps[1])
    bias[0, :, 5, 3, 6] = 100.0
    plain, moved = detector.regressor.output(maps[1]), detector.regressor.output(maps[1] + bias)
    changed = (plain != moved).flatten(2).any(dim=1)[0].nonzero()[:, 0]
    grid = detector.anchors.grid(SHAPE, torch.device("cpu"))
    middles = box_ops.centers(grid.boxes[changed * grid.per_position])
    assert middles.mean(dim=0).tolist() == [5.5, 7, 13]


def test_finest_levels_are_computed_for_the_segmentation_in_training_only():
    detector = RetinaUNet(LEVELS, 3, ANCHORS, detection_levels=[2, 3], **SMALL)
    assert "segmentation" in detector(features(), SHAPE)
    assert set(detector.fpn(features(), 2)) == {2, 3}
    outputs = detector.eval()(features(), SHAPE)
    assert set(outputs) == {"logits", "deltas"}
    assert set(detector.loss(outputs, make_batch())) == {"loss", "classification", "regression", "positives"}


def test_retinanet_has_no_segmentation():
    detector = build(
        DETECTORS, {"name": "retinanet", **SMALL}, "detector", levels=LEVELS, num_classes=3, anchors=ANCHORS
    )
    assert detector.segmentation == "none" and not any("segment" in name for name, _ in detector.named_parameters())
    assert min(map(int, detector.fpn.lateral)) == 1
    same = retinanet(LEVELS, 3, ANCHORS, **SMALL)
    assert sum(p.numel() for p in same.parameters()) == sum(p.numel() for p in detector.parameters())


def test_classes_that_are_not_annotated_have_no_classification_loss():
    detector = RetinaUNet(LEVELS, 3, ANCHORS, **SMALL)
    maps, batch = features(), make_batch()
    batch["annotated"] = torch.tensor([[True, False, True], [True, True, True]])
    outputs = detector(maps, SHAPE)
    outputs = {key: value.detach().requires_grad_() for key, value in outputs.items()}
    detector.loss(outputs, batch)["loss"].backward()
    gradient = outputs["logits"].grad
    assert (gradient[0, :, 1] == 0).all() and (gradient[0, :, [0, 2]] != 0).all() and (gradient[1] != 0).all()
    assert (outputs["segmentation"].grad[0] == 0).all() and (outputs["segmentation"].grad[1] != 0).any()


@pytest.mark.parametrize("recipe", ["study", "nndetection"])
def test_a_batch_of_which_nothing_is_annotated_costs_nothing(recipe):
    detector = RetinaUNet(LEVELS, 3, ANCHORS, recipe=recipe, **SMALL)
    batch = make_batch(False) | {"annotated": torch.zeros(2, 3, dtype=torch.bool)}
    losses = detector.loss(detector(features(), SHAPE), batch)
    losses["loss"].backward()
    assert losses["loss"] == 0
    assert all(torch.isfinite(parameter.grad).all() for parameter in detector.parameters())


def test_losses_are_float32_under_autocast():
    detector = RetinaUNet(LEVELS, 3, ANCHORS, **SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = detector(features(), SHAPE)
        assert outputs["logits"].dtype == torch.bfloat16
        losses = detector.loss(outputs, make_batch())
        found = detector.predict(outputs, SHAPE)
    assert losses["loss"].dtype == torch.float32 and found[0].boxes.dtype == found[0].scores.dtype == torch.float32


def test_predict_finds_what_perfect_outputs_say():
    detector = RetinaUNet(LEVELS, 3, ANCHORS, **SMALL)
    batch = make_batch()
    grid = detector.anchors.grid(SHAPE, torch.device("cpu"))
    assigned = atss(grid, batch["boxes"], batch["valid"])
    logits, deltas = torch.full((2, len(grid.boxes), 3), -9.0), torch.zeros(2, len(grid.boxes), 6)
    for image in range(2):
        pairs = zip(assigned.anchor[image], assigned.box[image], assigned.positive[image], strict=True)
        for anchor, box, positive in pairs:
            if positive:
                logits[image, anchor, batch["labels"][image, box]] = 4.0
                deltas[image, anchor] = box_ops.encode(batch["boxes"][image, box], grid.boxes[anchor])
    found = detector.predict({"logits": logits, "deltas": deltas}, SHAPE)
    for image, count in enumerate((2, 1)):
        best = found[image][torch.arange(count)]
        truth = batch["boxes"][image][:count]
        order = best.labels.argsort()
        assert best.labels[order].tolist() == batch["labels"][image][:count].tolist()
        assert (box_ops.aligned_iou(best.boxes[order], truth) > 0.999).all()
        assert (found[image].scores[count:] < 0.01).all() and len(found[image]) <= 100
        assert (found[image].scores.diff() <= 0).all()
        assert (found[image].boxes >= 0).all() and (found[image].boxes <= torch.tensor([*SHAPE, *SHAPE])).all()


def test_a_score_that_is_zero_is_no_detection():
    detector = RetinaUNet(LEVELS, 3, ANCHORS, **SMALL)
    count = len(detector.anchors.grid(SHAPE, torch.device("cpu")).boxes)
    outputs = {"logits": torch.full((2, count, 3), -200.0), "deltas": torch.zeros(2, count, 6)}
    assert [len(found) for found in detector.predict(outputs, SHAPE)] == [0, 0]


class TinyBackbone(nn.Module):
    levels = (Level(8, (1, 1, 1)), Level(12, (2, 2, 2)), Level(16, (4, 4, 4)))

    def __init__(self) -> None:
        super().__init__()
        widths = [1, *(level.channels for level in self.levels)]
        self.stages = nn.ModuleList(
            nn.Sequential(
                OrderedDict(conv=nn.Conv3d(a, b, 3, stride, 1), norm=nn.InstanceNorm3d(b, affine=True), act=nn.ReLU())
            )
            for a, b, stride in zip(widths, widths[1:], (1, 2, 2), strict=False)
        )

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        return maps


def cubes(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Patches of 16^3 with one bright (label 0) or dark (label 1) cube in noise."""
    generator = torch.Generator().manual_seed(seed)
    image = 0.3 * torch.randn(count, 1, 16, 16, 16, generator=generator)
    mask, boxes = torch.zeros(count, 16, 16, 16, dtype=torch.uint8), torch.zeros(count, 1, 6)
    labels = torch.randint(0, 2, (count, 1), generator=generator)
    for index in range(count):
        low = torch.randint(1, 9, (3,), generator=generator)
        high = low + torch.randint(4, 7, (3,), generator=generator)
        where = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        image[index, 0][where] += 1.5 - 3.0 * labels[index, 0]
        mask[index][where] = 1 + labels[index, 0]
        boxes[index, 0] = torch.cat([low, high])
    return {
        "image": image,
        "mask": mask,
        "boxes": boxes,
        "labels": labels,
        "valid": torch.ones(count, 1, dtype=torch.bool),
    }


@pytest.mark.parametrize("recipe", ["study", pytest.param("nndetection", marks=pytest.mark.slow)])
def test_it_learns_to_find_cubes(recipe):
    torch.manual_seed(0)
    backbone = TinyBackbone()
    detector = RetinaUNet(backbone.levels, 2, {"boxes": [[5, 5, 5]]}, [1, 2], 16, num_convs=1, recipe=recipe)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *detector.parameters()], lr=2e-3)
    for step in range(45):
        batch = cubes(8, step)
        losses = detector.loss(detector(backbone(batch["image"]), (16, 16, 16)), batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    unseen = cubes(16, 1000)
    with torch.no_grad():
        detections = detector.eval().predict(detector(backbone.eval()(unseen["image"]), (16, 16, 16)), (16, 16, 16))
    hits = [
        bool(found.labels[0] == label[0] and box_ops.aligned_iou(found.boxes[0], box[0]) > 0.3)
        for found, label, box in zip(detections, unseen["labels"], unseen["boxes"], strict=True)
    ]
    assert sum(hits) >= 13, hits


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"detection_levels": [2, 7]}, "detection_levels is .*between 0 and 3"),
        ({"detection_levels": []}, "detection_levels"),
        ({"recipe": "detectron"}, "recipe is 'detectron'; expected one of study, nndetection"),
        ({"regression": "l2"}, "regression is 'l2'"),
        ({"segmentation": "yes"}, "segmentation is 'yes'"),
        ({"anchors": {"sizes": [[4]]}}, "anchors"),
        ({"nms_iou": 0.0}, "nms_iou is 0.0; expected a number above 0 and at most 1"),
        ({"nms_iou": 1.5}, "nms_iou is 1.5"),
        ({"nms_iou": math.nan}, "nms_iou is nan"),
        ({"detections_per_patch": 0}, "detections_per_patch is 0; expected at least 1"),
        ({"num_convs": -1}, "num_convs is -1; expected 0 or more"),
        ({"fpn_channels": 0}, "fpn_channels is 0; expected at least 1"),
        ({"head_channels": -8}, "head_channels is -8; expected at least 1"),
        ({"classification_weight": math.nan}, "classification_weight is nan; it must be above 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        RetinaUNet(**({"levels": LEVELS, "num_classes": 2, "anchors": ANCHORS} | arguments))


@pytest.mark.parametrize(
    "count, expected", [(7, (2, 3, 4, 5, 6)), (6, (2, 3, 4, 5)), (5, (1, 2, 3, 4)), (2, (1,)), (1, (2, 3, 4, 5))]
)
def test_default_detection_levels(count, expected):
    levels = [Level(8, (2**i,) * 3) for i in range(count)]
    assert RetinaUNet(levels, 1, ANCHORS, **SMALL).detection_levels == expected


def half_a_batch(rank: int, port: int, folder: str) -> None:
    """One of two processes: its half of the batch, gradients averaged."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    detector = RetinaUNet(LEVELS, 3, ANCHORS, **SMALL)
    maps = [m[rank : rank + 1] for m in features()]
    batch = {key: value[rank : rank + 1] for key, value in make_batch().items()}
    parallel = nn.parallel.DistributedDataParallel(detector)
    losses = detector.loss(parallel(maps, SHAPE), batch)
    losses["loss"].backward()
    torch.save({n: p.grad for n, p in detector.named_parameters()} | {"loss": losses["loss"]}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    mp.spawn(half_a_batch, args=(29631, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    detector = RetinaUNet(LEVELS, 3, ANCHORS, **SMALL)
    loss = detector.loss(detector(features(), SHAPE), make_batch())["loss"]
    loss.backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert (parts[0]["loss"] + parts[1]["loss"]).item() / 2 == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in detector.named_parameters():
        torch.testing.assert_close(parts[0][name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_it_is_nndetections_network_parameter_for_parameter():
    """v0.1 has 18.97 M (encoder 14.02, decoder 2.52, heads 0.98 and 1.45): ours, and an output convolution unused."""
    with torch.device("meta"):
        backbone = PlainConv()
        detector = RetinaUNet(backbone.levels, 1, {"sizes": [[4, 8, 16]] * 3}, recipe="nndetection")
    parts = [backbone, detector.fpn, detector.classifier, detector.regressor]
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    unused = 64 * 64 * 27 + 64  # of its level 1, between the segmentation's and the detection's
    assert [round(count / 1e6, 2) for count in counts] == [14.02, 2.41, 0.98, 1.45]
    assert round((sum(counts) + unused) / 1e6, 2) == 18.97
