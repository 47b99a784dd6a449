"""What `transfer.adapt` may change of weights that were made for another network; each says what it did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pretrain3d.config import UserError

ADAPTATIONS = ("channels", "positions", "stages", "kernels", "strides")


def adapt_stages(
    stored: Any, backbone: Any, weights: dict[str, Tensor], adapt: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Changes ``weights`` of a network of stages in place as far as that is allowed.

    Returns:
        The arguments of the network that the weights now belong to, and what was done.
    """
    arguments = dict(stored.arguments)
    done: list[str] = []
    if type(stored) is not type(backbone) or "strides" not in arguments:
        return arguments, done
    model = backbone.arguments
    old, new = len(arguments["strides"]), len(model["strides"])
    if "stages" in adapt and new < old:
        arguments |= {key: value[:new] for key, value in arguments.items() if isinstance(value, list)}
        dropped = [name for name in weights if name.startswith("stages.") and int(name.split(".")[1]) >= new]
        for name in dropped:
            del weights[name]
        done.append(f"stages: the first {new} of {old}, {len(dropped)} tensors left out")
    if "kernels" in adapt and "kernels" in arguments:
        arguments["kernels"], averaged = _averaged_kernels(arguments["kernels"], model["kernels"], weights)
        done += [f"kernels: averaged along {', '.join(averaged)}"] if averaged else []
    if "strides" in adapt and arguments["strides"] != model["strides"] and len(arguments["strides"]) == new:
        done.append(f"strides: {model['strides']} instead of {arguments['strides']}")
        arguments["strides"] = model["strides"]
    return arguments, done


def _averaged_kernels(
    kernels: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], weights: dict[str, Tensor]
) -> tuple[list[list[int]], list[str]]:
    """Averages ``weights`` in place along the axes on which kernels are wanted to be 1: the kernels, what was done."""
    result, done = [list(kernel) for kernel in kernels], []
    for stage, (kernel, other) in enumerate(zip(kernels, wanted, strict=False)):
        axes = [axis for axis in range(3) if other[axis] == 1 < kernel[axis]]
        if not axes:
            continue
        prefixes = (f"stages.{stage}.", "stem.") if stage == 0 else (f"stages.{stage}.",)
        for name, weight in list(weights.items()):
            if name.startswith(prefixes) and list(weight.shape[2:]) == list(kernel):  # not the 1 x 1 x 1 of a skip
                weights[name] = weight.mean([2 + axis for axis in axes], keepdim=True)
        result[stage] = [1 if axis in axes else size for axis, size in enumerate(kernel)]
        done.append(f"{' and '.join('xyz'[axis] for axis in axes)} in stage {stage}")
    return result, done


def adapt_channels(
    stored: Any, backbone: Any, weights: dict[str, Tensor], path: object, adapt: Sequence[str]
) -> list[str]:
    """Changes ``weights`` in place where the image has more channels and that is allowed; says what it did."""
    old, new = stored.in_channels, backbone.in_channels
    if old == new:
        return []
    differ = f"{path} does not fit: in_channels is {old} in the file and {new} in the model"
    if "channels" not in adapt:
        raise UserError(f"{differ}; transfer.adapt=[channels] repeats the first kernels of a 1-channel file")
    if old != 1:
        raise UserError(f"{differ}; only a file of 1 channel can be adapted")
    for name in backbone.input_weights:
        weight = weights[name]  # (out, 1, kx, ky, kz)
        weights[name] = weight.repeat(1, new, *[1] * (weight.ndim - 2)) / new
    return [f"channels: {', '.join(backbone.input_weights)} repeated over {new} channels and divided by {new}"]


def adapt_positions(
    stored: Any, backbone: Any, weights: dict[str, Tensor], path: object, adapt: Sequence[str]
) -> list[str]:
    """Changes ``weights`` in place where learned positions are for another grid; says what it did."""
    old, new = stored.arguments.get("image_size"), backbone.arguments.get("image_size")
    names = getattr(backbone, "position_weights", ())
    if old == new or not names:
        return []
    if "positions" not in adapt:
        raise UserError(
            f"{path} does not fit: image_size is {old} in the file and {new} in the model; set backbone.image_size as "
            "in the file, or transfer.adapt=[positions] interpolates the learned positions"
        )
    wanted = backbone.state_dict()
    for name in names:
        grid = wanted[name].shape[1:]  # the weight is (C, x, y, z)
        resized = F.interpolate(weights[name][None].float(), size=grid, mode="trilinear", align_corners=False)[0]
        weights[name] = resized.to(weights[name].dtype)
    return [f"positions: {', '.join(names)} interpolated from image_size {old} to {new}"]
