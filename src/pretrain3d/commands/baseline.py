"""What `test` does with a baseline without a network: fits it to the training fold and scores it like a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pretrain3d.commands import tested
from pretrain3d.config import UserError
from pretrain3d.options import output_folder


def test(
    baseline: str, store: str, out: str, fold: int, num_folds: int, split: str, samples: int, by: str, cases: str
) -> None:
    """Fits a baseline to the training fold and scores it like a run."""
    from pretrain3d.data.splits import fold_cases
    from pretrain3d.data.store import Store
    from pretrain3d.evaluation.strata import chosen_values
    from pretrain3d.reporting.results import SCORE_FILES

    if baseline not in ("mean_box", "threshold"):
        raise UserError(f"baseline={baseline}: it is mean_box or threshold")
    folder, data = output_folder("out", out), Store(Path(store))
    of_fold = fold_cases(data, fold, num_folds)
    case_ids = tested.held_out(of_fold, split)
    tested.check_annotated(data, case_ids, split)
    values = chosen_values(cases, by, tested.truth_of(data, case_ids))
    asked = {"baseline": baseline, "fold": fold, "num_folds": num_folds, "split": split, "samples": samples,
             "data": data.data_hash, "cases": tested.hash_of(data, of_fold["train"] + case_ids)}  # fmt: skip
    if tested.is_to_be_tested(folder, asked, "this baseline", SCORE_FILES):
        predict = fit(baseline, data, of_fold["train"])
        about = {"asked": asked, "config": {"baseline": baseline, "fold": fold, "num_folds": num_folds}, "seed": 0}
        tested.score_cases(folder, folder.name, data, case_ids, predict, about, samples)
    tested.write_strata(folder, by, values, samples)


def fit(baseline: str, data: Any, train: list[str]) -> Callable[[str], tested.Prediction]:
    """The prediction function of a baseline that was fitted to the training cases."""
    from pretrain3d.evaluation.baselines import MeanBoxBaseline, ThresholdBaseline

    def image_of(case_id: str) -> np.ndarray:
        case = data.cases[case_id]
        return data.read(case_id, "image", (0, 0, 0), case.shape)[0]

    if baseline == "mean_box":
        chosen = [data.cases[case_id] for case_id in train]
        mean_box = MeanBoxBaseline(len(data.classes))
        mean_box.fit([c.shape for c in chosen], [c.boxes for c in chosen], [c.labels for c in chosen])
        return lambda case_id: mean_box.predict(data.cases[case_id].shape)
    threshold = ThresholdBaseline(data.spacing_mm)
    threshold.fit([(image_of(i), data.cases[i].boxes, data.cases[i].labels) for i in train])
    return lambda case_id: threshold.predict(image_of(case_id))
