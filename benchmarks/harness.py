"""What all benchmarks share: interleaved repeats, one table with inputs, versions and machine, targets, exit status."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version

import torch


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
