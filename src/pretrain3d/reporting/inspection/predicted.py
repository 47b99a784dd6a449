"""A folder that `predict` wrote, in lines: its score file, else the masks of its boxes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pretrain3d.reporting.inspection.lines import Rows, aligned
from pretrain3d.reporting.inspection.runs import json_lines


def is_predicted(path: Path) -> bool:
    """Whether `predict` wrote a score file into the folder, or masks (``format=nifti``) into it or its ``nifti``."""
    return (path / "predictions.json").is_file() or bool(_notes(path))


def predicted_lines(path: Path) -> list[str]:
    """The boxes of all images, by class."""
    if (path / "predictions.json").is_file():
        return json_lines(path / "predictions.json")
    notes = _notes(path)
    boxes = Counter(note["classes"][label] for note in notes for label in note["instances"].values())
    hidden = sum(len(note["hidden"]) for note in notes)
    rows: Rows = [
        ("images", f"{len(notes)}, {sum(not note['instances'] for note in notes)} without a box"),
        *[(name, f"{boxes[name]} boxes") for name in notes[0]["classes"]],
        ("hidden", f"{hidden} boxes that better ones cover" if hidden else ""),
    ]
    return aligned(f"{path}: masks of the boxes that predict found", rows)


def _notes(path: Path) -> list[dict[str, Any]]:
    """What lies beside the masks, see `formats.volumes.write_nifti`."""
    notes = []
    for file in sorted([*path.glob("*.json"), *path.glob("nifti/*.json")]):
        if file.with_suffix(".nii.gz").is_file():
            try:
                note = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                continue
            if isinstance(note, dict) and {"classes", "instances", "scores", "hidden"} <= note.keys():
                notes.append(note)
    return notes
