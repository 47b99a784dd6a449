"""The plan of a store: spacing, intensities, patch size and anchors, in a file that people read and edit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from pretrain3d.config import UserError
from pretrain3d.data.normalise import SCHEMES, resolve_intensity
from pretrain3d.data.splits import fold_cases
from pretrain3d.data.store import Case, Store
from pretrain3d.detection.anchors import base_sizes, best_iou, mean_best_iou
from pretrain3d.files import write_text

MULTIPLE = 16  # of patch sizes: what the coarsest level of the small backbones needs
PATCH_BUDGET = (128, 128, 128)
LEVEL_SCALES = (1, 2, 4, 8)  # a detector's four levels; each scales the anchors by its stride relative to the finest
POOR_IOU = 0.4  # a box whose best anchor overlaps less is named in the plan
MAX_SEARCH_BOXES = 1500
MAX_NAMED = 20


def make_plan(store: Store, patch_size: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The plan that fits a store's cases, the test cases left out.

    Args:
        store: prepared, with or without objects.
        patch_size: largest patch in voxels, multiples of 16; None: 128 per axis.

    Returns:
        ``spacing_mm``; ``intensity`` (for `normalise.resolve_intensity`); ``patch_size`` (median shape of the cases,
        rounded up to a multiple of 16, within the budget); ``anchors`` (``{"sizes": [xs, ys, zs]}`` of the finest
        detection level, None without objects); ``coverage``: how well patch and anchors fit, and which objects not.

    Raises:
        UserError: ``patch_size`` is not three positive multiples of 16.
    """
    budget = patch_budget(patch_size)
    cases = _pool(store, store.cases.values())
    median = np.median([case.shape for case in cases], axis=0)
    patch = [min(limit, math.ceil(size / MULTIPLE) * MULTIPLE) for limit, size in zip(budget, median, strict=True)]
    anchors, coverage = None, None
    training = [case for case in cases if case.id in _first_fold(store)]
    boxes = np.concatenate([case.boxes for case in training]) if training else np.zeros((0, 6), np.float32)
    if len(boxes):
        anchors = {"sizes": search_anchors(torch.from_numpy(boxes[:, 3:] - boxes[:, :3]))}
        coverage = _coverage(store, cases, patch, anchors)
    scheme = "ct" if set(store.modality) == {"CT"} else "zscore"
    foreground = "objects" if len(boxes) else "body"
    intensity = {"scheme": scheme, "foreground": foreground, **dict.fromkeys(("low", "high", "mean", "std"))}
    return {
        "spacing_mm": list(store.spacing_mm),
        "intensity": intensity,
        "patch_size": patch,
        "anchors": anchors,
        "coverage": coverage,
    }


def search_anchors(sizes: Tensor, scales: tuple[int, ...] = LEVEL_SCALES) -> list[list[float]]:
    """Three anchor sizes per axis (27 anchors per position) that overlap boxes of the given sizes best.

    Maximises the mean over boxes of the best IoU with any anchor of any level at the same centre, as nnDetection does
    by random evolution; here one size after the other is moved by ever smaller factors until none improves, from three
    starting points, so that the same boxes give the same anchors.

    Args:
        sizes: (N, 3) voxels, N >= 1.
        scales: of the levels, relative to the finest.

    Returns:
        Three ascending lists of voxels, for the finest level.
    """
    sizes = sizes[torch.argsort(sizes.prod(dim=1), stable=True)]
    sizes = sizes[:: math.ceil(len(sizes) / MAX_SEARCH_BOXES)].float()
    quantiles = torch.quantile(sizes, torch.tensor([1 / 6, 1 / 2, 5 / 6]), dim=0).T  # (3 axes, 3)
    found = [_climb((quantiles / divisor).clamp(min=1.0), sizes, scales) for divisor in scales[:3]]
    best = max(found, key=lambda result: result[1])[0]
    return [[round(value, 1) for value in sorted(axis)] for axis in best.tolist()]


def write_plan(path: Path, plan: dict[str, Any], store: Store) -> None:
    """Writes ``plan.yaml`` with a word on each value, atomically."""
    flow = {key: _flow(value) for key, value in plan.items() if key not in ("intensity", "coverage")}
    lines = [
        f"# Plan of {store.name}. Edit freely: `prepare` keeps this file unless it is called with replan=true.",
        "",
        "# Voxel size in mm along right, anterior, superior. After a change, run `prepare` again.",
        f"spacing_mm: {flow['spacing_mm']}",
        "",
        "# Intensities on reading. ct: clip to the 0.5 and 99.5 percentiles of the foreground (objects | body) of the",
        "# training fold, then subtract its mean and divide by its std. zscore: mean and std of each case's body.",
        "# window: low..high becomes -1..1; windows: lists low and high, one input channel for each pair.",
        "# null is computed; a number you write is used instead.",
        *(f"# {line}" for line in _statistics(store, plan["intensity"])),
        "intensity:",
        *(f"  {key}: {_flow(value)}" for key, value in plan["intensity"].items()),
        "",
        "# Voxels of a training patch and of an inference tile, multiples of the backbone's coarsest stride.",
        f"patch_size: {flow['patch_size']}",
        "",
        "# Anchor sizes in voxels along x, y, z on the finest detection level; each coarser level doubles them.",
        f"anchors: {flow['anchors']}",
        "",
        "# How patch and anchors fit the objects outside the test set; nothing reads this.",
        "coverage:" if plan["coverage"] else "coverage: null",
        *(f"  {key}: {_flow(value)}" for key, value in (plan["coverage"] or {}).items()),
    ]
    write_text(path, "\n".join(lines) + "\n")


def read_plan(path: Path) -> dict[str, Any]:
    """A plan, checked; ``coverage`` may be missing.

    Raises:
        UserError: not readable, a missing or unknown key, or a value that makes no sense.
    """
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    keys = {"spacing_mm", "intensity", "patch_size", "anchors"}
    if not isinstance(plan, dict) or not keys <= plan.keys() <= keys | {"coverage"}:
        found = sorted(plan) if isinstance(plan, dict) else plan
        raise UserError(f"{path}: expected the keys {sorted(keys)}, got {found}")
    if not _numbers(plan["spacing_mm"], float) or min(plan["spacing_mm"]) <= 0:
        raise UserError(f"{path}: spacing_mm must be three sizes in mm, got {plan['spacing_mm']!r}")
    if not _numbers(plan["patch_size"], int) or min(plan["patch_size"]) < 1:
        raise UserError(f"{path}: patch_size must be three numbers of voxels, got {plan['patch_size']!r}")
    if not isinstance(plan["intensity"], dict) or plan["intensity"].get("scheme") not in SCHEMES:
        raise UserError(f"{path}: intensity.scheme must be one of {', '.join(SCHEMES)}, got {plan['intensity']!r}")
    if plan["anchors"] is not None:
        try:
            base_sizes(plan["anchors"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return plan


def patch_budget(patch_size: tuple[int, ...] | None) -> tuple[int, ...]:
    """The largest patch to plan, as asked for or by default.

    Raises:
        UserError: not three positive multiples of 16.
    """
    budget = PATCH_BUDGET if patch_size is None else tuple(patch_size)
    if len(budget) != 3 or any(size < MULTIPLE or size % MULTIPLE for size in budget):
        raise UserError(f"patch_size must be three multiples of {MULTIPLE}, got {list(budget)}")
    return budget


def _pool(store: Store, cases: Any) -> list[Case]:
    """The annotated cases that are not for testing; without any, all that are not; without any, all."""
    cases = list(cases)
    for splits in (("train", "val"), ("pretrain",), ("test",)):
        pool = [case for case in cases if case.split in splits]
        if pool:
            return pool
    raise UserError(f"{store.path} has no case")


def _first_fold(store: Store) -> set[str]:
    """The training cases of fold 0; all of them where there are too few patients to fold."""
    if any(case.split == "val" for case in store.cases.values()):
        return set(fold_cases(store, 0)["train"])
    patients = {case.group for case in store.cases.values() if case.split == "train"}
    if len(patients) >= 5:
        return set(fold_cases(store, 0)["train"])
    return {case.id for case in store.cases.values() if case.split == "train"}


def _climb(sizes: Tensor, boxes: Tensor, scales: tuple[int, ...]) -> tuple[Tensor, float]:
    """(3, 3) sizes (axis, anchor) moved one at a time while the mean best IoU grows; and that IoU."""
    score = float(mean_best_iou(_all_anchors(sizes[None], scales), boxes))
    for step in (0.3, 0.1, 0.03):
        factors = torch.tensor([math.exp(k * step) for k in (-2, -1, 1, 2)])
        improved = True
        while improved:
            improved = False
            for axis in range(3):
                for index in range(3):
                    candidates = sizes.repeat(len(factors), 1, 1)
                    candidates[:, axis, index] *= factors
                    scores = mean_best_iou(_all_anchors(candidates, scales), boxes)
                    if float(scores.max()) > score + 1e-5:
                        sizes, score, improved = candidates[scores.argmax()], float(scores.max()), True
    return sizes, score


def _all_anchors(sizes: Tensor, scales: tuple[int, ...]) -> Tensor:
    """(C, 3 axes, 3) -> (C, 27 L, 3): every combination on every level."""
    x, y, z = (sizes[:, axis] for axis in range(3))  # (C, 3)
    shape = (len(sizes), 3, 3, 3)
    grid = torch.stack(
        [x[:, :, None, None].expand(shape), y[:, None, :, None].expand(shape), z[:, None, None, :].expand(shape)], -1
    )
    base = grid.reshape(len(sizes), 27, 3)
    return torch.cat([base * scale for scale in scales], dim=1)


def _coverage(store: Store, cases: list[Case], patch: list[int], anchors: dict[str, Any]) -> dict[str, Any]:
    """Mean best IoU, and the objects that do not fit."""
    sizes = torch.from_numpy(np.concatenate([case.boxes[:, 3:] - case.boxes[:, :3] for case in cases]))
    names = [
        f"{case.id}/{instance} {store.classes[label]}"
        for case in cases
        for instance, label in zip(case.instances.tolist(), case.labels.tolist(), strict=True)
    ]
    every = torch.cat([base_sizes(anchors) * scale for scale in LEVEL_SCALES])
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
    if intensity["scheme"] != "ct" or not _first_fold(store):
        return []
    try:
        values = resolve_intensity(store, intensity, 0)
    except UserError:
        return []  # fewer patients than folds
    text = ", ".join(f"{key} {[round(v, 2) for v in values[key]]}" for key in ("low", "high", "mean", "std"))
    return [f"In fold 0: {text}."]


def _numbers(value: Any, kind: type) -> bool:
    kinds = (int, float) if kind is float else (int,)
    return isinstance(value, list) and len(value) == 3 and all(type(v) in kinds for v in value)


def _flow(value: Any) -> str:
    """One line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").strip()
