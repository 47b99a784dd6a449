"""A small data set in the nnDetection raw layout."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

LABELS = {"0": "nodule", "1": "lesion"}


def affine_of(
    axes: str, spacing_mm: tuple[float, ...], origin_mm: tuple[float, ...] = (7.0, -30.0, 12.0)
) -> np.ndarray:
    """The affine of a file whose axes point as ``axes`` says, for example "RAS" or "LPI"; spacing per file axis."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, letter in enumerate(axes):
        world = next(i for i, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        affine[world, axis] = spacing_mm[axis] * (1 if letter in "RAS" else -1)
    affine[:3, 3] = origin_mm
    return affine


def ct_phantom(rng: np.random.Generator, shape: tuple[int, ...] = (30, 28, 24)) -> np.ndarray:
    """(X, Y, Z) int16: a noisy soft-tissue box in air, with an air-filled hole."""
    image = np.full(shape, -1000, dtype=np.int16)
    body = tuple(slice(size // 5, size - size // 5) for size in shape)
    image[body] = rng.normal(40, 20, image[body].shape).astype(np.int16)
    image[tuple(slice(size // 2 - 2, size // 2 + 2) for size in shape)] = -900
    return image


def save(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    """Writes a NIfTI file, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def write_dataset(folder: Path, **more: object) -> None:
    """dataset.json of two classes and one CT channel."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"task": "Task900_Tiny", "name": "tiny", "labels": LABELS, "modalities": {"0": "CT"}, **more}
    (folder / "dataset.json").write_text(json.dumps(content))


def write_case(
    folder: Path,
    case_id: str,
    image: np.ndarray,
    mask: np.ndarray | None,
    classes: dict[int, int],
    affine: np.ndarray,
    ending: str = "Tr",
) -> None:
    """One case: image, and mask with its JSON unless ``mask`` is None."""
    save(folder / f"images{ending}" / f"{case_id}_0000.nii.gz", image, affine)
    if mask is not None:
        save(folder / f"labels{ending}" / f"{case_id}.nii.gz", mask, affine)
        content = {"instances": {str(key): value for key, value in classes.items()}}
        (folder / f"labels{ending}" / f"{case_id}.json").write_text(json.dumps(content))


def write_cases(folder: Path, count: int = 3, axes: str = "LPS") -> None:
    """``count`` training cases with two objects each, in [9, 13) and one voxel."""
    write_dataset(folder)
    for index in range(count):
        image = ct_phantom(np.random.default_rng(index))
        mask = np.zeros(image.shape, dtype=np.uint8)
        mask[9:13, 8:12, 7:9] = 1
        mask[18, 17, 15] = 2
        write_case(folder, f"case_{index}", image, mask, {1: 0, 2: 1}, affine_of(axes, (1.0, 1.0, 2.0)))
