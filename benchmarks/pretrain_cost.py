"""What a sample of each pretraining method costs: TFLOP counted, seconds measured, and the share of the network.

TFLOP are two for each multiplication with its addition, counted on tensors without memory and compared with the
networks of the reference codes. Seconds are those of the processor on a CPU, so that other processes do not count.

    python benchmarks/pretrain_cost.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import Target, interleave, report, samples, write_store
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain3d.backbones import BACKBONES
from pretrain3d.backbones.decoders import image_decoder
from pretrain3d.backbones.primus import Primus, primus_s
from pretrain3d.backbones.resenc import ResEnc, resenc_s
from pretrain3d.data import spatial
from pretrain3d.data.augment import Augmentation
from pretrain3d.data.batch import collate
from pretrain3d.modules.optim import adamw, parameter_groups
from pretrain3d.objectives import PRETRAINING
from pretrain3d.registry import build

Shape = tuple[int, int, int]
CUBE: Shape = (160, 160, 160)


@dataclass(frozen=True)
class Workload:
    """A method on a backbone, one sample, and the TFLOP of the reference's: forward, and with the backward pass.

    ``views`` > 1: the method makes so many inputs of a sample; a method ``""`` is the backbone alone.
    """

    method: str
    backbone: str
    forward: float
    total: float
    patch: Shape = CUBE
    views: int = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)
    backbone_arguments: Mapping[str, Any] = field(default_factory=dict)


WORKLOADS = {
    "mae, resenc_l": Workload("mae", "resenc_l", 2.80, 8.40),
    "models_genesis, resenc_l": Workload("models_genesis", "resenc_l", 2.80, 8.40),
    "volume_fusion, resenc_l": Workload("volume_fusion", "resenc_l", 2.80, 8.40),
    "resenc_l alone": Workload("", "resenc_l", 1.91, 5.73),
    "s3d, resenc_l": Workload("s3d", "resenc_l", 3.01, 9.01, backbone_arguments={"masking": "sparse"}),
    "voco, resenc_l": Workload("voco", "resenc_l", 2.45, 7.33, (256, 256, 64), arguments={"grid": (4, 4, 1)}),
    "simclr, resenc_l": Workload("simclr", "resenc_l", 0.49, 1.47, (192, 192, 64)),
    "swin_mix, resenc_l": Workload("swin_mix", "resenc_l", 4.04, 12.12, views=2),
    "mae, primus_m": Workload("mae", "primus_m", 1.55, 4.63),
    "simmim, primus_s": Workload("simmim", "primus_s", 1.59, 4.75),
    "simmim, primus_b": Workload("simmim", "primus_b", 3.90, 11.69),
    "simmim, primus_m": Workload("simmim", "primus_m", 5.85, 17.55),
    "simmim, primus_l": Workload("simmim", "primus_l", 11.66, 34.96),
    "vit_b/16 alone": Workload("", "vit_b", 0.21, 0.63),
    "vit_b/8 alone": Workload("", "vit_b", 3.73, 11.17, backbone_arguments={"patch": 8}),
}


def tflop(work: Workload) -> tuple[float, float, int]:
    """TFLOP of a sample, forward and with the backward pass, and the number of parameters; nothing is computed."""
    with torch.device("meta"):
        backbone = build(BACKBONES, {"name": work.backbone, **work.backbone_arguments}, "backbone", in_channels=1)
        method = make(work.method, backbone, work.patch, **work.arguments) if work.method else None
        image, inside = torch.empty(1, 1, *work.patch), torch.ones(1, 1, *work.patch, dtype=torch.bool)
        views = torch.empty(work.views, 1, *work.patch)
    if work.method in ("mae", "simmim", "s3d", "simclr"):
        assert method is not None
        prepared = method.prepare({"image": image, "inside": inside}, [torch.Generator().manual_seed(0)])
    elif work.method == "voco":  # 4 targets and 16 bases; its table of bases has no values here to cut at
        with torch.device("meta"):
            prepared = {"inputs": torch.empty(1, 20, 1, 64, 64, 64), "labels": torch.empty(1, 4, 16)}
    else:  # these networks see whole patches; what was done to them before does not change the cost
        prepared = {"inputs": views, "keep": inside.expand(work.views, *inside.shape[1:])}
        if work.method == "swin_mix":
            prepared["quarters"] = torch.empty(work.views, dtype=torch.long, device="meta")
    no_autocast = mock.patch("torch.autocast", lambda *_, **__: nullcontext())  # not to be had on the meta device
    with no_autocast, FlopCounterMode(display=False) as counter:
        outputs = backbone(prepared["inputs"]) if method is None else method(backbone, prepared)
        forward = counter.get_total_flops()
        torch.stack([value.sum() for value in _tensors(outputs) if value.requires_grad]).sum().backward()
    parameters = sum(p.numel() for module in (backbone, method) if module is not None for p in module.parameters())
    return forward / 1e12, counter.get_total_flops() / 1e12, parameters


def _tensors(outputs: Any) -> list[Tensor]:
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [t for value in values for t in (value if isinstance(value, (list, tuple)) else [value])]


def make(name: str, backbone: Any, patch: Shape, **arguments: Any) -> nn.Module:
    """A registered method on a backbone."""
    return build(
        PRETRAINING, {"name": name, **arguments}, "method",
        levels=backbone.levels, in_channels=1, patch_size=patch, decoder=partial(image_decoder, backbone),
    )  # fmt: skip


def counted() -> int:
    """The table of TFLOP against the reference's; 1 when one is more than 5 % off."""
    results: dict[str, list[float]] = {}
    targets = []
    for name, work in WORKLOADS.items():
        forward, total, _ = tflop(work)
        for part, value, reference in (("forward", forward, work.forward), ("with backward", total, work.total)):
            key = f"{name}, {part}"
            results[key], results[f"{key}, reference"] = [value], [reference]
            targets.append(Target(f"{key}, off by", lambda m, k=key: abs(m[k] / m[f"{k}, reference"] - 1), 0.05, True))
    ratio = Target(
        "primus_m: MAE / SimMIM = 0.265, off by",
        lambda m: abs(m["mae, primus_m, with backward"] / m["simmim, primus_m, with backward"] / 0.265 - 1), 0.05, True,
    )  # fmt: skip
    return report("Cost of a sample", "TFLOP", "one sample, tensors without memory", (), results, [*targets, ratio])


class Step:
    """A training step of a method; `network` holds the seconds that forward and backward took of it."""

    def __init__(self, backbone: Any, method: nn.Module, patch: Shape) -> None:
        self.backbone, self.method, self.patch, self.network = backbone, method, patch, 0.0
        groups = parameter_groups({"backbone": backbone, "method": method}, 1e-2)
        self.optimizer = adamw(groups, lr=1e-4)

    def __call__(self, batch: dict[str, Any], index: int = 0) -> float:
        """Processor seconds of the step."""
        draws = [torch.Generator().manual_seed(2 * index + row) for row in range(len(batch["image"]))]
        start = time.process_time()
        prepared = self.method.prepare(batch, draws)
        before = time.process_time()
        outputs = self.method(self.backbone, prepared)
        after = time.process_time()
        loss = self.method.loss(outputs, prepared)["loss"]
        middle = time.process_time()
        loss.backward()  # the gradient of the loss itself, a subtraction and a product, counts as network
        self.network = after - before + time.process_time() - middle
        self.optimizer.step()
        self.optimizer.zero_grad()
        if hasattr(self.method, "after_step"):
            self.method.after_step()
        return time.process_time() - start


def batch_of(patch: Shape, batch: int) -> dict[str, Any]:
    """Noise inside the volume, with a map of two organs."""
    organs = torch.zeros(batch, *patch, dtype=torch.int16)
    organs[:, : patch[0] // 4], organs[:, patch[0] // 2 :] = 1, 2
    return {
        "image": torch.randn(batch, 1, *patch),
        "inside": torch.ones(batch, 1, *patch, dtype=torch.bool),
        "semantic": organs,
        "semantic_annotated": torch.ones(batch, 2, dtype=torch.bool),
    }


def visible_tokens() -> int:
    """MAE encodes a quarter of the tokens: its step beside SimMIM's, Primus-S, 96^3."""
    patch = (96, 96, 96)
    candidates: dict[str, Callable[[], float]] = {}
    for name in ("mae", "simmim"):
        torch.manual_seed(0)
        backbone = primus_s(image_size=96)
        candidates[name] = partial(Step(backbone, make(name, backbone, patch), patch), batch_of(patch, 1))
    return report(
        "Step on a Transformer", "s", "primus_s, one sample of 96^3", (),
        interleave(candidates),
        [Target("MAE / SimMIM", lambda m: m["mae"] / m["simmim"], 0.5, at_most=True)],
    )  # fmt: skip


def throughput() -> int:
    """Samples per second of every registered method on a small network, from the batch to the optimiser's step."""
    patch, size, candidates = (32, 32, 32), 2, {}
    special = {"supervised": {"classes": {"": ["a", "b"]}}, "voco": {"grid": (2, 2, 1)}, "simclr": {"crop_size": 16}}
    for name in PRETRAINING:
        torch.manual_seed(0)
        backbone: nn.Module = ResEnc([8, 16, 32], [1, 1, 1], [1, 2, 2], masking="sparse" if name == "s3d" else "zero")
        if name == "simmim":  # it replaces embedded patches
            backbone = Primus(72, 4, 2, 8, 32)
        step = Step(backbone, make(name, backbone, patch, **special.get(name, {})), patch)
        candidates[name] = lambda step=step: size / step(batch_of(patch, size))
        candidates[name]()
    inputs = f"{size} samples of {patch}, ResEnc of 8, 16 and 32 channels; simmim: Primus of width 72, 4 blocks"
    return report("Throughput", "samples/s", inputs, (), interleave(candidates), [])


def rest_of_the_step() -> int:
    """MAE on ResEnc-S: drawing, reading, augmenting, masking, loss and optimiser against the network."""
    patch, size, rounds = (96, 96, 96), 1, 5
    torch.manual_seed(0)
    backbone = resenc_s()
    step, augmentation = Step(backbone, make("mae", backbone, patch), patch), Augmentation()
    results: dict[str, list[float]] = {"draw, read, augment": [], "mask, loss, optimise": [], "network": []}
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder))
        for index in range(rounds):
            start = time.process_time()
            raw = samples(store, patch, spatial.SpatialSettings(), {}, size, first=index * size)
            batch = augmentation(collate(raw))
            results["draw, read, augment"].append(time.process_time() - start)
            whole = step(batch, index)
            results["mask, loss, optimise"].append(whole - step.network)
            results["network"].append(step.network)
    target = Target("share of what is not the network", _rest, 0.1, at_most=True)
    return report("Step of MAE", "s", f"resenc_s, a batch of {size}, patches of 96^3", ("blosc2",), results, [target])


def _rest(medians: Mapping[str, float]) -> float:
    return 1 - medians["network"] / sum(medians.values())


def main() -> int:
    """Runs all parts; 1 when a target of any is missed."""
    torch.set_num_threads(1)
    return max(part() for part in (counted, visible_tokens, throughput, rest_of_the_step))


if __name__ == "__main__":
    sys.exit(main())
