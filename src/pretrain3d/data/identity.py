"""Content hashes: which data a case holds and a run has used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np


def content_hash(image: np.ndarray) -> str:
    """A hash of the decoded voxels of an input image: the same for any compression, file name or header.

    Args:
        image: (C, X, Y, Z) as read, in the input file's axes.
    """
    digest = hashlib.sha256(f"{image.dtype.str}{image.shape}".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()[:32]


def data_hash(hashes: Mapping[str, str]) -> str:
    """One hash of all cases (id -> content hash), whatever their order."""
    return hashlib.sha256("\n".join(f"{key} {hashes[key]}" for key in sorted(hashes)).encode()).hexdigest()[:32]


def files_hash(files: Iterable[Path]) -> str:
    """A hash of the names and bytes of files, in the given order."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:32]
