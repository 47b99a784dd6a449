"""3D Slicer markups: a file that Slicer opens as one ROI per box."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb

from pretrain3d.reporting.figures import COLOURS
from pretrain3d.reporting.formats.found import LPS, Found
from pretrain3d.reporting.results import write_json

SCHEMA = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"


def write_slicer(folder: Path, case: str, classes: Sequence[str], found: Found) -> None:
    """``slicer/<case>.mrk.json``: an ROI node per box, named by class, number and score, coloured by class, best first.

    Positions are LPS millimetres, as Slicer itself writes them; ROIs lie along the axes of the input file, so they fit
    oblique volumes too.
    """
    values = found.restored()
    axes = values["axes"].copy()
    if np.linalg.det(axes) < 0:  # a box is its own mirror image, an ROI must be rotated only
        axes[:, 2] *= -1
    orientation = (axes * LPS[:, None]).ravel().tolist()  # row by row; columns are the ROI's axes
    markups = [
        _roi(f"{classes[int(label)]} {index + 1}", float(score), center * LPS, size, orientation,
             COLOURS[int(label) % len(COLOURS)])
        for index, (label, score, center, size) in enumerate(
            zip(values["labels"], values["scores"], values["center_mm"], values["size_mm"], strict=True)
        )
    ]  # fmt: skip
    content = {"@schema": f"{SCHEMA}markups-schema-v1.0.3.json#", "markups": markups}
    write_json(folder / "slicer" / f"{case}.mrk.json", content)


def _roi(
    name: str, score: float, center: np.ndarray, size: np.ndarray, orientation: list[float], colour: str
) -> dict[str, Any]:
    position = center.tolist()
    label, rgb = f"{name}: {score:.2f}", list(to_rgb(colour))
    return {
        "type": "ROI", "name": label, "coordinateSystem": "LPS", "coordinateUnits": "mm", "locked": True,
        "roiType": "Box", "center": position, "orientation": orientation, "size": size.tolist(), "insideOut": False,
        "controlPoints": [
            {"id": "1", "label": label, "position": position, "selected": True, "locked": True, "visibility": True,
             "positionStatus": "defined"}
        ],
        "display": {"visibility": True, "opacity": 1.0, "color": rgb, "selectedColor": rgb,
                    "propertiesLabelVisibility": True, "pointLabelsVisibility": False, "handlesInteractive": False},
    }  # fmt: skip
