"""A trained run, as `test` and `sweep` take it: its module, its data, and what its result says of it."""

from __future__ import annotations

import math
from typing import Any

from pretrain3d.config import UserError
from pretrain3d.registry import build
from pretrain3d.reporting.run_folder import RunFolder


def load_run(
    folder: RunFolder, checkpoint: str, kind: str = "detection", tile_batch: int | None = None
) -> tuple[Any, Any]:
    """The trained module of a run, and the data that it was trained and validated on.

    Args:
        folder, checkpoint: which weights.
        kind: a key of `MODULES`.
        tile_batch: tiles predicted at once; None: as configured.

    Raises:
        UserError: no run, no such checkpoint, or its store is gone or has changed.
    """
    if tile_batch is not None and (type(tile_batch) is not int or tile_batch < 1):
        raise UserError(f"tile_batch={tile_batch}: expected a whole number from 1 on")
    weights = folder.checkpoint(checkpoint)

    import torch

    from pretrain3d.modules.checkpoint import load_module

    module: Any = load_module(weights, kind, "cuda" if torch.cuda.is_available() else "cpu")
    if tile_batch is not None:
        module.tile_batch = tile_batch
    return module, data_of(folder, module.note)


def data_of(folder: RunFolder, note: dict[str, Any]) -> Any:
    """The data of a run as it was trained on them, whatever the plan of its store says by now.

    Raises:
        UserError: a store is gone, or its cases, classes or spacing have changed; a run of an earlier version.
    """
    from pretrain3d.commands.assemble import about_sets
    from pretrain3d.commands.settings import DATA

    folder.check_known(note, ("batch", "processes", "sets"))
    settings, known = folder.config(), note["preprocessing"]
    data = {**settings["data"], "batch_size": note["batch"]["batch_size"], "patch_size": known["patch_size"]}
    if isinstance(data["store"], str) or data.get("intensity") == "pretrained":  # else each set has its plan's
        data["intensity"] = known["intensity"]
    datamodule: Any = build(DATA, {"name": "data", **data}, "data", seed=settings["seed"])
    store = datamodule.store
    now = {"sets": about_sets(datamodule), "classes": list(store.classes)}
    folder.check_same(note, {**now, "mirror_classes": dict(store.mirror_classes)})
    return datamodule


def unswept(module: Any, case_ids: list[str]) -> dict[str, Any] | None:
    """What `sweep` chose for the module; None, and the module as configured, where it chose on these cases."""
    chosen: dict[str, Any] | None = module.note.get("inference")
    if chosen is None or not set(case_ids) & set(chosen["cases"]):
        return chosen
    module.merging = module.unswept
    print("the merge settings of this checkpoint were chosen on these cases: those of its config are used instead")
    return None


def about_run(folder: RunFolder, settings: dict[str, Any], module: Any) -> dict[str, Any]:
    """``config, seed, cost, backbone`` of the result of a trained run; see `reporting.results.write_result`."""
    from pretrain3d.backbones.transfer import fingerprint
    from pretrain3d.reporting.cost import cost_of

    step, transfer = module.note["source"]["step"], module.note.get("transfer")
    batch = math.prod(module.note["batch"].values()) * module.note["processes"]
    return {
        "config": settings,
        "seed": settings["seed"],
        "cost": {**cost_of(folder), "steps": step, "samples": step * batch},
        "backbone": {
            "name": settings["backbone"]["name"],
            "fingerprint": fingerprint(module.best_networks()[0].state_dict()),
            "init": transfer["source"]["method"] if transfer else "scratch",
            "transfer": transfer,
        },
    }


def log_to_wandb(folder: RunFolder, settings: dict[str, Any]) -> None:
    """Adds the result to the W&B run that training left in the folder; nothing where it left none."""
    node = (settings.get("logger") or {}).get("wandb")
    if node is None or not (folder.path / "wandb" / "run-id.txt").is_file():
        return
    from pretrain3d.reporting.results import read_result
    from pretrain3d.reporting.wandb_logger import log_result

    log_result(node, folder.path, settings, read_result(folder.path))
