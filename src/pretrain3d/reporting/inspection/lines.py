"""From what is known of a thing to aligned lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Rows = list[tuple[str, object]]  # what is said of a thing, line by line


def aligned(title: str, rows: Rows) -> list[str]:
    """The title, then a line per row; what has nothing to say is left out."""
    shown = [(key, value) for key, value in rows if str(value)]
    width = max((len(key) for key, _ in shown), default=0)
    return [title, *(f"  {key:<{width}}  {value}" for key, value in shown)]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    """Rows of nested settings, by dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "none" if value in (None, "", [], {}) else value


def components(module: Mapping[str, Any]) -> str:
    """The names in the section ``module`` of a config: of the module and of its method or detector."""
    nodes = [module, module.get("method") or {}, module.get("detector") or {}]
    return " ".join(node["name"] for node in nodes if "name" in node)
