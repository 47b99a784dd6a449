"""What the training of a run cost: read from its folder, and said in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from pretrain3d.reporting.results import read_rows
from pretrain3d.reporting.run_folder import RunFolder


def cost_of(folder: RunFolder) -> dict[str, Any]:
    """What training cost, of all processes together, as far as it was logged.

    Returns:
        ``steps`` and ``seconds`` of the whole run, ``samples`` and ``device`` (its name); medians over the rows of
        ``metrics.csv``: ``samples_per_second``, ``tflop_per_sample`` (forward and backward), ``mfu`` (0 to 1); and the
        largest ``memory_gib`` of the first process's GPU. See `reporting.throughput`; None where it is not known.
    """
    state, path = folder.state(), folder.path / "metrics.csv"
    rows = [
        {key: float(text) for key, text in row.items() if key == "step" or key.startswith("perf/")}
        for row in (read_rows(path) if path.is_file() else [])
        if "perf/samples_seen" in row
    ]

    def column(key: str) -> list[float]:
        return [row[f"perf/{key}"] for row in rows if f"perf/{key}" in row]

    speeds = column("patches_per_second")
    tflop = [
        row["perf/tflop_per_second"] / row["perf/patches_per_second"] for row in rows if "perf/tflop_per_second" in row
    ]
    per_step = rows[-1]["perf/samples_seen"] / rows[-1]["step"] if rows else None
    return {
        "steps": state["step"] or None,
        "seconds": state.get("seconds"),
        "samples": None if per_step is None else round(per_step * state["step"]),
        "device": state.get("device"),
        "samples_per_second": median(speeds) if speeds else None,
        "tflop_per_sample": median(tflop) if tflop else None,
        "memory_gib": max(column("memory_gib"), default=None),
        "mfu": median(column("mfu")) if column("mfu") else None,
    }


def in_words(cost: Mapping[str, Any]) -> dict[str, str]:
    """What is known of a cost, by what it is called: ``{"training time": "3 min 20 s", ...}``."""
    forms: dict[str, tuple[str, Callable[[Any], str]]] = {
        "steps": ("steps", "{:,}".format),
        "samples": ("samples", "{:,}".format),
        "seconds": ("training time", duration),
        "samples_per_second": ("samples/s", "{:.3g}".format),
        "tflop_per_sample": ("TFLOP/sample", "{:.3g}".format),
        "memory_gib": ("peak GPU memory", "{:.1f} GiB".format),
        "mfu": ("MFU", "{:.1%}".format),
        "device": ("device", str),
    }
    known = {key: cost[key] for key in forms if cost.get(key) is not None}
    return {forms[key][0]: forms[key][1](value) for key, value in known.items()}


def duration(seconds: float) -> str:
    """``"1 h 02 min"``, ``"3 min 20 s"`` or ``"4.5 s"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
