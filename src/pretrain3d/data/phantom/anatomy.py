"""The body that everything hangs on: its tissues, its wall and the dome of the diaphragm. A small torso.

Model coordinates: x to the patient's right, y forward, z up; z = 0 is about the top of the right diaphragm.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pretrain3d.data.phantom.canvas import Array, Canvas

ORGANS = ("lung", "liver", "kidney", "spleen", "heart", "aorta", "bone")  # labels 1.. of the organ map
BODY_HALF_MM = (106.0, 80.0)  # half width and half depth of the skin of the mean body


@dataclass
class Traits:
    """What differs between bodies: HU of tissues, mm of walls."""

    fat_mm: float
    lung: float
    muscle: float
    liver: float
    spleen: float
    kidney: float
    blood: float
    spongy: float  # inside of a bone
    cortex: float  # its surface


@dataclass
class Body:
    """A painted body: what the placement of objects needs to know."""

    canvas: Canvas
    traits: Traits
    distances: dict[str, Array] = field(default_factory=dict)  # organ or part -> signed distance, mm
    spine: list[tuple[float, float, float]] = field(default_factory=list)  # centres of vertebral bodies, model mm


def organ_map(body: Body) -> Array:
    """Labels 1.. of `ORGANS` at voxel centres: (X, Y, Z) uint8."""
    labels = np.zeros(body.canvas.shape, dtype=np.uint8)
    for value, name in enumerate(ORGANS, start=1):
        labels[body.distances[name] < 0] = value
    return labels


def points_inside(canvas: Canvas, sdf: Array, count: int, rng: np.random.Generator) -> Array:
    """At most `count` random model points where `sdf` is negative: (N, 3)."""
    flat = np.flatnonzero(sdf < 0)
    if not len(flat):
        return np.empty((0, 3))
    flat = rng.choice(flat, min(count, len(flat)), replace=False)
    return np.stack([grid.ravel()[flat] for grid in (canvas.x, canvas.y, canvas.z)], axis=1).astype(np.float64)


def _superellipse(x: Array, y: Array, a: float | Array, b: float | Array, power: float) -> Array:
    rho = ((np.abs(x) / a) ** power + (np.abs(y) / b) ** power) ** np.float32(1 / power)
    return (rho - 1) * np.minimum(a, b)


def chest_taper(z: Array) -> Array:
    """How the chest narrows towards its apex: 1 in the belly, about 0.4 at z = 112."""
    t = np.clip((z - 5) / 107.0, 0, 1)
    return np.sqrt(1 - 0.84 * t**3)


def paint_soft_tissue(body: Body, rng: np.random.Generator, grain: Array) -> None:
    """Skin, fat, muscle, diaphragm. Sets "skin", "cage" (inside of the ribs), "dome" (height of the diaphragm)."""
    c, t = body.canvas, body.traits
    waves = c.smooth_field(rng, 70.0, 1.0)
    wide, deep = BODY_HALF_MM
    skin = _superellipse(c.x, c.y, wide, deep, 2.6)
    taper = chest_taper(c.z)
    cage_a, cage_b = (wide - 8 - 12) * taper, (deep - 8 - 11) * (0.35 + 0.65 * taper)
    cage = _superellipse(c.x, c.y - 2, cage_a, cage_b, 2.4)
    c.paint(skin, 25.0)
    c.paint(skin + 2.2, -105 + 8 * grain)
    c.paint(skin + t.fat_mm, t.muscle + 7 * grain)
    # fat planes between the layers of muscle; a wavy distance makes them come and go
    planes = np.abs(np.sin(0.42 * (cage + 3 * waves))) - 0.16
    c.paint(np.maximum(np.maximum(planes * 8, skin + t.fat_mm + 2), 4 - cage), -85.0, 0.8)
    # the diaphragm: a high dome over the liver, a lower one over the stomach
    right = 52 * np.exp(-((c.x - 42) ** 2) / 2312 - (c.y - 5) ** 2 / 2600)
    left = 42 * np.exp(-((c.x + 42) ** 2) / 2312 - (c.y - 5) ** 2 / 2600)
    # the lungs reach deepest behind and at the sides
    dome = -47 + 0.28 * c.y - 0.002 * c.x**2 + right + left
    c.paint(cage, -98 + 8 * grain)
    c.paint(np.maximum(cage, np.abs(c.z - dome) - 1.6), 50.0)
    body.distances |= {"skin": skin, "cage": cage, "dome": dome}
