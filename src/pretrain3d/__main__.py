"""The command line: ``pretrain3d COMMAND [PATH ...] [key=value ...] [--config FILE] [--help]``.

A user's mistake becomes one line and exit status 2. Nothing heavy is imported before the command runs, so help and
mistakes are answered at once.
"""

from __future__ import annotations

import errno
import importlib
import keyword
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain3d.config import UserError, suggestion

COMMANDS = {
    "phantom": "write the embedded data set of synthetic CT volumes",
    "prepare": "turn a folder of raw cases into a training store",
    "plan": "choose patch, batch, levels and anchors of a store for a backbone and a memory",
    "fit": "train what a configuration names, pretraining or detection; resumes an unfinished run",
    "sweep": "choose how a detector's boxes are merged, and its operating point, on validation cases",
    "test": "evaluate a trained detector on the held-out cases of its store",
    "predict": "find objects in image files with one checkpoint",
    "import": "turn a checkpoint of another framework into a file that a detector starts from",
    "export": "write the pretrained backbone of a run to one file",
    "score": "compare predicted boxes with true ones, from any detector",
    "table": "tabulate the results of runs",
    "compare": "say how sure the differences between tested runs are",
    "show": "say what a file or folder is: raw data, store, configuration, run, checkpoint, result, boxes",
}

_OPTION = re.compile(r"\+?[A-Za-z_][\w.]*=")  # a path with '=' in it is written ./a=b

_FILES = {  # what a user can mend: a full disk, rights, a path
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EISDIR,
    errno.ENOTDIR,
}  # fmt: skip


_python_format = warnings.formatwarning


@dataclass
class _Arguments:
    paths: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)  # key=value, as written
    config: str | None = None
    help: bool = False


def main(argv: Sequence[str]) -> int:
    """Runs one command.

    A command is a module (`module_of`) with the text ``USAGE`` and ``run(paths: list[str], options:
    dict[str, object]) -> int``, whose options are text for `options.read_options`. One that sets
    ``TAKES_CONFIG = True`` has ``run(config_path: str | None, paths: list[str], overrides: list[str]) -> int``.

    Returns:
        The exit status: the command's own (0 done, 1 done in part), 2 for a user's mistake or a file that the system
        refuses, 130 when interrupted, 141 when the reader of the output has gone (``pretrain3d ... | head``).
    """
    warnings.formatwarning = _format_warning
    try:
        status = _run(list(argv))
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"pretrain3d: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pretrain3d: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        return 141
    except OSError as error:
        if error.errno not in _FILES:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"pretrain3d: error: {where}{error.strerror}", file=sys.stderr)
        return 2


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One of ours is one line, without the place in the code that it comes from; others are as Python prints them."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        return f"pretrain3d: warning: {message}\n"
    return _python_format(message, category, filename, lineno, line)


def _output_is_closed() -> bool:
    """Whether nobody reads standard output; if so, what is left of it goes nowhere, the interpreter's own flush too.

    A pipe may also break between processes of a run: so one more line is tried.
    """
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def module_of(name: str) -> str:
    """The module of a command: its name, with ``_`` where Python keeps the word for itself."""
    return f"pretrain3d.commands.{name}{'_' if keyword.iskeyword(name) else ''}"


def entry() -> None:
    """The installed command ``pretrain3d``."""
    sys.exit(main(sys.argv[1:]))


def _run(argv: list[str]) -> int:
    if not argv:
        print(_overview(), file=sys.stderr)
        return 2
    if argv[0] in ("--help", "-h"):
        print(_overview())
        return 0
    name = argv[0]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{suggestion(name, COMMANDS) or '.'} Commands: {', '.join(COMMANDS)}")
    arguments = _parse(argv[1:])
    command = importlib.import_module(module_of(name))
    if arguments.help:
        print(f"{name}: {COMMANDS[name]}\n\n{command.USAGE.strip()}")
        return 0
    if getattr(command, "TAKES_CONFIG", False):
        return command.run(arguments.config, arguments.paths, arguments.options)
    if arguments.config is not None:
        raise UserError(f"{name} takes no --config; see pretrain3d {name} --help")
    return command.run(arguments.paths, _as_dict(arguments.options))


def _parse(argv: list[str]) -> _Arguments:
    arguments, words = _Arguments(), iter(argv)
    for word in words:
        if word in ("--help", "-h"):
            arguments.help = True
        elif word == "--config" or word.startswith("--config="):
            file = word.partition("=")[2] or next(words, "")
            if not file or file.startswith("--") or arguments.config is not None:
                raise UserError("--config takes one YAML file, once: --config FILE")
            arguments.config = file
        elif word.startswith("-"):
            key = word.lstrip("-")
            hint = f"write {key if '=' in key else key + '=VALUE'}" if key else "options are key=value"
            raise UserError(f"unknown flag {word!r}; {hint} (the only flags are --config and --help)")
        elif _OPTION.match(word):
            arguments.options.append(word)
        else:
            arguments.paths.append(word)
    return arguments


def _as_dict(options: list[str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key in values:
            raise UserError(f"{key} is given twice: {key}={values[key]} and {option}")
        values[key] = value
    return values


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pretrain3d COMMAND [PATH ...] [key=value ...] [--config FILE] [--help]",
            "",
            *lines,
            "",
            "pretrain3d COMMAND --help says what a command takes.",
        ]
    )


if __name__ == "__main__":
    entry()
