"""One object-balanced patch: where it comes from, beside MONAI's box sampler."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Hashable

import numpy as np
import torch
from harness import Target, interleave, report
from monai.apps.detection.transforms.dictionary import RandCropBoxByPosNegLabeld

from pretrain3d.data.case import Case
from pretrain3d.data.patches import PatchSampler
from pretrain3d.geometry import Frame

SHAPE, PATCH = (256, 256, 200), (96, 96, 96)
CASES, OBJECTS, CLASSES = 200, 20, 3


def make_case(number: int) -> Case:
    """A record with `OBJECTS` boxes of 4 to 24 voxels."""
    rng = np.random.default_rng(number)
    size = np.exp(rng.uniform(np.log(4), np.log(24), size=(OBJECTS, 3))).round()
    start = np.floor(rng.random((OBJECTS, 3)) * (np.asarray(SHAPE) - size))
    return Case(
        id=f"case_{number}", split="train", group=str(number), shape=SHAPE, channels=1,
        frame=Frame.of_file(np.eye(4), SHAPE), boxes=np.concatenate([start, start + size], axis=1).astype(np.float32),
        labels=rng.integers(0, CLASSES, size=OBJECTS), instances=np.arange(1, OBJECTS + 1),
        volumes_mm3=np.ones(OBJECTS), annotated=(0, 1, 2), content_hash="", histograms={}, has_instances=True,
        has_semantic=False,
    )  # fmt: skip


def milliseconds(call: Callable[[int], object], number: int) -> Callable[[], float]:
    """The median over ``number`` calls, each with an index of its own."""
    index = iter(range(10**9))

    def measure() -> float:
        times = []
        for _ in range(number):
            start = time.perf_counter()
            call(next(index))
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    return measure


def main() -> int:
    """Runs the benchmark; 1 when the target is missed."""
    torch.set_num_threads(1)
    cases = [make_case(number) for number in range(CASES)]
    sampler = PatchSampler(cases, PATCH, seed=0, foreground=1.0)
    volume = np.random.default_rng(0).integers(-1000, 1000, size=(1, *SHAPE)).astype(np.int16)
    image = torch.from_numpy(volume)

    def draw_and_cut(index: int) -> torch.Tensor:
        """What MONAI's sampler also does: the crop, out of a volume in memory."""
        start = np.clip(sampler.draw(index).center - np.asarray(PATCH) / 2, 0, np.asarray(SHAPE) - PATCH).astype(int)
        x, y, z = (slice(int(low), int(low) + size) for low, size in zip(start, PATCH, strict=True))
        return image[:, x, y, z].clone()

    crop = RandCropBoxByPosNegLabeld("image", "box", "label", spatial_size=PATCH, pos=1.0, neg=0.0, num_samples=1)
    sample: dict[Hashable, torch.Tensor] = {
        "image": image,
        "box": torch.from_numpy(cases[0].boxes),
        "label": torch.from_numpy(cases[0].labels),
    }
    results = interleave({
        "draw": milliseconds(sampler.draw, 1000),
        "draw + crop": milliseconds(draw_and_cut, 200),
        "MONAI RandCropBoxByPosNegLabeld": milliseconds(lambda index: crop(sample), 5),
    })  # fmt: skip
    return report(
        "Sampling: one object-balanced patch, rotation and scaling drawn too",
        "ms",
        f"{CASES} cases {SHAPE} with {OBJECTS} objects of {CLASSES} classes, patch {PATCH}; MONAI: one case in memory",
        ("monai",),
        results,
        [
            Target("draw in ms", lambda m: m["draw"], 1.0, at_most=True),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
