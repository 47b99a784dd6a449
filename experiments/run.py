"""Runs the stages of an experiment file in order, timed; a stage that is done costs nothing the second time.

    python experiments/run.py experiments/demo.yaml [scale=long] [key=value ...]

A stage is a pretrain3d command line. `{key}` in it is replaced by a value of the file's `values`, of the chosen entry
of `scales`, or of the command line, in rising order; values of the file may mention others. A stage with `each: LIST`
runs once for every entry of that list of `lists`, with `{entry}` its name and `{options}` what it holds; elsewhere a
word with `{LIST}` becomes one per entry.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from pretrain3d.__main__ import main as pretrain3d
from pretrain3d.config import UserError, read_yaml


class Values(dict[str, Any]):
    """Texts in which others are named as `{key}`, filled in when they are read."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return value.format_map(self) if isinstance(value, str) else value


def read(path: Path, options: dict[str, str]) -> list[tuple[str, list[str]]]:
    """(name, argument list) of every stage, placeholders filled.

    Raises:
        UserError: there is no such file, scale or value, or one is missing.
    """
    experiment = read_yaml(path)
    values = Values(experiment.get("values") or {})
    scales = experiment.get("scales") or {}
    scale = options.pop("scale", "") or next(iter(scales), "")
    if scale not in scales and (scale or scales):
        raise UserError(f"{path}: scale={scale} is unknown; it is one of {', '.join(scales)}")
    values |= {"scale": scale, **(scales.get(scale) or {})}
    unknown = set(options) - set(values)
    if unknown:
        raise UserError(f"{path}: {', '.join(sorted(unknown))} is unknown; it takes scale, {', '.join(values)}")
    values |= {key: shlex.quote(value).replace("{", "{{").replace("}", "}}") for key, value in options.items()}
    missing = [key for key, value in values.items() if value is None]
    if missing:
        raise UserError(f"{path} needs {missing[0]}=...")
    lists = {
        name: {entry: text.format_map(values) for entry, text in entries.items()}
        for name, entries in (experiment.get("lists") or {}).items()
    }
    lines = []
    for stage in experiment["stages"]:
        entries = lists[stage["each"]] if "each" in stage else {"": ""}
        for entry, text in entries.items():
            known = {**{key: values[key] for key in values}, "entry": entry, "options": text}
            words = [word for word in stage["run"].split() for word in _one_per_entry(word, lists)]
            line = shlex.split(" ".join(word.format(**known) for word in words))
            lines.append((stage["name"].format(**known), line))
    return lines


def _one_per_entry(word: str, lists: dict[str, dict[str, str]]) -> list[str]:
    named = [name for name in lists if f"{{{name}}}" in word]
    return [word.replace(f"{{{named[0]}}}", entry) for entry in lists[named[0]]] if named else [word]


def main(arguments: list[str]) -> int:
    """Runs all stages; stops at the first that fails and returns its status, 2 for a mistake in the arguments."""
    if not arguments or arguments[0].startswith("-") or not all("=" in argument for argument in arguments[1:]):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        stages = read(Path(arguments[0]), dict(argument.split("=", 1) for argument in arguments[1:]))
    except UserError as error:
        print(f"experiments/run.py: error: {error}", file=sys.stderr)
        return 2
    took: list[tuple[str, float]] = []
    for index, (name, line) in enumerate(stages, 1):
        print(f"\n[{index}/{len(stages)}] {name}: pretrain3d {' '.join(line)}", flush=True)
        start = time.perf_counter()
        status = pretrain3d(line)
        took.append((name, time.perf_counter() - start))
        if status:
            print(f"{name} ended with status {status} after {took[-1][1]:.0f} s", file=sys.stderr)
            return status
    print("\n" + "\n".join(f"{name:<28}{seconds:8.1f} s" for name, seconds in took))
    print(f"{'all':<28}{sum(seconds for _, seconds in took):8.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
