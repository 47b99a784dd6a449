"""Random crops of whole-body-sized volumes: the store and its patches against MONAI's loaders."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from harness import Target, interleave, report
from monai.data import DataLoader as MonaiLoader
from monai.data import Dataset as MonaiDataset
from monai.data import PersistentDataset
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandSpatialCropd, ScaleIntensityRanged
from torch.utils.data import DataLoader, RandomSampler

from pretrain3d.data.augment import Augmentation
from pretrain3d.data.batch import collate, is_raw
from pretrain3d.data.case import Case
from pretrain3d.data.fingerprint import Histogram
from pretrain3d.data.module import GlobalBatches
from pretrain3d.data.normalise import Normalisation
from pretrain3d.data.patches import PatchDataset
from pretrain3d.data.spatial import SpatialSettings
from pretrain3d.data.store import Store, StoreWriter
from pretrain3d.geometry import Frame

SHAPE, PATCH = (256, 256, 200), (96, 96, 96)
VOLUMES, WORKERS, SECONDS = 6, 2, 4.0
LOW, HIGH = -1000.0, 1000.0


def ct_like(seed: int) -> np.ndarray:
    """(X, Y, Z) int16: air, a body of soft tissue with two lungs, and scanner noise."""
    rng = np.random.default_rng(seed)
    x, y, z = (np.linspace(-1, 1, size, dtype=np.float32).reshape(np.roll((-1, 1, 1), axis))
               for axis, size in enumerate(SHAPE))  # fmt: skip
    volume = np.where((x / 0.9) ** 2 + (y / 0.7) ** 2 < 1, np.float32(40), np.float32(-1000)) + 0 * z
    for side in (-0.4, 0.4):
        lung = ((x - side) / 0.3) ** 2 + (y / 0.45) ** 2 + (z / 0.8) ** 2 < 1
        volume = np.where(lung, np.float32(-850), volume)
    volume += rng.normal(0, 20, size=SHAPE).astype(np.float32) * (volume > -1000)
    return np.clip(volume, -1024, 3071).astype(np.int16)


def write(folder: Path) -> tuple[Store, list[dict[str, str]]]:
    """The same volumes as a store and as .nii.gz files."""
    writer = StoreWriter(folder / "store", "synthetic", [], (1.0, 1.0, 1.0), ["CT"])
    nothing = {"boxes": np.zeros((0, 6), np.float32), "labels": np.zeros(0, np.int64),
               "instances": np.zeros(0, np.int64), "volumes_mm3": np.zeros(0)}  # fmt: skip
    files = []
    for number in range(VOLUMES):
        volume, name = ct_like(number), f"case_{number}"
        files.append({"image": str(folder / f"{name}.nii.gz")})
        nibabel.Nifti1Image(volume, np.eye(4)).to_filename(files[-1]["image"])
        histogram = (Histogram.of(volume[::8]),)
        frame = Frame.of_file(np.eye(4), SHAPE)
        case = Case(
            id=name, split="pretrain", group=name, shape=SHAPE, channels=1, frame=frame, annotated=(),
            content_hash=name, histograms={"body": histogram, "objects": histogram}, has_instances=False,
            has_semantic=False, **nothing,
        )  # fmt: skip
        writer.add(case, volume[None])
    return writer.finish([f"case_{number}" for number in range(VOLUMES)]), files


def ours(store: Store) -> Iterable[Any]:
    """Batches of one patch, without augmentation."""
    window = Normalisation((LOW,), (HIGH,), (LOW,), (HIGH - LOW,))
    still = SpatialSettings(flip_axes=(), rotation_p=0.0, scale_p=0.0)
    data = PatchDataset(store, list(store.cases), PATCH, 0, lambda case: window, 0.0, still, {})
    return DataLoader(data, batch_sampler=GlobalBatches(0, 1), num_workers=WORKERS, collate_fn=collate)


def monai(files: list[dict[str, str]], cache: Path | None) -> Iterable[Any]:
    """The same crops from files, or from `PersistentDataset`'s cache of loaded and scaled volumes."""
    transform = Compose([
        LoadImaged("image"),
        EnsureChannelFirstd("image"),
        ScaleIntensityRanged("image", LOW, HIGH, 0.0, 1.0, clip=True),
        RandSpatialCropd("image", roi_size=PATCH, random_size=False),
    ])  # fmt: skip
    data = MonaiDataset(files, transform) if cache is None else PersistentDataset(files, transform, cache_dir=cache)
    if cache is not None:
        for number in range(len(data)):  # fills the cache
            data[number]
    endless = RandomSampler(data, replacement=True, num_samples=10**9)
    return MonaiLoader(data, batch_size=1, sampler=endless, num_workers=WORKERS)


def patches_per_second(batches: Iterator[Any]) -> Callable[[], float]:
    """A measurement that goes on with running workers; what they had prepared while others ran does not count."""
    finish = Augmentation()

    def measure() -> float:
        count, start = -3 * WORKERS, 0.0  # the prefetched patches and one more per worker
        while True:
            batch = next(batches)
            image = (finish(batch) if is_raw(batch) else batch)["image"]
            assert tuple(image.shape) == (1, 1, *PATCH) and image.dtype == torch.float32
            count += 1
            if count == 0:
                start = time.perf_counter()
            elif count > 0 and time.perf_counter() - start > SECONDS:
                return count / (time.perf_counter() - start)

    return measure


def main() -> int:
    """Runs the benchmark; 1 when a target is missed."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store, files = write(Path(folder))
        loaders = {
            "store": ours(store),
            "MONAI PersistentDataset": monai(files, Path(folder) / "cache"),
            "MONAI LoadImaged": monai(files, None),
        }
        results = interleave({name: patches_per_second(iter(loader)) for name, loader in loaders.items()})
    return report(
        "Loader: one random crop per volume draw",
        "patches/s",
        f"{VOLUMES} volumes {SHAPE} int16, crops {PATCH} float32, {WORKERS} workers, {SECONDS:g} s each, files cached",
        ("blosc2", "monai", "nibabel"),
        results,
        [
            Target("store / LoadImaged", lambda m: m["store"] / m["MONAI LoadImaged"], 40),
            Target("store / PersistentDataset", lambda m: m["store"] / m["MONAI PersistentDataset"], 4),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
