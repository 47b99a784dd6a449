"""Checkpoints and exported backbones, in lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain3d.backbones.checkpoints.importing import form_of
from pretrain3d.backbones.torchfile import read_torch
from pretrain3d.backbones.transfer import fingerprint, load_export
from pretrain3d.modules.base import NOTE
from pretrain3d.modules.checkpoint import read_checkpoint, used_weights
from pretrain3d.reporting.inspection.lines import Rows, aligned, components, flat


def weights_lines(path: Path) -> list[str]:
    """A checkpoint, an export, or weights of another framework."""
    content = read_torch(path, mmap=True)
    if isinstance(content, dict) and "weights" in content and "backbone" in content:
        return _export(path)
    ours = not isinstance(content, dict) or {"pretrain3d", "state_dict"} <= set(content)
    if not ours and (form := form_of(content)):
        plan = content.get("nnssl_adaptation_plan")
        about = plan.get("architecture_plans") if isinstance(plan, dict) else None
        weights = content.get("network_weights")
        return aligned(
            f"{path}: weights in the form {form}; `pretrain3d import {path} out=FILE` reads them",
            [
                ("architecture", about.get("arch_class_name") if isinstance(about, dict) else ""),
                ("tensors", len(weights) if isinstance(weights, dict) else ""),
            ],
        )
    return _checkpoint(path)


def _export(path: Path) -> list[str]:
    content = load_export(path)
    return aligned(f"{path}: exported backbone, version {content['version']}", _travelling(content, content["weights"]))


def _checkpoint(path: Path) -> list[str]:
    checkpoint = read_checkpoint(path)
    note = checkpoint[NOTE]
    swept = note.get("inference") or {}
    rows: Rows = [
        ("module", components(note["module"])),
        ("classes", ", ".join(note["classes"]) if note["kind"] == "detection" else ""),
        ("step", checkpoint.get("global_step", "unknown")),
        ("weights", f"{note['weights']} are used"),
        *_travelling(note, used_weights(checkpoint, "backbone")),
        *flat({key: swept[key] for key in ("metric", "value", "merging", "operating") if key in swept}, "sweep."),
    ]
    return aligned(f"{path}: checkpoint of a {note['kind']} module", rows)


def _travelling(content: Mapping[str, Any], weights: Mapping[str, Any]) -> Rows:
    """Backbone, preprocessing and source: what a checkpoint and an export have in common."""
    arguments = {key: value for key, value in content["backbone"].items() if key != "name"}
    return [
        ("backbone", f"{content['backbone']['name']} ({', '.join(f'{k}={v}' for k, v in arguments.items())})"),
        ("parameters", f"{sum(tensor.numel() for tensor in weights.values()):,} in the backbone"),
        ("fingerprint", fingerprint(weights)),
        *flat(content["preprocessing"], "preprocessing."),
        *flat(content["source"], "source."),
    ]
