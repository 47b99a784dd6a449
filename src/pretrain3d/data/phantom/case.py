"""One phantom: a body, its objects, and the scanner that looks at it."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
from scipy import ndimage

from pretrain3d.data.phantom.anatomy import BODY_HALF_MM, Body, Traits, organ_map, paint_soft_tissue
from pretrain3d.data.phantom.canvas import Array, Canvas, texture
from pretrain3d.data.phantom.lesions import Placer, add_distractors, add_objects
from pretrain3d.data.phantom.organs import paint_abdomen, paint_chest
from pretrain3d.data.phantom.skeleton import paint_skeleton, place_spine

Range = tuple[float, float]
SPLITS = ("train", "test", "unlabelled")
# directions of the file axes: LPS is what most scanners write, the rest occurs in public sets
ORIENTATIONS = ("LPS", "LPS", "RAS", "LAS", "RPI", "PIR", "LSP", "ASR")


@dataclass(frozen=True)
class Ranges:
    """From what the bodies and scanners of a split are drawn. HU, mm, or mean-body sizes."""

    scale: Range = (0.93, 1.03)
    warp_mm: Range = (2.0, 3.5)
    fat_mm: Range = (6.0, 12.0)
    lung: Range = (-880.0, -840.0)
    liver: Range = (100.0, 122.0)
    blood: Range = (140.0, 175.0)
    spongy: Range = (260.0, 330.0)
    noise: Range = (15.0, 21.0)
    in_plane_mm: Range = (1.9, 2.2)
    slice_mm: Range = (2.0, 2.8)


TRAINING = Ranges()
TEST = Ranges(
    scale=(0.96, 1.07),
    warp_mm=(2.5, 4.0),
    fat_mm=(4.0, 14.0),
    lung=(-870.0, -815.0),
    liver=(92.0, 115.0),
    blood=(125.0, 165.0),
    spongy=(250.0, 350.0),
    noise=(18.0, 25.0),
    in_plane_mm=(1.9, 2.3),
    slice_mm=(2.0, 3.2),
)


@dataclass
class PhantomCase:
    """A synthetic CT with its truth, in file axes.

    Attributes:
        image: (X, Y, Z) int16 HU.
        affine: (4, 4) voxel to RAS mm: a flip and permutation with spacing and an offset.
        instances: (X, Y, Z) uint8, ids 1..N.
        labels: class index of each id, see `CLASSES`.
        organs: (X, Y, Z) uint8, labels 1.. of `ORGANS`.
    """

    image: Array
    affine: Array
    instances: Array
    labels: dict[int, int]
    organs: Array


def make_case(seed: int, index: int, split: str) -> PhantomCase:
    """The case number `index` of a split: a pure function of its arguments.

    Args:
        seed: of the whole data set.
        index: from 0.
        split: "train", "test" (other bodies, other noise) or "unlabelled" (like "train").
    """
    assert split in SPLITS, split
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    ranges = TEST if split == "test" else TRAINING
    canvas = _canvas(rng, ranges)
    body = _body(canvas, _traits(rng, ranges), rng)
    placer = Placer(body, rng)
    instances, labels = add_objects(placer, index)
    add_distractors(placer)
    _couch(body, rng)
    image = _scan(canvas, rng, ranges)
    order = nib.orientations.axcodes2ornt(str(rng.choice(ORIENTATIONS)))
    order = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), order)
    affine = np.diag([*canvas.spacing_mm, 1.0])
    affine[:3, 3] = canvas.origin_mm + rng.uniform(-150, 150, 3).round(1)
    affine = affine @ nib.orientations.inv_ornt_aff(order, canvas.shape)
    volumes = [np.ascontiguousarray(nib.apply_orientation(v, order)) for v in (image, instances, organ_map(body))]
    return PhantomCase(volumes[0], affine, volumes[1], labels, volumes[2])


def _canvas(rng: np.random.Generator, ranges: Ranges) -> Canvas:
    scale = rng.uniform(*ranges.scale)
    in_plane, step = round(rng.uniform(*ranges.in_plane_mm), 3), round(rng.uniform(*ranges.slice_mm), 2)
    wide, deep = (scale * half + rng.uniform(4, 10) for half in BODY_HALF_MM)
    bottom = scale * rng.uniform(-104, -92)
    height = min(rng.uniform(155, 200), 116 * scale - bottom)
    behind = deep + rng.uniform(4, 16)  # some room for the couch
    size = (int(2 * wide / in_plane), int((deep + behind) / in_plane), int(height / step))
    return Canvas(
        rng, size, (in_plane, in_plane, step), (-wide, -behind, bottom), scale, warp_mm=rng.uniform(*ranges.warp_mm)
    )


def _traits(rng: np.random.Generator, ranges: Ranges) -> Traits:
    liver = rng.uniform(*ranges.liver)
    spongy = rng.uniform(*ranges.spongy)
    return Traits(
        fat_mm=rng.uniform(*ranges.fat_mm),
        lung=rng.uniform(*ranges.lung),
        muscle=rng.uniform(50, 62),
        liver=liver,
        spleen=liver + rng.uniform(0, 20),
        kidney=liver + rng.uniform(50, 90),
        blood=rng.uniform(*ranges.blood),
        spongy=spongy,
        cortex=spongy + rng.uniform(110, 150),
    )


def _body(canvas: Canvas, traits: Traits, rng: np.random.Generator) -> Body:
    """A healthy body, painted from the skin inwards."""
    body = Body(canvas, traits)
    grain = texture(rng, canvas.shape, 1.2)
    blotches = canvas.smooth_field(rng, 60.0, 1.0)
    paint_soft_tissue(body, rng, grain)
    place_spine(body, rng)
    paint_abdomen(body, rng, grain, blotches)
    paint_chest(body, rng, grain, blotches)
    paint_skeleton(body, rng, grain)
    return body


def _couch(body: Body, rng: np.random.Generator) -> None:
    """The table under most bodies: a curved plate with foam inside; it is not warped with the body."""
    if rng.random() < 0.35:
        return
    canvas = body.canvas
    x = canvas.axes[0][:, None, None].astype(np.float32)
    y = canvas.axes[1][None, :, None].astype(np.float32)
    top = -BODY_HALF_MM[1] * canvas.scale - 9 + 0.0012 * x**2
    plate = np.maximum(np.abs(y - top + 6) - 6, np.abs(x) - 88) + 0 * canvas.z
    outside = 3 - body.distances["skin"]
    canvas.paint(np.maximum(plate, outside), -150.0)
    canvas.paint(np.maximum(plate + 2, outside), -900.0)


def _scan(canvas: Canvas, rng: np.random.Generator, ranges: Ranges) -> Array:
    """Blur, shading and correlated noise: (X, Y, Z) int16 HU."""
    blur = rng.uniform(0.3, 0.45)
    image = ndimage.gaussian_filter(canvas.hu, (blur, blur, 0.4), truncate=3.0)
    image += canvas.smooth_field(rng, 180.0, 3.0)
    image += np.float32(rng.uniform(*ranges.noise)) * _noise(rng, canvas.shape)
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Noise of filtered back-projection, standard deviation 1: in a slice it has grain but no large spots."""
    sharp = rng.uniform(0.36, 0.44)
    fine = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), (sharp, sharp, 0.3), truncate=3.0)
    # the ramp filter takes the low frequencies away
    fine -= 0.8 * ndimage.gaussian_filter(fine, (1.2, 1.2, 0), truncate=2.5)
    return fine / fine.std()
