"""What a format's module gives back, and the account of every tensor of a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from torch import Tensor

from pretrain3d.config import UserError

SHOWN = 3  # names in an error
LONGEST = 60  # characters of a value in an error
WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name


@dataclass(frozen=True)
class Wishes:
    """What the user says about a file; ``None`` = as the file says.

    Attributes:
        stem: prefix of the input layers of a file with several (MultiTalent), e.g. ``encoder.stem.004``.
        token_order: "hwd" or "whd", how a Primus file flattens its tokens.
    """

    stem: str | None = None
    token_order: str | None = None


@dataclass
class Imported:
    """A backbone of another framework in our terms.

    Attributes:
        backbone: ``{"name", **arguments}``.
        weights: state dict of that backbone.
        preprocessing: ``spacing_mm``, ``patch_size`` (network axes), ``intensity``, each None where the file is silent.
        source: where the weights come from; plain values.
        permutation: our axis a, of x y z, is the network's axis ``permutation[a]`` if the network saw arrays as
            z, y, x and transposed them as its plan says; used for ``axes=zyx`` only.
        corpus: `data.leakage.Corpus.to_dict` of the cases it was trained on, None where the file does not say.
        notes: one sentence each on what was decided on the way.
    """

    backbone: dict[str, Any]
    weights: dict[str, Tensor]
    preprocessing: dict[str, Any]
    source: dict[str, Any]
    permutation: tuple[int, int, int] = (2, 1, 0)
    corpus: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


class Ledger:
    """The tensors of a file: each is taken, dropped on purpose and counted, or left over, which is an error.

    Args:
        tensors: name -> tensor; a prefix of a wrapper that all names have is removed.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        names = list(tensors)
        prefix = ""
        for wrapper in WRAPPERS * 2:
            if names and all(name.startswith(prefix + wrapper) for name in names):
                prefix += wrapper
        self.left = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        self.total = len(self.left)
        self.taken = 0
        self.duplicates = 0
        self.dropped: Counter[str] = Counter()

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def under(self, prefix: str) -> list[str]:
        """Names of the subtree ``prefix`` that are left."""
        return [name for name in self.left if name.startswith(f"{prefix}.")]

    def take(self, name: str) -> Tensor:
        """A tensor that is loaded."""
        self.taken += 1
        return self.left.pop(name)

    def duplicate(self, name: str) -> Tensor:
        """A tensor that is in the file a second time under this name."""
        self.duplicates += 1
        return self.left.pop(name)

    def drop(self, names: Iterable[str], what: str | None = None) -> None:
        """Leaves tensors out on purpose, counted under ``what``; by default under the first part of their name."""
        for name in list(names):
            del self.left[name]
            self.dropped[what or name.partition(".")[0]] += 1

    def close(self, path: str) -> str:
        """One sentence on where every tensor went.

        Raises:
            UserError: nothing was taken, or something is left over.
        """
        if not self.taken:
            raise UserError(f"{path}: none of its {self.total} tensors belongs to the backbone ({self._some()})")
        if self.left:
            raise UserError(f"{path}: {len(self.left)} tensors are not known to this format ({self._some()})")
        parts = [f"{self.taken} loaded"]
        if self.duplicates:
            parts.append(f"{self.duplicates} second names")
        if self.dropped:
            counts = ", ".join(f"{what} {count}" for what, count in sorted(self.dropped.items()))
            parts.append(f"{self.dropped.total()} left out ({counts})")
        return f"{self.total} tensors: {', '.join(parts)}"

    def _some(self) -> str:
        return ", ".join([*self.left, *self.dropped][:SHOWN])


def table(value: Any, what: str, path: str) -> Mapping[str, Any]:
    """A table of a file.

    Raises:
        UserError: it is something else, named ``what``.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: its {what} is {shown(value)}; it must be a table")
    return value


def listed(value: Any) -> list[Any]:
    """A list of a file, where it may also be null or the only entry itself."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def three(value: Any, what: str, path: str) -> list[float] | None:
    """Three numbers of a file; None where it holds null, also as three nulls (nnU-Net without resampling).

    Raises:
        UserError: it is something else, named ``what``.
    """
    if value is None or listed(value) == [None] * 3:
        return None
    if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(isinstance(v, Real) for v in value):
        raise UserError(f"{path}: its {what} is {shown(value)}; it must be three numbers or null")
    return [float(number) for number in value]


def permutation_of(plan: Mapping[str, Any], path: str) -> tuple[int, int, int]:
    """`Imported.permutation` by a plan's ``transpose_forward``, of arrays that were read as z, y, x.

    Raises:
        UserError: it is no order of three axes.
    """
    forward = listed(plan.get("transpose_forward")) or [0, 1, 2]
    if sorted(forward, key=str) != [0, 1, 2]:
        raise UserError(f"{path}: its transpose_forward is {shown(forward)}; it must be an order of 0, 1, 2")
    seen = ["zyx"[int(axis)] for axis in forward]
    return seen.index("x"), seen.index("y"), seen.index("z")


def shown(value: Any) -> str:
    """A value of a file for an error: whole where it is short."""
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= LONGEST else f"a {type(value).__name__}"


def reported(names: list[str]) -> str:
    """A few names for a sentence."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def citations_of(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a file of nnssl or nnU-Net asks to be cited, ``{"type", "name", "apa_citations" or "bibtex_citations"}``."""
    plan = content.get("nnssl_adaptation_plan") or {}
    stated = content.get("citations") or plan.get("citations")
    return [entry for entry in listed(stated) if isinstance(entry, Mapping)]


def method_of(content: Mapping[str, Any]) -> str:
    """The pretraining method that a file of nnssl or nnU-Net names; "" where it names none."""
    plan = content.get("nnssl_adaptation_plan") or {}
    for entry in citations_of(content):
        if entry.get("type") == "Pretraining Method" and entry.get("name"):
            return str(entry["name"])
    return str(content.get("trainer_name") or plan.get("trainer_name") or "")
