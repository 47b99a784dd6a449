"""The body: organs as signed distances in model mm, painted in HU. A small torso, from the lung apex to the kidneys.

Model coordinates: x to the patient's right, y forward, z up; z = 0 is about the top of the right diaphragm.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pretrain3d.data.phantom.canvas import Array, Canvas, chain, ellipsoid, smooth_max, texture, tree

ORGANS = ("lung", "liver", "kidney", "spleen", "heart", "aorta", "bone")  # labels 1.. of the organ map
BODY_HALF_MM = (106.0, 80.0)  # half width and half depth of the skin of the mean body
VERTEBRA_STEP = 29.0


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
    bones: list[Array] = field(default_factory=list)  # centre lines of ribs and sternum, model mm


def build(canvas: Canvas, traits: Traits, rng: np.random.Generator) -> Body:
    """Paints a whole healthy body on the canvas."""
    body = Body(canvas, traits)
    grain = texture(rng, canvas.shape, 1.2)
    blotches = canvas.smooth_field(rng, 60.0, 1.0)
    _soft_tissue(body, rng, grain)
    _place_spine(body, rng)
    _abdomen(body, rng, grain, blotches)
    _chest(body, rng, grain, blotches)
    _skeleton(body, rng, grain)
    return body


def organ_map(body: Body) -> Array:
    """Labels 1.. of `ORGANS` at voxel centres: (X, Y, Z) uint8."""
    labels = np.zeros(body.canvas.shape, dtype=np.uint8)
    for value, name in enumerate(ORGANS, start=1):
        labels[body.distances[name] < 0] = value
    return labels


def _superellipse(x: Array, y: Array, a: float | Array, b: float | Array, power: float) -> Array:
    rho = ((np.abs(x) / a) ** power + (np.abs(y) / b) ** power) ** np.float32(1 / power)
    return (rho - 1) * np.minimum(a, b)


def _taper(z: Array) -> Array:
    """How the chest narrows towards its apex: 1 in the belly, about 0.4 at z = 112."""
    t = np.clip((z - 5) / 107.0, 0, 1)
    return np.sqrt(1 - 0.84 * t**3)


def _soft_tissue(body: Body, rng: np.random.Generator, grain: Array) -> None:
    c, t = body.canvas, body.traits
    wide, deep = BODY_HALF_MM
    skin = _superellipse(c.x, c.y, wide, deep, 2.6)
    taper = _taper(c.z)
    cage_a, cage_b = (wide - 8 - 12) * taper, (deep - 8 - 11) * (0.35 + 0.65 * taper)
    cage = _superellipse(c.x, c.y - 2, cage_a, cage_b, 2.4)
    c.paint(skin, 25.0)
    c.paint(skin + 2.2, -105 + 8 * grain)
    wall = np.maximum(skin + t.fat_mm, -cage - 40)
    c.paint(wall, t.muscle + 7 * grain)
    # fat planes between the layers of muscle; a wavy distance makes them come and go
    planes = np.abs(np.sin(0.42 * (cage + 3 * c.smooth_field(rng, 70.0, 1.0)))) - 0.16
    c.paint(np.maximum(np.maximum(planes * 8, skin + t.fat_mm + 2), 4 - cage), -85.0, 0.8)
    # the diaphragm: a high dome over the liver, a lower one over the stomach
    right = 52 * np.exp(-((c.x - 42) ** 2) / 2312 - (c.y - 5) ** 2 / 2600)
    left = 42 * np.exp(-((c.x + 42) ** 2) / 2312 - (c.y - 5) ** 2 / 2600)
    dome = np.float32(-54.0) + right + left
    c.paint(cage, -98 + 8 * grain)
    c.paint(np.maximum(cage, np.abs(c.z - dome) - 1.6), 50.0)
    body.distances |= {"skin": skin, "cage": cage, "dome": dome}


def _place_spine(body: Body, rng: np.random.Generator) -> None:
    """The vertebral column as distances; painted later, but organs have to keep out of it."""
    c = body.canvas
    phase, offset = rng.uniform(0, 2 * np.pi), rng.uniform(0, VERTEBRA_STEP)

    def line(z: Array) -> tuple[Array, Array]:
        return 3 * np.sin(z / 55 + phase), -39 + 4 * np.sin(z / 70 + phase / 2)

    xs, ys = line(c.z)
    dz = c.z - offset - VERTEBRA_STEP * np.round((c.z - offset) / VERTEBRA_STEP)
    waist = 1 - 0.07 * (1 - (dz / 12) ** 2)
    column = (np.sqrt(((c.x - xs) / (19 * waist)) ** 2 + ((c.y - ys) / (15 * waist)) ** 2) - 1) * np.float32(15.0)
    canal = np.sqrt((c.x - xs) ** 2 + (c.y - ys + 21.5) ** 2)
    levels = offset + VERTEBRA_STEP * np.arange(-6, 6)
    x0, y0 = line(levels)
    body.spine = list(zip(x0.tolist(), y0.tolist(), levels.tolist(), strict=True))
    processes = []
    for x, y, z in body.spine:
        arch = np.array([[x, y - 30, z - 1], [x, y - 38, z - 9]])
        processes.append(chain(arch, np.array([3.2, 2.6])))
        for side in (-1, 1):
            wing = np.array(
                [[x + side * 9, y - 20, z + 2], [x + side * 17, y - 24, z + 3], [x + side * 29, y - 27, z + 4]]
            )
            processes.append(chain(wing, np.array([4.4, 4.0, 2.8])))
    ring = np.maximum(np.maximum(np.maximum(canal - 10.5, 6.3 - canal), np.abs(dz) - 9.5), c.y - ys + 16)
    vertebrae = np.minimum(smooth_max(column, np.abs(dz) - 12.2, 4.0), ring)
    body.distances |= {
        "column": column,
        "canal": canal - 6.3,
        "vertebrae": c.tubes(np.concatenate(processes), vertebrae),
    }


def _abdomen(body: Body, rng: np.random.Generator, grain: Array, blotches: Array) -> None:
    c, t, d = body.canvas, body.traits, body.distances
    below = c.z - d["dome"] + 2.5
    kidney = np.minimum(
        ellipsoid(c, (42 + rng.uniform(-3, 3), -27, -80), (16, 15, 27)),
        ellipsoid(c, (-42 + rng.uniform(-3, 3), -27, -73), (16, 15, 28)),
    )
    keep_out = np.maximum(4 - d["column"], -45 - d["column"])
    lower = (-79 + rng.uniform(-6, 6) + 0.5 * (60 - c.x) + 0.12 * c.y) - c.z
    bounds = [d["cage"] + 4.5, lower * np.float32(0.85), -34 - c.x, 3.5 - kidney, keep_out, -47 - c.y]
    liver = below
    for bound in bounds:
        liver = smooth_max(liver, bound, 7.0)
    bladder = ellipsoid(c, (28, 33, -50), (9, 10, 15))
    liver = np.maximum(liver, 1.5 - bladder)
    # the fissure between the lobes
    liver = np.maximum(liver, 2.0 - np.maximum(np.abs(c.x - 4 + 0.2 * c.y), np.maximum(6 - c.y, c.z + 34)))
    stomach = np.maximum(ellipsoid(c, (-36, 14, -38), (27, 26, 25)), np.maximum(below + 1, d["cage"] + 5))
    stomach = np.maximum(stomach, 2.5 - liver)
    spleen = np.maximum(ellipsoid(c, (-62, -20, -34), (20, 30, 30)), np.maximum(below, d["cage"] + 4))
    spleen = np.maximum(np.maximum(spleen, 2.5 - stomach), 2.5 - kidney)

    c.paint(liver, t.liver + 4 * grain + 2 * blotches)
    _liver_vessels(body, rng, liver)
    c.paint(bladder, 8.0)
    c.paint(stomach, 60.0)
    level = 14 + rng.uniform(-4, 12)
    c.paint(stomach + 3.5, np.where(c.y > level, np.float32(-950), 25 + 12 * grain))
    c.paint(spleen, t.spleen + 4 * grain)
    c.paint(kidney, t.kidney + 5 * grain)
    c.paint(kidney + 5.5, t.kidney - 45 + 30 * np.clip(blotches, -1, 1))
    sinus = np.minimum(ellipsoid(c, (31, -24, -80), (9, 7, 15)), ellipsoid(c, (-31, -24, -73), (9, 7, 15)))
    c.paint(sinus, -20 + 50 * np.clip(blotches, -1, 1))
    _bowel(body, rng, np.minimum(np.minimum(liver, kidney), np.minimum(stomach, spleen)))
    d |= {"liver": liver, "kidney": kidney, "spleen": spleen, "stomach": stomach}


def _liver_vessels(body: Body, rng: np.random.Generator, liver: Array) -> None:
    c = body.canvas
    inside = points_inside(c, liver + 5, 50, rng)
    vessels = np.full(c.shape, 50.0, dtype=np.float32)
    if len(inside) >= 10:
        portal = tree(rng, np.array([14.0, -4.0, -42.0]), inside[::2], 0.8)
        hepatic = tree(rng, np.array([14.0, -10.0, -8.0]), inside[1::2], 0.8)
        vessels = c.tubes(np.concatenate([portal, hepatic]), vessels)
    c.paint(np.maximum(vessels, liver), body.traits.liver + 40)
    body.distances["liver_vessels"] = vessels


def _bowel(body: Body, rng: np.random.Generator, organs: Array) -> None:
    """Loops of bowel in what is left of the belly: wall, contents, some gas."""
    c, d = body.canvas, body.distances
    loops: list[Array] = []
    gas: list[Array] = []
    for _ in range(9):
        p = np.array([rng.uniform(-60, 60), rng.uniform(-5, 45), rng.uniform(-120, -62)])
        points = p + np.cumsum(rng.normal(0, 13, (5, 3)), axis=0)
        (gas if rng.random() < 0.35 else loops).append(chain(points, rng.uniform(6, 11)))
    free = np.maximum(np.maximum(d["cage"] + 3, c.z - d["dome"] + 6), np.maximum(2.5 - organs, 12 - d["column"]))
    for tubes, content in ((loops, 28.0), (gas, -880.0)):
        if tubes:
            wall = np.maximum(c.tubes(np.concatenate(tubes)), free)
            c.paint(wall, 60.0)
            c.paint(wall + 2.5, content)


def _chest(body: Body, rng: np.random.Generator, grain: Array, blotches: Array) -> None:
    c, t, d = body.canvas, body.traits, body.distances
    heart = ellipsoid(c, (-13 + rng.uniform(-4, 4), 15, 22), (38 * rng.uniform(0.9, 1.1), 31, 33))
    lean = c.x - 0.15 * (c.z - 30)
    medial = 15 + 5 * rng.random() - np.abs(lean)  # the mediastinum keeps the lungs apart
    rim = np.maximum(3.5 - d["vertebrae"], 4 - d["column"])
    lung = smooth_max(d["cage"] + 2.5, (d["dome"] - c.z) * np.float32(0.75) + 1.5, 5.0)
    for bound in (4.5 - heart, np.where(c.y > -30, medial, np.float32(-20)), rim, c.z - 103 + 0.004 * c.y**2):
        lung = smooth_max(lung, bound, 5.0)
    central = np.maximum(d["cage"] + 2, d["dome"] - c.z)
    c.paint(np.maximum(np.maximum(central, heart - 20), 1 - heart), -85 + 10 * grain)
    c.paint(heart, t.muscle + 45)
    chambers = np.minimum(ellipsoid(c, (-24, 8, 18), (17, 14, 19)), ellipsoid(c, (6, 20, 20), (14, 12, 22)))
    c.paint(chambers, t.blood + 5 * grain)
    aorta = _great_vessels(body, heart)
    dependent = np.clip((-c.y - 15) / 45, 0, 1)  # lungs are denser where one lies on them
    c.paint(lung, t.lung + 22 * grain + 25 * blotches + 70 * dependent**2)
    d |= {"lung": lung, "heart": heart, "aorta": aorta}
    _lung_vessels(body, rng)
    _airways(body)


def _great_vessels(body: Body, heart: Array) -> Array:
    c, t = body.canvas, body.traits
    spine = np.array(body.spine)
    descent = np.stack([spine[:, 0] - 13, spine[:, 1] + 22, spine[:, 2]], axis=1)
    descent = descent[(descent[:, 2] < 66) & (descent[:, 2] > -140)]
    arch = np.array([[-2, 16, 44], [4, 13, 66], [0, 5, 80], [-8, -5, 83], [-13, -14, 76]], dtype=float)
    aorta = c.tubes(np.concatenate([chain(np.concatenate([descent, arch[::-1]]), 8.0), chain(arch, 8.5)]))
    cava = chain(np.array([[16, -13, -140], [17, -13, -60], [15, -10, -10], [8, 4, 14]], dtype=float), 8.0)
    upper = chain(np.array([[10, 8, 30], [14, 6, 70], [16, 4, 100]], dtype=float), 6.5)
    trunk = np.array([[-10, 27, 38], [-10, 14, 56]], dtype=float)
    left, right = np.array([[-10, 14, 56], [-27, -2, 52]]), np.array([[-10, 12, 56], [27, -2, 50]])
    pulmonary = [chain(trunk, 9.0), chain(left, 6.5), chain(right, 6.5)]
    neck = [chain(np.array([[x, 0, 82], [1.8 * x, 2, 125]], dtype=float), 3.6) for x in (-12, -4, 6)]
    c.paint(c.tubes(np.concatenate([cava, upper])), t.blood - 25)
    c.paint(c.tubes(np.concatenate(pulmonary + neck)), t.blood)
    c.paint(aorta, t.blood + 10)
    return aorta


def _lung_vessels(body: Body, rng: np.random.Generator) -> None:
    """Arteries and veins of both lungs, down to about a millimetre; the central ones are as thick as nodules."""
    c, d = body.canvas, body.distances
    segments = []
    for side in (-1, 1):
        targets = points_inside(c, np.maximum(d["lung"] + 4, -side * c.x), 170, rng)
        if len(targets) >= 10:
            cut = len(targets) * 3 // 5
            segments.append(tree(rng, np.array([side * 26.0, -2.0, 51.0]), targets[:cut], 0.72))
            segments.append(tree(rng, np.array([side * 20.0, -8.0, 36.0]), targets[cut:], 0.72))
    vessels = c.tubes(np.concatenate(segments)) if segments else np.full(c.shape, 50.0, dtype=np.float32)
    c.paint(np.maximum(vessels, d["lung"] - 1), 45.0)
    d["lung_vessels"] = vessels


def _airways(body: Body) -> None:
    c = body.canvas
    trachea = chain(np.array([[0, -2, 130], [0, -4, 62]], dtype=float), 6.2)
    bronchi = [
        chain(
            np.array([[0, -4, 62], [s * 24, -7, 47], [s * 38, -12, 30 - s * 4]], dtype=float), np.array([5, 3.8, 2.2])
        )
        for s in (-1, 1)
    ]
    lobar = [chain(np.array([[s * 20, -7, 50], [s * 40, 6, 62]], dtype=float), np.array([3.0, 1.8])) for s in (-1, 1)]
    airway = c.tubes(np.concatenate([trachea, *bronchi, *lobar]))
    c.paint(airway - 1.6, 30.0)
    c.paint(airway, -985.0)


def _skeleton(body: Body, rng: np.random.Generator, grain: Array) -> None:
    c, t, d = body.canvas, body.traits, body.distances
    ribs, cartilage = [], []
    for level in range(-5, 7):
        for side in (-1, 1):
            line, gristle = _rib(15.5 * level + rng.uniform(-2, 2), side, rng)
            body.bones.append(line)
            ribs.append(chain(line, np.linspace(4.3, 4.0, len(line))))
            cartilage.append(chain(gristle, 3.6))
    sternum = np.array([[x, 62 - 0.18 * max(z - 30, 0), z] for z in range(14, 84, 8) for x in (-4, 4)], dtype=float)
    body.bones.append(sternum[::2])
    c.paint(np.maximum(c.tubes(np.concatenate(cartilage)), d["skin"] + 6), 105.0)
    c.paint(np.maximum(d["column"], -np.float32(60) - c.z * 0), 80.0)  # discs; the vertebrae go over them
    c.paint(d["canal"], 25.0)
    flat = [chain(np.stack([sternum[i], sternum[i + 2]]), 4.6) for i in range(len(sternum) - 2)]
    collar = [
        chain(np.array([[s * 12, 50, 92], [s * 45, 38, 104], [s * 80, 8, 112]], dtype=float), 4.6) for s in (-1, 1)
    ]
    blades = _shoulder_blades()
    bone = np.minimum(d["vertebrae"], c.tubes(np.concatenate(ribs + flat + collar + blades)))
    bone = np.maximum(bone, d["skin"] + 4)
    marrow = t.spongy + 18 * grain
    c.paint(bone, np.where(bone > -1.8, np.float32(t.cortex), marrow))
    d["bone"] = bone


def _rib(z: float, side: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Centre line of a rib from the spine round to the front, and of its cartilage. Below the belly they float."""
    reach = 0.80 if z > -10 else max(0.80 + 0.0065 * (z + 10), 0.38)
    angle = np.linspace(0.13, reach, 26) * np.pi
    fall = 34 * (angle / np.pi) ** 1.3 * rng.uniform(0.85, 1.1)
    height = z + 16 - fall
    taper = _taper(height)
    wide = (BODY_HALF_MM[0] - 20) * taper + 3.5
    deep = (BODY_HALF_MM[1] - 19) * (0.35 + 0.65 * taper) + 3.5
    line = np.stack([side * wide * np.sin(angle), 2 - deep * np.cos(angle), height], axis=1)
    end = line[-1]
    if reach < 0.7:
        return line, np.stack([end, end + np.array([0.0, 4.0, -1.0])])
    target = np.array([side * 7.0, 61.0 - 0.18 * max(end[2] - 30, 0), max(end[2] + 12, 16.0)])
    middle = 0.5 * (end + target) + [side * 3.0, 4.0, -3.0]
    return line, np.stack([end, middle, target])


def _shoulder_blades() -> list[Array]:
    """Thin plates behind the upper ribs, as fans of tubes."""
    blades = []
    for s in (-1, 1):
        foot = np.array([s * 62.0, -54.0, 38.0])
        blades += [
            chain(np.stack([foot, np.array([s * x, -62 + 0.3 * (x - 40), 100.0])]), 2.4) for x in range(44, 86, 6)
        ]
    return blades


def points_inside(canvas: Canvas, sdf: Array, count: int, rng: np.random.Generator) -> Array:
    """At most `count` random model points where `sdf` is negative: (N, 3)."""
    flat = np.flatnonzero(sdf < 0)
    if not len(flat):
        return np.empty((0, 3))
    flat = rng.choice(flat, min(count, len(flat)), replace=False)
    return np.stack([grid.ravel()[flat] for grid in (canvas.x, canvas.y, canvas.z)], axis=1).astype(np.float64)
