"""How much memory a training step needs, found without the memory and without a GPU.

The step is run once on tensors that have shapes but no numbers, and every storage that comes and goes is counted. What
the allocator adds (fragments, workspaces of the convolution library, the context of the device) is not in it;
`usable_bytes` leaves room for that. These tensors are a CPU's, also where the step will be a GPU's: what autocast and
`Conv3d` do otherwise there is then done here too.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from pretrain3d.backbones import BACKBONES
from pretrain3d.backbones.contract import Triple, check_backbone
from pretrain3d.config import UserError, by_text
from pretrain3d.detection import DETECTORS
from pretrain3d.detection.necks import pyramid_levels
from pretrain3d.devices import GIB
from pretrain3d.planning.counting import GpuAutocast, LiveMemory, without_ways_of_a_cpu
from pretrain3d.registry import build, takes

CONTEXT_BYTES = GIB // 2  # of a CUDA process before its first tensor
FRAGMENTS = 1.15  # allocated to reserved memory, workspaces of the convolutions included
OPTIMIZER_STATES = 2  # of AdamW; SGD has one
REFERENCE_STEPS = (2, 4)  # positions per axis on the coarsest level of the two steps that are measured
OBJECTS = 8  # per patch in that step
ANCHORS = {"sizes": [[4.0, 8.0, 16.0]] * 3}  # 27, as they will be


@dataclass(frozen=True)
class Footprint:
    """Memory of a training step, in bytes.

    Attributes:
        fixed: weights, gradients, optimiser, averaged weights, casts of the weights.
        per_patch: activations that do not depend on its size, such as those of queries.
        per_voxel: activations and what the loss makes of them, per voxel of a patch.
        multiple: (3,) what a patch must be a multiple of.
    """

    fixed: int
    per_patch: float
    per_voxel: float
    multiple: tuple[int, ...]

    def bytes(self, patch_size: Sequence[int], batch_size: int) -> int:
        """Of a step on ``batch_size`` patches."""
        return self.fixed + math.ceil(batch_size * (self.per_patch + self.per_voxel * math.prod(patch_size)))


def pyramid(backbone: str | Mapping[str, Any], in_channels: int = 1) -> tuple[tuple[int, ...], list[Triple]]:
    """What a patch must be a multiple of, (3,), and the strides of a detector's pyramid, finest first.

    Raises:
        UserError: an unknown name or argument.
    """
    return _pyramid(build(BACKBONES, _node(backbone), "backbone", in_channels=in_channels))


def footprint(
    backbone: str | Mapping[str, Any],
    detector: str | Mapping[str, Any] = "retina_unet",
    in_channels: int = 1,
    num_classes: int = 1,
    precision: str = "bf16-mixed",
    on_gpu: bool = True,
) -> Footprint:
    """Memory that training a detector takes.

    Args:
        backbone, detector: names in their registries, or nodes ``{"name": ..., **arguments}``.
        in_channels, num_classes: of the data.
        precision: Lightning's name of it.
        on_gpu: on a GPU or on a CPU, which keep different things for the backward pass: `resenc_xs` 1.3 times and
            SegResNet 1.7 times as much there.

    Raises:
        UserError: an unknown name or argument.
    """
    nodes = [_node(backbone), _node(detector)]
    return _measured(json.dumps(nodes, sort_keys=True), in_channels, num_classes, precision, on_gpu)


@lru_cache(maxsize=16)
def _measured(nodes: str, in_channels: int, num_classes: int, precision: str, on_gpu: bool) -> Footprint:
    backbone_node, detector_node = json.loads(nodes)
    backbone, detector = _networks(backbone_node, detector_node, in_channels, num_classes)
    weights = sum(p.numel() * p.element_size() for net in (backbone, detector) for p in net.parameters())
    multiple, _ = _pyramid(backbone)
    sizes = [tuple(steps * m for m in multiple) for steps in REFERENCE_STEPS]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # anchors and the like are plain attributes
        for net in (backbone, detector):
            _without_numbers(net, mode)
            if on_gpu:
                without_ways_of_a_cpu(net)
        with GpuAutocast() if on_gpu else nullcontext():
            small, large = (
                _peak(backbone, detector, _batch(size, in_channels, num_classes), precision) for size in sizes
            )
    casts = weights // 2 if "mixed" in precision else 0  # autocast keeps them for the backward pass
    fixed = weights * (2 + OPTIMIZER_STATES + 1) + casts  # weights and gradients; optimiser; averaged weights
    per_voxel = (large - small) / (math.prod(sizes[1]) - math.prod(sizes[0]))
    per_patch = max(large - casts - per_voxel * math.prod(sizes[1]), 0.0)
    return Footprint(fixed, per_patch, per_voxel, multiple)


def measure_step(
    backbone: str | Mapping[str, Any],
    detector: str | Mapping[str, Any],
    patch_size: Sequence[int],
    batch_size: int,
    device: torch.device,
    in_channels: int = 1,
    num_classes: int = 1,
    precision: str = "bf16-mixed",
) -> int:
    """Bytes that a training step really takes: the same as `Footprint.bytes`, by doing it twice on noise.

    Args:
        backbone, detector, in_channels, num_classes, precision: see `footprint`.
        patch_size, batch_size: of the step.
        device: on which.

    Raises:
        RuntimeError: out of memory, see `devices.is_out_of_memory`.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with LiveMemory() as memory:
        network, head = (
            net.to(device) for net in _networks(_node(backbone), _node(detector), in_channels, num_classes)
        )
        average = copy.deepcopy((network, head))
        optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()])
        batch = {
            key: value.expand(batch_size, *value.shape[1:]).to(device).contiguous()
            for key, value in _batch(patch_size, in_channels, num_classes).items()
        }
        batch["image"].normal_()
        for _ in range(2):  # the optimiser has its state from the first one on
            outputs = _outputs(network, head, batch, precision)
            head.loss(outputs, batch)["loss"].backward()
            del outputs
            optimizer.step()
            optimizer.zero_grad()
        del average
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory.peak


def _node(named: str | Mapping[str, Any]) -> dict[str, Any]:
    return dict(named) if isinstance(named, Mapping) else {"name": named}


def _pyramid(backbone: Any) -> tuple[tuple[int, ...], list[Triple]]:
    strides = [level.stride for level in pyramid_levels(backbone.levels)]
    return tuple(math.lcm(a, b) for a, b in zip(backbone.size_multiple, strides[-1], strict=True)), strides


def _networks(
    backbone_node: dict[str, Any], detector_node: dict[str, Any], in_channels: int, num_classes: int
) -> tuple[Any, Any]:
    backbone = build(BACKBONES, backbone_node, "backbone", in_channels=in_channels)
    check_backbone(backbone)
    if takes(DETECTORS, detector_node, "detector", "anchors"):
        detector_node = {"anchors": ANCHORS, **detector_node}
    return backbone, build(DETECTORS, detector_node, "detector", levels=backbone.levels, num_classes=num_classes)


def _outputs(backbone: nn.Module, detector: Any, batch: dict[str, Any], precision: str) -> Any:
    targets = {"targets": batch} if getattr(detector, "needs_targets", False) else {}
    with torch.autocast(batch["image"].device.type, torch.bfloat16, enabled="mixed" in precision):  # fp16 is as large
        return detector(backbone(batch["image"]), batch["image"].shape[2:], **targets)


def _without_numbers(network: nn.Module, mode: FakeTensorMode) -> None:
    """Parameters and buffers become shapes. Initialisation needs numbers, so the network is built with them first."""
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                tensors[name] = None if tensor is None else mode.from_tensor(tensor)  # type: ignore[assignment]
    for parameter in network.parameters():  # gradients are counted apart: only activations shall live here
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def _batch(size: Sequence[int], channels: int, num_classes: int) -> dict[str, Any]:
    """All tensors that a detector's loss may look at."""
    boxes = torch.cat([torch.zeros(1, OBJECTS, 3), torch.ones(1, OBJECTS, 3)], dim=-1)
    return {
        "image": torch.empty(1, channels, *size),
        "boxes": boxes,
        "labels": torch.zeros(1, OBJECTS, dtype=torch.long),
        "valid": torch.ones(1, OBJECTS, dtype=torch.bool),
        "annotated": torch.ones(1, num_classes, dtype=torch.bool),
        "inside": torch.ones(1, 1, *size, dtype=torch.bool),
        "mask": torch.zeros(1, *size, dtype=torch.int16),
    }


def _peak(backbone: nn.Module, detector: Any, batch: dict[str, Any], precision: str) -> int:
    """Bytes alive at the worst moment of forward and backward pass, beyond weights and input."""
    with LiveMemory() as memory:
        outputs = _outputs(backbone, detector, batch, precision)
        try:
            loss = detector.loss(outputs, batch)["loss"]
        except RuntimeError:  # a loss that asks for values (Hungarian matching) finds none; with few boxes it is small
            loss = sum(t.float().sum() for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad)
        del outputs
        loss.backward()
    return memory.peak


def usable_bytes(memory_gb: float) -> int:
    """What tensors may take of a device's memory.

    Raises:
        UserError: nothing would be left.
    """
    usable = int((memory_gb * GIB - CONTEXT_BYTES) / FRAGMENTS)
    if usable <= 0:
        raise UserError(f"memory_gb={memory_gb:g}: at least 1 is needed")
    return usable


def out_of_memory_advice(
    settings: Mapping[str, Any], batch_size: int, patch_size: Sequence[int], tile_batch: int | None = None
) -> str:
    """One line: what ran out, and what to lower.

    Args:
        settings: resolved configuration of the run; what it does not say is as by default.
        batch_size: of a step and process.
        patch_size: voxels.
        tile_batch: tiles predicted at once, where the prediction of a validation case failed.
    """
    patch = by_text(patch_size)
    if tile_batch is not None:
        return (
            f"out of memory in validation, with {tile_batch} tiles of {patch} at once: lower module.tile_batch, or "
            "have smaller patches (data.patch_size)"
        )
    accumulate = int(settings["trainer"].get("accumulate_grad_batches") or 1)
    ways = ["a smaller data.patch_size", "a smaller backbone"]
    detector = settings.get("module", {}).get("detector")
    if detector and not detector.get("checkpointing") and takes(DETECTORS, detector, "detector", "checkpointing"):
        ways.insert(0, "+module.detector.checkpointing=true (of its encoder)")
    backbone = settings["backbone"]
    if not backbone.get("checkpointing") and takes(BACKBONES, backbone, "backbone", "checkpointing"):
        ways.insert(0, "+backbone.checkpointing=true (about a third more time)")
    if "32" in str(settings["trainer"].get("precision", "32-true")):
        ways.insert(0, "+trainer.precision=bf16-mixed (about a quarter less)")
    if batch_size > 1:
        less = max(n for n in range(1, batch_size) if batch_size % n == 0)
        steps = accumulate * batch_size // less
        keys = (("data", "batch_size", less), ("trainer", "accumulate_grad_batches", steps))
        said = " ".join(f"{'' if key in settings[part] else '+'}{part}.{key}={value}" for part, key, value in keys)
        ways.insert(0, f"{said} (the same effective batch)")
    return f"out of memory, with data.batch_size={batch_size} and patches of {patch}: try {', or '.join(ways)}"
