"""Augmenting a batch of four patches of 96^3, image and mask, against MONAI's dictionary transforms.

Both mirror, rotate and scale in one resampling, then add noise, blur, brightness, contrast, low resolution, gamma of
the negative and gamma. At the recipe's probabilities both get the same draws: what was drawn for a sample of ours has
probability 1 in MONAI's chain for its partner, the rest has 0. MONAI's patches are cut and normalised already; ours
clips, normalises, pads, finds the boxes anew and gives the mask of classes besides. Times are processor seconds on a
CPU; on a GPU ours is timed on the wall, and MONAI stays on the CPU, where its loaders run it.

    python benchmarks/augment.py [profile]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
from harness import Target, interleave, report, samples, write_store
from monai.apps.detection.transforms.dictionary import BoxToMaskd, MaskToBoxd

from pretrain3d.data import intensity
from pretrain3d.data.augment import Augmentation
from pretrain3d.data.batch import collate
from pretrain3d.data.spatial import SpatialSettings
from pretrain3d.data.store import Store

PATCH, BATCH = (96, 96, 96), 4
RECIPE_BATCHES = 6
NOTHING = SpatialSettings(flip_p=0.0, rotation_p=0.0, scale_p=0.0)
EVERYTHING = SpatialSettings(flip_p=1.0, rotation_p=1.0, scale_p=1.0)
ROTATION = SpatialSettings(flip_p=0.0, rotation_p=1.0, scale_p=0.0)
INTENSITIES = intensity.settings_from_config(
    {name: {"p": 1.0} | ({"channel_p": 1.0} if "channel_p" in values else {})
     for name, values in intensity.DEFAULTS.items()}
)  # fmt: skip


def ours(raw: list[dict[str, Any]], device: torch.device) -> Callable[[], float]:
    """Milliseconds per batch of the samples, collating included."""
    augmentation = Augmentation()
    for sample in raw:
        sample["image"] = sample["image"].to(device)
        sample["slots"] = None if sample["slots"] is None else sample["slots"].to(device)

    def run() -> None:
        for start in range(0, len(raw), BATCH):
            batch = augmentation(collate(raw[start : start + BATCH]))
            assert batch["mask"].shape == (BATCH, *PATCH)

    return milliseconds(run, len(raw) // BATCH, device.type == "cuda")


def monai(chains: list[mt.Compose], patches: list[dict[str, Any]]) -> Callable[[], float]:
    """Milliseconds per batch: every patch through its chain, then stacked."""

    def run() -> None:
        for start in range(0, len(patches), BATCH):
            rows = zip(chains[start : start + BATCH], patches[start : start + BATCH], strict=True)
            done = [chain(dict(patch)) for chain, patch in rows]
            assert torch.stack([sample["image"] for sample in done]).shape == (BATCH, 1, *PATCH)
            torch.stack([sample["mask"] for sample in done])

    return milliseconds(run, len(patches) // BATCH, False)


def milliseconds(run: Callable[[], None], batches: int, cuda: bool) -> Callable[[], float]:
    """A measurement of ``run``, which makes ``batches`` batches, warmed up."""
    run()

    def measure() -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter() if cuda else time.process_time()
        run()
        if cuda:
            torch.cuda.synchronize()
        return 1e3 * ((time.perf_counter() if cuda else time.process_time()) - start) / batches

    return measure


def chain(sample: dict[str, Any]) -> mt.Compose:
    """MONAI's transforms, those that were drawn for ``sample`` with probability 1 and the others with 0."""
    geometry, drawn = sample["geometry"], sample["intensity"]["drawn"]
    # Turned by at most 30 degrees about every axis: the diagonal keeps the signs of the mirrors.
    mirrors = np.diag(np.asarray(geometry["matrix"])[:, :3]) < 0 if geometry["resample"] else geometry["flips"]
    p = {name: float(any(value is not None for value in drawn.get(name, ()))) for name in intensity.DEFAULTS}
    angle, pair = np.deg2rad(30.0), ("image", "mask")
    return mt.Compose([
        *(mt.RandFlipd(pair, prob=float(mirror), spatial_axis=axis) for axis, mirror in enumerate(mirrors)),
        mt.RandAffined(pair, prob=float(geometry["resample"]), rotate_range=(angle,) * 3, scale_range=(0.3,) * 3,
                       mode=("bilinear", "nearest"), padding_mode="border"),
        mt.RandGaussianNoised("image", prob=p["noise"], std=0.1),
        mt.RandGaussianSmoothd("image", *((0.5, 1.0),) * 3, prob=p["blur"]),
        mt.RandScaleIntensityd("image", factors=0.25, prob=p["brightness"]),
        mt.RandScaleIntensityFixedMeand("image", factors=0.25, preserve_range=True, prob=p["contrast"]),
        mt.RandSimulateLowResolutiond("image", prob=p["low_resolution"], zoom_range=(0.5, 1.0)),
        mt.RandAdjustContrastd("image", prob=p["gamma_inverted"], gamma=(0.7, 1.5), invert_image=True,
                               retain_stats=True),
        mt.RandAdjustContrastd("image", prob=p["gamma"], gamma=(0.7, 1.5), retain_stats=True),
    ])  # fmt: skip


def box_chain() -> mt.Compose:
    """MONAI's way to rotate boxes: each becomes a mask, the masks are rotated, and each mask becomes a box again."""
    angle = np.deg2rad(30.0)
    return mt.Compose([
        BoxToMaskd(["boxes"], ["box_mask"], ["labels"], ["image"], min_fg_label=0),
        mt.RandAffined(("image", "mask", "box_mask"), prob=1.0, rotate_range=(angle,) * 3,
                       mode=("bilinear", "nearest", "nearest"), padding_mode="border"),
        MaskToBoxd(["boxes"], ["box_mask"], ["labels"], min_fg_label=0),
    ])  # fmt: skip


def patches(store: Store, count: int) -> list[dict[str, Any]]:
    """What MONAI starts from: normalised patches with masks (1, X, Y, Z), boxes and labels."""
    batch = Augmentation()(collate(samples(store, PATCH, NOTHING, {}, count)))
    return [
        {"image": batch["image"][row], "mask": batch["mask"][row][None], "boxes": batch["boxes"][row][valid],
         "labels": batch["labels"][row][valid]}
        for row, valid in enumerate(batch["valid"])
    ]  # fmt: skip


def main() -> int:
    """Runs the benchmark; 1 when a target is missed."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder))
        everything = samples(store, PATCH, EVERYTHING, INTENSITIES, BATCH)
        recipe = samples(store, PATCH, SpatialSettings(), dict(intensity.DEFAULTS), BATCH * RECIPE_BATCHES)
        rotated = samples(store, PATCH, ROTATION, {}, BATCH)
        cut = patches(store, BATCH * RECIPE_BATCHES)
    if "profile" in sys.argv[1:]:
        measure = ours(everything, device)
        with torch.profiler.profile() as record:
            measure()
        print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
    candidates = {
        "everything": ours(everything, device),
        "everything, MONAI": monai([chain(sample) for sample in everything], cut[:BATCH]),
        "recipe": ours(recipe, device),
        "recipe, MONAI": monai([chain(sample) for sample in recipe], cut),
        "rotated boxes": ours(rotated, device),
        "rotated boxes, MONAI": monai([box_chain()] * BATCH, cut[:BATCH]),
    }
    bounds = {"everything": 1.5, "recipe": 2.0, "rotated boxes": 3.0}
    if device.type == "cuda":
        bounds = dict.fromkeys(bounds, 10.0)
    return report(
        "Augmentation of a batch: image and mask",
        "ms",
        f"{BATCH} patches {PATCH}, {len(cut[0]['boxes'])} objects in the first; recipe: {RECIPE_BATCHES} batches",
        ("monai",),
        interleave(candidates),
        [
            Target(f"{name}: MONAI / ours", lambda m, name=name: m[f"{name}, MONAI"] / m[name], bound)
            for name, bound in bounds.items()
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
