"""The plan of a store: spacing, intensities, patch, batch, levels and anchors, in a file that people read and edit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from pretrain3d.config import UserError
from pretrain3d.data.case import Case
from pretrain3d.data.normalise import check_intensity, resolve_intensity
from pretrain3d.data.splits import fold_cases, fold_or_all
from pretrain3d.data.store import Store, check_plan, repair
from pretrain3d.detection import DETECTORS
from pretrain3d.detection.anchors import base_sizes, best_iou
from pretrain3d.devices import GIB, device_memory_gb
from pretrain3d.files import write_text
from pretrain3d.planning.anchors import plan_levels, relative_strides, search_anchors
from pretrain3d.planning.memory import footprint, pyramid
from pretrain3d.planning.patch import BATCH_SIZE, plan_patch, shared_out
from pretrain3d.registry import takes

MULTIPLE = 16  # of patch sizes: what the coarsest level of the small backbones needs
PATCH_BUDGET = (128, 128, 128)
BACKBONE, DETECTOR = "resenc_xs", "retina_unet"  # of configs/detect/base.yaml
POOR_IOU = 0.4  # a box whose best anchor overlaps less is named in the plan
MAX_NAMED = 20
HELD = 0.95  # share of the objects, by their size along each axis, that a patch should hold while memory allows it
KEPT = ("spacing_mm", "intensity")  # by a plan that is made again
NEEDED = {"spacing_mm", "intensity", "patch_size", "anchors"}


def make_plan(
    store: Store,
    patch_size: tuple[int, ...] | None = None,
    backbone: str = BACKBONE,
    detector: str = DETECTOR,
    memory_gb: float | None = None,
    batch_size: int = BATCH_SIZE,
) -> dict[str, Any]:
    """The plan that fits a store's cases, the test cases left out.

    Args:
        store: prepared, with or without objects.
        patch_size: largest patch in voxels, multiples of what the backbone needs; None: 128^3 voxels, see
            `patch.shared_out`.
        backbone, detector: names of what will be trained: strides and memory are theirs.
        memory_gb: GiB of one GPU; None: of the GPU here, without one of this machine, on whose CPU it is then planned.
        batch_size: patches per optimiser step.

    Returns:
        ``spacing_mm``; ``intensity`` (for `normalise.resolve_intensity`); ``patch_size``, ``batch_size`` and
        ``accumulate_grad_batches`` (see `patch.plan_patch`); ``detection_levels`` (indices into the pyramid);
        ``anchors`` (``{"sizes": [xs, ys, zs]}`` of the finest of these levels); the last two None without objects;
        ``planned_for``: backbone, detector, memory, the estimated need, and the spacing of the voxels; ``coverage``:
        how well patch and anchors fit, and which objects not.

    Raises:
        UserError: ``patch_size`` is not three multiples, an unknown name, or nothing fits into the memory.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: at least 1")
    data: dict[str, Any] = {
        "in_channels": channels_of(store),
        "num_classes": max(len(store.classes), 1),
        "on_gpu": memory_gb is not None or torch.cuda.is_available(),
    }
    multiple, strides = pyramid(backbone, data["in_channels"])
    budget = patch_budget(patch_size, multiple)
    memory, device = (memory_gb, "named") if memory_gb is not None else device_memory_gb()
    cases = _pool(store)
    shape = np.median([case.shape for case in cases], axis=0).tolist()
    if patch_size is None:
        budget = shared_out(budget, shape, multiple)
    first_fold = set(fold_or_all(store, 0)["train"])
    training = [case for case in cases if case.id in first_fold]
    if not any(len(case.boxes) for case in training):  # few objects, all of them in the cases that fold 0 validates on
        training = cases
    boxes = np.concatenate([case.boxes for case in training]) if training else np.zeros((0, 6), np.float32)
    sizes = torch.from_numpy(boxes[:, 3:] - boxes[:, :3])
    held = sizes.float().quantile(HELD, dim=0).tolist() if len(boxes) else (0, 0, 0)
    levels, anchors, coverage = None, None, None
    if len(boxes):
        levels = list(plan_levels(strides, sizes))
    need = footprint(backbone, planned_detector(detector, levels), **data)
    patch = plan_patch(shape, budget, need, memory, batch_size, held)
    if levels is not None:
        scales = relative_strides(strides, levels)
        anchors = {"sizes": search_anchors(sizes, scales)}
        coverage = _coverage(store, cases, list(patch.patch_size), anchors, scales)
    scheme = "ct" if set(store.modality) == {"CT"} else "zscore"
    foreground = "objects" if len(boxes) and scheme == "ct" else "body"
    return {
        "spacing_mm": list(store.spacing_mm),
        "intensity": {"scheme": scheme, "foreground": foreground, **dict.fromkeys(("low", "high", "mean", "std"))},
        "patch_size": list(patch.patch_size),
        "batch_size": patch.batch_size,
        "accumulate_grad_batches": patch.accumulate,
        "detection_levels": levels,
        "anchors": anchors,
        "planned_for": {
            "backbone": backbone,
            "detector": detector,
            "memory_gb": round(float(memory), 1),
            "memory_of": device,
            "estimated_gb": round(patch.bytes / GIB, 2),
            "spacing_mm": list(store.spacing_mm),
        },
        "coverage": coverage,
    }


def planned_detector(detector: str, levels: list[int] | None) -> dict[str, Any]:
    """The node of a detector with the planned pyramid levels, when there are some and it has anchors for them."""
    node: dict[str, Any] = {"name": detector}
    both = all(takes(DETECTORS, node, "detector", key) for key in ("anchors", "detection_levels"))
    if levels is None or not both:
        return node
    return {**node, "detection_levels": levels}


def plan_again(store: Store, old: dict[str, Any]) -> dict[str, Any]:
    """The plan of a store whose spacing has changed: what is counted in voxels is new, for what ``old`` was made for.

    Spacing and intensities are the old ones.

    Raises:
        UserError: see `make_plan`.
    """
    about = old["planned_for"]
    plan = make_plan(
        store,
        backbone=about.get("backbone", BACKBONE),
        detector=about.get("detector", DETECTOR),
        memory_gb=about.get("memory_gb") if about.get("memory_of") == "named" else None,
        batch_size=old.get("batch_size", BATCH_SIZE) * old.get("accumulate_grad_batches", 1),
    )
    return plan | {key: old[key] for key in KEPT}


def write_plan(path: Path, plan: dict[str, Any], store: Store) -> None:
    """Writes ``plan.yaml`` with a word on each value, atomically."""
    flow = {key: _flow(value) for key, value in plan.items()}
    lines = [
        f"# Plan of {store.name}. Edit freely: `prepare` keeps this file unless it is called with replan=true.",
        "",
        "# Voxel size in mm along right, anterior, superior. After a change, run `prepare` again: it also plans again",
        "# all that is counted in voxels below, and keeps the intensities.",
        f"spacing_mm: {flow['spacing_mm']}",
        "",
        "# Intensities on reading. ct: clip to the 0.5 and 99.5 percentiles of the foreground (objects | body) of the",
        "# training fold, then subtract its mean and divide by its std. zscore: mean and std of each case's body, or",
        "# with foreground: image of its whole image, as nnU-Net and nnssl do.",
        "# window: low..high becomes -1..1; windows: lists low and high, one input channel for each pair.",
        "# null is computed; a number you write is used instead.",
        *(f"# {line}" for line in _statistics(store, plan["intensity"])),
        "intensity:",
        *(f"  {key}: {_flow(value)}" for key, value in plan["intensity"].items()),
        "",
        "# What the rest was planned for; `pretrain3d plan` plans it again for another backbone or memory. The",
        "# estimate is of the tensors of a training step in bf16-mixed.",
        "planned_for:",
        *(f"  {key}: {_flow(value)}" for key, value in plan["planned_for"].items()),
        "",
        "# Voxels of a training patch and of an inference tile, multiples of the backbone's coarsest stride.",
        f"patch_size: {flow['patch_size']}",
        "",
        "# Patches at once, and batches per optimiser step; taken where a config says null for data.batch_size and",
        "# trainer.accumulate_grad_batches.",
        f"batch_size: {flow['batch_size']}",
        f"accumulate_grad_batches: {flow['accumulate_grad_batches']}",
        "",
        "# Levels of the pyramid that predict boxes, 0 the finest; taken for this backbone where a config names",
        "# neither levels nor anchors.",
        f"detection_levels: {flow['detection_levels']}",
        "",
        "# Anchor sizes in voxels along x, y, z on the finest of these levels; a coarser one multiplies them by its",
        "# stride relative to it.",
        f"anchors: {flow['anchors']}",
        "",
        "# How patch and anchors fit the objects outside the test set; nothing reads this.",
        "coverage:" if plan["coverage"] else "coverage: null",
        *(f"  {key}: {_flow(value)}" for key, value in (plan["coverage"] or {}).items()),
    ]
    write_text(path, "\n".join(lines) + "\n")


def read_plan(path: Path) -> dict[str, Any]:
    """A plan, checked; what is not in `NEEDED` may be missing.

    Raises:
        UserError: not readable, a missing or unknown key, or a value that makes no sense.
    """
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}; {repair(path)}") from error
    if not isinstance(plan, dict) or not plan.keys() >= NEEDED:
        found = sorted(map(str, plan)) if isinstance(plan, dict) else plan
        raise UserError(f"{path}: expected the keys {sorted(NEEDED)}, got {found}; {repair(path)}")
    check_plan(path, plan)
    check_intensity(plan["intensity"], f"{path}: intensity")
    if plan["anchors"] is not None:
        try:
            base_sizes(plan["anchors"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return plan


def patch_budget(
    patch_size: tuple[int, ...] | None, multiple: tuple[int, ...] = (MULTIPLE, MULTIPLE, MULTIPLE)
) -> tuple[int, ...]:
    """The largest patch to plan, as asked for or by default.

    Raises:
        UserError: not three positive multiples of what the backbone needs.
    """
    if patch_size is None:
        return tuple(limit // m * m or m for limit, m in zip(PATCH_BUDGET, multiple, strict=True))
    if len(patch_size) != 3 or any(n < m or n % m for n, m in zip(patch_size, multiple, strict=True)):
        needed = multiple[0] if len(set(multiple)) == 1 else list(multiple)
        raise UserError(f"patch_size must be three multiples of {needed}, got {list(patch_size)}")
    return tuple(patch_size)


def _pool(store: Store) -> list[Case]:
    """The annotated cases that are not for testing; without any, all that are not; without any, all."""
    for splits in (("train", "val"), ("pretrain",), ("test",)):
        pool = [case for case in store.cases.values() if case.split in splits]
        if pool:
            return pool
    raise UserError(f"{store.path} has no case")


def channels_of(store: Store) -> int:
    """Channels of the image."""
    return max((case.channels for case in store.cases.values()), default=1)


def _coverage(
    store: Store, cases: list[Case], patch: list[int], anchors: dict[str, Any], scales: list[tuple[int, int, int]]
) -> dict[str, Any]:
    """Mean best IoU, and the objects that do not fit."""
    sizes = torch.from_numpy(np.concatenate([case.boxes[:, 3:] - case.boxes[:, :3] for case in cases]))
    names = [
        f"{case.id}/{instance} {store.classes[label]}"
        for case in cases
        for instance, label in zip(case.instances.tolist(), case.labels.tolist(), strict=True)
    ]
    every = torch.cat([base_sizes(anchors) * torch.tensor(scale, dtype=torch.float32) for scale in scales])
    overlap = best_iou(every, sizes)
    too_large = (sizes > torch.tensor(patch)).any(dim=1)
    rows = [f"{name} {'x'.join(f'{v:.0f}' for v in size)}" for name, size in zip(names, sizes.tolist(), strict=True)]
    return {
        "objects": len(rows),
        "mean_best_anchor_iou": round(float(overlap.mean()), 3),
        f"anchor_iou_below_{POOR_IOU}": _named(rows, overlap < POOR_IOU),
        "larger_than_patch": _named(rows, too_large),
    }


def _named(rows: list[str], which: Tensor) -> list[str]:
    chosen = [row for row, yes in zip(rows, which.tolist(), strict=True) if yes]
    return chosen[:MAX_NAMED] + ([f"and {len(chosen) - MAX_NAMED} more"] if len(chosen) > MAX_NAMED else [])


def _statistics(store: Store, intensity: dict[str, Any]) -> list[str]:
    """What ``null`` comes to in fold 0."""
    try:
        if intensity["scheme"] != "ct" or not fold_cases(store, 0)["train"]:
            return []
        values = resolve_intensity(store, intensity, 0)
    except UserError:
        return []  # fewer patients than folds
    text = ", ".join(f"{key} {[round(v, 2) for v in values[key]]}" for key in ("low", "high", "mean", "std"))
    return [f"In fold 0: {text}."]


def _flow(value: Any) -> str:
    """One line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").strip()
