"""What the benchmarks share: repeats, the table with inputs, versions, machine and targets, the status, a small store.

A benchmark ends with status 0 when every target is reached, 1 when one is missed, and `NOT_RUN` when something that it
needs is not there.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain3d.data.case import Case
from pretrain3d.data.fingerprint import Histogram
from pretrain3d.data.normalise import Normalisation
from pretrain3d.data.patches import PatchDataset
from pretrain3d.data.spatial import SpatialSettings
from pretrain3d.data.store import Store, StoreWriter
from pretrain3d.geometry import Frame

NOT_RUN = 2
SHAPE, OBJECTS = (192, 192, 192), 5  # of the store


@dataclass(frozen=True)
class Target:
    """A promise about the medians: ``value(medians)`` must be at least (or at most) ``bound``."""

    name: str
    value: Callable[[Mapping[str, float]], float]
    bound: float
    at_most: bool = False

    def holds(self, medians: Mapping[str, float]) -> bool:
        """Whether the promise is kept."""
        value = self.value(medians)
        return value <= self.bound if self.at_most else value >= self.bound


def timed(run: Callable[[], object], per_second: float = 1.0) -> Callable[[], float]:
    """A measurement of ``run`` in processor seconds, of which other processes take none, or parts of them."""

    def measure() -> float:
        start = time.process_time()
        run()
        return per_second * (time.process_time() - start)

    return measure


def not_run(reason: str) -> int:
    """Says in a line what is missing; the status of a benchmark that cannot run."""
    print(f"not run: {reason}", file=sys.stderr)
    return NOT_RUN


def interleave(candidates: Mapping[str, Callable[[], float]], repeats: int = 5) -> dict[str, list[float]]:
    """Measures every candidate once per round, so that a slow minute of the machine hits them all."""
    assert repeats >= 5, repeats
    results: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, measure in candidates.items():
            results[name].append(measure())
    return results


def report(
    title: str, unit: str, inputs: str, packages: tuple[str, ...], results: Mapping[str, list[float]],
    targets: list[Target],
) -> int:  # fmt: skip
    """Prints a benchmark; 0, or 1 when a target is missed."""
    print(f"{title}\n  inputs    {inputs}")
    print("  versions  " + ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", *packages)))
    print(f"  machine   {machine()}")
    width = max(map(len, results))
    for name, values in results.items():
        low, high = min(values), max(values)
        median = statistics.median(values)
        print(f"  {name:<{width}}  {median:10.3f} {unit}  ({low:.3f} .. {high:.3f}, {len(values)} runs)")
    medians = {name: statistics.median(values) for name, values in results.items()}
    for target in targets:
        verdict = "reached" if target.holds(medians) else "MISSED"
        bound = f"{'at most' if target.at_most else 'at least'} {target.bound:g}"
        print(f"  {target.name}: {target.value(medians):.3g} (target: {bound}) {verdict}")
    return 0 if all(target.holds(medians) for target in targets) else 1


def machine() -> str:
    """Processor, cores, load and GPU."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux: the platform's own name stays
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    load = os.getloadavg()[0]
    return f"{name}, {os.cpu_count()} cores, load {load:.1f}, {torch.get_num_threads()} torch threads, {gpu}"


def write_store(folder: Path) -> Store:
    """One CT-like case with a handful of objects close enough together that a patch holds them all."""
    rng = np.random.default_rng(0)
    image = rng.normal(0, 100, size=SHAPE).astype(np.int16)
    instances = np.zeros(SHAPE, np.int16)
    start = rng.integers(80, 100, size=(OBJECTS, 3))
    start[:, 2] = 60 + 14 * np.arange(OBJECTS)
    stop = start + rng.integers(6, 13, size=(OBJECTS, 3))
    for number, (low, high) in enumerate(zip(start, stop, strict=True), start=1):
        instances[tuple(slice(*bounds) for bounds in zip(low, high, strict=True))] = number
    histogram = (Histogram.of(image[::8]),)
    case = Case(
        id="case", split="train", group="case", shape=SHAPE, channels=1, frame=Frame.of_file(np.eye(4), SHAPE),
        boxes=np.concatenate([start, stop], axis=1).astype(np.float32), labels=np.zeros(OBJECTS, np.int64),
        instances=np.arange(1, OBJECTS + 1), volumes_mm3=np.prod(stop - start, axis=1).astype(np.float64),
        annotated=(0,), content_hash="case", histograms={"body": histogram, "objects": histogram},
        has_instances=True, has_semantic=False,
    )  # fmt: skip
    writer = StoreWriter(folder / "store", "synthetic", ["object"], (1.0, 1.0, 1.0), ["CT"])
    writer.add(case, image[None], instances)
    return writer.finish(["case"])


def samples(
    store: Store, patch: tuple[int, int, int], spatial: SpatialSettings, intensities: dict[str, Any], count: int,
    first: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Raw samples from index ``first`` on with what was drawn for them; all are placed on objects."""
    window = Normalisation((-300.0,), (300.0,), (0.0,), (100.0,))
    data = PatchDataset(store, ["case"], patch, 0, lambda case: window, 1.0, spatial, intensities)
    return [data[index] for index in range(first, first + count)]
