"""ResEnc in released files (nnssl, nnU-Net v2): names, arguments, and both ways between them and ours.

Released files hold every convolution and norm twice, as ``.conv``/``.norm`` and as ``.all_modules.0``/``.1``: two names
of one tensor, except in files of sparse pretraining, where only the latter was trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from pretrain3d.backbones.checkpoints.contract import Ledger, reported, shown, table
from pretrain3d.backbones.contract import triple
from pretrain3d.backbones.stages import NORM_EPS, SLOPE
from pretrain3d.config import UserError

ENCODER, STEM = "encoder.stages", "encoder.stem"
CLASSES = ("ResidualEncoderUNet", "ResEncL", "NoSkipResEncL")
SHAPES = {  # channels, blocks, strides; kernels of 3
    "resenc_l": ([32, 64, 128, 256, 320, 320], [1, 3, 4, 6, 6, 6], [1, 2, 2, 2, 2, 2]),
    "resenc_s": ([32, 64, 128, 256, 320, 320], [1, 2, 2, 2, 2, 2], [1, 2, 2, 2, 2, 2]),
    "resenc_xxs": ([8, 16, 32, 64], [1, 1, 2, 2], [1, 2, 2, 2]),
    "resenc_xs": ([8, 16, 32, 64, 96], [1, 1, 2, 2, 2], [1, 2, 2, 2, 2]),
}
_FREE = {  # arguments of the reference that change no feature of the encoder at inference, or are read elsewhere
    "n_stages", "features_per_stage", "kernel_sizes", "strides", "n_blocks_per_stage", "n_conv_per_stage_decoder",
    "norm_op_kwargs", "nonlin_kwargs", "conv_op", "return_skips", "deep_supervision", "stochastic_depth_p",
    "squeeze_excitation_reduction_ratio", "num_classes", "input_channels", "input_shape", "patch_size", "batch_size",
    "arch_kwargs_requiring_import", "allow_init", "dropout_op_kwargs",
}  # fmt: skip
_FIXED: dict[str, tuple[Any, ...]] = {  # what ours computes, by the end of a dotted name
    "conv_bias": (True,), "norm_op": (None, "InstanceNorm3d"), "nonlin": (None, "LeakyReLU"), "dropout_op": (None,),
    "block": (None, "BasicBlockD"), "bottleneck_channels": (None,), "disable_default_stem": (False,),
    "pool_type": (None, "conv"), "squeeze_excitation": (False,), "stem_channels": (None,), "pool": ("conv",),
    "nonlin_first": (False,),
}  # fmt: skip


def arguments_of(class_name: str, kwargs: Mapping[str, Any] | None, in_channels: int, where: str) -> dict[str, Any]:
    """Arguments of `ResEnc` from those of the reference; ResEnc-L where a file names its class only.

    Raises:
        UserError: a class or a setting whose features ours would not reproduce.
    """
    kind = class_name.rpartition(".")[2]
    if kind not in CLASSES:
        raise UserError(f"{where}: the network is a {class_name}; these can be imported: {', '.join(CLASSES)}")
    if not kwargs:
        if kind == "ResidualEncoderUNet":
            raise UserError(f"{where}: arch_kwargs is null and {class_name} has no standard size; fill it in")
        return {**_shape("resenc_l"), "in_channels": in_channels}
    channels, blocks, strides, kernels = stages_of(kwargs, "n_blocks_per_stage", where)
    return {"channels": channels, "blocks": blocks, "strides": strides, "kernels": kernels, "in_channels": in_channels}


def stages_of(kwargs: Mapping[str, Any], count: str, where: str, free: Sequence[str] = ()) -> tuple[list[Any], ...]:
    """Channels, blocks or convolutions, strides and kernels per stage, of ``arch_kwargs`` that ours can follow.

    Args:
        kwargs: of the reference.
        count: its key of the number of blocks or convolutions per stage.
        where: for errors.
        free: further keys that may hold anything.

    Raises:
        UserError: an entry that is not one number per stage, or a setting whose features ours would not reproduce.
    """
    for key in ("features_per_stage", count, "kernel_sizes", "strides"):
        value = kwargs.get(key)
        if not _whole(value) or (key == "features_per_stage" and isinstance(value, Integral)):
            raise UserError(f"{where}: arch_kwargs.{key} is {shown(value)}; it must be a list, one number per stage")
    for key, value in kwargs.items():
        if key in _FREE or key == count or key in free:
            continue
        wanted = _FIXED.get(key)
        plain = value.rpartition(".")[2] if isinstance(value, str) else value
        first = kwargs["features_per_stage"][0]
        if wanted is None or not (plain in wanted or (key == "stem_channels" and plain == first)):
            raise UserError(f"{where}: arch_kwargs.{key} is {value}; pretrain3d has no such variant of the network")
    eps = table(kwargs.get("norm_op_kwargs") or {}, "norm_op_kwargs", where).get("eps", NORM_EPS)
    slope = table(kwargs.get("nonlin_kwargs") or {}, "nonlin_kwargs", where).get("negative_slope", SLOPE)
    if eps != NORM_EPS or slope != SLOPE:
        raise UserError(f"{where}: norm eps {eps} and slope {slope}; pretrain3d's are {NORM_EPS} and {SLOPE}")
    stages = len(kwargs["features_per_stage"])
    counts, kernels, strides = (
        value if isinstance(value, (list, tuple)) else [value] * stages
        for value in (kwargs[count], kwargs["kernel_sizes"], kwargs["strides"])
    )
    if any(isinstance(value, (list, tuple)) and len(value) != 3 for value in [*kernels, *strides]):
        raise UserError(f"{where}: kernels {list(kernels)} are not those of a 3D network")
    channels = [int(number) for number in kwargs["features_per_stage"]]
    return channels, [int(number) for number in counts], _triples(strides), _triples(kernels)


def node_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``{"name", ...}``: a named variant where it is one."""
    for name in SHAPES:
        if all(arguments[key] == value for key, value in _shape(name).items()):
            return {"name": name, "in_channels": arguments["in_channels"]}
    shape = ("channels", "blocks", "strides", "kernels", "in_channels")
    return {"name": "resenc", **{key: arguments[key] for key in shape}}


def take_weights(ledger: Ledger, encoder: str, stem: str) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of `ResEnc` out of a file, and what there is to say about it.

    Args:
        ledger: the file's tensors.
        encoder, stem: prefixes of the stages and of the stem.
    """
    inside = stem.startswith(f"{encoder}.")
    names = [*ledger.under(stem), *(n for n in ledger.under(encoder) if not (inside and n.startswith(f"{stem}.")))]

    def ours(name: str) -> str:
        if name.startswith(f"{stem}."):
            return "stem." + name.removeprefix(f"{stem}.").removeprefix("convs.0.")
        return "stages." + re.sub(r"\.skip\.\d+\.", ".skip.", name.removeprefix(f"{encoder}."))

    return take_once(ledger, names, ours)


def take_once(ledger: Ledger, names: Sequence[str], ours: Callable[[str], str]) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict out of tensors that a file may hold twice, and what there is to say about it.

    Args:
        ledger: the file's tensors.
        names: those that are taken.
        ours: our name for a tensor named with ``.conv.`` and ``.norm.``.
    """
    state: dict[str, Tensor] = {}
    differing: list[str] = []
    for name in sorted(names, key=lambda name: ".all_modules." not in name):  # those first: they are the trained ones
        wanted = ours(re.sub(r"\.all_modules\.([01])\.", lambda m: (".conv.", ".norm.")[int(m[1])], name))
        if wanted not in state:
            state[wanted] = ledger.take(name)
        elif not torch.equal(ledger.duplicate(name), state[wanted]):
            differing.append(name)
    notes = []
    if differing:
        notes.append(
            f"{len(differing)} tensors differ from their second name, .all_modules, which was taken "
            f"({reported(differing)}): only that one is trained in sparse pretraining"
        )
    return state, notes


def released_weights(weights: Mapping[str, Tensor], strides: list[list[int]]) -> dict[str, Tensor]:
    """The names of a released file, each tensor under both, from our state dict."""
    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.startswith("stem."):
            prefix = f"{STEM}.convs.0.{name.removeprefix('stem.')}"
        else:
            _, stage, _ = name.split(".", 2)
            index = int(max(strides[int(stage)]) > 1)  # 0 is average pooling where the block is strided
            prefix = f"encoder.{name}".replace(".skip.", f".skip.{index}.")
        block, kind, what = prefix.rsplit(".", 2)
        out[prefix] = tensor
        out[f"{block}.all_modules.{('conv', 'norm').index(kind)}.{what}"] = tensor
    return out


def kwargs_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arch_kwargs`` as nnDetection's and nnU-Net's loaders read them."""
    stages = len(arguments["channels"])
    return {
        "n_stages": stages,
        "features_per_stage": arguments["channels"],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": arguments["kernels"],
        "strides": arguments["strides"],
        "n_blocks_per_stage": arguments["blocks"],
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": NORM_EPS, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def _triples(values: Sequence[Any]) -> list[list[int]]:
    return [list(triple(value)) for value in values]


def _whole(value: Any) -> bool:
    """Whether this is a whole number, or a list of such or of lists of such."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_whole(entry) for entry in value)
    return isinstance(value, Integral)


def _shape(name: str) -> dict[str, Any]:
    channels, blocks, strides = SHAPES[name]
    return {"channels": channels, "blocks": blocks, "strides": [[s] * 3 for s in strides],
            "kernels": [[3] * 3 for _ in strides]}  # fmt: skip
