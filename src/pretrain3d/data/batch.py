"""Random numbers as pure functions of (seed, index, purpose), and the raw batch that workers hand to the device."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    """The random numbers of one sample for one purpose, whoever asks, and in whatever order.

    Args:
        seed: of the run, >= 0.
        index: global sample index, >= 0.
        purpose: what is drawn ("position", "spatial", ...): purposes do not disturb each other.
    """
    return np.random.Generator(np.random.Philox(_entropy(seed, index, purpose)))


def torch_generator(seed: int, index: int, purpose: str, device: torch.device | str) -> torch.Generator:
    """`generator` for fields drawn on the device (noise, masks); its numbers differ between kinds of device."""
    state = int(_entropy(seed, index, purpose).generate_state(1, np.uint64)[0])
    return torch.Generator(device=device).manual_seed(state & (2**63 - 1))


def _entropy(seed: int, index: int, purpose: str) -> np.random.SeedSequence:
    # crc32, not hash(): the latter differs between processes. Fixed positions keep (seed, index) pairs apart.
    return np.random.SeedSequence(entropy=seed, spawn_key=(zlib.crc32(purpose.encode()), index))


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Raw samples of `data.patches.PatchDataset` -> raw batch for `data.augment.Augmentation`.

    Sources stay a list, because their shapes differ; what has one entry per object is padded to N, the largest number
    of objects that touch a source region of this batch (at least 1), so that the device never has to be asked for it.

    Returns:
        ``image`` list of (C, x, y, z), ``slots`` list of (x, y, z) or None, ``boxes`` list of (n, 6) or None (only for
        cases without an instance mask), ``labels`` (B, N) int64, ``lookup`` (B, N + 1) uint8 (slot -> 0 or 1 + class),
        ``annotated`` (B, K) bool, and per-sample plain values in ``geometry``, ``normalisation``, ``intensity``.
    """
    num_objects = max(1, *(len(sample["labels"]) for sample in samples)) if samples else 1
    labels = torch.zeros(len(samples), num_objects, dtype=torch.int64)  # (B, N)
    for row, sample in enumerate(samples):
        labels[row, : len(sample["labels"])] = sample["labels"]
    lookup = torch.nn.functional.pad(labels + 1, (1, 0)).to(torch.uint8)  # (B, N + 1)
    batch: dict[str, Any] = {
        key: [sample[key] for sample in samples]
        for key in ("image", "slots", "boxes", "geometry", "normalisation", "intensity")
    }
    batch |= {
        "labels": labels,
        "lookup": lookup,
        "annotated": torch.stack([sample["annotated"] for sample in samples]),
        "with_mask": samples[0]["with_mask"],
        "patch_size": samples[0]["patch_size"],
        "sample_index": [sample["sample_index"] for sample in samples],
        "case_ids": [sample["case_id"] for sample in samples],
    }
    return batch


def is_raw(batch: Any) -> bool:
    """Whether this is what `collate` returns (and not, say, the name of a whole case)."""
    return isinstance(batch, dict) and "geometry" in batch


def normalise(
    source: Tensor, low: Sequence[float], high: Sequence[float], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """(C, x, y, z) raw intensities -> float32 ``(clip(x, low, high) - mean) / std`` per channel.

    The bounds are host numbers: nothing is copied to the device and nothing waits for it.
    """
    image = source.to(torch.float32, copy=True)
    for channel, plane in enumerate(image):
        plane.clamp_(low[channel], high[channel]).sub_(mean[channel]).div_(std[channel])
    return image
