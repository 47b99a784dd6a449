"""From a config and its data to the module that `fit` trains, and what the module's checkpoints say of both."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from pretrain3d.commands.settings import with_anchors, with_levels
from pretrain3d.config import UserError, by_text
from pretrain3d.registry import build, check
from pretrain3d.reporting.run_folder import RunFolder

WORSE_IOU = 0.03  # of the training boxes with their best anchors, against the plan, from which it is said
SPLITS = ("train", "val", "test")


def assemble(settings: dict[str, Any], datamodule: Any, folder: RunFolder) -> Any:
    """The LightningModule of a config: backbone, transferred weights, and the head that the module section names."""
    from pretrain3d.backbones import BACKBONES
    from pretrain3d.backbones.contract import check_backbone, check_first_features
    from pretrain3d.backbones.transfer import transfer_into
    from pretrain3d.data.leakage import Corpus, find, merged, warning
    from pretrain3d.modules import MODULES

    backbone_node = {**settings["backbone"], "in_channels": datamodule.in_channels}
    backbone = build(BACKBONES, backbone_node, "backbone")
    check_backbone(backbone)
    check_patch(datamodule, backbone, settings)
    module_node, given = _module_of(settings, datamodule)
    note = _note(settings, datamodule, backbone_node, module_node)
    transfer = settings.get("transfer") or {}
    if transfer.get("path"):
        report = transfer_into(backbone, str(transfer["path"]), adapt=tuple(transfer.get("adapt") or ()))
        note["transfer"] = report.to_dict()
        note["pretrained_on"] = report.corpus
        print(f"{folder.path}: {report}")
        warn_of_spacing(report.preprocessing.get("spacing_mm"), datamodule.store.spacing_mm)
    cases = [(part.store, split, getattr(part, f"{split}_ids")) for part in datamodule.sets for split in SPLITS]
    note["leakage"] = find(note.get("pretrained_on"), cases)
    note["corpus"] = merged(*(Corpus.of(part.store, part.train_ids).to_dict() for part in datamodule.sets))
    if note["leakage"]:
        print(warning(note["leakage"], str(transfer["path"])), file=sys.stderr)
    given |= {"backbone": backbone, "patch_size": tuple(datamodule.patch_size), "note": note}
    module = build(MODULES, module_node, "module", **given)
    check_first_features(backbone)
    views = getattr(getattr(module, "method", None), "view_size", datamodule.patch_size)  # which tile a region
    warn_of_padding(
        datamodule, [m * (s // v) for m, s, v in zip(backbone.size_multiple, datamodule.patch_size, views, strict=True)]
    )
    if hasattr(getattr(module, "method", None), "check_mirrors"):
        module.method.check_mirrors(datamodule.spatial.flip_axes)
    asked = settings["module"].get("detector", {})
    if "anchors" in module_node.get("detector", {}) and asked.get("anchors") is None:
        name, own = settings["backbone"]["name"], asked.get("detection_levels") is not None
        warn_of_anchors(module.detector.anchors.level_sizes(), datamodule, name, own)
    return module


def _module_of(settings: dict[str, Any], datamodule: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The node of the module, completed by the plan, and what it is given of the data."""
    node, store = dict(settings["module"]), datamodule.store
    if node["name"] == "segmentation":
        return node, {"label_classes": datamodule.label_classes}
    if node["name"] != "detection":
        return node, {}
    if len(datamodule.sets) > 1:
        raise UserError("data.store lists several stores; a detector is trained on one")
    if not store.classes:
        raise UserError(f"{store.path} has no class of objects, so that there is nothing to detect; with reader=nnunet "
                        "name labels that are objects under objects in dataset.json and prepare again")  # fmt: skip
    detector = with_levels(node["detector"], store.plan, settings["backbone"]["name"])
    node["detector"] = with_anchors(detector, store.plan.get("anchors"))
    if node["detector"].get("anchors", {}) is None:
        raise UserError(f"{store.path}/plan.yaml has no anchors, as no training case held an object when it was made; "
                        f"where some do now: pretrain3d plan {store.path}")  # fmt: skip
    return node, {"classes": store.classes, "mirror_classes": store.mirror_classes}


def _note(
    settings: dict[str, Any], datamodule: Any, backbone_node: dict[str, Any], module_node: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint says of its run, before anything is transferred."""
    from pretrain3d.modules.monitors import through_shared_stem
    from pretrain3d.reporting.results import commit

    store, trainer = datamodule.store, settings["trainer"]
    shared = through_shared_stem(datamodule.sets, module_node.get("method", {}))[0]
    return {
        "version": 1,
        "kind": module_node["name"],
        "seed": settings["seed"],
        "backbone": backbone_node,
        "module": module_node,
        "classes": list(store.classes),
        "mirror_classes": dict(store.mirror_classes),
        "preprocessing": preprocessing(datamodule, shared),
        "sets": about_sets(datamodule),
        "batch": {
            "batch_size": datamodule.batch_size,
            "accumulate_grad_batches": trainer.get("accumulate_grad_batches", 1),
        },
        "precision": trainer.get("precision", "32-true"),
        "source": {
            "run": settings["name"],
            "commit": commit(),
            "method": module_node.get("detector", module_node.get("method", {})).get("name", ""),
            "data": "+".join(part.name for part in datamodule.sets),
            "data_hash": datamodule.data_hash,
            "licence": ", ".join(dict.fromkeys(part.store.licence for part in datamodule.sets)),
        },
        "transfer": None,
    }


def check_patch(datamodule: Any, backbone: Any, settings: dict[str, Any]) -> None:
    """Raises UserError when patches are no multiple of what the backbone needs; crops of views are no patches."""
    patch, multiple = datamodule.patch_size, backbone.size_multiple
    if settings["module"]["name"] == "contrastive" or not any(s % m for s, m in zip(patch, multiple, strict=True)):
        return
    name, store = settings["backbone"]["name"], datamodule.store.path
    advice = "set data.patch_size"
    if settings["data"].get("patch_size") is None and plannable(name):
        advice = f"the plan's are for another backbone, `pretrain3d plan {store} backbone={name}` makes one for this"
    needed = by_text(multiple)
    raise UserError(f"patches of {by_text(patch)} do not fit {name}, which needs multiples of {needed}: {advice}")


def about_sets(datamodule: Any) -> dict[str, dict[str, Any]]:
    """What a run takes from each of its stores, by the name of the set: ``sets`` of a checkpoint's note."""
    return {
        part.name: {
            "data_hash": part.store.data_hash,
            "cases": _training_cases(part),
            "label_classes": list(part.label_classes),
            "preprocessing": preprocessing(datamodule, part),
        }
        for part in datamodule.sets
    }


def _training_cases(part: Any) -> str:
    """Tells when other cases are trained or validated on: their numbers, and a hash of their names."""
    names = hashlib.sha256(json.dumps([sorted(part.train_ids), sorted(part.val_ids)]).encode()).hexdigest()
    return f"{len(part.train_ids)} train, {len(part.val_ids)} val, {names[:8]}"


def preprocessing(datamodule: Any, part: Any) -> dict[str, Any]:
    """What must be done to a file of one data set before the network sees it; travels in checkpoints and exports."""
    from pretrain3d.data.normalise import resolve_intensity

    store = part.store
    return {
        "axes": "RAS",
        "modality": list(store.modality),
        "spacing_mm": [float(value) for value in store.spacing_mm],
        "patch_size": list(datamodule.patch_size),
        "intensity": resolve_intensity(store, part.intensity, part.fold, part.num_folds),
    }


def warn_of_spacing(pretrained_mm: Sequence[float] | None, store_mm: Sequence[float]) -> None:
    """Says so when the transferred weights know objects at another size in voxels."""
    if pretrained_mm is None or all(abs(a / b - 1) <= 0.1 for a, b in zip(pretrained_mm, store_mm, strict=True)):
        return
    sizes = f"{by_text(pretrained_mm)} mm, the store has voxels of {by_text(store_mm)} mm"
    print(f"note: the weights were pretrained at {sizes}", file=sys.stderr)


def warn_of_padding(datamodule: Any, multiple: Sequence[int]) -> None:
    """Says so when a patch that holds every training volume would have less than half the voxels."""
    patch, shapes = datamodule.patch_size, [datamodule.case(case_id).shape for case_id in datamodule.train_ids]
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    enough = [min(s, math.ceil(n / m) * m) for s, n, m in zip(patch, largest, multiple, strict=True)]
    if math.prod(patch) <= 2 * math.prod(enough):
        return
    middle = [statistics.median(sizes) for sizes in zip(*shapes, strict=True)]
    print(
        f"warning: most of every patch of {by_text(patch)} is padding: the median training volume has "
        f"{by_text(middle)} voxels, the largest {by_text(largest)}; data.patch_size={str(enough).replace(' ', '')} "
        "holds them",
        file=sys.stderr,
    )


def warn_of_anchors(sizes: Any, datamodule: Any, backbone: str, own_levels: bool) -> None:
    """Says so when the plan's anchors, (L, A, 3) voxels on the levels of this detector, fit worse than planned."""
    import numpy as np
    import torch

    from pretrain3d.detection.anchors import mean_best_iou

    store = datamodule.store
    planned = (store.plan.get("coverage") or {}).get("mean_best_anchor_iou")
    boxes = torch.from_numpy(np.concatenate([store.cases[case_id].boxes for case_id in datamodule.train_ids]))
    if planned is None or not len(boxes):
        return
    fit = float(mean_best_iou(sizes.flatten(0, 1), boxes[:, 3:] - boxes[:, :3]))
    if fit < planned - WORSE_IOU:
        advice = f"`pretrain3d plan {store.path} backbone={backbone}` finds better ones"
        if own_levels or not plannable(backbone):
            advice = "give module.detector.anchors, sizes in voxels on the finest of them"
        print(
            f"note: on the levels of {backbone} the plan's anchors have a mean best IoU of {fit:.2f}, planned were "
            f"{planned:.2f}; {advice}",
            file=sys.stderr,
        )


def plannable(backbone: str) -> bool:
    """Whether `plan`, which takes a name alone, can make a plan for a backbone."""
    from pretrain3d.backbones import BACKBONES

    try:
        check(BACKBONES, {"name": backbone}, "backbone", given=("in_channels",))
    except UserError:
        return False
    return True
