"""Which data a case holds and a run has used: content hashes, and signatures that a resampled copy shares.

A signature describes what an image looks like at low resolution: means over a 24^3 grid on the box that holds all but
two hundredths of the patient along each axis, their cosine transform, the frequencies up to 10 weighted by their square
(what all patients share is in the lowest), 4 bits each.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.fft import dctn

if TYPE_CHECKING:
    from pretrain3d.data.case import Case

GRID, RADIUS = 24, 10
MARGIN = 0.01  # of the body, outside the grid at either end of an axis: a nose or a mask decides where the body ends
POWER = 2.0  # of the frequency, by which a coefficient is weighted: flattens the spectrum of anatomy
LEVELS = 7  # a coefficient is quantised to -7..7
DEVIATIONS = 4.0  # of the coefficients, at which the quantised value ends
ALIKE = 0.9  # correlation from which on two signatures are of one image; 0.88 was the highest between 286 patients
_FREQUENCIES = np.array(
    [t for t in itertools.product(range(RADIUS + 1), repeat=3) if 0 < sum(i * i for i in t) <= RADIUS**2]
)  # (F, 3)


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


def same_content(cases: Iterable[Case]) -> list[tuple[Case, Case]]:
    """Pairs of cases with one image: each case that repeats another, after the first that has it."""
    first: dict[str, Case] = {}
    return [(kept, case) for case in cases if (kept := first.setdefault(case.content_hash, case)) is not case]


def files_hash(files: Iterable[Path]) -> str:
    """A hash of the names and bytes of files, in the given order."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:32]


def signature(image: np.ndarray, body: np.ndarray, step: np.ndarray) -> str:
    """What an image looks like, the same for any voxel size, header, name, type of number and scale of intensities.

    Args:
        image: (C, X, Y, Z) in RAS axes; the first channel counts.
        body: coarse (x, y, z) bool mask of the patient, and
        step: (3,) voxels of the image per voxel of it, both from `body.body_mask`.

    Returns:
        text of 432 characters; "" for an image without contrast.
    """
    coarse = image[0][:: step[0], :: step[1], :: step[2]].astype(np.float32)
    ends = [_ends(body, axis) for axis in range(3)]
    low, high = np.percentile(coarse[tuple(slice(int(a), int(np.ceil(b))) for a, b in ends)], (1, 99))
    if low == high:
        return ""
    grid = np.clip(coarse, low, high)
    for axis, (first, last) in enumerate(ends):
        means = _means(np.linspace(first, last, GRID + 1), grid.shape[axis])
        grid = np.moveaxis(np.tensordot(means, grid, axes=(1, axis)), 0, axis)
    values = dctn(grid, norm="ortho")[tuple(_FREQUENCIES.T)] * np.linalg.norm(_FREQUENCIES, axis=1) ** POWER
    codes = np.clip(np.rint(values / values.std() * (LEVELS / DEVIATIONS)), -LEVELS, LEVELS).astype(np.int8) + 8
    codes = np.append(codes, 0).astype(np.uint8)  # the number of frequencies is odd
    return base64.b64encode(codes[::2] << 4 | codes[1::2]).decode()


def _ends(body: np.ndarray, axis: int) -> tuple[float, float]:
    """Where along an axis all but `MARGIN` of the body at either end begins and ends, in fractions of its voxels."""
    share = body.sum(axis=tuple(a for a in range(3) if a != axis)).cumsum() / body.sum()
    places = np.interp((MARGIN, 1 - MARGIN), np.append(0.0, share), np.arange(len(share) + 1.0))
    return float(places[0]), float(places[1])


def _means(edges: np.ndarray, voxels: int) -> np.ndarray:
    """(cells, voxels) float32: what takes voxels to their means over the cells between the edges."""
    start = np.arange(voxels)
    overlap = np.minimum(edges[1:, None], start + 1) - np.maximum(edges[:-1, None], start)
    return (overlap.clip(0) / np.diff(edges)[:, None]).astype(np.float32)


def signature_values(signatures: Sequence[str]) -> np.ndarray:
    """(N, F) float32 rows of unit length, whose products are correlations; a row of zeros for ""."""
    rows = np.zeros((len(signatures), len(_FREQUENCIES)), dtype=np.float32)
    for row, text in zip(rows, signatures, strict=True):
        if text:
            packed = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
            values = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[: len(row)].astype(np.float32) - 8
            row[:] = values / np.linalg.norm(values)
    return rows


def best_matches(values: np.ndarray, corpus: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most alike image of a corpus, also if one of the two has its axes exchanged or turned round.

    Args:
        values: (N, F) of `signature_values`.
        corpus: (M, F), M > 0.

    Returns:
        (N,) correlation, (N,) row of the corpus.
    """
    best, where = np.full(len(values), -1.0, dtype=np.float32), np.zeros(len(values), dtype=np.int64)
    place = {tuple(t): index for index, t in enumerate(_FREQUENCIES.tolist())}
    for axes in itertools.permutations(range(3)):
        order = [place[t[axes[0]], t[axes[1]], t[axes[2]]] for t in _FREQUENCIES.tolist()]
        for flips in itertools.product((1, -1), repeat=3):
            signs = np.prod(np.where(_FREQUENCIES % 2, flips, 1), axis=1).astype(np.float32)
            for first in range(0, len(values), 256):
                part = slice(first, first + 256)
                products = (values[part][:, order] * signs) @ corpus.T
                found = products.argmax(axis=1)
                score = products[np.arange(len(found)), found]
                better = score > best[part]
                best[part], where[part] = np.where(better, score, best[part]), np.where(better, found, where[part])
    return best, where
