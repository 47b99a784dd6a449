"""Spine, ribs, sternum, collar bones and shoulder blades."""

from __future__ import annotations

import numpy as np

from pretrain3d.data.phantom.anatomy import BODY_HALF_MM, Body, chest_taper
from pretrain3d.data.phantom.canvas import Array, chain, smooth_max

VERTEBRA_STEP_MM = 29.0


def place_spine(body: Body, rng: np.random.Generator) -> None:
    """The vertebral column as distances and the muscles on it; its bone is painted later, but organs keep out of it."""
    c = body.canvas
    phase, offset = rng.uniform(0, 2 * np.pi), rng.uniform(0, VERTEBRA_STEP_MM)

    def line(z: Array) -> tuple[Array, Array]:
        return 3 * np.sin(z / 55 + phase), -39 + 4 * np.sin(z / 70 + phase / 2)

    xs, ys = line(c.z)
    dz = c.z - offset - VERTEBRA_STEP_MM * np.round((c.z - offset) / VERTEBRA_STEP_MM)
    waist = 1 - 0.07 * (1 - (dz / 12) ** 2)
    column = (np.sqrt(((c.x - xs) / (19 * waist)) ** 2 + ((c.y - ys) / (15 * waist)) ** 2) - 1) * np.float32(15.0)
    canal = np.sqrt((c.x - xs) ** 2 + (c.y - ys + 21.5) ** 2)
    levels = offset + VERTEBRA_STEP_MM * np.arange(-6, 6)
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
    middle = x0.mean()
    psoas = [
        chain(np.array([[middle + s * 17, -38, -28], [middle + s * 27, -38, -125]], dtype=float), np.array([6, 12]))
        for s in (-1, 1)
    ]
    ligaments = column - 2.5  # with the crura of the diaphragm
    c.paint(np.minimum(ligaments, c.tubes(np.concatenate(psoas))), body.traits.muscle)
    body.distances |= {
        "column": column,
        "canal": canal - 6.3,
        "vertebrae": c.tubes(np.concatenate(processes), vertebrae),
    }


def paint_skeleton(body: Body, rng: np.random.Generator, grain: Array) -> None:
    """All bones, with a denser surface; "bone" in `distances`."""
    c, t, d = body.canvas, body.traits, body.distances
    ribs, cartilage = [], []
    for level in range(-5, 7):
        for side in (-1, 1):
            line, gristle = _rib(15.5 * level + rng.uniform(-2, 2), side, rng)
            ribs.append(chain(line, np.linspace(4.3, 4.0, len(line))))
            cartilage.append(chain(gristle, 3.6))
    sternum = np.array([[x, 62 - 0.18 * max(z - 30, 0), z] for z in range(14, 84, 8) for x in (-4, 4)], dtype=float)
    c.paint(np.maximum(c.tubes(np.concatenate(cartilage)), d["skin"] + 6), 105.0)
    c.paint(d["column"], 80.0)  # discs; the vertebrae go over them
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
    _basivertebral_veins(body)


def _basivertebral_veins(body: Body) -> None:
    """The vein that leaves each vertebral body in the middle of its back wall, forked like a Y."""
    veins = []
    for x, y, z in body.spine:
        fork = np.array([x, y - 9, z])
        veins.append(chain(np.stack([np.array([x, y - 17, z]), fork]), np.array([3.0, 2.2])))
        veins += [chain(np.stack([fork, np.array([x + s * 6, y - 4, z])]), np.array([2.0, 1.0])) for s in (-1, 1)]
    body.canvas.paint(body.canvas.tubes(np.concatenate(veins)), 70.0)


def _rib(z: float, side: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Centre line of a rib from the spine round to the front, and of its cartilage. Below the belly they float."""
    reach = 0.80 if z > -10 else max(0.80 + 0.0065 * (z + 10), 0.38)
    angle = np.linspace(0.13, reach, 26) * np.pi
    fall = 34 * (angle / np.pi) ** 1.3 * rng.uniform(0.85, 1.1)
    height = z + 16 - fall
    taper = chest_taper(height)
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
