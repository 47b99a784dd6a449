"""Objects and what only looks like them: irregular lumps in lung, liver and bone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from pretrain3d.data.phantom.anatomy import Body
from pretrain3d.data.phantom.canvas import Array, Canvas, chain, texture

CLASSES = ("nodule", "liver_lesion", "bone_lesion")  # class index -> name
DIAMETER_MM = (4.0, 24.0)  # of the sphere of the same volume, log-uniform
MIN_INSIDE = 0.7  # an object that its organ or the volume cuts by more is placed elsewhere
GAP_MM = 3.0  # between two lumps
SUBVOXELS = 3  # per axis, for partial volume
MASKED = 0.4  # occupancy from which a voxel is labelled: below one half, since a small object lies between voxels
BROKEN = 0.55  # share of the bone lesions that break through the surface of the bone

# how many of each class a case holds; the columns rotate from case to case, so that all classes are equally frequent
COUNTS = (
    (3, 3, 3),
    (3, 2, 3),
    (4, 3, 2),
    (3, 3, 2),
    (0, 4, 2),
    (2, 2, 4),
    (3, 2, 3),
    (4, 0, 3),
    (2, 3, 3),
    (3, 3, 3),
    (4, 1, 3),
)
EMPTY_EVERY = len(COUNTS) + 1  # one case in twelve has no object


class Lump:
    """A blob with bulges: an ellipsoid whose radius varies with direction, of exactly the volume of its sphere.

    Args:
        rng: where the shape comes from.
        diameter_mm: of the sphere of the same volume.
        roughness: how strongly it bulges; 0 is an ellipsoid.
    """

    def __init__(self, rng: np.random.Generator, diameter_mm: float, roughness: float = 0.28) -> None:
        self.diameter_mm = diameter_mm
        axes = np.exp(rng.uniform(-0.2, 0.2, 3))
        self.rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        self.directions = self._unit(rng.standard_normal((7, 3)))
        self.heights = rng.uniform(-0.6, 1.0, 7) * roughness
        self.radii = axes / np.prod(axes) ** (1 / 3)
        sphere = self._unit(np.random.default_rng(0).standard_normal((500, 3)))
        self.radii *= 0.5 * diameter_mm / np.mean(self._bulge(sphere) ** 3) ** (1 / 3)
        self.reach_mm = float(self.radii.max() * self._bulge(sphere).max() * 1.05)

    @staticmethod
    def _unit(vectors: Array) -> Array:
        return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)

    def _bulge(self, unit: Array) -> Array:
        return 1 + np.exp(3.5 * (unit @ self.directions.T - 1)) @ self.heights

    def distance(self, offsets_mm: Array) -> Array:
        """Approximate signed distance in mm at offsets (..., 3) from the centre."""
        q = offsets_mm @ self.rotation / self.radii
        return (np.linalg.norm(q, axis=-1) - self._bulge(self._unit(q))) * self.radii.mean()

    def occupancy(self, canvas: Canvas, centre_mm: Array, extra_mm: float = 0.0) -> tuple[tuple[slice, ...], Array]:
        """How much of each voxel it fills, by supersampling: the voxels around it and (x, y, z) float32 in [0, 1]."""
        reach = self.reach_mm + extra_mm + canvas.spacing_mm
        box = canvas.box(centre_mm - reach, centre_mm + reach)
        steps = (np.arange(SUBVOXELS) + 0.5) / SUBVOXELS - 0.5
        fine = [
            (axis[side, None] + steps * spacing).ravel() - centre
            for axis, side, spacing, centre in zip(canvas.axes, box, canvas.spacing_mm, centre_mm, strict=True)
        ]
        inside = self.distance(np.stack(np.meshgrid(*fine, indexing="ij"), axis=-1)) < extra_mm
        size = [side.stop - side.start for side in box]
        split = inside.reshape(size[0], SUBVOXELS, size[1], SUBVOXELS, size[2], SUBVOXELS)
        return box, split.mean(axis=(1, 3, 5), dtype=np.float32)


@dataclass
class Placed:
    """A lump in the volume: its centre (world mm), the voxels around it, and how much of each it fills."""

    centre_mm: Array
    box: tuple[slice, ...]
    occupancy: Array


@dataclass
class Placer:
    """Finds room for lumps, one after the other."""

    body: Body
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self._taken: list[tuple[Array, float]] = []
        self.grain = texture(self.rng, self.body.canvas.shape, 1.0)

    def candidates(self, allowed: Array, count: int = 40) -> Iterator[Array]:
        """Random world positions of voxels that `allowed` marks, off the voxel centres by up to half a voxel."""
        flat = np.flatnonzero(allowed)
        if not len(flat):
            return
        canvas = self.body.canvas
        for index in self.rng.choice(flat, min(count, len(flat)), replace=False):
            voxel = np.array(np.unravel_index(index, canvas.shape)) + self.rng.uniform(-0.5, 0.5, 3)
            yield canvas.origin_mm + voxel * canvas.spacing_mm

    def free(self, centre: Array, reach: float) -> bool:
        """Whether a lump there keeps its distance from all others."""
        return all(np.linalg.norm(centre - other) > reach + r + GAP_MM for other, r in self._taken)

    def take(self, centre: Array, reach: float) -> None:
        """Nothing else comes there."""
        self._taken.append((centre, reach))

    def place(self, lump: Lump, allowed: Array, host: Array, beside: Array | None = None) -> Placed | None:
        """Tries `allowed` centres until the lump fits.

        Args:
            lump: the shape.
            allowed: (X, Y, Z) bool, where the centre may lie.
            host: signed distance of the organ that holds (and cuts) it.
            beside: signed distance of what it may touch but not hide in, such as vessels of its own brightness.

        Returns:
            None when there is no room.
        """
        canvas = self.body.canvas
        volume = np.pi / 6 * lump.diameter_mm**3
        for centre in self.candidates(allowed):
            if not self.free(centre, lump.reach_mm):
                continue
            box, occupancy = lump.occupancy(canvas, centre)
            occupancy = _one_piece(occupancy * canvas.cover(host[box]))
            # the smallest lumps have few sub-voxels, hence the slack
            enough = (MIN_INSIDE * volume - 2) / np.prod(canvas.spacing_mm)
            seen = occupancy if beside is None else occupancy * (1 - canvas.cover(beside[box]))
            if seen.sum() >= enough:
                self.take(centre, lump.reach_mm)
                return Placed(centre, box, occupancy)
        return None

    def fill(self, box: tuple[slice, ...], occupancy: Array, hu: float) -> None:
        """Paints an occupancy into the volume, with a little grain."""
        part = self.body.canvas.hu[box]
        part += occupancy * (hu + 5 * self.grain[box] - part)


def _one_piece(occupancy: Array) -> Array:
    """The largest piece of a lump that its host has cut in two, such as one across a disc."""
    pieces, count = ndimage.label(occupancy >= MASKED)
    if count < 2:
        return occupancy
    largest = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    return occupancy * ndimage.binary_dilation(largest)


def counts(index: int) -> tuple[int, ...]:
    """How many objects of each class case `index` asks for."""
    row = index % EMPTY_EVERY
    if row == len(COUNTS):
        return (0,) * len(CLASSES)
    shift = (index // EMPTY_EVERY + row) % len(CLASSES)
    return COUNTS[row][shift:] + COUNTS[row][:shift]


def add_objects(placer: Placer, index: int) -> tuple[Array, dict[int, int]]:
    """Paints the objects of case `index`.

    Returns:
        The instance mask (X, Y, Z) uint8 with ids 1..N and the class index of each id. An object for which the anatomy
        has no room is left out.
    """
    rng = placer.rng
    low, high = np.log(DIAMETER_MM)
    wanted = [(float(np.exp(rng.uniform(low, high))), label) for label, n in enumerate(counts(index)) for _ in range(n)]
    instances = np.zeros(placer.body.canvas.shape, dtype=np.uint8)
    labels: dict[int, int] = {}
    for diameter, label in sorted(wanted, reverse=True):  # the largest first, while there is room
        placed = (_nodule, _liver_lesion, _bone_lesion)[label](placer, diameter)
        if placed is None:
            continue
        number = len(labels) + 1
        mask = placed.occupancy >= min(MASKED, float(placed.occupancy.max()))  # at least one voxel
        instances[placed.box][mask] = number
        labels[number] = label
    return instances, labels


def _nodule(placer: Placer, diameter: float) -> Placed | None:
    """Solid, in lung: free, on a vessel or, unless it is small, on the pleura."""
    rng, d, radius = placer.rng, placer.body.distances, 0.5 * diameter
    lung, vessels = d["lung"], d["lung_vessels"]
    where = rng.choice(["free", "vessel", "pleura"], p=[0.15, 0.45, 0.4] if diameter > 7 else [0.5, 0.5, 0])
    if where == "free":
        allowed = (lung < -radius - 2) & (vessels > radius)
    elif where == "vessel":
        allowed = (lung < -radius - 1) & (vessels < 0.8 * radius)
    else:
        allowed = (lung < -0.45 * radius) & (lung > -0.8 * radius) & (d["cage"] > -radius - 6)
    placed = placer.place(Lump(rng, diameter), allowed, lung, beside=vessels)
    if placed is not None:
        placer.fill(placed.box, placed.occupancy, 30 + rng.uniform(-30, 30))
    return placed


def _liver_lesion(placer: Placer, diameter: float) -> Placed | None:
    """25 to 50 HU below the liver around it; a small one at least 45, since a faint one would drown in the noise."""
    rng, liver = placer.rng, placer.body.distances["liver"]
    size = (diameter - DIAMETER_MM[0]) / (DIAMETER_MM[1] - DIAMETER_MM[0])
    allowed = (liver < -0.6 * diameter / 2) if diameter > 8 else (liver < -0.5 * diameter - 2)
    placed = placer.place(Lump(rng, diameter), allowed, liver)
    if placed is not None:
        placer.fill(placed.box, placed.occupancy, placer.body.traits.liver - rng.uniform(45 - 20 * size, 50))
    return placed


def _bone_lesion(placer: Placer, diameter: float) -> Placed | None:
    """Lytic: soft tissue in bone. Most break through its surface; the others keep a shell and blow the bone up."""
    rng, body, radius = placer.rng, placer.body, 0.5 * diameter
    canvas, d = body.canvas, body.distances
    bone = d["bone"]
    block = np.maximum(d["column"], bone)  # vertebral bodies, the only ones with room for a large one
    in_spine = diameter > 11 or rng.random() < 0.5
    broken = rng.random() < BROKEN
    if broken:
        allowed = (bone < -0.35 * radius) & (bone > -0.7 * radius)
        host = bone - 1
    else:
        allowed = bone < -min(0.6 * radius, 2.2)
        host = bone - 0.75 * radius
    allowed &= (block < -0.35 * radius if broken else block < -min(0.6 * radius, 5.0)) if in_spine else block > 0
    lump = Lump(rng, diameter, roughness=0.22)
    placed = placer.place(lump, allowed, np.maximum(host, d["skin"] + 5))
    if placed is None:
        return None
    if not broken:
        shell_box, shell = lump.occupancy(canvas, placed.centre_mm, extra_mm=2.2)
        placer.fill(shell_box, shell, body.traits.cortex - 30)
        bone[shell_box][shell > 0.5] = -0.1
    placer.fill(placed.box, placed.occupancy, rng.uniform(30, 80))
    return placed


def add_distractors(placer: Placer) -> None:
    """Paints what a careless detector takes for an object. Nothing here is labelled."""
    rng, d, traits = placer.rng, placer.body.distances, placer.body.traits
    lung, liver, kidney = d["lung"], d["liver"], d["kidney"]

    def some(most: int, sizes: tuple[float, float], allowed: Array, host: Array, hus: tuple[float, float]) -> None:
        for _ in range(rng.integers(0, most + 1)):
            placed = placer.place(Lump(rng, rng.uniform(*sizes)), allowed, host)
            if placed is not None:
                placer.fill(placed.box, placed.occupancy, rng.uniform(*hus))

    some(2, (5, 9), lung < -4, lung, (500, 900))  # calcified granulomas
    some(1, (14, 26), lung < -8, lung, (traits.lung + 180, traits.lung + 300))  # ground glass
    some(2, (9, 18), liver < -7, liver, (0, 15))  # cysts
    some(2, (6, 16), liver < -5, liver, (traits.liver + 45, traits.liver + 75))  # haemangiomas
    some(2, (7, 16), np.abs(kidney) < 3, kidney - 8, (0, 18))  # cysts of the kidneys
    some(3, (4, 9), d["vertebrae"] < -3, d["bone"], (750, 950))  # bone islands
    some(4, (3, 5), np.abs(d["aorta"]) < 1.5, d["aorta"] - 3, (500, 900))  # calcified plaques
    some(1, (3, 6), d["spleen"] < -4, d["spleen"], (350, 600))  # old granulomas of the spleen
    some(4, (6, 14), d["meal"] < -3, d["meal"], (30, 80))  # food in contrast: as dark as a hole in bone
    some(4, (6, 13), d["bowel_contrast"] < -2, d["bowel_contrast"], (30, 80))
    some(6, (5, 11), d["bowel_gas"] < -5, d["bowel_gas"], (-20, 60))  # stool in gas: as bright as a nodule in lung
    _plugs(placer)


def _plugs(placer: Placer) -> None:
    """Short thick cords in lung (mucus, scars): as thick as small nodules, several times as long."""
    rng, canvas, lung = placer.rng, placer.body.canvas, placer.body.distances["lung"]
    segments = []
    for centre in placer.candidates(lung < -6, count=int(rng.integers(2, 6))):
        direction = rng.standard_normal(3)
        length = rng.uniform(7, 13)
        if not placer.free(centre, length + 4):
            continue
        placer.take(centre, length + 4)
        half = direction / np.linalg.norm(direction) * length
        points = np.stack([centre - half, centre + rng.normal(0, 1.5, 3), centre + half])
        segments.append(chain(points, rng.uniform(1.8, 3.5)))
    if segments:
        tubes = canvas.tubes(np.concatenate(segments), warped=False)
        canvas.paint(np.maximum(tubes, lung), 40.0)
