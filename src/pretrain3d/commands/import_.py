"""`import`: a checkpoint of another framework becomes a file that a detector starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain3d.commands.export import write_once
from pretrain3d.config import UserError, suggestion
from pretrain3d.options import REQUIRED, read_options

USAGE = """\
pretrain3d import CHECKPOINT out=FILE [axes=xyz stem=null token_order=null intensity=null spacing_mm=null ...]

Reads a checkpoint of nnssl (OpenMind, the Missing Piece, nnFoundation, MultiTalent), nnU-Net v2 (ResEnc and plain
U-Nets), MONAI's SwinUNETR or VoCo, and writes its encoder as `pretrain3d export` does. Every tensor is loaded, left out
by name, or an error. CHECKPOINT is a file, or hf://owner/name[/file][@revision] on the Hugging Face hub. No code in a
file is run.

  out=FILE                 the file to write
  format=null              nnssl, nnunet or monai_swin; null: recognised
  axes=xyz                 zyx turns ResEnc, PlainConv and Primus, which saw arrays in the order z, y, x, to our
                           x, y, z; xyz takes them as they are, as other loaders do
  stem=null                the input layers to take of a file with several (MultiTalent), e.g. encoder.stem.004
  token_order=null         hwd or whd, of a Primus; null: what the file says, else hwd, that of the OpenMind files
  intensity=null           {scheme: window, low: -175, high: 250, ...} where the file does not say it
  spacing_mm=null          [x,y,z] where the file does not say it
  method=null licence=""   for the record

  pretrain3d import hf://MIC-DKFZ/ResEncL-MissingPiece-MAE out=weights/mae.pt licence=CC-BY-4.0"""

DEFAULTS: dict[str, Any] = {
    "out": REQUIRED,
    "format": None,
    "axes": "xyz",
    "stem": None,
    "token_order": None,
    "intensity": None,
    "spacing_mm": None,
    "method": None,
    "licence": "",
}


def run(paths: list[str], options: dict[str, object]) -> int:
    """Imports one checkpoint; returns the exit status."""
    if len(paths) != 1:
        raise UserError(f"import takes one checkpoint, got {len(paths)}: {' '.join(paths) or 'none'}")
    given = read_options(options, DEFAULTS)
    _check(given)
    out = Path(str(given["out"]))
    if out.is_dir():
        raise UserError(f"out={out} is a folder; name the file, for example out={out / 'backbone.pt'}")

    from pretrain3d.backbones.checkpoints.contract import Wishes
    from pretrain3d.backbones.checkpoints.importing import convert

    wishes = Wishes(stem=given["stem"], token_order=given["token_order"])
    imported = convert(paths[0], wishes, axes=given["axes"], kind=given["format"])
    preprocessing, source = imported.preprocessing, imported.source
    for key in ("intensity", "spacing_mm"):
        if given[key] is not None:
            preprocessing[key] = given[key]
    if given["method"] is not None:
        source["method"] = str(given["method"])
    source = {"run": "", "commit": None, "step": None, "data_hash": "", "weights": "online", "licence": "", **source}
    if given["licence"]:
        source["licence"] = str(given["licence"])
    content = {"backbone": imported.backbone, "preprocessing": preprocessing, "source": source,
               "corpus": imported.corpus, "weights": imported.weights}  # fmt: skip
    write_once(out, content, f"{imported.backbone['name']} of {paths[0]} ({source['format']}, {source['method']})")
    for note in imported.notes:
        print(f"  {note}")
    return 0


def _check(given: dict[str, Any]) -> None:
    from pretrain3d.backbones.checkpoints import FORMATS

    for key, known in (("format", tuple(FORMATS)), ("axes", ("xyz", "zyx")), ("token_order", ("hwd", "whd"))):
        value = given[key]
        if value is not None and value not in known:
            raise UserError(f"{key}={value}{suggestion(str(value), known) or ':'} it is {' or '.join(known)}")
    intensity, spacing = given["intensity"], given["spacing_mm"]
    if intensity is not None and (not isinstance(intensity, dict) or "scheme" not in intensity):
        raise UserError(f"intensity={intensity}: expected {{scheme: ct | zscore | window, ...}}, as in a plan")
    if intensity is not None:
        from pretrain3d.data.normalise import check_intensity

        check_intensity(intensity)
    if spacing is not None:
        if not isinstance(spacing, list) or len(spacing) != 3 or not all(type(v) in (int, float) for v in spacing):
            raise UserError(f"spacing_mm={spacing}: expected three sizes in mm, such as spacing_mm=[1.5,1.5,2]")
        given["spacing_mm"] = [float(value) for value in spacing]
