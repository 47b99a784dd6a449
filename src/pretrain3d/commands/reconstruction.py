"""What `test` does with a run that was pretrained by reconstruction: errors on patches of held-out volumes."""

from __future__ import annotations

from typing import Any

from pretrain3d.commands.pretrained import Measured, write_held_out
from pretrain3d.commands.trained import load_run
from pretrain3d.config import UserError
from pretrain3d.options import at_least, read_options
from pretrain3d.reporting.run_folder import RunFolder

DEFAULTS = {"checkpoint": "last", "split": "test", "samples": 1000, "patches": 4}


def run(folder: RunFolder, options: dict[str, object]) -> int:
    """Tests a run folder; returns the exit status."""
    test(folder, **at_least(read_options(options, DEFAULTS), samples=0, patches=1))
    return 0


def test(folder: RunFolder, checkpoint: str, split: str, samples: int, patches: int) -> None:
    """Writes ``result.json``: errors of the network, of the mean predictor and of tri-linear in-painting.

    Every held-out case gives ``patches`` patches, uniform over the volume, and each patch one mask (or corruption): the
    same ones for every run with patches of that size. The error of a case is the method's own (``asked.measure``) over
    all voxels that it predicts there; what is said of all cases is `evaluation.reconstruction.summarise`.

    Raises:
        UserError: the method restores no intensities, or as `load_run` and `write_held_out`.
    """
    name = folder.config()["module"]["method"]["name"]
    module, datamodule = load_run(folder, checkpoint, "reconstruction")
    if not hasattr(module.method, "measure"):
        raise UserError(f"{folder.path} was pretrained with {name}, which restores no intensities")

    from pretrain3d.evaluation.reconstruction import summarise

    def measure(case_ids: list[str]) -> Measured:
        rows = errors_of(module, datamodule, case_ids, patches)
        errors = [{key: value for key, value in row.items() if key != "case"} for row in rows]
        metrics = summarise(errors, [datamodule.case(case_id).group for case_id in case_ids], samples)
        texts = [f"{key.replace('_', ' ')} {entry['value']:.4f}" for key, entry in metrics.items() if "/" not in key]
        return Measured(metrics, {}, rows, f"{module.method.measure}: {', '.join(texts)}")

    asked = {"checkpoint": checkpoint, "split": split, "samples": samples, "patches": patches,
             "measure": module.method.measure}  # fmt: skip
    write_held_out(folder, module, datamodule, asked, measure)


def errors_of(module: Any, datamodule: Any, case_ids: list[str], patches: int) -> list[dict[str, Any]]:
    """Per case ``{"case", "network", "mean_predictor", ...}``, see `ReconstructionModule.errors`."""
    from tqdm import tqdm

    return [
        {"case": case_id, **module.errors(datamodule.fixed_patches(case_id, row * patches, patches))}
        for row, case_id in enumerate(tqdm(case_ids, desc="test", unit="case"))
    ]
