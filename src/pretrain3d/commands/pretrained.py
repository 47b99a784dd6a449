"""What `test` does with a pretraining, whatever it measures: weights, held-out cases, leakage, and the result file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pretrain3d.commands.tested import held_out, is_to_be_tested
from pretrain3d.commands.trained import about_run, log_to_wandb
from pretrain3d.config import UserError
from pretrain3d.reporting.run_folder import RunFolder


@dataclass(frozen=True)
class Measured:
    """What a pretraining does on held-out cases; see `reporting.results.write_result`.

    Attributes:
        metrics, per_class: ``{key: {"value", "low", "high"}}``, the latter by class.
        cases: one row per case.
        text: for the terminal.
    """

    metrics: dict[str, Any]
    per_class: dict[str, Any]
    cases: list[dict[str, Any]]
    text: str


def write_held_out(
    folder: RunFolder,
    module: Any,
    datamodule: Any,
    asked: dict[str, Any],
    measure: Callable[[list[str]], Measured],
) -> None:
    """Measures and writes ``result.json``; skips what it already holds for the same weights and options.

    Args:
        folder: of the run.
        module, datamodule: as `trained.load_run` gives them.
        asked: what decides the result, ``split`` among it.
        measure: case ids -> numbers; called only where they are not known.

    Raises:
        UserError: the split is not ``test`` or ``val``, or holds no case.
    """
    from pretrain3d.backbones.transfer import fingerprint
    from pretrain3d.data.leakage import find, merged, warning
    from pretrain3d.reporting.results import write_result

    settings, source, split = folder.config(), module.note["source"], asked["split"]
    if split == "test" and not datamodule.test_ids:
        raise UserError(f"the data of {folder.path} hold no test case; split=val takes those that `fit` held out")
    case_ids = held_out({"test": datamodule.test_ids, "val": datamodule.val_ids}, split)
    asked = {**asked, "step": source["step"], "fingerprint": fingerprint(module.state_dict())}
    if not is_to_be_tested(folder.path, asked, "these weights"):
        return
    ids = [(part.store, split, getattr(part, f"{split}_ids")) for part in datamodule.sets]
    leakage = find(merged(module.note.get("pretrained_on"), module.note["corpus"]), ids)
    if leakage:
        print(warning(leakage, str(folder.path)), file=sys.stderr)
    start = time.perf_counter()
    measured = measure(case_ids)
    write_result(
        folder.path,
        run=settings["name"],
        metrics=measured.metrics,
        per_class=measured.per_class,
        curves={},
        cases=measured.cases,
        data={
            "hash": source["data_hash"],
            "name": source["data"],
            "licence": source["licence"],
            "cases": len(case_ids),
        },
        test_seconds=time.perf_counter() - start,
        leakage=leakage,
        asked=asked,
        **about_run(folder, settings, module),
    )
    print(f"{settings['name']}, {measured.text}")
    print(f"{folder.path / 'result.json'} ({len(case_ids)} cases)")
    log_to_wandb(folder, settings)
