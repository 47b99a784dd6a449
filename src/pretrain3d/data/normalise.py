"""From raw intensities to network input: one clip and one affine map per channel, applied on reading."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain3d.config import UserError, suggestion
from pretrain3d.data.case import Case
from pretrain3d.data.fingerprint import Histogram, Moments, merge
from pretrain3d.data.splits import fold_or_all
from pretrain3d.data.store import Store

SCHEMES = ("ct", "zscore", "window", "windows")
KEYS = ("scheme", "foreground", "low", "high", "mean", "std")
FOREGROUNDS = {"ct": ("objects", "body"), "zscore": ("body", "image")}  # of schemes that measure something
PERCENTILES = (0.5, 99.5)
MIN_STD = 1e-6


@dataclass(frozen=True)
class Normalisation:
    """``(clip(x, low, high) - mean) / std`` per channel; an image of one channel becomes one channel per window.

    Attributes:
        low: (C) lower clip, may be ``-inf``.
        high: (C) upper clip, may be ``inf``.
        mean: (C).
        std: (C), above zero.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def pad_value(self) -> tuple[float, ...]:
        """(C) raw value outside the volume: ``low`` where it is finite, else ``mean``."""
        return tuple(a if math.isfinite(a) else m for a, m in zip(self.low, self.mean, strict=True))

    @property
    def padding(self) -> tuple[float, ...]:
        """(C) `pad_value`, normalised."""
        return tuple(self(torch.tensor(self.pad_value).view(-1, 1, 1, 1)).flatten().tolist())

    def __call__(self, image: Tensor) -> Tensor:
        """(C, X, Y, Z) raw intensities -> float32."""
        assert len(image) in (1, len(self.mean)), (image.shape, len(self.mean))
        low, high, mean, std = (
            torch.tensor(values, dtype=torch.float32, device=image.device).view(-1, 1, 1, 1)
            for values in (self.low, self.high, self.mean, self.std)
        )
        return (image.float().clamp(low, high) - mean) / std


def normalisation_for(
    store: Store, intensity: dict[str, Any], fold: int, num_folds: int = 5
) -> Callable[[Case], Normalisation]:
    """How to normalise each case of a store.

    Args:
        store: the statistics come from its records; no volume is read.
        intensity: the plan's ``intensity``; see `resolve_intensity`.
        fold: "ct" takes its statistics from the training cases of this fold only.
        num_folds: as in `splits.fold_or_all`.

    Raises:
        UserError: unknown scheme or foreground, missing or senseless values.
    """
    resolved = resolve_intensity(store, intensity, fold, num_folds)
    of_image = normalisation_of(resolved, len(store.modality))
    if resolved.get("foreground") == "image" and not all(case.moments for case in store.cases.values()):
        raise UserError(f"{store.path} does not hold what intensity.foreground=image needs; prepare the data again")
    return lambda case: of_image(case.histograms["body"], case.moments)


def normalisation_of(
    resolved: dict[str, Any], channels: int
) -> Callable[[tuple[Histogram, ...], tuple[Moments, ...]], Normalisation]:
    """`normalisation_for` without a store, from what `resolve_intensity` gave (a checkpoint holds that).

    Returns:
        from the histograms of a case's body and the moments of its whole image, one per channel each, to its
        normalisation.
    """
    if resolved["scheme"] == "zscore":
        low, high = (_per_channel(resolved.get(k), channels, k, d) for k, d in (("low", -math.inf), ("high", math.inf)))

        def per_case(body: tuple[Histogram, ...], image: tuple[Moments, ...]) -> Normalisation:
            known: tuple[Histogram | Moments, ...] = image if resolved.get("foreground") == "image" else body
            return Normalisation(low, high, tuple(m.mean for m in known), tuple(max(m.std, MIN_STD) for m in known))

        return per_case
    channels = len(resolved["low"]) if resolved["scheme"] == "windows" else channels
    fixed = Normalisation(*(_per_channel(resolved[key], channels, key) for key in ("low", "high", "mean", "std")))
    if any(a >= b for a, b in zip(fixed.low, fixed.high, strict=True)) or min(fixed.std) <= 0:
        raise UserError(f"intensity: low must be below high and std above 0, got {resolved}")
    return lambda body, image: fixed


def resolve_intensity(store: Store, intensity: dict[str, Any], fold: int, num_folds: int = 5) -> dict[str, Any]:
    """The plan's ``intensity`` with every number filled in, so that it means the same without the store.

    "ct": percentiles 0.5 and 99.5, then mean and standard deviation of the values clipped to them, of the foreground of
    the fold's training cases (nnDetection and nnU-Net take mean and standard deviation before clipping; the difference
    is small and this one gives exactly mean 0 and std 1). "zscore": per case, mean and std of the body, or with
    ``foreground: image`` of the whole image with the air around, as nnU-Net and nnssl have it. "window":
    ``low`` and ``high`` become -1 and 1. "windows": an image of one channel becomes one channel per entry of the lists
    ``low`` and ``high``, each from -1 to 1, as one looks at lung, soft tissue and bone in turn. A number that is given
    (one for all channels or one per channel) stays.

    Raises:
        UserError: unknown scheme or foreground, missing or senseless values.
    """
    check_intensity(intensity)
    scheme = intensity["scheme"]
    given = {key: intensity.get(key) for key in ("low", "high", "mean", "std")}
    channels = len(store.modality)
    if scheme == "zscore":
        if given["mean"] is not None or given["std"] is not None:
            raise UserError("intensity.scheme zscore takes mean and std from each case; leave them null or use window")
        return {"scheme": scheme, "foreground": intensity.get("foreground") or "body", **given}
    if scheme == "windows":
        channels = _num_windows(given, channels)
    if scheme in ("window", "windows"):
        if given["low"] is None or given["high"] is None:
            raise UserError("intensity.scheme window needs low and high")
        low, high = (_per_channel(given[key], channels, key) for key in ("low", "high"))
        defaults = {
            "mean": [(a + b) / 2 for a, b in zip(low, high, strict=True)],
            "std": [(b - a) / 2 for a, b in zip(low, high, strict=True)],
        }
    elif any(value is None for value in given.values()):
        defaults = _foreground_statistics(store, intensity, fold, num_folds)
    return {"scheme": scheme, **{k: defaults[k] if value is None else value for k, value in given.items()}}


def check_intensity(intensity: dict[str, Any], where: str = "intensity") -> None:
    """Raises UserError for an unknown scheme, key or foreground; a window may keep the foreground of another scheme."""
    scheme, foreground = intensity.get("scheme"), intensity.get("foreground")
    if scheme not in SCHEMES:
        raise UserError(f"{where}.scheme is {scheme!r}; use one of {', '.join(SCHEMES)}")
    for key in intensity:
        if key not in KEYS:
            raise UserError(f"{where} has no {key!r}{suggestion(str(key), KEYS) or ';'} it has {', '.join(KEYS)}")
    known = FOREGROUNDS.get(scheme, ("objects", "body", "image"))
    if foreground is not None and foreground not in known:
        raise UserError(f"{where}.foreground is {foreground!r}; scheme {scheme} takes {' or '.join(known)}")


def _num_windows(given: dict[str, Any], channels: int) -> int:
    low, high = given["low"], given["high"]
    if channels != 1:
        raise UserError(f"intensity.scheme windows is for images of one channel; these have {channels}")
    if not isinstance(low, list | tuple) or not isinstance(high, list | tuple) or len(low) != len(high) or not low:
        raise UserError(f"intensity.scheme windows needs lists low and high of one length, got {low!r} and {high!r}")
    return len(low)


def _foreground_statistics(
    store: Store, intensity: dict[str, Any], fold: int, num_folds: int
) -> dict[str, list[float]]:
    """Per channel, from the merged histograms of the fold's training cases ("pretrain" cases where there are none)."""
    splits = fold_or_all(store, fold, num_folds)
    cases = [store.cases[case_id] for case_id in splits["train"] or splits["pretrain"]]
    has_objects = any(case.histograms["objects"][0].total for case in cases)
    foreground = intensity.get("foreground") or ("objects" if has_objects else "body")
    statistics: dict[str, list[float]] = {"low": [], "high": [], "mean": [], "std": []}
    for channel in range(len(store.modality)):
        histogram = merge([case.histograms[foreground][channel] for case in cases])
        if not histogram.total:
            raise UserError(f"{store.path}: no voxel of foreground {foreground!r} in the training cases of fold {fold}")
        low, high = intensity.get("low"), intensity.get("high")
        low = histogram.percentile(PERCENTILES[0]) if low is None else _at(low, channel)
        high = histogram.percentile(PERCENTILES[1]) if high is None else _at(high, channel)
        mean, std = histogram.clipped_moments(low, high)
        for key, value in zip(statistics, (low, high, mean, max(std, MIN_STD)), strict=True):
            statistics[key].append(float(value))
    return statistics


def _at(value: Any, channel: int) -> float:
    return float(value[channel] if isinstance(value, list | tuple) else value)


def _per_channel(value: Any, channels: int, key: str, default: float | None = None) -> tuple[float, ...]:
    """One number for all channels, or one each."""
    value = default if value is None else value
    values = list(value) if isinstance(value, list | tuple) else [value] * channels
    if len(values) != channels or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise UserError(f"intensity.{key} must be a number or a list of {channels} numbers, got {value!r}")
    return tuple(float(v) for v in values)
