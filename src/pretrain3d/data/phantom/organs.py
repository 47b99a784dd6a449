"""Organs of belly and chest with their vessels, each a signed distance in model mm and painted in HU."""

from __future__ import annotations

import numpy as np

from pretrain3d.data.phantom.anatomy import Body, points_inside
from pretrain3d.data.phantom.canvas import Array, chain, ellipsoid, smooth_max, tree


def paint_abdomen(body: Body, rng: np.random.Generator, grain: Array, blotches: Array) -> None:
    """Liver, gall bladder, stomach, spleen, kidneys, bowel; `grain` and `blotches` (X, Y, Z) are textures of std 1."""
    c, t, d = body.canvas, body.traits, body.distances
    below = c.z - d["dome"] + 2.5
    kidney = np.minimum(
        ellipsoid(c, (42 + rng.uniform(-3, 3), -27, -80), (16, 15, 27)),
        ellipsoid(c, (-42 + rng.uniform(-3, 3), -27, -73), (16, 15, 28)),
    )
    lower = (-79 + rng.uniform(-6, 6) + 0.5 * (60 - c.x) + 0.12 * c.y) - c.z
    bounds = [d["cage"] + 4.5, lower * np.float32(0.85), -34 - c.x, 3.5 - kidney, 4 - d["column"], -47 - c.y]
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
    meal = 25 if rng.random() < 0.5 else rng.uniform(200, 380)  # water or oral contrast
    c.paint(stomach + 3.5, np.where(c.y > level, np.float32(-950), meal + 12 * grain))
    d["meal"] = np.maximum(stomach + 3.5, c.y - level) if meal > 25 else np.full_like(stomach, 50.0)
    c.paint(spleen, t.spleen + 4 * grain)
    c.paint(kidney, t.kidney + 5 * grain)
    c.paint(kidney + 5.5, t.kidney - 45 + 30 * np.clip(blotches, -1, 1))
    sinus = np.minimum(ellipsoid(c, (31, -24, -80), (9, 7, 15)), ellipsoid(c, (-31, -24, -73), (9, 7, 15)))
    c.paint(sinus, -20 + 50 * np.clip(blotches, -1, 1))
    _bowel(body, rng, np.minimum(np.minimum(liver, kidney), np.minimum(stomach, spleen)))
    d |= {"liver": liver, "kidney": kidney, "spleen": spleen}


def _liver_vessels(body: Body, rng: np.random.Generator, liver: Array) -> None:
    c = body.canvas
    inside = points_inside(c, liver + 5, 50, rng)
    vessels = np.full(c.shape, 50.0, dtype=np.float32)
    if len(inside) >= 10:
        portal = tree(rng, np.array([14.0, -4.0, -42.0]), inside[::2], 0.8)
        hepatic = tree(rng, np.array([14.0, -10.0, -8.0]), inside[1::2], 0.8)
        vessels = c.tubes(np.concatenate([portal, hepatic]), vessels)
    c.paint(np.maximum(vessels, liver), body.traits.liver + 40)


def _bowel(body: Body, rng: np.random.Generator, organs: Array) -> None:
    """Loops of bowel in what is left of the belly: wall and water, gas or oral contrast."""
    c, d = body.canvas, body.distances
    loops: dict[str, list[Array]] = {"water": [], "gas": [], "contrast": []}
    for _ in range(10):
        p = np.array([rng.uniform(-60, 60), rng.uniform(-5, 45), rng.uniform(-120, -62)])
        points = p + np.cumsum(rng.normal(0, 13, (5, 3)), axis=0)
        content = str(rng.choice(list(loops), p=[0.4, 0.3, 0.3]))
        widths = {"water": (6, 11), "gas": (10, 15), "contrast": (8, 12)}
        loops[content].append(chain(points, rng.uniform(*widths[content])))
    free = np.maximum(np.maximum(d["cage"] + 3, c.z - d["dome"] + 6), np.maximum(2.5 - organs, 12 - d["column"]))
    for (name, tubes), hu in zip(loops.items(), (28.0, -880.0, rng.uniform(250, 420)), strict=True):
        wall = np.maximum(c.tubes(np.concatenate(tubes) if tubes else np.empty((0, 8))), free)
        c.paint(wall, 60.0)
        c.paint(wall + 2.5, hu)
        # loops cross: a later one takes the room
        for other in [key for key in d if key.startswith("bowel_")]:
            d[other] = np.maximum(d[other], -wall)
        d[f"bowel_{name}"] = wall + 2.5


def paint_chest(body: Body, rng: np.random.Generator, grain: Array, blotches: Array) -> None:
    """Heart, great vessels, lungs with their vessels, airways; `grain`, `blotches`: textures of std 1."""
    c, t, d = body.canvas, body.traits, body.distances
    heart = ellipsoid(c, (-13 + rng.uniform(-4, 4), 15, 22), (38 * rng.uniform(0.9, 1.1), 31, 33))
    lean = c.x - 0.15 * (c.z - 30)
    medial = 15 + 5 * rng.random() - np.abs(lean)  # the mediastinum keeps the lungs apart
    rim = np.maximum(3.5 - d["vertebrae"], 4 - d["column"])
    lung = smooth_max(d["cage"] + 2.5, (d["dome"] - c.z) * np.float32(0.75) + 1.5, 5.0)
    for bound in (4.5 - heart, np.where(c.y > -30, medial, np.float32(-20)), rim, c.z - 103 + 0.004 * c.y**2):
        lung = smooth_max(lung, bound, 5.0)
    c.paint(heart, t.muscle + 45)
    chambers = np.minimum(ellipsoid(c, (-24, 8, 18), (17, 14, 19)), ellipsoid(c, (6, 20, 20), (14, 12, 22)))
    c.paint(chambers, t.blood + 5 * grain)
    aorta, veins = _great_vessels(body)
    lung = np.maximum(lung, 2.5 - aorta)
    d["liver"] = np.maximum(d["liver"], 1 - np.minimum(np.minimum(aorta, veins), heart))
    dependent = np.clip((-c.y - 15) / 45, 0, 1)  # lungs are denser where one lies on them
    c.paint(lung, t.lung + 22 * grain + 25 * blotches + 70 * dependent**2)
    d |= {"lung": lung, "heart": heart, "aorta": aorta}
    _lung_vessels(body, rng)
    _airways(body)


def _great_vessels(body: Body) -> tuple[Array, Array]:
    """Paints the vessels around the heart: distances of the aorta and of the great veins."""
    c, t = body.canvas, body.traits
    spine = np.array(body.spine)
    descent = np.stack([spine[:, 0] - 13, spine[:, 1] + 22, spine[:, 2]], axis=1)
    descent = descent[(descent[:, 2] < 66) & (descent[:, 2] > -140)]
    arch = np.array([[-2, 16, 44], [4, 13, 66], [0, 5, 80], [-8, -5, 83], [-13, -14, 76]], dtype=float)
    aorta = c.tubes(chain(np.concatenate([descent, arch[::-1]]), 8.0))
    cava = chain(np.array([[16, -13, -140], [17, -13, -60], [15, -10, -10], [8, 4, 14]], dtype=float), 8.0)
    upper = chain(np.array([[10, 8, 30], [14, 6, 70], [16, 4, 100]], dtype=float), 6.5)
    trunk = np.array([[-10, 27, 38], [-10, 14, 56]], dtype=float)
    left, right = np.array([[-10, 14, 56], [-27, -2, 52]]), np.array([[-10, 12, 56], [27, -2, 50]])
    pulmonary = [chain(trunk, 9.0), chain(left, 6.5), chain(right, 6.5)]
    neck = [chain(np.array([[x, 0, 82], [1.8 * x, 2, 125]], dtype=float), 3.6) for x in (-12, -4, 6)]
    veins = c.tubes(np.concatenate([cava, upper]))
    c.paint(veins, t.blood - 25)
    c.paint(c.tubes(np.concatenate(pulmonary + neck)), t.blood)
    c.paint(aorta, t.blood + 10)
    return aorta, veins


def _lung_vessels(body: Body, rng: np.random.Generator) -> None:
    """Arteries and veins of both lungs, down to a millimetre; the central ones are as thick as small nodules."""
    c, d = body.canvas, body.distances
    segments = []
    for side in (-1, 1):
        targets = points_inside(c, np.maximum(d["lung"] + 4, -side * c.x), 110, rng)
        if len(targets) >= 10:
            cut = len(targets) * 3 // 5
            segments.append(tree(rng, np.array([side * 26.0, -2.0, 51.0]), targets[:cut], 0.7, exponent=0.4))
            segments.append(tree(rng, np.array([side * 20.0, -8.0, 36.0]), targets[cut:], 0.7, exponent=0.4))
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
