"""`plan`: chooses patch, batch, pyramid levels and anchors of a store again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain3d.config import UserError
from pretrain3d.options import read_options
from pretrain3d.registry import check_name

USAGE = """\
pretrain3d plan STORE [backbone=resenc_xs detector=retina_unet memory_gb=null batch_size=4 patch_size=null]

Plans what `prepare` planned for the default backbone again, for another backbone, detector or memory, and writes it to
STORE/plan.yaml. Spacing and intensities stay as they are there. The memory is estimated, no GPU is needed; where there
is one, a step of the plan is done on it, and what that took stands beside the estimate.

  backbone=NAME        what will be trained: its strides and its memory count
  detector=NAME        on top of it
  memory_gb=null       GiB of one device; null: of the GPU here, without one of this machine
  batch_size=4         patches per optimiser step; where fewer fit at once, they are accumulated
  patch_size=null      largest patch, a number or [x,y,z]; null: 128, more beside an axis of which the cases have less

  pretrain3d plan stores/phantom backbone=resenc_l memory_gb=24"""

DEFAULTS: dict[str, Any] = {
    "backbone": "resenc_xs",
    "detector": "retina_unet",
    "memory_gb": None,
    "batch_size": 4,
    "patch_size": None,
}
SHOWN = ("patch_size", "batch_size", "accumulate_grad_batches", "detection_levels", "anchors")


def run(paths: list[str], options: dict[str, object]) -> int:
    """Plans a store; returns the exit status."""
    if len(paths) != 1:
        raise UserError(f"plan takes one store, got {len(paths)}: {' '.join(paths) or 'none'}")
    given = read_options(options, DEFAULTS)
    from pretrain3d.backbones import BACKBONES
    from pretrain3d.detection import DETECTORS

    check_name(BACKBONES, given["backbone"], "backbone")
    check_name(DETECTORS, given["detector"], "detector")
    memory, patch = given["memory_gb"], given["patch_size"]
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, (int, float)) or memory <= 0):
        raise UserError(f"memory_gb={memory}: expected a number of GiB, such as memory_gb=24")
    patch = [patch] * 3 if isinstance(patch, int) else patch
    if patch is not None and not (isinstance(patch, list) and all(type(size) is int for size in patch)):
        raise UserError(f"patch_size={patch}: expected one or three whole numbers of voxels, such as patch_size=96")

    from pretrain3d.data.store import Store
    from pretrain3d.planning.plan import KEPT, make_plan, read_plan, write_plan

    store = Store(Path(paths[0]))
    path = store.path / "plan.yaml"
    old = read_plan(path) if path.is_file() else {}
    plan = make_plan(
        store,
        None if patch is None else tuple(patch),
        given["backbone"],
        given["detector"],
        memory,
        given["batch_size"],
    )
    plan |= {key: old[key] for key in KEPT if key in old}
    check_on_gpu(plan, store)
    write_plan(path, plan, store)
    _report(path, plan, old)
    return 0


def check_on_gpu(plan: dict[str, Any], store: Any) -> None:
    """Adds ``planned_for.measured_gb`` where a GPU is here that should be large enough.

    Raises:
        UserError: a step of the plan runs out of its memory.
    """
    import torch

    from pretrain3d.devices import GIB, is_out_of_memory
    from pretrain3d.planning.memory import measure_step
    from pretrain3d.planning.plan import channels_of, planned_detector

    about = plan["planned_for"]
    if not torch.cuda.is_available() or about["memory_gb"] > torch.cuda.get_device_properties(0).total_memory / GIB + 1:
        return
    detector = planned_detector(about["detector"], plan["detection_levels"])
    what = about["backbone"], detector, plan["patch_size"], plan["batch_size"]
    try:
        found = measure_step(*what, torch.device("cuda"), channels_of(store), max(len(store.classes), 1))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"a step of this plan does not fit on {torch.cuda.get_device_name(0)}, although about "
            f"{about['estimated_gb']} GiB were estimated; plan with memory_gb={0.8 * about['memory_gb']:.0f}"
        ) from None
    about["measured_gb"] = round(found / GIB, 2)


def _report(path: Path, plan: dict[str, Any], old: dict[str, Any]) -> None:
    about = plan["planned_for"]
    print(
        f"{path}: planned for {about['detector']} on {about['backbone']} with {about['memory_gb']} GiB "
        f"({about['memory_of']}); a step needs about {about['estimated_gb']} GiB"
        + (f", measured {about['measured_gb']} GiB" if "measured_gb" in about else "")
    )
    for key in SHOWN:
        changed = f", was {old[key]}" if key in old and old[key] != plan[key] else ""
        print(f"  {key}: {plan[key]}{changed}")
    coverage = plan["coverage"] or {}
    for key, objects in coverage.items():
        if isinstance(objects, list) and objects:
            print(f"  {key}: {len(objects)} objects or more: {', '.join(objects[:3])}{', ...' * (len(objects) > 3)}")
