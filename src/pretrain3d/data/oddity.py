"""What makes a file unlikely to be the image that it is taken for; it is said, and the file is used all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pretrain3d.data.readers import volumes
from pretrain3d.data.readers.contract import MAX_NAMED

POSITIONS = "its sform and its qform place the voxels differently; the sform is taken"
LABELS = "whole numbers from 0, few of them or in areas of one value: a segmentation, no image?"
SHIFTED = "no air, and soft tissue near 1000 instead of 0: a CT stored without its rescale intercept? It is taken as HU"
FEW_LABELS = 32
MANY_LABELS = 256
SAME = 0.6  # of the voxels beside the background have their neighbour's value: over 0.64 in masks, 0.23 in 8-bit MR
STEP = 4  # voxels; every fourth one along each axis tells
TISSUE = (900, 1150)  # fat to muscle and blood, where HU were stored with 1000 or 1024 added
TISSUE_SHARE = 0.1  # of the voxels; in HU these are compact bone, of which no volume has so much and nothing below
AIR = -200
AIR_SHARE = 0.001


def oddities(path: Path | None, image: np.ndarray, modality: Sequence[str]) -> list[str]:
    """What is odd about an image, in words; mostly nothing.

    Args:
        path: of the (first) file, None of an array.
        image: (C, X, Y, Z) as it was read, finite.
        modality: per channel; CT is expected in HU.
    """
    found = [POSITIONS] if path is not None and volumes.has_two_positions(path) else []
    if any(_is_label_map(channel) for channel in image):
        found.append(LABELS)
    if any(name == "CT" and _is_shifted(channel) for channel, name in zip(image, modality, strict=True)):
        found.append(SHIFTED)
    return found


def by_oddity(odd: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for everything that is odd, with the first of the files that it is said of.

    Args:
        odd: file -> what is odd about it.
    """
    lines = []
    for text in (POSITIONS, LABELS, SHIFTED):
        files = sorted(file for file, texts in odd.items() if text in texts)
        more = f" and {len(files) - MAX_NAMED} more" if len(files) > MAX_NAMED else ""
        if files:
            lines.append(f"{', '.join(files[:MAX_NAMED])}{more}: {text}")
    return lines


def _is_label_map(channel: np.ndarray) -> bool:
    for part in (channel[::STEP, ::STEP, ::STEP], channel):  # the first one answers for most images, and fast
        values, counts = np.unique(part, return_counts=True)
        if len(values) >= MANY_LABELS or values[0] < 0 or not np.array_equal(values, np.rint(values)):
            return False
    here, beside = channel[:-1], channel[1:]
    labelled = here != values[counts.argmax()]
    return len(values) < FEW_LABELS or bool((here == beside).sum(where=labelled) > SAME * labelled.sum())


def _is_shifted(channel: np.ndarray) -> bool:
    part = channel[::STEP, ::STEP, ::STEP]
    tissue = (part >= TISSUE[0]) & (part <= TISSUE[1])
    return bool((part < AIR).mean() <= AIR_SHARE and tissue.mean() >= TISSUE_SHARE)
