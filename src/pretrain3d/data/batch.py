"""Random numbers as pure functions of (seed, index, purpose), raw batches for the device, their order."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch


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
    Only voxels are tensors: each tensor from a worker costs a round trip between the processes, an array does not.

    Returns:
        ``image`` list of (C, x, y, z) and ``slots`` list of (x, y, z) or None, tensors; ``boxes`` list of (n, 6) or
        None (only for cases without an instance mask), ``labels`` (B, N) int64, ``annotated`` (B, K) bool, arrays; and
        per-sample plain values in ``geometry``, ``normalisation``, ``intensity``. Where the samples have them:
        ``semantic`` list of (x, y, z), tensors, ``semantic_annotated`` (B, K) bool, array; ``set_index`` list of int.
    """
    num_objects = max(1, *(len(sample["labels"]) for sample in samples))
    labels = np.zeros((len(samples), num_objects), dtype=np.int64)
    for row, sample in enumerate(samples):
        labels[row, : len(sample["labels"])] = sample["labels"]
    batch: dict[str, Any] = {
        key: [sample[key] for sample in samples]
        for key in ("image", "slots", "boxes", "geometry", "normalisation", "intensity", "sample_index")
    }
    if samples[0]["semantic"] is not None:
        batch["semantic"] = [sample["semantic"] for sample in samples]
        batch["semantic_annotated"] = np.stack([sample["semantic_annotated"] for sample in samples])
    if "set_index" in samples[0]:
        batch["set_index"] = [sample["set_index"] for sample in samples]
    return batch | {
        "labels": labels,
        "annotated": np.stack([sample["annotated"] for sample in samples]),
        "with_mask": samples[0]["with_mask"],
        "patch_size": samples[0]["patch_size"],
        "case_ids": [sample["case_id"] for sample in samples],
    }


def is_raw(batch: Any) -> bool:
    """Whether this is what `collate` returns (and not, say, the name of a whole case)."""
    return isinstance(batch, dict) and "geometry" in batch


class GlobalBatches:
    """Endless sample indices for one process: of every global batch, each ``world_size``-th sample from ``rank`` on.

    The order is that of the natural numbers, so a run is continued by starting at the number of samples it has seen,
    and the union over processes is what one process with the global batch would see. Has no length on purpose.
    """

    def __init__(self, first: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.first, self.batch_size, self.rank, self.world_size = first, batch_size, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        index = self.first
        while True:
            stop = index + self.batch_size * self.world_size
            yield list(range(index + self.rank, stop, self.world_size))
            index = stop
