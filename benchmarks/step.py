"""A training step of Retina U-Net, and how much of it is not the network.

ResEnc-S, patches of 96^3, two at a time, 27 anchors per position on strides 4 to 32. Not the network:
drawing and reading the patches, collating, augmenting, assigning anchors, the losses and their gradient, the optimiser.
On a CPU the times are processor milliseconds of one thread, so that other processes on the machine do not count.
On a GPU the share is of the wall time of whole steps, as training runs them: workers draw and read the next patches.

    python benchmarks/step.py [profile]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Target, interleave, report, write_store
from torch.utils.data import DataLoader

from pretrain3d.backbones.resenc import resenc_s
from pretrain3d.data.augment import Augmentation
from pretrain3d.data.batch import collate
from pretrain3d.data.normalise import normalisation_for
from pretrain3d.data.patches import PatchDataset
from pretrain3d.data.store import Store
from pretrain3d.detection.retina import RetinaUNet
from pretrain3d.modules.optim import adamw, parameter_groups

PATCH, LEVELS, ANCHORS = 96, (2, 3, 4, 5), {"sizes": [[4.0, 8.0, 16.0]] * 3}
BATCH = 2
REPEATS = 5
STEPS, WARM, WORKERS = 30, 10, 8  # of whole steps on a GPU
NETWORK = ("forward", "backward")


class Stopwatch:
    """Milliseconds by name: of the processor on a CPU, of the wall around a finished GPU."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.times: dict[str, list[float]] = {}

    def __call__(self, name: str, run: Callable[[], Any]) -> Any:
        start = self._now()
        result = run()
        self.times.setdefault(name, []).append(1e3 * (self._now() - start))
        return result

    def _now(self) -> float:
        if not self.cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


class Step:
    """One training step, piece by piece."""

    def __init__(self, store: Store, device: torch.device) -> None:
        torch.manual_seed(0)
        normalisation = normalisation_for(store, {"scheme": "zscore"}, 0)
        self.dataset = PatchDataset(store, list(store.cases), (PATCH,) * 3, 0, normalisation)
        self.augmentation, self.device = Augmentation(), device
        self.backbone = resenc_s().to(device)
        self.detector = RetinaUNet(self.backbone.levels, len(store.classes), ANCHORS, LEVELS).to(device)
        networks = {"backbone": self.backbone, "detector": self.detector}
        self.optimizer = adamw(parameter_groups(networks, 1e-2), lr=1e-4)
        self.outputs: dict[str, torch.Tensor] = {}
        self.gradients: list[torch.Tensor] = []

    def data(self, index: int) -> dict[str, Any]:
        return collate([self.dataset[BATCH * index + i] for i in range(BATCH)])

    def augment(self, raw: dict[str, Any]) -> dict[str, Any]:
        for key in ("image", "slots"):
            raw[key] = [None if source is None else source.to(self.device, non_blocking=True) for source in raw[key]]
        return self.augmentation(raw)

    def forward(self, batch: dict[str, Any]) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            self.outputs = self.detector(self.backbone(batch["image"]), (PATCH,) * 3)

    def loss(self, batch: dict[str, Any]) -> None:
        """The losses, and their gradient down to the network's outputs."""
        leaves = {key: value.detach().requires_grad_() for key, value in self.outputs.items()}
        self.detector.loss(leaves, batch)["loss"].backward()
        self.gradients = [leaf.grad for leaf in leaves.values()]  # type: ignore[misc]

    def backward(self) -> None:
        torch.autograd.backward(list(self.outputs.values()), self.gradients)

    def optimise(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole(self) -> float:
        """Milliseconds of a step, the mean of many that follow each other; workers draw and read their patches."""
        indices = [[BATCH * step + row for row in range(BATCH)] for step in range(WARM + STEPS)]
        pin = self.device.type == "cuda"
        loader = DataLoader(
            self.dataset, batch_sampler=indices, num_workers=WORKERS, collate_fn=collate, pin_memory=pin
        )
        for index, raw in enumerate(loader):
            if index == WARM:
                start = self._finished()
            batch = self.augment(raw)
            self.forward(batch)
            self.loss(batch)
            self.backward()
            self.optimise()
        return 1e3 * (self._finished() - start) / STEPS

    def network(self) -> float:
        """Milliseconds of the network alone in such a step, with the gradients of the last step's losses."""
        batch = {"image": torch.zeros(BATCH, 1, *(PATCH,) * 3, device=self.device)}
        for index in range(WARM + STEPS):
            if index == WARM:
                start = self._finished()
            self.forward(batch)
            self.backward()
            self.optimizer.zero_grad()
        return 1e3 * (self._finished() - start) / STEPS

    def _finished(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> int:
    """Runs the benchmark; 1 when the target is missed."""
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True  # as `fit`
    cuda = torch.cuda.is_available()
    watch = Stopwatch(cuda)
    with tempfile.TemporaryDirectory() as folder:
        step = Step(write_store(Path(folder)), torch.device("cuda" if cuda else "cpu"))
        for index in range(REPEATS):
            raw = watch("draw, read, collate", lambda index=index: step.data(index))
            batch = watch("augment", lambda raw=raw: step.augment(raw))
            watch("forward", lambda batch=batch: step.forward(batch))
            watch("assign, losses", lambda batch=batch: step.loss(batch))
            watch("backward", step.backward)
            watch("optimise", step.optimise)
        if "profile" in sys.argv[1:]:
            with torch.profiler.profile() as record:
                step.augment(step.data(REPEATS))
                step.loss(batch)
            print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))
        whole = interleave({"whole": step.whole, "network": step.network}, REPEATS) if cuda else {}
    inputs = f"resenc_s, batch of {BATCH}, patches of {PATCH}^3, {len(step.detector.anchors.base)} anchors per position"
    name = "share of what is not the network"
    if not cuda:
        return report("Training step", "ms", inputs, (), watch.times, [Target(name, _rest, 0.1, at_most=True)])
    report("Training step, piece after piece", "ms", inputs, (), watch.times, [])
    target = Target(name, lambda medians: 1 - medians["network"] / medians["whole"], 0.05, at_most=True)
    return report("Training step", "ms", f"{inputs}, {WORKERS} workers, bf16", (), whole, [target])


def _rest(medians: Any) -> float:
    total = sum(medians.values())
    return (total - sum(medians[name] for name in NETWORK)) / total


if __name__ == "__main__":
    sys.exit(main())
