"""What `test` does with a run that was pretrained by reconstruction: errors on patches of held-out volumes."""

from __future__ import annotations

import sys
import time
from typing import Any

from pretrain3d.commands.tested import held_out, say_what_is_replaced
from pretrain3d.commands.trained import about_run, data_of, log_to_wandb
from pretrain3d.config import UserError
from pretrain3d.files import check_writable
from pretrain3d.options import read_options
from pretrain3d.reporting.run_folder import RunFolder

DEFAULTS = {"checkpoint": "last", "split": "test", "samples": 1000, "patches": 4}


def run(folder: RunFolder, options: dict[str, object]) -> int:
    """Tests a run folder; returns the exit status."""
    given = read_options(options, DEFAULTS)
    for key, least in (("samples", 0), ("patches", 1)):
        if given[key] < least:
            raise UserError(f"{key}={given[key]}: it must be {least} or more")
    test(folder, **given)
    return 0


def test(folder: RunFolder, checkpoint: str, split: str, samples: int, patches: int) -> None:
    """Writes ``result.json``: errors of the network, of the mean predictor and of tri-linear in-painting.

    Every held-out case gives ``patches`` patches, uniform over the volume, and each patch one mask (or corruption): the
    same ones for every run with patches of that size. The error of a case is the method's own (``asked.measure``) over
    all voxels that it predicts there; what is said of all cases is `evaluation.reconstruction.summarise`. Skips what
    ``result.json`` already holds for the same weights and options.
    """
    module, datamodule = load(folder, checkpoint)

    from pretrain3d.backbones.transfer import fingerprint
    from pretrain3d.data.leakage import find, merged, warning
    from pretrain3d.evaluation.reconstruction import summarise
    from pretrain3d.reporting.results import is_current, write_result

    settings = folder.config()
    if split == "test" and not datamodule.test_ids:
        raise UserError(f"the data of {folder.path} hold no test case; split=val takes those that `fit` held out")
    case_ids = held_out({"test": datamodule.test_ids, "val": datamodule.val_ids}, split)
    asked = {
        "checkpoint": checkpoint, "split": split, "samples": samples, "patches": patches,
        "measure": module.method.measure, "step": module.note["source"]["step"],
        "fingerprint": fingerprint(module.state_dict()),
    }  # fmt: skip
    if is_current(folder.path / "result.json", asked):
        print(f"{folder.path / 'result.json'} is of these weights already, nothing to predict")
        return
    check_writable(folder.path)
    say_what_is_replaced(folder.path, asked)
    ids = [(part.store, split, getattr(part, f"{split}_ids")) for part in datamodule.sets]
    leakage = find(merged(module.note.get("pretrained_on"), module.note["corpus"]), ids)
    if leakage:
        print(warning(leakage, str(folder.path)), file=sys.stderr)
    start = time.perf_counter()
    rows = errors_of(module, datamodule, case_ids, patches)
    errors = [{key: value for key, value in row.items() if key != "case"} for row in rows]
    metrics = summarise(errors, [datamodule.case(case_id).group for case_id in case_ids], samples)
    source = module.note["source"]
    write_result(
        folder.path,
        run=settings["name"],
        metrics=metrics,
        per_class={},
        curves={},
        cases=rows,
        data={"hash": source["data_hash"], "name": source["data"], "licence": source["licence"], "cases": len(rows)},
        test_seconds=time.perf_counter() - start,
        leakage=leakage,
        asked=asked,
        **about_run(folder, settings, module),
    )
    texts = [f"{key.replace('_', ' ')} {entry['value']:.4f}" for key, entry in metrics.items() if "/" not in key]
    print(f"{settings['name']}, {module.method.measure}: {', '.join(texts)}")
    print(f"{folder.path / 'result.json'} ({len(rows)} cases, {patches} patches each)")
    log_to_wandb(folder, settings)


def load(folder: RunFolder, checkpoint: str) -> tuple[Any, Any]:
    """The trained module of a run, and the data that it was trained and validated on.

    Raises:
        UserError: no run, no such checkpoint, its store is gone, or its method restores no intensities.
    """
    settings, weights = folder.config(), folder.checkpoint(checkpoint)
    name = settings["module"]["method"]["name"]

    import torch

    from pretrain3d.modules.checkpoint import load_module

    module: Any = load_module(weights, "reconstruction", "cuda" if torch.cuda.is_available() else "cpu")
    if not hasattr(module.method, "measure"):
        raise UserError(f"{folder.path} was pretrained with {name}, which restores no intensities")
    return module, data_of(folder, module.note)


def errors_of(module: Any, datamodule: Any, case_ids: list[str], patches: int) -> list[dict[str, Any]]:
    """Per case ``{"case", "network", "mean_predictor", ...}``, see `ReconstructionModule.errors`."""
    from tqdm import tqdm

    return [
        {"case": case_id, **module.errors(datamodule.fixed_patches(case_id, row * patches, patches))}
        for row, case_id in enumerate(tqdm(case_ids, desc="test", unit="case"))
    ]
