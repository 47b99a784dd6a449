"""Was a case seen in pretraining? Weights carry what identifies their corpus; runs that start from them look it up.

No name and no image travels: hashes of voxels, hashes of data set and patient, and signatures (`identity.signature`).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from pretrain3d.data.identity import ALIKE, best_matches, signature_values
from pretrain3d.data.store import Store

VERSION = 1
HASH, GROUP, SIGNATURE = 16, 8, 324  # bytes per case or patient
HOW = ("same voxels", "copy", "same patient")


@dataclass(frozen=True)
class Corpus:
    """What identifies the cases that weights were trained on.

    Attributes:
        hashes: content hashes.
        groups: of data set and patient, 16 hexadecimal digits each.
        signatures: of the images; fewer than hashes where a store is older than signatures.
    """

    hashes: frozenset[str]
    groups: frozenset[str]
    signatures: frozenset[str]

    @classmethod
    def of(cls, store: Store, case_ids: Iterable[str]) -> Corpus:
        """Cases of a store."""
        cases = [store.cases[case_id] for case_id in case_ids]
        return cls(
            frozenset(_hash(case.content_hash) for case in cases),
            frozenset(_group(store, case.group) for case in cases),
            frozenset(case.signature for case in cases if case.signature),
        )

    def __or__(self, other: Corpus) -> Corpus:
        return Corpus(self.hashes | other.hashes, self.groups | other.groups, self.signatures | other.signatures)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, about 0.5 kB per case."""
        return {
            "version": VERSION,
            "cases": len(self.hashes),
            "hashes": _packed(bytes.fromhex(text) for text in sorted(self.hashes)),
            "groups": _packed(bytes.fromhex(text) for text in sorted(self.groups)),
            "signatures": _packed(base64.b64decode(text) for text in sorted(self.signatures)),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Corpus:
        """The inverse of `to_dict`."""
        return cls(
            frozenset(part.hex() for part in _parts(values["hashes"], HASH)),
            frozenset(part.hex() for part in _parts(values["groups"], GROUP)),
            frozenset(base64.b64encode(part).decode() for part in _parts(values["signatures"], SIGNATURE)),
        )


def merged(*corpora: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """All of several `Corpus.to_dict`; None where there is none."""
    known = [Corpus.from_dict(values) for values in corpora if values is not None]
    return reduce(or_, known).to_dict() if known else None


def find(corpus: Mapping[str, Any] | None, cases: Iterable[tuple[Store, str, Sequence[str]]]) -> list[dict[str, Any]]:
    """The cases that a corpus holds, whatever their name, header or voxel size is now.

    Args:
        corpus: `Corpus.to_dict`; None: nothing is known, nothing is found.
        cases: (store, split, ids of its cases) each.

    Returns:
        one row per case found: ``{"case", "split", "how": one of HOW, "similarity": of the signatures or None}``; "same
        voxels" says more than "copy", and that more than "same patient".
    """
    if corpus is None:
        return []
    known = Corpus.from_dict(corpus)
    rows = []
    for store, split, case_ids in cases:
        alike = _similarities(known, store, case_ids)
        for case_id, similarity in zip(case_ids, alike, strict=True):
            case = store.cases[case_id]
            checks = (_hash(case.content_hash) in known.hashes, similarity >= ALIKE,
                      _group(store, case.group) in known.groups)  # fmt: skip
            if any(checks):
                how = HOW[checks.index(True)]
                shown = round(float(similarity), 3) if case.signature and known.signatures else None
                rows.append({"case": case_id, "split": split, "how": how, "similarity": shown})
    return rows


def warning(rows: Sequence[Mapping[str, Any]], file: str) -> str:
    """One line for the terminal: a warning where a held-out case was found, a note where only training cases were."""
    parts = []
    for split in dict.fromkeys(row["split"] for row in rows):
        names = [f"{row['case']} ({row['how']})" for row in rows if row["split"] == split]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        parts.append(f"{len(names)} {split} cases: {', '.join(names[:3])}{more}")
    kind = "note" if all(row["split"] == "train" for row in rows) else "warning: leakage"
    return f"{kind}: what {file} was pretrained on holds {'; '.join(parts)}"


def _similarities(known: Corpus, store: Store, case_ids: Sequence[str]) -> np.ndarray:
    if not known.signatures or not case_ids:
        return np.zeros(len(case_ids), dtype=np.float32)
    values = signature_values([store.cases[case_id].signature for case_id in case_ids])
    return best_matches(values, signature_values(sorted(known.signatures)))[0]


def _hash(content_hash: str) -> str:
    """A content hash as it is; what some other writer of a store put in its place is hashed to the same length."""
    try:
        if len(bytes.fromhex(content_hash)) == HASH:
            return content_hash
    except ValueError:
        pass
    return hashlib.sha256(content_hash.encode()).hexdigest()[: 2 * HASH]


def _group(store: Store, group: str) -> str:
    return hashlib.sha256(f"{store.name}\n{group}".encode()).hexdigest()[: 2 * GROUP]


def _packed(parts: Iterable[bytes]) -> str:
    return base64.b64encode(b"".join(parts)).decode()


def _parts(text: str, size: int) -> list[bytes]:
    whole = base64.b64decode(text)
    return [whole[first : first + size] for first in range(0, len(whole), size)]
