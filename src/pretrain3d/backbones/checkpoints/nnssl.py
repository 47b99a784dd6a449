"""Files of nnssl: OpenMind, the Missing Piece, nnFoundation, MultiTalent; read, and written for their loaders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pretrain3d.backbones.checkpoints import released_plainconv, released_primus, released_resenc
from pretrain3d.backbones.checkpoints.axes import REVERSED, permuted
from pretrain3d.backbones.checkpoints.contract import (
    Imported,
    Ledger,
    Wishes,
    citations_of,
    listed,
    method_of,
    permutation_of,
    table,
    three,
)
from pretrain3d.backbones.primus import Primus
from pretrain3d.backbones.resenc import ResEnc
from pretrain3d.backbones.transfer import meta_backbone
from pretrain3d.config import UserError, suggestion
from pretrain3d.files import replacing

PLAN = "nnssl_adaptation_plan"
OURS = "pretrain3d"  # where a file that we wrote keeps what the format has no place for


def recognises(content: Mapping[str, Any]) -> bool:
    """Whether this is a file of nnssl."""
    return PLAN in content and "network_weights" in content


def is_ours(content: Mapping[str, Any]) -> bool:
    """Whether this is a file that `write` wrote."""
    return recognises(content) and OURS in content


def convert(content: Mapping[str, Any], ledger_of: Any, wishes: Wishes, path: str) -> Imported:
    """Node, weights and preprocessing of a file.

    Args:
        content: the file.
        ledger_of: makes the `Ledger` that the caller closes from the tensors.
        wishes: what the user says.
        path: for errors.

    Raises:
        UserError: a plan without what is needed, or an architecture that we do not have.
    """
    plan = table(content[PLAN], PLAN, path)
    ledger: Ledger = ledger_of(content["network_weights"])
    stem = _stem(plan, ledger, wishes, path)
    about = table(plan.get("architecture_plans") or {}, "architecture_plans", path)
    name, kwargs = str(about.get("arch_class_name")), table(about.get("arch_kwargs") or {}, "arch_kwargs", path)
    mark = content.get(OURS) or {}
    if released_plainconv.is_nndetection(ledger):
        node, weights, notes = released_plainconv.take_nndetection(ledger, stem, kwargs, path)
    elif "Primus" in name:
        tokens = wishes.token_order or mark.get("token_order") or "hwd"
        sizes = [plan.get("pretrain_patch_size"), _configuration(plan, path).get("patch_size"),
                 plan.get("recommended_downstream_patchsize")]  # fmt: skip
        encoder = _encoder(plan, ledger, path)
        node, weights, notes = released_primus.take(ledger, encoder, stem, kwargs, sizes, tokens, path)
        notes.append(f"order of the tokens: {tokens}")
    else:
        weights, notes = released_resenc.take_weights(ledger, _encoder(plan, ledger, path), stem)
        first = weights.get("stem.conv.weight")
        channels = plan.get("pretrain_num_input_channels", 1) if first is None else first.shape[1]
        node = released_resenc.node_of(released_resenc.arguments_of(name, kwargs, int(channels), path))
    others = [f for f in ledger.under(stem.rpartition(".")[0]) if _is_other_stem(f, stem, plan)]
    ledger.drop(others, "other stems")
    ledger.drop(list(ledger.left))  # by contract all that lies outside the two subtrees: decoders, heads, tokens
    preprocessing = _preprocessing(plan, notes, path)
    order = permutation_of(_pretrain_plan(plan, path), path)
    result = Imported(node, weights, preprocessing, _source(content, plan), permutation=order, notes=notes)
    if mark:  # a file of ours
        if mark["axes"] == "zyx":
            result = permuted(result, REVERSED)
        result.backbone, result.preprocessing, result.source = mark["backbone"], mark["preprocessing"], mark["source"]
        result.corpus = mark["corpus"]
        result.permutation = (0, 1, 2)  # its axes are known, whatever is asked for
    return result


def write(path: str | Path, export: Mapping[str, Any], axes: str = "xyz") -> None:
    """Writes an export (`transfer.load_export`) as a file for nnDetection's and nnU-Net's loaders, atomically.

    It holds what they load, encoder and stem. Tokens are in the order "whd", that of the networks they build now.

    Args:
        path: where.
        export: content of an export.
        axes: "zyx" turns the network for loaders whose arrays are z, y, x; "xyz" leaves it as it is.

    Raises:
        UserError: neither a ResEnc nor a Primus.
    """
    imported = Imported(export["backbone"], export["weights"], export["preprocessing"], export["source"])
    if axes == "zyx":
        imported = permuted(imported, REVERSED)
    backbone = meta_backbone(imported.backbone)
    if not isinstance(backbone, (ResEnc, Primus)):
        raise UserError(f"format=nnssl holds a ResEnc or a Primus, not a {imported.backbone['name']}")
    patch = imported.preprocessing.get("patch_size") or [160, 160, 160]
    content = {
        "network_weights": _released(backbone, imported.weights),
        PLAN: _plan(backbone, imported.preprocessing, imported.source, list(patch)),
        "citations": [],
        OURS: {
            **{key: export[key] for key in ("backbone", "preprocessing", "source")},
            "corpus": export.get("corpus"),
            "token_order": "whd",
            "axes": axes,
        },
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)


def _released(backbone: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if isinstance(backbone, Primus):
        return released_primus.released_weights(weights)
    return released_resenc.released_weights(weights, backbone.arguments["strides"])


def _plan(
    backbone: Any, preprocessing: Mapping[str, Any], source: Mapping[str, Any], patch: list[int]
) -> dict[str, Any]:
    arguments = backbone.arguments
    if isinstance(backbone, Primus):
        names, kwargs, imports = released_primus, released_primus.kwargs_of(arguments), []
        node = released_primus.node_of(arguments)["name"]
        class_name = released_primus.CLASSES.get(node, "PrimusX")
        in_projection, positions = [f"{names.STEM}.proj"], f"{names.ENCODER}.pos_embed"
        patch = list(arguments["image_size"])  # their loaders take the grid of the learned positions from it
        encoder, stem = names.ENCODER, names.STEM
    else:
        kwargs, imports = released_resenc.kwargs_of(arguments), ["conv_op", "norm_op", "dropout_op", "nonlin"]
        class_name = "ResidualEncoderUNet"
        encoder, stem, positions = released_resenc.ENCODER, released_resenc.STEM, None
        in_projection = [f"{stem}.convs.0.conv", f"{stem}.convs.0.all_modules.0"]
    spacing = preprocessing.get("spacing_mm")
    configuration = {
        "data_identifier": str(source.get("data", "")), "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": "onemmiso" if spacing == [1.0, 1.0, 1.0] else "median" if spacing else "noresample",
        "spacing": spacing, "normalization_schemes": ["ZScoreNormalization"] * arguments["in_channels"],
        "use_mask_for_norm": [False] * arguments["in_channels"], "patch_size": patch,
    }  # fmt: skip
    return {
        "architecture_plans": {
            "arch_class_name": class_name, "arch_kwargs": kwargs, "arch_kwargs_requiring_import": imports,
        },
        "pretrain_plan": {
            "dataset_name": str(source.get("data", "")), "plans_name": "pretrain3d",
            "original_median_spacing_after_transp": spacing, "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "experiment_planner_used": "pretrain3d",
            "configurations": {configuration["spacing_style"]: configuration},
        },
        "pretrain_num_input_channels": arguments["in_channels"],
        "recommended_downstream_patchsize": patch,
        "key_to_encoder": encoder, "key_to_stem": stem, "keys_to_in_proj": in_projection, "key_to_lpe": positions,
    }  # fmt: skip


def _encoder(plan: Mapping[str, Any], ledger: Ledger, path: str) -> str:
    encoder = plan.get("key_to_encoder")
    if not encoder:
        raise UserError(f"{path}: its plan lacks key_to_encoder, so nothing says where the encoder is")
    if not ledger.under(str(encoder)):
        raise UserError(f"{path}: key_to_encoder is {str(encoder)!r}, but no tensor of the file lies there")
    return str(encoder)


def _stem(plan: Mapping[str, Any], ledger: Ledger, wishes: Wishes, path: str) -> str:
    stem = str(wishes.stem or plan.get("key_to_stem") or "")
    if not stem:
        raise UserError(f"{path}: its plan lacks key_to_stem, so nothing says where the input layers are")
    if not ledger.under(stem):
        parents = [name.rpartition(".")[0] for name in (stem, str(plan.get("key_to_stem")))]
        parent = next((name for name in parents if name and ledger.under(name)), "")
        depth = len(parent.split("."))
        known = sorted({".".join(n.split(".")[: depth + 1]) for n in ledger.under(parent)}) if parent else []
        hint, there = suggestion(stem, known) or ";", ", ".join(known[:8]) or "none"
        raise UserError(f"{path}: no tensor lies under the stem {stem!r}{hint} there are {there}")
    return stem


def _is_other_stem(name: str, stem: str, plan: Mapping[str, Any]) -> bool:
    """MultiTalent: a stem per data set beside the chosen one, ``encoder.stem.<id>``."""
    parent = stem.rpartition(".")[0]
    default = str(plan.get("key_to_stem"))
    is_one_of_many = parent.endswith("stem") and default.rpartition(".")[0] == parent
    return is_one_of_many and name.startswith(f"{parent}.")


def _configuration(plan: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    configurations = table(_pretrain_plan(plan, path).get("configurations") or {}, "configurations", path)
    return table(next(iter(configurations.values()), {}), "configuration", path)


def _pretrain_plan(plan: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    return table(plan.get("pretrain_plan") or {}, "pretrain_plan", path)


def _preprocessing(plan: Mapping[str, Any], notes: list[str], path: str) -> dict[str, Any]:
    configuration = _configuration(plan, path)
    spacing = three(configuration.get("spacing"), "spacing", path)
    patch = three(configuration.get("patch_size"), "patch_size", path)
    schemes = {str(scheme) for scheme in listed(configuration.get("normalization_schemes"))}
    intensity = zscore(configuration) if schemes == {"ZScoreNormalization"} else None
    if intensity is None:
        notes.append(f"normalisation {sorted(schemes) or 'not stated'} has no counterpart here; give intensity=...")
    if spacing is None:
        notes.append("pretrained at the spacing of each image (no fixed one)")
    return {
        "spacing_mm": spacing,
        "patch_size": None if patch is None else [int(value) for value in patch],
        "intensity": intensity,
    }


def about_intensity(preprocessing: Mapping[str, Any]) -> str:
    """What there is to say where the plan of a file that `write` writes states another normalisation than the run's."""
    intensity = preprocessing.get("intensity") or {}
    if all(intensity.get(key) == value for key, value in zscore({}).items()):
        return ""
    own = ", ".join(f"{key}: {value}" for key, value in intensity.items() if value is not None) or "not known"
    return f"its plan says ZScoreNormalization of the whole image, but the intensity of the run is {own}"


def zscore(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """nnU-Net's ``ZScoreNormalization``: over the whole image, or over what is not 0 where its masks are used."""
    masked = all(listed(configuration.get("use_mask_for_norm")) or [False])
    return {"scheme": "zscore", "foreground": "body" if masked else "image",
            **dict.fromkeys(("low", "high", "mean", "std"))}  # fmt: skip


def _source(content: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    data = (plan.get("pretrain_plan") or {}).get("dataset_name") or ""
    citations = [
        text
        for entry in citations_of(content)
        for key in ("apa_citations", "bibtex_citations")
        for text in listed(entry.get(key))
    ]
    return {"method": method_of(content), "data": str(data), "citations": [str(text) for text in citations]}
