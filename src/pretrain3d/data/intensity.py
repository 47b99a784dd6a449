"""Intensity augmentation: drawn in the worker, applied on the device to normalised patches.

Each sample is treated alone, with host numbers: only the operations that were drawn cost anything, nothing waits for
the device, and a sample looks the same bit for bit in whatever batch it lands.

Source: nnDetection v0.1 ``base_more``, and nnU-Net's low resolution.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain3d.config import UserError
from pretrain3d.data.batch import torch_generator
from pretrain3d.data.spatial import around_one, checked_node, checked_probability, checked_range

# In the order of application. `channel_p`: with this probability each channel takes part, where not all do.
DEFAULTS: dict[str, dict[str, Any]] = {
    # The reference calls its range a variance but uses it as the standard deviation; so does this.
    "noise": {"p": 0.1, "range": (0.0, 0.1)},
    "blur": {"p": 0.2, "range": (0.5, 1.0), "channel_p": 0.5},  # sigma in voxels
    "brightness": {"p": 0.15, "range": (0.75, 1.25)},
    "contrast": {"p": 0.15, "range": (0.75, 1.25)},
    "low_resolution": {"p": 0.25, "range": (0.5, 1.0), "channel_p": 0.5},  # voxels kept per axis
    "gamma_inverted": {"p": 0.1, "range": (0.7, 1.5)},
    "gamma": {"p": 0.3, "range": (0.7, 1.5)},
}
FACTORS = ("brightness", "contrast", "gamma_inverted", "gamma")  # drawn around 1


def settings_from_config(
    config: dict[str, Any] | bool | None, defaults: dict[str, dict[str, Any]] = DEFAULTS
) -> dict[str, dict[str, Any]]:
    """``None`` or True: ``defaults``; False: nothing; a dict: the defaults with changes (False: left out).

    Raises:
        UserError: an unknown operation or key, a range or probability that is none.
    """
    if config is False:
        return {}
    changes = checked_node("augment.intensity", config)
    for name in changes:
        if name not in defaults:
            raise UserError(f"augment.intensity has no {name!r}; it has {', '.join(defaults)}")
    settings = {}
    for name, default in defaults.items():
        change = changes.get(name, {})
        if change is False:
            continue
        change = {} if change is None or change is True else change
        if not isinstance(change, dict):
            raise UserError(f"augment.intensity.{name}={change}: expected false or some of {', '.join(default)}")
        for key in change:
            if key not in default:
                raise UserError(f"augment.intensity.{name} has no {key!r}; it has {', '.join(default)}")
        values = default | change
        values["range"] = checked_range(
            f"augment.intensity.{name}.range", values["range"], above=-1e-9 if name == "noise" else 0.0
        )
        for key in ("p", "channel_p"):
            if key in values:
                checked_probability(f"augment.intensity.{name}.{key}", values[key])
        settings[name] = values
    if "low_resolution" in settings and settings["low_resolution"]["range"][1] > 1:
        raise UserError(f"augment.intensity.low_resolution.range={settings['low_resolution']['range']}: at most 1")
    return settings


def draw(rng: np.random.Generator, settings: dict[str, dict[str, Any]], channels: int) -> dict[str, tuple[Any, ...]]:
    """What happens to one sample: ``{operation: one number per channel, None where the channel is left alone}``."""
    drawn = {}
    for name, values in settings.items():
        if rng.random() >= values["p"]:
            continue
        takes_part = rng.random(channels) < values.get("channel_p", 1.0)
        if takes_part.any():
            drawn[name] = tuple(_number(rng, name, *values["range"]) if part else None for part in takes_part)
    return drawn


def _number(rng: np.random.Generator, name: str, low: float, high: float) -> float:
    return around_one(rng, low, high) if name in FACTORS else float(rng.uniform(low, high))


def apply(image: Tensor, drawn: dict[str, tuple[Any, ...]], seed: int, index: int) -> None:
    """Applies what `draw` drew.

    Args:
        image: (C, X, Y, Z) float32, normalised; overwritten.
        drawn: of `draw`.
        seed, index: of the sample, for the noise field.
    """
    for name, parameters in drawn.items():
        rng = torch_generator(seed, index, "noise", image.device) if name == "noise" else None
        for channel, parameter in enumerate(parameters):
            if parameter is None:
                continue
            plane = image[channel]  # (X, Y, Z)
            if name == "noise":
                plane.add_(torch.randn(plane.shape, generator=rng, device=plane.device), alpha=parameter)
            else:
                plane.copy_(OPERATIONS[name](plane, parameter))


def blur(plane: Tensor, sigma: float) -> Tensor:
    """Gaussian of ``sigma`` voxels, truncated at 3 sigma, edges repeated."""
    radius = max(1, math.ceil(3 * sigma))
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    total = sum(weights)
    for axis in range(3):
        size = plane.shape[axis]
        margins = [0] * 6
        margins[2 * (2 - axis)] = margins[2 * (2 - axis) + 1] = radius
        padded = F.pad(plane[None, None], margins, mode="replicate")[0, 0]
        result = torch.zeros_like(plane)
        for tap, weight in enumerate(weights):  # shifted sums: host weights, and faster than conv3d with one channel
            result.add_(padded.narrow(axis, tap, size), alpha=weight / total)
        plane = result
    return plane


def brightness(plane: Tensor, factor: float) -> Tensor:
    """Multiplies."""
    return plane * factor


def contrast(plane: Tensor, factor: float) -> Tensor:
    """Stretches about the mean, within the range of values that the patch had."""
    mean, (low, high) = plane.mean(), torch.aminmax(plane)
    stretched = (plane - mean).mul_(factor).add_(mean)
    return torch.minimum(torch.maximum(stretched, low, out=stretched), high, out=stretched)  # clamp of tensors is slow


def low_resolution(plane: Tensor, zoom: float) -> Tensor:
    """Keeps every ``1 / zoom``-th voxel and interpolates the others."""
    size = [max(1, round(extent * zoom)) for extent in plane.shape]
    small = F.interpolate(plane[None, None], size=size, mode="nearest-exact")
    return F.interpolate(small, size=list(plane.shape), mode="trilinear", align_corners=False)[0, 0]


def gamma(plane: Tensor, exponent: float) -> Tensor:
    """Raises the values, scaled to 0..1, to a power; mean and standard deviation stay."""
    low, high = torch.aminmax(plane)
    mean = plane.mean()
    length = torch.linalg.vector_norm(
        plane - mean
    )  # sqrt(n - 1) standard deviations; torch.std_mean takes ten times as long
    curved = (plane - low).div_((high - low).clamp_min(1e-7)).pow_(exponent)
    curved.sub_(curved.mean())
    return curved.mul_(length / torch.linalg.vector_norm(curved).clamp_min(1e-7)).add_(mean)


def gamma_inverted(plane: Tensor, exponent: float) -> Tensor:
    """`gamma` of the negative image: bends the bright end instead of the dark one."""
    return gamma(-plane, exponent).neg_()


OPERATIONS = {
    "blur": blur,
    "brightness": brightness,
    "contrast": contrast,
    "low_resolution": low_resolution,
    "gamma_inverted": gamma_inverted,
    "gamma": gamma,
}
