"""`export`: the backbone of a run in one file, for a detector to start from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain3d.config import UserError
from pretrain3d.options import REQUIRED, read_options
from pretrain3d.reporting.run_folder import RunFolder

USAGE = """\
pretrain3d export RUN out=FILE [checkpoint=last stem=NAME format=pretrain3d axes=xyz]

Writes the backbone of a run to one file: name and arguments, weights (the averaged ones where the run has them),
preprocessing, and where they come from. A detector starts from it with transfer.path=FILE.
RUN may also be such a file, to write it in the other format.

  out=FILE               the file to write
  checkpoint=last|best   which weights of the run
  stem=NAME              of the data sets of a supervised run, the one whose own stem is written; without, the one that
                         those without a stem of their own share
  format=pretrain3d      or nnssl: a file for nnDetection's finetuning branch and nnU-Net's pretrained trainers (ResEnc,
                         Primus); `pretrain3d import` reads it back
  axes=xyz               nnssl only: zyx turns the network for their arrays, which are z, y, x"""

FORMATS = ("pretrain3d", "nnssl")


def run(paths: list[str], options: dict[str, object]) -> int:
    """Exports one run; returns the exit status."""
    if len(paths) != 1:
        raise UserError(f"export takes one run folder, got {len(paths)}: {' '.join(paths) or 'none'}")
    defaults = {"out": REQUIRED, "checkpoint": "last", "stem": "", "format": "pretrain3d", "axes": "xyz"}
    given = read_options(options, defaults)
    for key, known in (("format", FORMATS), ("axes", ("xyz", "zyx"))):
        if given[key] not in known:
            raise UserError(f"{key}={given[key]}: it is {' or '.join(known)}")
    if given["axes"] != "xyz" and given["format"] != "nnssl":
        raise UserError("axes=zyx is for format=nnssl; files of pretrain3d are always x, y, z")
    out = Path(str(given["out"]))
    if out.is_dir():
        raise UserError(f"out={out} is a folder; name the file, for example out={out / 'backbone.pt'}")
    export(Path(paths[0]), out, given["checkpoint"], given["stem"], given["format"], given["axes"])
    return 0


def export(source: Path, out: Path, which: str, stem: str, form: str, axes: str) -> None:
    """Writes the file, unless it holds exactly this already.

    Raises:
        UserError: no such run or checkpoint, or ``out`` is a file of another kind.
    """
    content = backbone_of(source, which, stem)
    about = f"{content['backbone']['name']}, {content['source'].get('weights', 'online')} weights of {source}"
    if form == "nnssl":
        from pretrain3d.backbones.checkpoints import nnssl
        from pretrain3d.backbones.checkpoints.importing import read_foreign

        if out.exists() and not nnssl.is_ours(read_foreign(out)):
            raise UserError(
                f"out={out} is a file that `pretrain3d export format=nnssl` did not write; choose another name"
            )
        nnssl.write(out, content, axes)
        print(f"{out}: {about}, for nnDetection and nnU-Net")
        if said := nnssl.about_intensity(content["preprocessing"]):
            print(f"note: {said}", file=sys.stderr)
    else:
        write_once(out, content, about)


def backbone_of(source: Path, which: str, stem: str) -> dict[str, Any]:
    """What an export of a run, or a file that is one, holds.

    With ``stem``, of a supervised run, the stem and the preprocessing are those of that data set.

    Raises:
        UserError: no such run, checkpoint or file, or that data set has no stem of its own.
    """
    from pretrain3d.backbones.transfer import load_export

    if source.is_file():
        if stem:
            raise UserError(f"stem={stem}: {source} holds one stem; give the run")
        return load_export(source)
    folder = RunFolder(source)
    path = folder.checkpoint(which)
    if said := folder.unfinished():
        print(said, file=sys.stderr)

    from pretrain3d.data.leakage import merged
    from pretrain3d.modules.base import NOTE
    from pretrain3d.modules.checkpoint import read_checkpoint, used_weights

    checkpoint = read_checkpoint(path)
    note = checkpoint[NOTE]
    content: dict[str, Any] = {
        "backbone": note["backbone"],
        "preprocessing": note["preprocessing"],
        "source": {**note["source"], "weights": note["weights"]},
        "corpus": merged(note.get("pretrained_on"), note.get("corpus")),
        "weights": used_weights(checkpoint, "backbone"),
    }
    if stem:
        stems = list(note["module"].get("method", {}).get("stems", ()))
        if stem not in stems:
            raise UserError(f"stem={stem}: the run has stems of its own for {', '.join(stems) or 'no data set'}")
        own = used_weights(checkpoint, f"method.stems.{stems.index(stem)}")
        content["weights"] |= {f"stem.{name}": value for name, value in own.items()}
        content["preprocessing"] = note["sets"][stem]["preprocessing"]
        content["source"]["stem"] = stem
    return content


def write_once(out: Path, content: Mapping[str, Any], about: str) -> None:
    """Writes an export and says so, or that the file holds exactly this already.

    Raises:
        UserError: ``out`` is a file of another kind.
    """
    from pretrain3d.backbones.transfer import export_weights, fingerprint, load_export

    weights = content["weights"]
    mark = fingerprint(weights)
    keys = ("backbone", "preprocessing", "source", "corpus")
    if out.exists():  # never over a file of another kind: load_export refuses those
        old = load_export(out)
        if old["fingerprint"] == mark and all(old.get(key) == content[key] for key in keys):
            print(f"{out} holds this backbone already (fingerprint {mark}), nothing to do")
            return
    export_weights(out, content["backbone"], weights, content["preprocessing"], content["source"], content["corpus"])
    parameters = sum(tensor.numel() for tensor in weights.values())
    print(f"{out}: {about}, {parameters:,} parameters, fingerprint {mark}")
