"""Patches of a store: which case, where, turned how; and the voxels for it, nothing else, from disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from pretrain3d.config import UserError
from pretrain3d.data import intensity, spatial
from pretrain3d.data.batch import generator
from pretrain3d.data.case import Case
from pretrain3d.data.normalise import Normalisation
from pretrain3d.data.semantic import SemanticMaps, mirror_table, unpaired_sides
from pretrain3d.data.store import Store
from pretrain3d.geometry import transform_boxes


@dataclass(frozen=True)
class Draw:
    """Where one sample comes from: the patch's ``center`` (3,) float64 in volume coordinates, and how it is turned."""

    case_id: str
    center: np.ndarray
    linear: spatial.Linear
    object_index: int | None  # the object of the case that the patch was placed on


class PatchSampler:
    """Draws cases and places from tables made once.

    With probability ``foreground`` a patch holds an object: a class is drawn uniformly among those present, then one of
    its objects uniformly over all cases, then a place such that the whole object lies inside the (turned) patch; of an
    object larger than the patch, the patch's centre lies in it. Otherwise case and place are uniform. Exactly the
    share ``foreground`` of every few consecutive samples is placed on objects (half of every two, by default), in an
    order that is random: batches are even, and no process of a distributed run gets only background.

    With ``voxel`` the same share is placed on organs instead: a case uniformly, then a voxel of it, then a place such
    that the voxel lies inside the patch.

    Args:
        cases: to draw from.
        patch_size: voxels.
        seed: of all draws.
        foreground: share of patches placed on objects, rounded to a fraction with a denominator of at most 100; where
            no case has an object, every patch is placed at random.
        settings: of the spatial transform.
        voxel: draws a voxel (3,) of an organ of a case; None where it has none.

    Raises:
        UserError: no case, or a share outside 0..1.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        patch_size: Sequence[int],
        seed: int,
        foreground: float = 0.5,
        settings: spatial.SpatialSettings | None = None,
        voxel: Callable[[Case, np.random.Generator], np.ndarray | None] | None = None,
    ):
        if not cases:
            raise UserError("there is no case to take patches from")
        self.share = Fraction(spatial.checked_probability("foreground", foreground)).limit_denominator(100)
        self.cases = list(cases)
        self.patch = np.asarray(patch_size, dtype=np.int64)
        self.seed = seed
        self.settings = settings or spatial.SpatialSettings()
        self.voxel = voxel
        self._spacing = [np.asarray(case.frame.spacing_mm, dtype=np.float64) for case in self.cases]
        self._shapes = np.asarray([case.shape for case in self.cases], dtype=np.int64)
        owners = np.concatenate([np.full(len(case.labels), row) for row, case in enumerate(self.cases)]).astype(int)
        places = np.concatenate([np.arange(len(case.labels)) for case in self.cases]).astype(int)
        labels = np.concatenate([np.asarray(case.labels) for case in self.cases])
        # per class that occurs: (objects of it, 2) rows of (case, object of the case)
        self._objects = [np.stack([owners, places], axis=1)[labels == label] for label in np.unique(labels)]

    def draw(self, index: int) -> Draw:
        """The sample ``index``: a pure function of it and the seed."""
        rng = generator(self.seed, index, "position")
        chosen: int | None = None
        box: np.ndarray | None = None
        if self.voxel is not None and self._on_object(index):
            row = int(rng.integers(len(self.cases)))
            found = self.voxel(self.cases[row], rng)
            box = None if found is None else np.concatenate([found, found + 1]).astype(np.float64)
        elif self.voxel is None and self._objects and self._on_object(index):
            objects = self._objects[rng.integers(len(self._objects))]
            row, chosen = (int(value) for value in objects[rng.integers(len(objects))])
            box = np.asarray(self.cases[row].boxes[chosen], dtype=np.float64)
        else:
            row = int(rng.integers(len(self.cases)))
        linear = spatial.draw(generator(self.seed, index, "spatial"), self.settings, self._spacing[row])
        shape = self._shapes[row]
        half = self.patch / 2
        # where the patch lies within the volume; on axes where the volume is smaller, where it holds the volume
        low, high = np.minimum(half, shape - half), np.maximum(half, shape - half)
        center = low + rng.random(3) * (high - low) if box is None else self._around(box, linear.matrix, low, high, rng)
        if not linear.resample:
            center = np.rint(center - half) + half
        return Draw(self.cases[row].id, center, linear, chosen)

    def _on_object(self, index: int) -> bool:
        """Whether this is one of the ``numerator`` samples of each ``denominator`` that are placed on an object."""
        size = self.share.denominator
        if size == 1:
            return self.share.numerator == 1
        order = generator(self.seed, index // size, "foreground").permutation(size)
        return bool(order[index % size] < self.share.numerator)

    def _around(
        self, box: np.ndarray, matrix: np.ndarray, low: np.ndarray, high: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """A patch centre for an object: random, then into the volume, then so that the object is still in the patch."""
        first, last = np.floor(box[:3]), np.ceil(box[3:])  # whole voxels: rounding the patch's place cannot cut it
        middle = (first + last) / 2
        inverse = np.linalg.inv(matrix)
        extent = np.abs(inverse) @ ((last - first) / 2)  # half extents of the turned box, in patch voxels
        half = self.patch / 2
        room = np.where(extent <= half, half - extent, extent)  # of its centre about the patch's, either way
        center = middle - matrix @ (rng.uniform(-1, 1, size=3) * room)
        center = np.clip(center, low, high)
        return middle - matrix @ np.clip(inverse @ (middle - center), -room, room)


class PatchDataset(Dataset[dict[str, Any]]):
    """Raw patches by global sample index (any index >= 0: there is no length).

    Args:
        store: to read from.
        case_ids: the cases to draw from.
        patch_size: voxels.
        seed: every draw is a pure function of it, the sample index and a purpose.
        normalisation: case -> what turns its raw intensities into the network's; used on the device.
        foreground: share of patches placed on objects, see `PatchSampler`.
        settings: spatial transform, default `SpatialSettings`. On axis 0, left and right, labels are exchanged by the
            store's ``mirror_classes``; where classes are lateral and none are given, that axis is not flipped and a
            warning says so.
        intensities: of `intensity.settings_from_config`; {} for none.
        semantic: the samples bring the map of organs along, and are placed on organs; every case must have a map.
    """

    def __init__(
        self,
        store: Store,
        case_ids: Sequence[str],
        patch_size: Sequence[int],
        seed: int,
        normalisation: Callable[[Case], Normalisation],
        foreground: float = 0.5,
        settings: spatial.SpatialSettings | None = None,
        intensities: dict[str, dict[str, Any]] | None = None,
        semantic: bool = False,
    ):
        cases = [store.cases[case_id] for case_id in case_ids]
        settings = _lateral_settings(settings or spatial.SpatialSettings(), store, semantic)
        self.store = store
        self.maps = SemanticMaps(store, cases) if semantic else None
        voxel = None if self.maps is None else self.maps.voxel
        self.sampler = PatchSampler(cases, patch_size, seed, foreground, settings, voxel)
        self.patch_size = tuple(int(size) for size in patch_size)
        self.seed = seed
        self.intensities = intensity.settings_from_config(None) if intensities is None else intensities
        self.mirrored = mirrored_labels(store)
        self.with_mask = any(case.annotated for case in cases) and all(
            case.has_instances for case in cases if len(case.labels)
        )
        self._normalisations: dict[str, dict[str, tuple[float, ...]]] = {}
        for case in cases:
            given = normalisation(case)
            self._normalisations[case.id] = {**vars(given), "pad": given.pad_value}
        self.channels = max((len(values["low"]) for values in self._normalisations.values()), default=0)
        self._annotated = {case.id: np.zeros(len(store.classes), dtype=bool) for case in cases}
        for case in cases:
            self._annotated[case.id][list(case.annotated)] = True

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The raw sample ``index``, for `data.batch.collate`."""
        drawn = self.sampler.draw(index)
        case = self.store.cases[drawn.case_id]
        linear, patch = drawn.linear, self.sampler.patch
        start, stop = spatial.source_region(linear, drawn.center, patch, np.asarray(case.shape))
        image = self.store.read(case.id, "image", start, stop)  # (C, x, y, z)
        touching = _touching(case, start, stop)
        labels = np.asarray(case.labels)[touching]
        slots = boxes = None
        if len(touching) and case.has_instances:
            slots = torch.from_numpy(self._slots(case, touching, start, stop))
        elif len(touching):
            visible, boxes = _visible_boxes(case.boxes[touching], drawn, patch)
            labels = labels[visible]
        annotated = self._annotated[case.id]
        if linear.flips[0]:
            labels, annotated = self.mirrored[labels], annotated[self.mirrored]
        semantic = semantic_annotated = None
        if self.maps is not None:
            semantic, semantic_annotated = self.maps.read(case, start, stop, linear.flips[0])
        rng = generator(self.seed, index, "intensity")
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image)),
            "slots": slots,
            "boxes": boxes,
            "labels": labels,
            "annotated": annotated,
            "semantic": semantic,
            "semantic_annotated": semantic_annotated,
            "geometry": _geometry(drawn, start, case.shape, patch),
            "normalisation": self._normalisations[case.id],
            "intensity": {"drawn": intensity.draw(rng, self.intensities, self.channels), "seed": self.seed},
            "patch_size": self.patch_size,
            "with_mask": self.with_mask,
            "sample_index": index,
            "case_id": case.id,
        }

    def _slots(self, case: Case, touching: np.ndarray, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray:
        """(x, y, z): 1 + position in ``touching`` of the object at each voxel, 0 elsewhere."""
        mask = self.store.read(case.id, "instances", start, stop)
        dtype = np.uint8 if len(touching) < 256 else np.int16
        table = np.zeros(int(max(mask.max(), np.max(case.instances))) + 1, dtype=dtype)
        table[np.asarray(case.instances)[touching]] = np.arange(1, len(touching) + 1)
        return table[mask]


def _touching(case: Case, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray:
    """(n,) which objects of the case reach into a region."""
    boxes = np.asarray(case.boxes).reshape(-1, 6)
    # two voxels of slack: boxes come from the input file's mask, the cached mask is a resampling of it
    return np.flatnonzero(((boxes[:, :3] - 2 < stop) & (boxes[:, 3:] + 2 > start)).all(axis=1))


def _visible_boxes(boxes: np.ndarray, drawn: Draw, patch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For cases with boxes only: which boxes cover a voxel centre of the patch; those, in patch voxels, cut to it."""
    inverse = np.linalg.inv(drawn.linear.matrix)
    matrix = np.concatenate([inverse, (patch / 2 - inverse @ drawn.center)[:, None]], axis=1)
    moved = transform_boxes(torch.as_tensor(boxes, dtype=torch.float64), torch.from_numpy(matrix)).numpy()
    moved[:, :3] = np.maximum(moved[:, :3], 0)
    moved[:, 3:] = np.minimum(moved[:, 3:], patch)
    visible = np.all(np.ceil(moved[:, :3] - 0.5) < np.ceil(moved[:, 3:] - 0.5), axis=1)
    return visible, moved[visible].astype(np.float32)


def _geometry(drawn: Draw, start: tuple[int, ...], shape: tuple[int, ...], patch: np.ndarray) -> dict[str, Any]:
    """Plain values that place the source region: see `data.augment`."""
    if not drawn.linear.resample:
        offset = np.asarray(start) - (drawn.center - patch / 2)
        return {"resample": False, "flips": drawn.linear.flips, "offset": tuple(int(value) for value in offset)}
    matrix = np.concatenate([drawn.linear.matrix, (drawn.center - start)[:, None]], axis=1)
    low = [float(-first) for first in start]  # the volume, in source coordinates
    high = [float(size - first) for size, first in zip(shape, start, strict=True)]
    return {"resample": True, "matrix": matrix.tolist(), "low": low, "high": high}


def mirrored_labels(store: Store) -> np.ndarray:
    """(K,) int64: the class that each class becomes when left and right are exchanged.

    Raises:
        UserError: a name in ``mirror_classes`` is neither a class of objects nor a semantic one.
    """
    for pair in store.mirror_classes.items():
        if not all(name in store.classes for name in pair) and not all(name in store.semantic_classes for name in pair):
            raise UserError(
                f"mirror_classes maps {pair[0]!r} to {pair[1]!r}; the classes are {', '.join(store.classes)}"
            )
    return mirror_table(store.classes, store.mirror_classes)


def _lateral_settings(settings: spatial.SpatialSettings, store: Store, semantic: bool) -> spatial.SpatialSettings:
    """The settings, without flips on axis 0 where a class is left or right and has no counterpart."""
    unpaired = [
        name
        for names in (store.classes, store.semantic_classes if semantic else [])
        for name in unpaired_sides(names, store.mirror_classes)
    ]
    if not unpaired or 0 not in settings.flip_axes:
        return settings
    warnings.warn(
        f"axis 0 (left-right) is not flipped: {store.name} has lateral classes without a counterpart in "
        f"mirror_classes: {', '.join(unpaired)}",
        stacklevel=3,
    )
    return replace(settings, flip_axes=tuple(axis for axis in settings.flip_axes if axis != 0))
