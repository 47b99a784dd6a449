"""The folder of a run: what it holds, and whether a config starts, resumes or has finished it."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from pretrain3d.config import UserError, read_yaml, to_yaml
from pretrain3d.files import write_text
from pretrain3d.reporting.results import read_json, write_json

AROUND = (  # of a config: how a run is read, written and logged; `out` may be the same folder by another path
    "out",
    "data.num_workers",
    "logger",
    "trainer.log_every_n_steps",
    "trainer.checkpoint_every_n_steps",
)
FREE = (*AROUND, "trainer.max_time")  # and limited


class RunFolder:
    """``<out>/<name>`` of a run; see docs/design.md for what lies in it."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.path / "checkpoints" / "last.ckpt"

    def checkpoint(self, which: str) -> Path:
        """The checkpoint ``last`` or ``best``.

        Raises:
            UserError: another name, or the run has no such checkpoint.
        """
        if which not in ("last", "best"):
            raise UserError(f"checkpoint={which}: it is last or best")
        path = self.path / "checkpoints" / f"{which}.ckpt"
        if not path.is_file():
            if (self.path / "config.yaml").is_file():
                writes = "trainer.checkpoint_every_n_steps" if which == "last" else "trainer.val_every_n_steps"
                raise UserError(f"{self.path} has no checkpoint {which} yet; `fit` writes one every {writes}")
            raise UserError(self._no_run(f"checkpoints/{which}.ckpt"))
        return path

    def _no_run(self, lacks: str) -> str:
        there = f"holds no {lacks}; is it the folder of a run?" if self.path.exists() else "does not exist"
        return f"{self.path} {there}"

    def state(self) -> dict[str, Any]:
        """``{"status": "new" | "running" | "finished", "step": n, "seconds": s}``, no seconds if it never began.

        Raises:
            UserError: the file is broken.
        """
        path = self.path / "state.json"
        state: dict[str, Any] = read_json(path) if path.is_file() else {"status": "new", "step": 0}
        return state

    def unfinished(self) -> str:
        """What to say of a run that is still to be trained on; empty for one that has reached its last step."""
        state = self.state()
        if state["status"] != "running":
            return ""
        steps = (self.config().get("trainer") or {}).get("max_steps") or -1
        return f"{self.path} is at step {state['step']}{f' of {steps}' if steps > 0 else ', a run without an end'}"

    def config(self) -> dict[str, Any]:
        """The resolved config of the run.

        Raises:
            UserError: the folder holds none.
        """
        path = self.path / "config.yaml"
        if not path.is_file():
            raise UserError(self._no_run("config.yaml"))
        return read_yaml(path)

    def open(self, settings: dict[str, Any]) -> None:
        """Writes the config and marks the run as running, for as long as this object lives.

        Raises:
            UserError: another process trains this run; two would write the same files at once.
        """
        import fcntl

        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / ".lock", "a+")  # noqa: SIM115 - as long as this object
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go by the system when the process ends
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else a file system without locks
                self._lock.seek(0)
                raise UserError(f"{self.path} is being trained by another process ({self._lock.read()}); give this run "
                                "another name=") from None  # fmt: skip
        self._lock.truncate(0)
        print(f"{os.getpid()} on {platform.node()}", end="", file=self._lock, flush=True)
        write_text(self.path / "config.yaml", to_yaml(settings))
        write_json(self.path / "state.json", {**self.state(), "status": "running"})

    def drop_requeued(self) -> None:
        """Removes what Lightning's own handler writes when SLURM signals the end of a job, see `modules.stopping`.

        It is of the middle of a step, and a run would go on from it.
        """
        for path in self.path.glob("hpc_ckpt_*.ckpt"):
            path.unlink(missing_ok=True)

    def start_of(self, settings: dict[str, Any]) -> str:
        """What `fit` with this config does here: ``fresh``, ``resume`` or ``finished``.

        A run that ended before its first checkpoint left nothing to go on from, whatever its config was. `FREE` keys
        may change on the way, and ``max_steps`` may grow: bit for bit, the weights do not depend on the former.

        Raises:
            UserError: the folder belongs to another config, or `max_steps` would shrink.
        """
        if not (self.path / "config.yaml").is_file() or not self.last.is_file():
            return "fresh"
        steps = settings["trainer"]["max_steps"]
        free = (*FREE, "trainer.max_steps")
        differing = _differences(without(self.config(), free), without(settings, free), "asked")
        if differing:
            raise UserError(f"{self.path} holds a run of another config ({differing}); give this run another name=")
        state = self.state()
        if 0 <= steps < state["step"]:
            raise UserError(f"{self.path} already ran {state['step']} steps; trainer.max_steps={steps} is less")
        return "finished" if state["status"] == "finished" and steps == state["step"] else "resume"

    def check_known(self, trained: dict[str, Any], keys: Iterable[str]) -> None:
        """Raises UserError where the note of a checkpoint lacks one of ``keys``, as those of version 0.1.0 do."""
        if missing := [key for key in keys if key not in trained]:
            raise UserError(
                f"{self.path} was trained by an earlier version, whose checkpoints lack {', '.join(missing)}: it "
                "cannot be resumed, swept or tested, train it again; predict, export, table and compare take it"
            )

    def check_same(self, trained: dict[str, Any], now: dict[str, Any]) -> None:
        """Compares what the run was trained with, a checkpoint's note, with what its store and plan give now.

        Args:
            trained: the note.
            now: the parts of a note that are compared.

        Raises:
            UserError: they differ, or the note does not say.
        """
        self.check_known(trained, now)
        differing = _differences({key: trained[key] for key in now}, now, "now")
        if differing:
            raise UserError(
                f"the store of {self.path} is not what it was trained on ({differing}): bring back its cases, "
                "spacing and plan, or train under another name="
            )


def without(settings: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A config by dotted key, without some keys and what lies below them."""
    left_out = tuple(f"{key}." for key in keys)
    return {key: value for key, value in _flat(settings).items() if not f"{key}.".startswith(left_out)}


def _differences(old: dict[str, Any], new: dict[str, Any], word: str) -> str:
    """The first keys at which two nested dictionaries differ, with both values; empty when none does."""
    there, here = _flat(old), _flat(new)
    differing = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    shown = "; ".join(f"{key} {there.get(key)!r} there, {here.get(key)!r} {word}" for key in differing[:3])
    return shown + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
