"""Pictures of what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pretrain3d.files import replacing
from pretrain3d.reporting.case_pictures import POINTS, case_picture, draw_case
from pretrain3d.reporting.formats.found import Found


def write_png(folder: Path, case: str, classes: Sequence[str], found: Found) -> None:
    """``png/<case>.png``: sagittal, coronal and axial planes through the three best boxes, all boxes with their scores.

    The planes are those of the volume that the network saw, right of the patient on the left; without a box they go
    through the middle.
    """
    assert found.image is not None, "the image was not kept"
    best = found.best_first()
    none, points = np.zeros((0, 6)), None
    if len(best):
        center = np.floor((best.boxes[:POINTS, :3] + best.boxes[:POINTS, 3:]) / 2)
        points = np.clip(center, 0, np.asarray(found.image.shape[1:]) - 1).astype(np.int64)
    picture = case_picture(
        found.image[0], none, np.zeros(0, np.int64), best.boxes, best.labels, best.scores, classes,
        tuple(found.frame.spacing_mm), points=points,
    )  # fmt: skip
    figure = draw_case(picture, most=len(best))
    FigureCanvasAgg(figure)
    with replacing(folder / "png" / f"{case}.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110, facecolor=figure.get_facecolor())
