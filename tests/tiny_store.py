"""A store of a few small cases, written by the store's own writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from pretrain3d.data.case import Case
from pretrain3d.data.fingerprint import Histogram
from pretrain3d.data.store import Store, StoreWriter
from pretrain3d.geometry import Frame, boxes_of_instances

PLAN = {
    "patch_size": [16, 16, 16],
    "intensity": {"scheme": "window", "low": -200.0, "high": 200.0, "mean": 0.0, "std": 100.0},
}


def blocks(shape: tuple[int, int, int], objects: list[tuple[int, ...]]) -> np.ndarray:
    """(X, Y, Z) int16: instance i + 1 fills ``objects[i]`` = (x1, y1, z1, x2, y2, z2)."""
    mask = np.zeros(shape, dtype=np.int16)
    for instance, (x1, y1, z1, x2, y2, z2) in enumerate(objects):
        mask[x1:x2, y1:y2, z1:z2] = instance + 1
    return mask


def make_case(
    case_id: str,
    image: np.ndarray,
    mask: np.ndarray,
    labels: list[int],
    split: str = "train",
    group: str | None = None,
    annotated: tuple[int, ...] = (0, 1),
    has_instances: bool = True,
) -> Case:
    """The record of a case whose cached voxels are the input file's."""
    shape = (mask.shape[0], mask.shape[1], mask.shape[2])
    instances, boxes = boxes_of_instances(mask)
    histograms = {kind: tuple(Histogram.of(channel.ravel()) for channel in image) for kind in ("body", "objects")}
    return Case(
        id=case_id, split=split, group=group or case_id, shape=shape, channels=len(image),
        frame=Frame.of_file(np.eye(4), shape), boxes=boxes.astype(np.float32), labels=np.asarray(labels, np.int64),
        instances=instances, volumes_mm3=np.ones(len(labels)), annotated=annotated, content_hash=case_id,
        histograms=histograms, has_instances=has_instances, has_semantic=False,
    )  # fmt: skip


def write_store(
    path: Path,
    cases: list[tuple[Case, np.ndarray, np.ndarray]],
    classes: tuple[str, ...] = ("nodule", "lesion"),
    mirror_classes: dict[str, str] | None = None,
) -> Store:
    """Cases with their (C, X, Y, Z) images and (X, Y, Z) masks -> a store with `PLAN`."""
    writer = StoreWriter(path, "tiny", list(classes), (1.0, 1.0, 1.0), ["CT"], mirror_classes)
    for case, image, mask in cases:
        writer.add(case, image, mask if case.has_instances else None)
    (path / "plan.yaml").write_text(yaml.safe_dump(PLAN), encoding="utf-8")
    return writer.finish(case.id for case, _, _ in cases)


def image_of(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """(1, X, Y, Z) int16 noise: no two places look alike."""
    return np.random.default_rng(seed).integers(-150, 150, size=(1, *shape)).astype(np.int16)


def tiny_store(path: Path, num_train: int = 6, num_pretrain: int = 4, **settings: object) -> Store:
    """``train_*`` with two objects of each class or none, ``test_0``, and ``pretrain_*`` without objects."""
    cases = []
    for number in range(num_train + 1):
        shape = (40 + 2 * number, 36, 30)
        objects = [] if number % 3 == 2 else [(3, 4, 5, 9, 8, 12), (20, 10, 8, 25, 17, 14), (30, 25, 20, 36, 33, 28)]
        split, case_id = ("test", "test_0") if number == num_train else ("train", f"train_{number}")
        image, mask = image_of(shape, number), blocks(shape, objects)
        cases.append((make_case(case_id, image, mask, [0, 1, 0][: len(objects)], split), image, mask))
    for number in range(num_pretrain):
        shape = (24, 12, 20)  # smaller than a patch on axis 1
        image, mask = image_of(shape, 100 + number), blocks(shape, [])
        case = make_case(f"pretrain_{number}", image, mask, [], "pretrain", annotated=(), has_instances=False)
        cases.append((case, image, mask))
    return write_store(path, cases, **settings)  # type: ignore[arg-type]
