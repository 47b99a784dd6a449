"""The grammar of the command line, exit statuses and the lines a user reads."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pretrain3d
from pretrain3d.__main__ import COMMANDS, entry, main, module_of
from pretrain3d.config import UserError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces the commands `prepare` and `fit` by ones that note their arguments."""
    noted: list[Any] = []

    def run(*arguments: Any) -> int:
        noted.append(arguments)
        return 1 if arguments[0] == ["partly"] else 0

    plain = SimpleNamespace(USAGE="pretrain3d prepare RAW out=STORE\n", run=run)
    configured = SimpleNamespace(USAGE="pretrain3d fit --config FILE", TAKES_CONFIG=True, run=run)
    monkeypatch.setitem(sys.modules, "pretrain3d.commands.prepare", plain)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pretrain3d.commands.fit", configured)  # type: ignore[arg-type]
    return noted


def test_paths_and_options_in_any_order(calls: list[Any]) -> None:
    assert main(["prepare", "out=a=b", "raw/one", "./x=y", "cases=3", "/abs/p=q", "+extra=1"]) == 0
    assert calls == [(["raw/one", "./x=y", "/abs/p=q"], {"out": "a=b", "cases": "3", "+extra": "1"})]


@pytest.mark.parametrize("flag", [["--config", "a.yaml"], ["--config=a.yaml"]])
def test_a_command_with_a_configuration(calls: list[Any], flag: list[str]) -> None:
    assert main(["fit", "seed=1", *flag, "+trainer.fast_dev_run=true", "seed=2"]) == 0
    assert calls == [("a.yaml", [], ["seed=1", "+trainer.fast_dev_run=true", "seed=2"])]
    assert main(["fit"]) == 0 and calls[1] == (None, [], [])


def test_a_warning_of_ours_is_one_line(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # to be put back
    assert main(["prepare"]) == 0
    ours = Path(pretrain3d.__file__).parent / "data" / "sets.py"
    assert warnings.formatwarning("two cases are left out", UserWarning, str(ours), 3) == (
        "pretrain3d: warning: two cases are left out\n"
    )
    assert warnings.formatwarning("other", UserWarning, "/lib/other.py", 3) == "/lib/other.py:3: UserWarning: other\n"


def test_the_status_is_the_commands(calls: list[Any]) -> None:
    assert main(["prepare", "partly"]) == 1


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["fti"], f"unknown command 'fti', did you mean 'fit'? Commands: {', '.join(COMMANDS)}"),
        (["zzz"], f"unknown command 'zzz'. Commands: {', '.join(COMMANDS)}"),
        (
            ["prepare", "--out=x"],
            "unknown flag '--out=x'; write out=x (the only flags are --config and --help)",
        ),
        (
            ["prepare", "--jobs", "3"],
            "unknown flag '--jobs'; write jobs=VALUE (the only flags are --config and --help)",
        ),
        (["prepare", "-"], "unknown flag '-'; options are key=value (the only flags are --config and --help)"),
        (["prepare", "--config", "x"], "prepare takes no --config; see pretrain3d prepare --help"),
        (["prepare", "a=1", "a=2"], "a is given twice: a=1 and a=2"),
        (["fit", "--config"], "--config takes one YAML file, once: --config FILE"),
        (["fit", "--config", "--help"], "--config takes one YAML file, once: --config FILE"),
        (["fit", "--config", "a", "--config", "b"], "--config takes one YAML file, once: --config FILE"),
    ],
)
def test_mistakes(calls: list[Any], capsys: pytest.CaptureFixture[str], argv: list[str], line: str) -> None:
    assert main(argv) == 2
    assert capsys.readouterr() == ("", f"pretrain3d: error: {line}\n")
    assert not calls


def raising(error: BaseException) -> SimpleNamespace:
    def run(paths: list[str], options: dict[str, object]) -> int:
        raise error

    return SimpleNamespace(USAGE="", run=run)


def test_a_users_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pretrain3d.commands.score", raising(UserError("case a:\n  no boxes")))  # type: ignore[arg-type]
    assert main(["score"]) == 2
    assert capsys.readouterr().err == "pretrain3d: error: case a: no boxes\n"


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pretrain3d.commands.score", raising(KeyboardInterrupt()))  # type: ignore[arg-type]
    assert main(["score"]) == 130


def test_a_reader_that_has_gone_is_141(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``pretrain3d show runs/x | head -1``: no traceback, and what is left of the output goes nowhere."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["--help"]) == 141
        print("more", file=closed)


def test_a_pipe_that_breaks_elsewhere_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pretrain3d.commands.score", raising(BrokenPipeError("a worker")))  # type: ignore[arg-type]
    with pytest.raises(BrokenPipeError, match="a worker"):
        main(["score"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EISDIR])
@pytest.mark.parametrize("path", [None, "runs/x"])
def test_a_file_that_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, path: str | None
) -> None:
    error = OSError(number, os.strerror(number), path)
    monkeypatch.setitem(sys.modules, "pretrain3d.commands.score", raising(error))  # type: ignore[arg-type]
    assert main(["score"]) == 2
    where = f"{path}: " if path else ""
    assert capsys.readouterr().err == f"pretrain3d: error: {where}{os.strerror(number)}\n"


def test_any_other_error_of_the_system_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pretrain3d.commands.score", raising(OSError("no reason")))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="no reason"):
        main(["score"])


def test_any_other_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pretrain3d.commands.score", raising(ValueError("a defect")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a defect"):
        main(["score"])


def test_entry_exits_with_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain3d", "fti"])
    with pytest.raises(SystemExit) as caught:
        entry()
    assert caught.value.code == 2


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name, text in COMMANDS.items():
        assert f"  {name:<7}  {text}\n" in overview
    assert main([]) == 2
    assert capsys.readouterr().err == overview


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{name}: {COMMANDS[name]}\n\npretrain3d {name}")
    command = importlib.import_module(module_of(name))
    assert callable(command.run)
    assert not hasattr(command, "HELP")  # the help line stands in one place, the table of commands
