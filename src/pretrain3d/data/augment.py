"""Raw batch -> batch, on whatever device the raw batch is: normalise, resample or flip, boxes, intensities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain3d.data import intensity, spatial
from pretrain3d.data.batch import normalise
from pretrain3d.geometry import boxes_of_instances, boxes_of_slots


class Augmentation:
    """Makes a batch of fixed patches out of `data.batch.collate`'s ragged sources.

    What is done to a sample was drawn in the worker and travels with it, so this has no settings and no state; a
    validation batch is one for which nothing was drawn. No step waits for the device.

    Returns (from ``__call__``): the batch of docs/design.md section 3, with ``annotated`` (B, K) bool: the classes
    whose absence in this case means something. ``mask`` is there when every case with objects has an instance mask.
    """

    @torch.no_grad()
    def __call__(self, raw: dict[str, Any]) -> dict[str, Any]:
        images, slots, inside = [], [], []
        for row in range(len(raw["image"])):
            image, slot, inner = _patch(raw, row)
            drawn = raw["intensity"][row]
            images.append(intensity.apply(image, drawn["drawn"], drawn["seed"], raw["sample_index"][row]))
            slots.append(slot)
            inside.append(inner)
        batch = {
            "image": torch.stack(images),
            "inside": torch.stack(inside)[:, None],
            "labels": raw["labels"],
            "annotated": raw["annotated"],
            "sample_index": raw["sample_index"],
            "case_ids": raw["case_ids"],
        }
        return batch | _objects(raw, slots)


def _patch(raw: dict[str, Any], row: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """One sample's image (C, X, Y, Z) float32, slots (X, Y, Z) int16 or None, inside (X, Y, Z) bool."""
    source, slots = raw["image"][row], raw["slots"][row]
    geometry, values = raw["geometry"][row], raw["normalisation"][row]
    patch, device = raw["patch_size"], source.device
    image = normalise(source, values["low"], values["high"], values["mean"], values["std"])
    if geometry["resample"]:
        points = spatial.coordinates(geometry["matrix"], patch, device)  # (3, X, Y, Z)
        inside = spatial.points_inside(points, geometry["low"], geometry["high"])
        image = spatial.sample_linear(image, points)
        for channel, pad in enumerate(values["pad"]):
            image[channel].masked_fill_(~inside, pad)
        if slots is not None:
            slots = spatial.sample_nearest(slots.to(torch.int16), points, inside)
        return image, slots, inside
    placed = torch.empty(len(image), *patch, device=device)
    for channel, pad in enumerate(values["pad"]):
        placed[channel].fill_(pad)
    offset, flips = geometry["offset"], geometry["flips"]
    spatial.place(image, offset, flips, placed)
    inside = torch.zeros(patch, dtype=torch.bool, device=device)
    spatial.place(torch.ones(source.shape[1:], dtype=torch.bool, device=device), offset, flips, inside)
    if slots is not None:
        flipped = torch.zeros(patch, dtype=torch.int16, device=device)
        spatial.place(slots.to(torch.int16), offset, flips, flipped)
        slots = flipped
    return placed, slots, inside


def _objects(raw: dict[str, Any], slots: list[Tensor | None]) -> dict[str, Tensor]:
    """``boxes`` (B, N, 6), ``valid`` (B, N) and, where there are instance masks, ``mask`` (B, X, Y, Z)."""
    labels: Tensor = raw["labels"]
    batch_size, num_objects = labels.shape
    device = labels.device
    boxes = torch.zeros(batch_size, num_objects, 6, device=device)
    valid = torch.zeros(batch_size, num_objects, dtype=torch.bool, device=device)
    mask = torch.zeros(batch_size, *raw["patch_size"], dtype=torch.uint8, device=device)
    for row, slot in enumerate(slots):
        if slot is not None:  # samples without an object cost nothing
            boxes[row], valid[row] = _boxes(slot, num_objects)
            mask[row] = raw["lookup"][row].index_select(0, slot.flatten().int()).view(slot.shape)
        elif raw["boxes"][row] is not None:
            count = len(raw["boxes"][row])
            boxes[row, :count] = raw["boxes"][row]
            valid[row, :count] = True
    return {"boxes": boxes, "valid": valid} | ({"mask": mask} if raw["with_mask"] else {})


def _boxes(slots: Tensor, num_objects: int) -> tuple[Tensor, Tensor]:
    """(X, Y, Z) slots -> boxes (N, 6) and which of them have a voxel (N)."""
    if slots.device.type != "cpu":
        boxes, present = boxes_of_slots(slots[None], num_objects)
        return boxes[0], present[0]
    ids, found = boxes_of_instances(slots.numpy())  # the same, 20 times faster where nothing runs in parallel
    boxes, present = torch.zeros(num_objects, 6), torch.zeros(num_objects, dtype=torch.bool)
    boxes[ids - 1], present[ids - 1] = torch.from_numpy(found).float(), True
    return boxes, present
