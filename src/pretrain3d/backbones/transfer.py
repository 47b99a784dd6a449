"""The file in which a backbone travels from pretraining to detection: written whole, loaded strictly.

``{"format", "version", "backbone": {"name", **arguments}, "preprocessing", "source", "corpus": of the cases trained on
or None, "weights": {name: tensor}, "fingerprint": of the weights}``, plain values throughout, readable with
``torch.load(path, weights_only=True)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain3d.backbones import BACKBONES
from pretrain3d.backbones.adaptation import ADAPTATIONS, adapt_channels, adapt_positions, adapt_stages
from pretrain3d.backbones.checkpoints.hub import local
from pretrain3d.backbones.torchfile import read_torch
from pretrain3d.config import UserError, suggestion
from pretrain3d.files import replacing
from pretrain3d.registry import build

FORMAT = "pretrain3d-backbone"
VERSION = 1
SHOWN = 3  # names in an error


@dataclass
class Report:
    """What a transfer did; every tensor of the backbone was loaded, or the transfer raised.

    Attributes:
        path: the file.
        fingerprint: of the weights in the file.
        tensors, parameters: how many were loaded.
        adaptations: what was changed to fit, one sentence each; empty when nothing was.
        preprocessing, source: as the file states them.
        corpus: of the file, for `data.leakage`; not part of `to_dict`.
    """

    path: str
    fingerprint: str
    tensors: int
    parameters: int
    adaptations: list[str] = field(default_factory=list)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, those that a result shows."""
        return {key: value for key, value in asdict(self).items() if key != "corpus"}

    def __str__(self) -> str:
        changes = "; ".join(self.adaptations) or "nothing adapted"
        return (
            f"loaded {self.tensors} tensors ({self.parameters:,} parameters) from {self.path}, "
            f"fingerprint {self.fingerprint}, {changes}"
        )


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of the SHA-256 over a state dict: names (sorted), types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def export_weights(
    path: str | Path,
    backbone_node: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    preprocessing: Mapping[str, Any],
    source: Mapping[str, Any],
    corpus: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the file, atomically.

    Args:
        path: where; its folder is made.
        backbone_node: ``{"name": ..., **arguments}``, everything that builds the backbone.
        weights: the state dict of that backbone.
        preprocessing: spacing, intensity, channels, patch size; plain values.
        source: run, commit, step, method, data hash, licence; plain values.
        corpus: which cases the weights have seen, `data.leakage.Corpus.to_dict`; None where nobody knows.

    Returns:
        What was written, as `load_export` gives it back.

    Raises:
        UserError: the weights are not those of that backbone.
    """
    path = Path(path)
    check_names(meta_backbone(backbone_node).state_dict(), weights, f"cannot export to {path}", "the checkpoint")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "backbone": dict(backbone_node),
        "preprocessing": dict(preprocessing),
        "source": dict(source),
        "corpus": None if corpus is None else dict(corpus),
        # clones: a view would drag its whole storage into the file
        "weights": {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()},
        "fingerprint": fingerprint(weights),
    }
    _check_plain({key: value for key, value in content.items() if key != "weights"}, "export")
    with replacing(path) as temporary:
        torch.save(content, temporary)
    return content


def is_checkpoint(content: Mapping[str, Any]) -> bool:
    """Whether a file of `torch.save` holds a checkpoint of `fit`."""
    return "pretrain3d" in content and "state_dict" in content


def load_export(path: str | PathLike[str]) -> dict[str, Any]:
    """Reads a file of `export_weights` on the CPU; executes nothing that is stored in it.

    Args:
        path: the file, or ``hf://owner/name[/file]`` on the hub.

    Raises:
        UserError: no such file, not an export, of a newer version, or damaged.
    """
    file = local(path)
    if file.is_dir():
        raise UserError(f"{path} is a folder; `pretrain3d export RUN out=FILE` writes the file of a run")
    if not file.is_file():
        raise UserError(f"{path}: no such file; `pretrain3d export RUN out={path}` writes one")
    content = read_torch(file, str(path))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        keys = f"it holds {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else "it is no table"
        hint = f"; `pretrain3d import {path} out=FILE` may read it" if isinstance(content, dict) else ""
        if isinstance(content, dict) and is_checkpoint(content):
            hint = "; it is a checkpoint, `pretrain3d export RUN out=FILE` writes the file of its run"
        raise UserError(f"{path} is not a file of `pretrain3d export` ({keys}){hint}")
    if content.get("version") != VERSION:
        raise UserError(f"{path} has format version {content.get('version')}, this release reads version {VERSION}")
    missing = [key for key in ("backbone", "preprocessing", "source", "weights", "fingerprint") if key not in content]
    if missing:
        raise UserError(f"{path} is incomplete: it lacks {', '.join(missing)}; export it again")
    mark = fingerprint(content["weights"])
    if mark != content["fingerprint"]:  # torch does not notice a flipped bit
        raise UserError(f"{path} is damaged: fingerprint {mark} instead of {content['fingerprint']}; export it again")
    return content


def load_backbone(path: str | PathLike[str]) -> nn.Module:
    """The backbone of an export, with its weights, on the CPU, in eval mode.

    Raises:
        UserError: see `load_export`; or the weights are not those of the backbone that the file names.
    """
    content = load_export(path)
    backbone = build(BACKBONES, content["backbone"], "backbone")
    check_names(backbone.state_dict(), content["weights"], str(path), "the file")
    backbone.load_state_dict(content["weights"])
    return backbone.eval()


def transfer_into(backbone: nn.Module, path: str | PathLike[str], adapt: Sequence[str] = ()) -> Report:
    """Loads the weights of an export into a backbone, all of them or none.

    Args:
        backbone: fulfils `contract.Backbone`; it is changed in place.
        path: a file of `export_weights`.
        adapt: what may be changed to fit. ``"channels"``: a file of one input channel for an image of C channels;
            the first kernels are repeated over the channels and divided by C. ``"positions"``: learned positions of
            another ``image_size`` are interpolated, trilinearly. For networks of stages: ``"stages"``: the first ones
            of a deeper file are taken. ``"kernels"``: kernels are averaged along axes on which the model's have size 1.
            ``"strides"``: weights are taken as they are where the model's stages have other strides.

    Source: what nnDetection's and nnU-Net's dynamic loaders do (nnDetection, branch finetuning, docs/finetuning.md).

    Raises:
        UserError: the file and the backbone differ; names the first differences with both values.
    """
    for name in adapt:
        if name not in ADAPTATIONS:
            hint = f"{suggestion(name, ADAPTATIONS) or ';'} Known: {', '.join(ADAPTATIONS)}"
            raise UserError(f"transfer: unknown adaptation {name!r}{hint}")
    content = load_export(path)
    stored = meta_backbone(content["backbone"])
    weights = dict(content["weights"])
    check_names(stored.state_dict(), weights, str(path), "the file")
    arguments, adaptations = adapt_stages(stored, backbone, weights, adapt)
    _check_arguments(stored, arguments, backbone, path)
    adaptations += adapt_channels(stored, backbone, weights, path, adapt)
    adaptations += adapt_positions(stored, backbone, weights, path, adapt)
    check_names(backbone.state_dict(), weights, f"{path} does not fit", "the file")
    backbone.load_state_dict(weights)
    return Report(
        path=str(path),
        fingerprint=content["fingerprint"],
        tensors=len(weights),
        parameters=sum(tensor.numel() for tensor in weights.values()),
        adaptations=adaptations,
        preprocessing=content["preprocessing"],
        source=content["source"],
        corpus=content.get("corpus"),
    )


def meta_backbone(node: Mapping[str, Any]) -> Any:
    """The backbone of a node without numbers: its arguments, and the names and shapes of its weights."""
    with torch.device("meta"):
        return build(BACKBONES, node, "backbone")


def _check_arguments(stored: Any, arguments: Mapping[str, Any], backbone: Any, path: object) -> None:
    """Weights of equal shape can still mean another network (strides, say): the arguments must agree too.

    Args:
        stored: the network of the file.
        arguments: its arguments, adapted.
        backbone: the network of the model.
        path: for errors.
    """
    if type(stored) is not type(backbone):
        raise UserError(f"{path} holds a {type(stored).__name__}, the model's backbone is a {type(backbone).__name__}")
    adapted = {"in_channels", *(["image_size"] if hasattr(stored, "position_weights") else [])}
    free = stored.runtime_arguments | adapted
    differing = [
        f"{key} is {value} in the file and {backbone.arguments[key]} in the model"
        for key, value in arguments.items()
        if key not in free and value != backbone.arguments[key]
    ]
    if differing:
        or_else = " (transfer.adapt may change stages, kernels and strides)" if "strides" in arguments else ""
        raise UserError(f"{path} does not fit: {'; '.join(differing[:SHOWN])}; set `backbone` as in the file{or_else}")


def check_names(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str, giver: str) -> None:
    """Strict: the same names, the same shapes."""
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    shapes = [
        f"{name} is {tuple(given[name].shape)} in {giver} and {tuple(wanted[name].shape)} in the backbone"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    problems = [
        *([f"{giver} lacks {len(missing)} tensors ({', '.join(missing[:SHOWN])})"] if missing else []),
        *([f"{giver} has {len(unexpected)} unknown tensors ({', '.join(unexpected[:SHOWN])})"] if unexpected else []),
        *shapes[:SHOWN],
    ]
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")


def _check_plain(value: Any, where: str) -> None:
    """Only what ``weights_only=True`` reads back: a file that cannot be loaded must not be written."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_plain(item, where)
    else:
        plain = value is None or type(value) in (bool, int, float, str)
        assert plain, f"{where} is a {type(value).__name__}; plain values only"
