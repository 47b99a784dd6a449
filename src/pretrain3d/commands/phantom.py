"""`phantom`: writes the embedded data set, or a picture of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pretrain3d.config import UserError
from pretrain3d.options import REQUIRED, read_options

USAGE = """\
pretrain3d phantom out=DIR [train=60 test=24 unlabelled=40 seed=0 workers=2] [picture=FILE.png]

Draws synthetic CT volumes (a torso in HU) with objects of three classes, nodule, liver_lesion and bone_lesion. Writes
them to DIR in the nnDetection raw layout: imagesTr, labelsTr (instance masks and class of each id), organsTr, the same
with Ts for the test cases, imagesUn for pretraining, dataset.json. The same seed gives the same files; what is there
already is left alone, so that an interrupted call is finished by repeating it.

  pretrain3d phantom out=data/phantom
  pretrain3d phantom out=data/small train=4 test=2 unlabelled=4 picture=phantom.png

picture=FILE also draws two cases (training, test) in three directions with the boxes of their objects."""

View = tuple[int, int, float, float]
PICTURED = (("train", 8), ("test", 13))
COLOURS = ("#ffb000", "#00d0ff", "#ff50a0")  # per class
VIEWS: tuple[
    View, ...
] = (  # class whose largest object the slice goes through, axis of the slice, window centre and width in HU
    (0, 2, -500, 1500),
    (1, 2, 80, 300),
    (2, 1, 150, 700),
    (2, 0, 100, 550),
)


def run(paths: list[str], options: dict[str, object]) -> int:
    """Writes the data set; returns the exit status."""
    from pretrain3d.data.phantom import generate

    if paths:
        raise UserError(f"phantom takes no path, got {paths[0]!r}: the folder is out=DIR")
    defaults = {"out": REQUIRED, "train": 60, "test": 24, "unlabelled": 40, "seed": 0, "workers": 2, "picture": ""}
    given = read_options(options, defaults)
    picture = Path(str(given["picture"])) if given["picture"] else None
    if picture and picture.suffix.lower() != ".png":
        raise UserError(f"picture={picture}: the name must end in .png")
    folder = Path(str(given["out"]))
    summary = generate(
        folder, given["train"], given["test"], given["unlabelled"], seed=given["seed"], workers=given["workers"]
    )
    if summary.written:
        kept = f", {summary.reused} were there" if summary.reused else ""
        print(f"{folder}: {summary.written} files written{kept}")
    else:
        print(f"{folder}: complete, nothing written ({summary.reused} files)")
    for split, number in summary.cases.items():
        objects = ", ".join(f"{n} {name}" for name, n in summary.objects.get(split, {}).items())
        print(f"  {split:10} {number:4} cases  {objects}")
    if picture:
        draw(picture, given["seed"])
        print(f"{picture}: picture")
    return 0


def draw(path: Path, seed: int = 0) -> None:
    """Draws a training and a test case in three directions, with the boxes of the objects that a slice meets.

    Args:
        path: of the PNG file.
        seed: of the data set.
    """
    import matplotlib
    import nibabel as nib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    from pretrain3d.data.phantom import CLASSES, make_case

    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    figure = Figure(figsize=(11, 5.4), facecolor="black", layout=layout)
    rows = figure.subplots(2, len(VIEWS))
    for row, (split, index) in zip(rows, PICTURED, strict=True):
        case = make_case(seed, index, split)
        as_ras = [nib.as_closest_canonical(nib.Nifti1Image(v, case.affine)) for v in (case.image, case.instances)]
        image, instances = (np.asarray(volume.dataobj) for volume in as_ras)
        for axes, view in zip(row, VIEWS, strict=True):
            _draw_slice(axes, image, instances, case.labels, as_ras[0].header.get_zooms()[:3], view)
    handles = [Line2D([], [], color=colour, label=name) for colour, name in zip(COLOURS, CLASSES, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, labelcolor="white", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"savefig.facecolor": "black"}):
        figure.savefig(path, dpi=95, metadata={"Software": None})


def _draw_slice(axes: Any, image: Any, instances: Any, labels: dict[int, int], spacing_mm: Any, view: View) -> None:
    """One slice in radiological convention (the patient's right at the left of the picture)."""
    from matplotlib.patches import Rectangle

    label, axis, centre, width = view
    ids = [number for number, of in labels.items() if of == label] or list(labels)
    largest = max(ids, key=lambda number: np.count_nonzero(instances == number))
    position = int(np.median(np.nonzero(instances == largest)[axis]))
    across, up = [other for other in range(3) if other != axis]
    axes.imshow(
        np.take(image, position, axis).T,
        cmap="gray",
        vmin=centre - width / 2,
        vmax=centre + width / 2,
        origin="lower",
        aspect=spacing_mm[up] / spacing_mm[across],
        interpolation="bicubic",
        extent=(0, image.shape[across], 0, image.shape[up]),
    )
    mask = np.take(instances, position, axis)
    for number in np.unique(mask[mask > 0]):
        where = np.argwhere(mask == number)
        low, high = where.min(axis=0), where.max(axis=0) + 1
        size = (high - low).tolist()
        axes.add_patch(
            Rectangle(tuple(low - 0.5), size[0] + 1, size[1] + 1, fill=False, lw=1.2, ec=COLOURS[labels[int(number)]])
        )
    # x and y both grow against the reading direction: right is drawn left, the front of a sagittal view left
    axes.invert_xaxis()
    axes.axis("off")
