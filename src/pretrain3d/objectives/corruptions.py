"""What Models Genesis and the Swin mix do to an image before a network restores it.

Images are (C, X, Y, Z) of one sample, on any device. What steers an operation (how many windows, where, how large) is
drawn on the host, so nothing waits for the device; fields of noise are drawn on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pretrain3d.devices import sent

CURVE_POINTS = 4096  # of a Bezier curve
CURVE_ENTRIES = 65536  # of the table it becomes: a step of 1.5e-5 of the intensity range
MARGIN = 3  # voxels between a painted window and the border, where there is room
Window = tuple[slice, slice, slice]


def host_rng(generator: torch.Generator) -> np.random.Generator:
    """Numbers known on the host, from the seed of a sample's generator and not from what was drawn from it so far."""
    return np.random.default_rng(generator.initial_seed())


def shuffle_windows(
    image: Tensor, rng: np.random.Generator, generator: torch.Generator, num_windows: int = 10_000
) -> Tensor:
    """Local pixel shuffling: the voxels of each small window change places at random.

    Sides are uniform from 1 to a tenth of the axis, places uniform. Every window takes its voxels from the original
    image; where windows overlap, the last one counts. All channels move together.

    Args:
        image: (C, X, Y, Z).
        rng: for the windows.
        generator: for the permutations, on the image's device.
        num_windows: as many in a small patch as in a large one: sides shrink with the patch.
    """
    shape = np.array(image.shape[1:])
    sides = rng.integers(1, np.maximum(1, shape // 10), (num_windows, 3), endpoint=True)
    starts = rng.integers(0, shape - sides, endpoint=True)
    if image.device.type == "cpu":  # the same distribution, several times faster where nothing runs in parallel
        source = torch.from_numpy(window_by_window(starts, sides, shape, rng))
    else:
        source = all_windows(starts, sides, shape, generator)
    return image.flatten(1).index_select(1, source).view_as(image)


def window_by_window(starts: np.ndarray, sides: np.ndarray, shape: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where each voxel comes from after the windows (N, 3) were shuffled in turn: (X * Y * Z) indices."""
    places = np.arange(shape.prod(), dtype=np.int32).reshape(shape)
    source = places.copy()
    for (x, y, z), (i, j, k) in zip(starts.tolist(), (starts + sides).tolist(), strict=True):
        window = places[x:i, y:j, z:k].flatten()  # a copy, as ravel would not always be
        rng.shuffle(window)
        source[x:i, y:j, z:k] = window.reshape(i - x, j - y, k - z)
    return source.ravel()


def all_windows(starts: np.ndarray, sides: np.ndarray, shape: np.ndarray, generator: torch.Generator) -> Tensor:
    """`window_by_window` at once, on the generator's device: E = all voxels of all windows, in order."""
    device = generator.device
    counts = sides.prod(1)
    total, volume = int(counts.sum()), int(shape.prod())
    table = np.stack([np.cumsum(counts) - counts, *sides[:, 1:].T, *starts.T])  # (6, N)
    first, side_y, side_z, x, y, z = sent(torch.from_numpy(table), device)
    repeats = sent(torch.from_numpy(counts), device)
    window = torch.repeat_interleave(repeats, output_size=total)  # (E) which window
    order = torch.arange(total, device=device)
    local = order - first[window]  # (E) which voxel of it
    rows, dz = local // side_z[window], local % side_z[window]
    dx, dy = rows // side_y[window], rows % side_y[window]
    _, size_y, size_z = shape.tolist()
    place = ((x[window] + dx) * size_y + y[window] + dy) * size_z + z[window] + dz  # (E) where in the image
    # A window's voxels in random order: sorted by window first, by a random number of 32 bits within it.
    mixed = torch.randint(1 << 32, (total,), device=device, generator=generator).add_(window << 32).argsort()
    last = torch.full((volume,), -1, device=device).scatter_reduce_(0, place, order, "amax")
    taken = place[mixed[last.clamp(min=0)]]
    return torch.where(last < 0, torch.arange(volume, device=device), taken)


def bezier_table(rng: np.random.Generator) -> np.ndarray:
    """A random intensity map of [0, 1] as (`CURVE_ENTRIES`) float32: rising, or with probability 0.5 falling.

    A cubic Bezier curve from (0, 0) to (1, 1) whose two inner control points are uniform in the unit square. Both its
    coordinates rise along the curve; the falling map pairs x(t) with y(1 - t).
    """
    inner = rng.random((2, 2))
    t = np.linspace(0.0, 1.0, CURVE_POINTS)
    weights = (3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t))
    x, y = (weights[0] * inner[0, axis] + weights[1] * inner[1, axis] + t**3 for axis in range(2))
    falling = rng.random() < 0.5
    entries = np.linspace(0.0, 1.0, CURVE_ENTRIES)
    return np.interp(entries, x, y[::-1] if falling else y).astype(np.float32)


def look_up(image: Tensor, table: np.ndarray) -> Tensor:
    """Intensities from [0, 1] through a table of entries at equal distances, the nearest entry."""
    entries = sent(torch.from_numpy(table), image.device)
    index = image.mul(len(table) - 1).round_().int()
    return entries.index_select(0, index.flatten()).view_as(image)


def in_paint(image: Tensor, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    """Noise of U(0, 1) in up to five boxes with sides from a sixth to a third of the axis; a box more with p = 0.95."""
    painted = image.clone()
    shape = np.array(image.shape[1:])
    for window in _windows(rng, shape, shape // 6, shape // 3, at_most=5):
        patch = painted[:, *window]
        patch.copy_(torch.rand(patch.shape, device=image.device, generator=generator))
    return painted


def out_paint(image: Tensor, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    """Noise of U(0, 1) everywhere but in one box and up to four more, with sides of 3/7 to 4/7 less than the axis."""
    painted = torch.rand(image.shape, device=image.device, generator=generator)
    shape = np.array(image.shape[1:])
    largest, smallest = shape - 3 * shape // 7, shape - 4 * shape // 7
    for window in [
        *_windows(rng, shape, smallest, largest, at_most=1, more=1.0),
        *_windows(rng, shape, smallest, largest, at_most=4),
    ]:
        painted[:, *window] = image[:, *window]
    return painted


def _windows(
    rng: np.random.Generator,
    shape: np.ndarray,
    smallest: np.ndarray,
    largest: np.ndarray,
    at_most: int,
    more: float = 0.95,
) -> list[Window]:
    """Boxes of random sides at random places; each one is drawn with probability ``more`` after the one before."""
    windows: list[Window] = []
    while len(windows) < at_most and rng.random() < more:
        sides = np.maximum(1, rng.integers(smallest, largest, endpoint=True))
        margin = np.minimum(MARGIN, (shape - sides) // 2)
        starts = rng.integers(margin, shape - sides - margin, endpoint=True)
        windows.append(_window(starts, starts + sides))
    return windows


def cut_out_windows(rng: np.random.Generator, shape: Sequence[int], most: float = 0.3) -> list[Window]:
    """Boxes to drop, until their voxels reach a share of the patch that is drawn from U(0, ``most``).

    A box has sides from 5 % to 25 % of the axis (cut at the border) and may overlap others; its voxels count again.
    """
    size = np.array(shape)
    goal, dropped = rng.uniform(0.0, most) * size.prod(), 0
    smallest = np.maximum(1, (0.05 * size).astype(int))
    largest = np.maximum(smallest, (0.25 * size).astype(int))
    windows = []
    while dropped < goal:
        starts = rng.integers(0, size - smallest, endpoint=True)
        stops = np.minimum(starts + rng.integers(smallest, largest, endpoint=True), size)
        dropped += int((stops - starts).prod())
        windows.append(_window(starts, stops))
    return windows


def restored_pictures(restored: Tensor, prepared: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Central slices along z of the first sample's first channel, (X, Y) float32 each.

    Args:
        restored: (B, C, X, Y, Z).
        prepared: ``targets`` and ``inputs`` of that shape.

    Returns:
        ``original``, ``corrupted``, ``restored``.
    """
    arrays = {"original": prepared["targets"], "corrupted": prepared["inputs"], "restored": restored}
    middle = restored.shape[-1] // 2
    return {name: array[0, 0, :, :, middle].detach().float().cpu().numpy() for name, array in arrays.items()}


def _window(starts: np.ndarray, stops: np.ndarray) -> Window:
    x, y, z = (slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True))
    return x, y, z
