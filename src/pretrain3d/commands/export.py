"""`export`: the backbone of a run in one file, for a detector to start from."""

from __future__ import annotations

from pathlib import Path

from pretrain3d.config import REQUIRED, UserError, read_options
from pretrain3d.reporting.run_folder import RunFolder

USAGE = """\
pretrain3d export RUN out=FILE [checkpoint=last]

Writes the backbone of a run to one file: name and arguments, weights (the averaged ones where the run has them),
preprocessing, and where they come from. A detector starts from it with transfer.path=FILE.

  out=FILE               the file to write
  checkpoint=last|best   which weights of the run"""


def run(paths: list[str], options: dict[str, object]) -> int:
    """Exports one run; returns the exit status."""
    if len(paths) != 1:
        raise UserError(f"export takes one run folder, got {len(paths)}: {' '.join(paths) or 'none'}")
    given = read_options(options, {"out": REQUIRED, "checkpoint": "last"})
    export(RunFolder(Path(paths[0])), Path(str(given["out"])), given["checkpoint"])
    return 0


def export(folder: RunFolder, out: Path, which: str) -> None:
    """Writes the file, unless it holds exactly this already.

    Raises:
        UserError: no such run or checkpoint, or ``out`` is a folder or a file of another kind.
    """
    source = folder.checkpoint(which)
    if out.is_dir():
        raise UserError(f"out={out} is a folder; name the file, for example out={out / 'backbone.pt'}")

    from pretrain3d.backbones.transfer import export_weights, fingerprint, load_export
    from pretrain3d.modules.base import NOTE
    from pretrain3d.modules.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(source)
    note = checkpoint[NOTE]
    prefix = "backbone." if note["weights"] == "online" else "averaged.backbone."
    state = checkpoint["state_dict"]
    weights = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
    about = {
        "backbone": note["backbone"],
        "preprocessing": note["preprocessing"],
        "source": {**note["source"], "weights": note["weights"]},
    }
    mark = fingerprint(weights)
    if out.exists():  # never over a file of another kind: load_export refuses those
        old = load_export(out)
        if old["fingerprint"] == mark and all(old[key] == value for key, value in about.items()):
            print(f"{out} holds this backbone already (fingerprint {mark}), nothing to do")
            return
    export_weights(out, about["backbone"], weights, about["preprocessing"], about["source"])
    parameters = sum(tensor.numel() for tensor in weights.values())
    print(
        f"{out}: {note['backbone']['name']}, {parameters:,} parameters, {note['weights']} weights of step "
        f"{note['source']['step']} of {folder.path}, fingerprint {mark}"
    )
