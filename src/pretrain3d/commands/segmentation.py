"""What `test` does with a run that was pretrained by segmentation: Dice of held-out volumes."""

from __future__ import annotations

from statistics import fmean

from pretrain3d.commands.pretrained import Measured, write_held_out
from pretrain3d.commands.trained import load_run
from pretrain3d.config import UserError
from pretrain3d.options import read_options
from pretrain3d.reporting.run_folder import RunFolder

DEFAULTS = {"checkpoint": "last", "split": "test", "samples": 1000, "tile_batch": None}


def run(folder: RunFolder, options: dict[str, object]) -> int:
    """Tests a run folder; returns the exit status."""
    given = read_options(options, DEFAULTS)
    if given["samples"] < 0:
        raise UserError(f"samples={given['samples']}: expected a whole number from 0 on")
    test(folder, **given)
    return 0


def test(folder: RunFolder, checkpoint: str, split: str, samples: int, tile_batch: int | None) -> None:
    """Writes ``result.json``: Dice, error of the volume and the Dice of knowing nothing (`evaluation.segmentation`).

    Whole cases are predicted. Of each the classes count that were annotated in it; cases without a map are left out.

    Raises:
        UserError: as `load_run` and `write_held_out`.
    """
    module, datamodule = load_run(folder, checkpoint, "segmentation", tile_batch)

    from tqdm import tqdm

    from pretrain3d.data.prepared import inputs_hash
    from pretrain3d.evaluation.protocol import as_number
    from pretrain3d.evaluation.segmentation import KEYS, summarise

    named = sum(case.split == "test" for part in datamodule.sets for case in part.store.cases.values())
    if split == "test" and named > len(datamodule.test_ids):
        print(f"{named - len(datamodule.test_ids)} of {named} test cases hold nothing to segment, left out")

    def measure(case_ids: list[str]) -> Measured:
        scores = [module.score_case(datamodule, case_id)[3] for case_id in tqdm(case_ids, desc="test", unit="case")]
        groups, names = [datamodule.case(case_id).group for case_id in case_ids], module.scores.names
        rows = []
        for case_id, of_case in zip(case_ids, scores, strict=True):
            dice = {f"dice/{name}": as_number(value) for name, value in zip(names, of_case[:, 0], strict=True)}
            known = [value for value in dice.values() if value is not None]
            rows.append({"case": case_id, "dice": fmean(known) if known else None, **dice})
        found = summarise(scores, names, groups, samples)
        values = {key.replace("_", " "): found["metrics"][key]["value"] for key in KEYS}
        texts = [f"{key} {'none' if value is None else f'{value:.4f}'}" for key, value in values.items()]
        return Measured(**found, cases=rows, text=", ".join(texts))

    labels = [inputs_hash(part.store.path, getattr(part, f"{split}_ids", [])) for part in datamodule.sets]
    asked = {"checkpoint": checkpoint, "split": split, "samples": samples, "labels": labels}
    write_held_out(folder, module, datamodule, asked, measure)
