"""Checkpoints of nnU-Net v2: the encoder of a ResEnc or a plain U-Net, its size from the plans in the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain3d.backbones.checkpoints import released_plainconv, released_resenc
from pretrain3d.backbones.checkpoints.contract import Imported, Ledger, Wishes, listed, permutation_of, table, three
from pretrain3d.backbones.checkpoints.nnssl import zscore
from pretrain3d.config import UserError


def recognises(content: Mapping[str, Any]) -> bool:
    """Whether this is a checkpoint of nnU-Net v2."""
    init = content.get("init_args")
    return "network_weights" in content and isinstance(init, Mapping) and "plans" in init


def convert(content: Mapping[str, Any], ledger_of: Any, wishes: Wishes, path: str) -> Imported:
    """Node, weights and preprocessing of a file; arguments as in `nnssl.convert`.

    Raises:
        UserError: another network than a 3D ResEnc or plain U-Net, or plans without its architecture.
    """
    init = content["init_args"]
    plans = table(init["plans"], "plans", path)
    configuration = _configuration(plans, str(init.get("configuration")), path)
    class_name, kwargs = _architecture(configuration, path)
    ledger: Ledger = ledger_of(content["network_weights"])
    if class_name.rpartition(".")[2] == released_plainconv.NNUNET_CLASS:
        node, weights, notes = released_plainconv.take_nnunet(ledger, kwargs, path)
    else:
        weights, notes = released_resenc.take_weights(ledger, released_resenc.ENCODER, released_resenc.STEM)
        first = weights.get("stem.conv.weight")
        channels = 1 if first is None else int(first.shape[1])
        node = released_resenc.node_of(released_resenc.arguments_of(class_name, kwargs, channels, path))
    ledger.drop(list(ledger.left))
    patch = three(configuration.get("patch_size"), "patch_size", path)
    intensity = _intensity(configuration, plans, notes, path)
    if any(len(set(values)) > 1 for values in [*node.get("kernels", []), *node.get("strides", [])]):
        notes.append("its kernels or strides differ between axes, which nnU-Net orders z, y, x: axes=zyx turns them")
    preprocessing = {
        "spacing_mm": three(configuration.get("spacing"), "spacing", path),
        "patch_size": None if patch is None else [int(value) for value in patch],
        "intensity": intensity,
    }
    trainer = str(content.get("trainer_name") or "nnUNetTrainer")
    source = {"method": trainer, "data": str(plans.get("dataset_name", "")), "citations": []}
    return Imported(node, weights, preprocessing, source, permutation=permutation_of(plans, path), notes=notes)


def _configuration(plans: Mapping[str, Any], name: str, path: str) -> dict[str, Any]:
    known = table(plans.get("configurations") or {}, "configurations", path)
    chain: list[Mapping[str, Any]] = []
    while name in known and len(chain) <= len(known):
        chain.append(table(known[name], f"configuration {name}", path))
        name = str(known[name].get("inherits_from"))
    if not chain:
        raise UserError(f"{path}: its plans have no configuration {name!r}; they have {', '.join(known) or 'none'}")
    merged: dict[str, Any] = {}
    for node in reversed(chain):
        merged |= node
    return merged


def _architecture(configuration: Mapping[str, Any], path: str) -> tuple[str, Mapping[str, Any]]:
    """Class and ``arch_kwargs``; before nnU-Net 2.4 they were spread over the configuration."""
    node = table(configuration.get("architecture") or {}, "architecture", path)
    try:
        if node:
            return str(node["network_class_name"]), table(node["arch_kwargs"] or {}, "arch_kwargs", path)
        kernels = configuration["conv_kernel_sizes"]
        base, top = configuration["UNet_base_num_features"], configuration["unet_max_num_features"]
        name = str(configuration["UNet_class_name"])
        count = "n_conv_per_stage" if name == released_plainconv.NNUNET_CLASS else "n_blocks_per_stage"
        return name, {
            "features_per_stage": [min(base * 2**stage, top) for stage in range(len(kernels))],
            "kernel_sizes": kernels,
            "strides": configuration["pool_op_kernel_sizes"],
            count: configuration["n_conv_per_stage_encoder"],
        }
    except KeyError as error:
        raise UserError(f"{path}: its plans do not describe the network, {error} is missing") from error


def _intensity(
    configuration: Mapping[str, Any], plans: Mapping[str, Any], notes: list[str], path: str
) -> dict[str, Any] | None:
    schemes = [str(scheme) for scheme in listed(configuration.get("normalization_schemes"))]
    if schemes and set(schemes) == {"ZScoreNormalization"}:
        return zscore(configuration)
    if schemes and set(schemes) == {"CTNormalization"}:
        key = "foreground_intensity_properties_per_channel"
        names = {"low": "percentile_00_5", "high": "percentile_99_5", "mean": "mean", "std": "std"}
        try:
            known = [plans[key][str(channel)] for channel in range(len(schemes))]
            return {"scheme": "ct"} | {ours: [float(c[theirs]) for c in known] for ours, theirs in names.items()}
        except (KeyError, TypeError, ValueError) as error:
            told = ", ".join(names.values())
            raise UserError(
                f"{path}: its plans lack numbers for CTNormalization: {told} per channel in {key}"
            ) from error
    notes.append(f"normalisation {schemes or 'not stated'} has no counterpart here; give intensity=...")
    return None
