"""Patch and batch size: as large as the data, the memory and the habits of the field allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain3d.config import UserError, by_text
from pretrain3d.devices import GIB
from pretrain3d.planning.memory import Footprint, usable_bytes

BATCH_SIZE = 4  # patches per optimiser step, as nnDetection
SMALL_BATCH = 2  # what a batch is lowered to before the patch is


@dataclass(frozen=True)
class PatchPlan:
    """``patch_size`` voxels, ``batch_size`` patches at once, ``accumulate`` batches per optimiser step."""

    patch_size: tuple[int, int, int]
    batch_size: int
    accumulate: int
    bytes: int


def plan_patch(
    shape: Sequence[float],
    largest: Sequence[int],
    need: Footprint,
    memory_gb: float,
    batch_size: int = BATCH_SIZE,
    objects: Sequence[float] = (0, 0, 0),
) -> PatchPlan:
    """The largest patch that fits.

    It starts as the median shape of the cases, rounded up, within ``largest``. While a step does not fit, the batch is
    lowered to 2 (or less); then the axis that sees most of the volume is shortened, as long as the patch holds
    ``objects``; then the batch is lowered to 1; then the patch is shortened further. What the batch lost is
    accumulated.

    Args:
        shape: (3,) median shape of the cases.
        largest: (3,) voxels.
        need: of the network.
        memory_gb: of the device.
        batch_size: patches per optimiser step.
        objects: (3,) size that a patch should hold.

    Raises:
        UserError: not even the smallest patch fits.
    """
    multiple, usable = need.multiple, usable_bytes(memory_gb)
    patch = [min(b, math.ceil(s / m) * m) for s, b, m in zip(shape, largest, multiple, strict=True)]
    patch = _more_than_one_position(patch, multiple, shape, largest)
    batch, *smaller = [n for n in range(batch_size, 0, -1) if batch_size % n == 0]  # the effective batch stays exact
    while need.bytes(patch, batch) > usable:
        shorter = _shortened(patch, multiple, shape)
        holds = shorter is not None and all(n >= o for n, o in zip(shorter, objects, strict=True))
        if batch > SMALL_BATCH:
            batch = smaller.pop(0)
        elif shorter is not None and (holds or batch == 1):
            patch = shorter
        elif batch > 1:
            batch = smaller.pop(0)
        else:
            raise UserError(
                f"memory_gb={memory_gb:g}: the smallest patch, {by_text(patch)}, needs "
                f"{need.bytes(patch, 1) / GIB:.1f} GiB for tensors alone; take a smaller backbone or more memory"
            )
    x, y, z = patch
    return PatchPlan((x, y, z), batch, batch_size // batch, need.bytes(patch, batch))


def shared_out(budget: Sequence[int], shape: Sequence[float], multiple: Sequence[int]) -> tuple[int, ...]:
    """The largest patch with as many voxels as ``budget``: what the volume leaves of a short axis, the others may use.

    Args:
        budget: (3,) voxels.
        shape: (3,) of the volume; the axis of which a patch sees least is lengthened first.
        multiple: (3,) what a patch must be a multiple of.

    Returns:
        (3,) voxels, on no axis less than ``budget``.
    """
    ends = [math.ceil(s / m) * m for s, m in zip(shape, multiple, strict=True)]
    patch = [min(b, end) for b, end in zip(budget, ends, strict=True)]
    while True:
        for axis in sorted(range(3), key=lambda axis: patch[axis] / shape[axis]):
            longer = [n + multiple[axis] * (axis == other) for other, n in enumerate(patch)]
            if patch[axis] < ends[axis] and math.prod(longer) <= math.prod(budget):
                patch = longer
                break
        else:
            return tuple(max(b, n) for b, n in zip(budget, patch, strict=True))


def _shortened(patch: list[int], multiple: Sequence[int], shape: Sequence[float]) -> list[int] | None:
    """One step less along the axis with the largest share of the volume; None when every axis is at its shortest."""
    candidates = [axis for axis in range(3) if patch[axis] > multiple[axis]]
    for axis in sorted(candidates, key=lambda axis: -patch[axis] / shape[axis]):
        shorter = [n - m if other == axis else n for other, (n, m) in enumerate(zip(patch, multiple, strict=True))]
        if any(n > m for n, m in zip(shorter, multiple, strict=True)):  # one position has nothing to be normalised with
            return shorter
    return None


def _more_than_one_position(
    patch: list[int], multiple: Sequence[int], shape: Sequence[float], largest: Sequence[int]
) -> list[int]:
    """Doubles the longest axis of a patch that would be one position on the coarsest level, if that may be."""
    may = [axis for axis in range(3) if 2 * patch[axis] <= largest[axis]]
    if not may or any(n > m for n, m in zip(patch, multiple, strict=True)):
        return patch
    longest = max(may, key=lambda axis: shape[axis])
    return [2 * n if axis == longest else n for axis, n in enumerate(patch)]
