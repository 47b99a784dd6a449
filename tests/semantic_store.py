"""Small stores whose cases bring maps of organs, for the tests of supervised pretraining."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from tiny_store import PLAN, blocks, image_of, make_case

from pretrain3d.data.store import Store, StoreWriter

OBJECTS = [(3, 4, 5, 9, 8, 12), (20, 10, 8, 25, 17, 14), (30, 25, 20, 36, 33, 28)]
LABELS = [0, 1, 0]


def semantic_store(
    path: Path,
    name: str,
    organs: list[str],
    num_train: int = 6,
    annotated: tuple[int, ...] | None = None,
    unmapped: int = 0,
    mirror_classes: dict[str, str] | None = None,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    channels: int = 1,
    tests: tuple[bool, ...] = (),
) -> Store:
    """Cases with three objects of two classes; the first two organs are exactly the objects of these classes.

    Args:
        annotated: organs that the maps of all cases mean to hold; None: all.
        unmapped: cases of split "pretrain" without a map.
        tests: cases of split "test", with a map or without.
    """
    writer = StoreWriter(path, name, ["nodule", "lesion"], spacing_mm, ["CT"] * channels, mirror_classes, organs)
    ids = []
    kinds = [("train", True)] * num_train + [("pretrain", False)] * unmapped + [("test", mapped) for mapped in tests]
    for number, (split, mapped) in enumerate(kinds):
        shape = (40 + 2 * (number % 3), 36, 30)
        mask = blocks(shape, OBJECTS if mapped else [])
        image = np.concatenate([image_of(shape, number + 50 * channel) for channel in range(channels)])
        image[:, mask > 0] += 120
        case = make_case(
            f"c{number}", image, mask, LABELS if mapped else [], split, annotated=(0, 1) if mapped else (),
            has_instances=mapped,
        )  # fmt: skip
        case = replace(case, has_semantic=mapped, semantic_annotated=annotated if mapped else None)
        organ = np.concatenate([[0], np.asarray(LABELS) + 1]).astype(np.uint8)[mask]
        writer.add(case, image, mask if mapped else None, organ if mapped else None)
        ids.append(case.id)
    (path / "plan.yaml").write_text(yaml.safe_dump({**PLAN, "patch_size": [16, 16, 16]}), encoding="utf-8")
    return writer.finish(ids)
