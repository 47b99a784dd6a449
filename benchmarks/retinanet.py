"""A training step of RetinaNet beside MONAI's, on the same backbone, patch, pyramid width, heads and anchors.

Forward, ATSS, hard-negative sampling, losses, backward and the optimiser's step, without data. On a GPU: ResEnc-S, two
patches of 96^3, float32 and bf16, wall time and peak memory; on a CPU: ResEnc-XS, one patch of 64^3, float32 and
processor seconds of one thread.

    python benchmarks/retinanet.py
"""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import Target, interleave, report
from torch import Tensor, nn

from pretrain3d.backbones.resenc import resenc_s, resenc_xs
from pretrain3d.detection.retina import RetinaUNet
from pretrain3d.modules.optim import adamw, parameter_groups

CHANNELS, CONVS, CLASSES, OBJECTS = 128, 4, 3, 5
SIZES = (4.0, 8.0, 16.0)  # of an anchor along an axis on the finest level: 27 anchors per position


class Extractor(nn.Module):
    """The backbone with MONAI's pyramid on its four coarsest levels, as MONAI's RetinaNet takes it."""

    out_channels = CHANNELS

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        from monai.networks.blocks.feature_pyramid_network import FeaturePyramidNetwork

        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(3, [level.channels for level in backbone.levels[-4:]], CHANNELS)

    def forward(self, image: Tensor) -> list[Tensor]:
        features = self.backbone(image)[-4:]
        return list(self.fpn({str(index): level for index, level in enumerate(features)}).values())


class Ours:
    """RetinaNet of this project in nnDetection's recipe."""

    def __init__(self, backbone: Any, device: torch.device) -> None:
        self.backbone = backbone.to(device)
        levels = len(backbone.levels)
        self.detector = RetinaUNet(
            backbone.levels, CLASSES, {"sizes": [list(SIZES)] * 3}, range(levels - 4, levels), fpn_channels=CHANNELS,
            num_convs=CONVS, recipe="nndetection", segmentation="none",
        ).to(device)  # fmt: skip
        self.networks = {"backbone": self.backbone, "detector": self.detector}

    def loss(self, image: Tensor, boxes: list[Tensor], labels: list[Tensor]) -> Tensor:
        valid = torch.ones(len(image), OBJECTS, dtype=torch.bool, device=image.device)
        annotated = torch.ones(len(image), CLASSES, dtype=torch.bool, device=image.device)
        batch = {"image": image, "boxes": torch.stack(boxes), "labels": torch.stack(labels), "valid": valid,
                 "annotated": annotated}  # fmt: skip
        outputs = self.detector(self.backbone(image), image.shape[2:])
        with torch.autocast(image.device.type, enabled=False):
            return self.detector.loss(outputs, batch)["loss"]


class Theirs:
    """MONAI's RetinaNetDetector with ATSS and the hard-negative sampler."""

    def __init__(self, backbone: Any, device: torch.device) -> None:
        from monai.apps.detection.networks import retinanet_detector
        from monai.apps.detection.networks.retinanet_network import RetinaNet
        from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape

        for name in ("Matcher", "BalancedPositiveNegativeSampler"):  # torchvision's: only asked whether ours are such
            setattr(retinanet_detector, name, type(name, (), {}))
        shapes = tuple(itertools.product(SIZES, SIZES, SIZES))
        strides = tuple(level.stride[0] for level in backbone.levels[-4:])
        network = RetinaNet(3, CLASSES, len(shapes), Extractor(backbone), size_divisible=strides[-1]).to(device)
        scales = tuple(stride // strides[0] for stride in strides)
        anchors = AnchorGeneratorWithAnchorShape(scales, shapes)
        self.detector = retinanet_detector.RetinaNetDetector(network, anchors).to(device)
        self.detector.set_atss_matcher(num_candidates=4, center_in_gt=False)
        self.detector.set_hard_negative_sampler(32, positive_fraction=0.33, pool_size=20, min_neg=1)
        self.detector.set_target_keys("boxes", "labels")
        self.networks = {"detector": self.detector}

    def loss(self, image: Tensor, boxes: list[Tensor], labels: list[Tensor]) -> Tensor:
        targets = [{"boxes": rows, "labels": numbers} for rows, numbers in zip(boxes, labels, strict=True)]
        losses = self.detector(image, targets)
        return sum(losses.values())  # type: ignore[return-value]


def objects(patch: int, batch: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Boxes of 4 to 20 voxels per side and their labels, for every patch of a batch."""
    draws = torch.Generator().manual_seed(0)
    size = 4 + 16 * torch.rand(batch, OBJECTS, 3, generator=draws)
    low = torch.rand(batch, OBJECTS, 3, generator=draws) * (patch - size)
    labels = torch.randint(CLASSES, (batch, OBJECTS), generator=draws)
    return list(torch.cat([low, low + size], 2).to(device)), list(labels.to(device))


def stepping(side: Ours | Theirs, image: Tensor, boxes: list[Tensor], labels: list[Tensor], bf16: bool) -> Callable:
    """A training step that measures its seconds."""
    optimizer = adamw(parameter_groups(side.networks, 1e-2), lr=1e-4)
    cuda = image.is_cuda

    def step() -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter() if cuda else time.process_time()
        with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
            loss = side.loss(image, boxes, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() if cuda else time.process_time()) - start

    return step


def peak_mib(step: Callable[[], float]) -> float:
    """Peak memory of a step on the GPU, with what lies there before."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**20


def main() -> int:
    """Runs the benchmark; 1 when a step takes longer than MONAI's, or on a GPU more memory."""
    warnings.filterwarnings("ignore", module="monai")
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True  # as `fit`
    cuda = torch.cuda.is_available()
    device, make = torch.device("cuda" if cuda else "cpu"), resenc_s if cuda else resenc_xs
    patch, batch = (96, 2) if cuda else (64, 1)
    boxes, labels = objects(patch, batch, device)
    image = torch.randn(batch, 1, *[patch] * 3, device=device)
    status = 0
    for bf16 in (False, True) if cuda else (False,):
        steps = {}
        for name, side in (("ours", Ours), ("MONAI", Theirs)):
            torch.manual_seed(0)
            steps[name] = stepping(side(make(), device), image, boxes, labels, bf16)
            steps[name]()  # the first step picks kernels
        inputs = (
            f"{make.__name__}, batch of {batch}, {patch}^3, 27 anchors on 4 levels, {'bf16' if bf16 else 'float32'}"
        )
        faster = Target("ours / MONAI", lambda m: m["ours"] / m["MONAI"], 1.0, at_most=True)
        status |= report("Training step of RetinaNet", "s", inputs, ("monai",), interleave(steps), [faster])
        if cuda:
            memory = {name: [peak_mib(step) for _ in range(5)] for name, step in steps.items()}
            smaller = Target("ours / MONAI", lambda m: m["ours"] / m["MONAI"], 1.0, at_most=True)
            status |= report("Its peak memory, both networks loaded", "MiB", inputs, ("monai",), memory, [smaller])
    return status


if __name__ == "__main__":
    sys.exit(main())
