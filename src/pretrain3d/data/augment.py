"""Raw batch -> batch, on whatever device the raw batch is: resample or flip, normalise, boxes, intensities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain3d.data import intensity, spatial
from pretrain3d.devices import sent
from pretrain3d.geometry import boxes_of_instances, boxes_of_slots, occupied_planes


class Augmentation:
    """Makes a batch of fixed patches out of `data.batch.collate`'s ragged sources.

    What is done to a sample was drawn in the worker and travels with it, so this has no settings and no state; a
    validation batch is one for which nothing was drawn. No step waits for the device.

    Returns (from ``__call__``): the batch of docs/design.md section 3, with ``annotated`` (B, K) bool: the classes
    whose absence in this case means something. ``mask`` is there when every case with objects has an instance mask,
    ``semantic`` and ``semantic_annotated`` when the data set brings its maps of organs.
    """

    @torch.no_grad()
    def __call__(self, raw: dict[str, Any]) -> dict[str, Any]:
        sources, patch = raw["image"], raw["patch_size"]
        device = sources[0].device
        channels = len(raw["normalisation"][0]["low"])  # more than the source has where windows become channels
        image = torch.empty(len(sources), channels, *patch, device=device)
        inside = torch.zeros(len(sources), 1, *patch, dtype=torch.bool, device=device)
        slots: list[Tensor | None] = []
        semantic = torch.zeros(len(sources), *patch, dtype=torch.int16, device=device) if "semantic" in raw else None
        for row in range(len(sources)):
            finish = _resample if raw["geometry"][row]["resample"] else _flip
            move = finish(raw, row, image[row], inside[row, 0])
            slots.append(None if raw["slots"][row] is None else move(raw["slots"][row]))
            if semantic is not None:
                semantic[row] = move(raw["semantic"][row])
            drawn = raw["intensity"][row]
            intensity.apply(image[row], drawn["drawn"], drawn["seed"], raw["sample_index"][row])
        batch = {
            "image": image,
            "inside": inside,
            **_objects(raw, slots, device),
            "annotated": _to_device(raw["annotated"], device),
            "sample_index": raw["sample_index"],
            "case_ids": raw["case_ids"],
        }
        if semantic is not None:
            batch |= {"semantic": semantic, "semantic_annotated": _to_device(raw["semantic_annotated"], device)}
        return batch | ({"set_index": raw["set_index"]} if "set_index" in raw else {})


Move = Callable[[Tensor], Tensor]  # a label map of the source (x, y, z) -> of the patch (X, Y, Z) int16, 0 outside


def _flip(raw: dict[str, Any], row: int, image: Tensor, inside: Tensor) -> Move:
    """Fills ``image`` (C, X, Y, Z) and ``inside`` (X, Y, Z) without resampling; gives what moves label maps along."""
    source, geometry, values = (raw[key][row] for key in ("image", "geometry", "normalisation"))
    offset, flips = geometry["offset"], geometry["flips"]
    source = source.expand(len(image), *source.shape[1:])
    if source.shape != image.shape:
        for channel, pad in enumerate(values["pad"]):
            image[channel].fill_(pad)  # raw, normalised below with the rest
    spatial.place(source, offset, flips, image)
    _normalise(image, values)
    spatial.place(torch.ones((), dtype=torch.bool, device=image.device).expand(source.shape[1:]), offset, flips, inside)

    def move(labels: Tensor) -> Tensor:
        flipped = torch.zeros(image.shape[1:], dtype=torch.int16, device=image.device)
        spatial.place(labels, offset, flips, flipped)
        return flipped

    return move


def _resample(raw: dict[str, Any], row: int, image: Tensor, inside: Tensor) -> Move:
    """`_flip` with rotation and scaling: image linear, label maps nearest."""
    source, geometry, values = (raw[key][row] for key in ("image", "geometry", "normalisation"))
    points = spatial.coordinates(geometry["matrix"], raw["patch_size"], image.device)  # (3, X, Y, Z)
    inside.copy_(spatial.points_inside(points, geometry["low"], geometry["high"]))
    source = source.float().expand(len(image), *source.shape[1:]).clone(memory_format=torch.contiguous_format)
    normalised = _normalise(source, values)  # clipping comes before interpolation
    image.copy_(spatial.sample_linear(normalised, points))
    pads = _normalise(torch.tensor(values["pad"]).view(-1, 1, 1, 1), values).flatten().tolist()
    for channel, pad in enumerate(pads):
        image[channel].masked_fill_(~inside, pad)
    return lambda labels: spatial.sample_nearest(labels.to(torch.int16), points, inside)


def _normalise(image: Tensor, values: dict[str, tuple[float, ...]]) -> Tensor:
    """``(clip(x, low, high) - mean) / std`` per channel of (C, x, y, z) float32, in place, with host numbers only."""
    for channel, plane in enumerate(image):
        plane.clamp_(values["low"][channel], values["high"][channel])
        plane.sub_(values["mean"][channel]).div_(values["std"][channel])
    return image


def _objects(raw: dict[str, Any], slots: list[Tensor | None], device: torch.device) -> dict[str, Tensor]:
    """``boxes`` (B, N, 6), ``labels`` and ``valid`` (B, N); ``mask`` (B, X, Y, Z) where there are instance masks."""
    batch_size, num_objects = raw["labels"].shape
    boxes = torch.zeros(batch_size, num_objects, 6, device=device)
    valid = torch.zeros(batch_size, num_objects, dtype=torch.bool, device=device)
    mask = torch.zeros(batch_size, *raw["patch_size"], dtype=torch.int16, device=device)
    labels = _to_device(raw["labels"], device)
    lookup = torch.nn.functional.pad(labels + 1, (1, 0)).to(torch.int16)  # (B, N + 1): slot -> 0 or 1 + class
    for row, slot in enumerate(slots):
        given = raw["boxes"][row]
        if slot is not None:  # samples without an object cost nothing
            boxes[row], valid[row] = _boxes(slot, num_objects)
            _fill(mask[row], slot, lookup[row])
        elif given is not None:
            boxes[row, : len(given)] = _to_device(given, device)
            valid[row, : len(given)] = True
    return {"boxes": boxes, "labels": labels, "valid": valid} | ({"mask": mask} if raw["with_mask"] else {})


def _fill(mask: Tensor, slots: Tensor, lookup: Tensor) -> None:
    """Writes ``lookup`` (N + 1) of the (X, Y, Z) slots into ``mask``, which is 0 as ``lookup[0]`` is."""
    if slots.device.type != "cpu":
        mask.copy_(lookup.index_select(0, slots.flatten().int()).view(slots.shape))
        return
    part = np.ix_(*occupied_planes(slots.numpy()))  # most planes of a patch hold no object
    mask.numpy()[part] = lookup.numpy()[slots.numpy()[part]]


def _boxes(slots: Tensor, num_objects: int) -> tuple[Tensor, Tensor]:
    """(X, Y, Z) slots -> boxes (N, 6) and which of them have a voxel (N)."""
    if slots.device.type != "cpu":
        boxes, present = boxes_of_slots(slots[None], num_objects)
        return boxes[0], present[0]
    ids, found = boxes_of_instances(slots.numpy())  # the same, 20 times faster where nothing runs in parallel
    boxes, present = torch.zeros(num_objects, 6), torch.zeros(num_objects, dtype=torch.bool)
    boxes[ids - 1], present[ids - 1] = torch.from_numpy(found).float(), True
    return boxes, present


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    return sent(torch.from_numpy(array), device)
